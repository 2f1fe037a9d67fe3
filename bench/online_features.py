"""Online features: one customer, and 100 items, each 21 features over two views, decoded, read in the process that wants them.

    python bench/online_features.py

In turn, in one run: ours (`server.online.features.FeatureReader`, as the server's `GetOnlineFeatures` uses it), Feast's SDK
(`get_online_features(...).to_dict()`), and the limit: redis-py with one pipelined HMGET an entity over the same keys and fields,
replies left as bytes. Beside them, over the network: our gRPC method and Feast's HTTP feature server, one call at a time. Each way
is asked ten times in a row at its turn, as a process that serves would be, and every answer is timed alone. Ours is awaited on a
running event loop, which is where it stands in a server; the others block, and do so in a thread of their own. Bars: one customer 3
times as fast as the SDK, 100 items 8 times, both within 1.5 times of raw Redis.
"""

import argparse
import asyncio
import contextlib
import http.client
import io
import json
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import median
from time import perf_counter
from typing import Any

import grpc
import numpy as np
import pandas as pd
import psycopg
import redis
import uvloop
from feast import FeatureStore, FeatureView, Field
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.types import Array, Float64, Int64, String
from rich.table import Table

from cli.stack import running_server
from concord.v1 import features_pb2, features_pb2_grpc
from feast_http import FEATURES, body, feature_server
from features.layout import entity_key
from features.registry import load_registry
from features.settings import Settings
from features.store import feature_store
from harness import WORK, Verdict, console, percentile, prepared_shop
from server.app import open_rooms
from server.domain import EntityKey, FeatureTable
from server.metrics import Metrics
from server.settings import ServerSettings

_VIEWS = {
    "bench_item_a": {**{f"count_{k}": Int64 for k in range(7)}, "name": String, "kind": String, "shares": Array(Float64)},
    "bench_item_b": {**{f"mean_{k}": Float64 for k in range(6)}, **{f"days_{k}": Int64 for k in range(4)}, "label": String},
}
ITEM_FEATURES = [f"{view}:{name}" for view, fields in _VIEWS.items() for name in fields]
# A customer who has both views.
_CUSTOMER = """
SELECT user_id FROM users u JOIN user_profile p USING (user_id) WHERE u.version > 20 AND u.merged_into IS NULL
ORDER BY p.event_timestamp DESC, user_id LIMIT 1
"""
_IN_A_ROW = 10

Way = Callable[[], Awaitable[list[float]]]
"""Asks ``_IN_A_ROW`` times; returns the seconds each answer took."""
Figures = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Question:
    """What is read: features of entities by one join key."""

    name: str
    join_key: str
    ids: list[str]
    refs: list[str]


def add_item_views(store: FeatureStore, items: Sequence[str]) -> None:
    """Registers two views of 21 features on items and writes values; the shop's own item views hold ten."""
    rng, now = np.random.default_rng(0), datetime.now(UTC)
    item = store.get_entity("item")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, fields in _VIEWS.items():
            source = PostgreSQLSource(name=f"{name}_source", table="item_popularity", timestamp_field="event_timestamp")
            schema = [Field(name=field, dtype=dtype) for field, dtype in fields.items()]
            store.apply(FeatureView(name=name, entities=[item], ttl=timedelta(days=365), schema=schema, source=source))
            columns = {field: [_value(dtype, rng) for _ in items] for field, dtype in fields.items()}
            store.write_to_online_store(name, pd.DataFrame({"item_id": items, "event_timestamp": now, "created": now, **columns}))


def _value(dtype: Any, rng: np.random.Generator) -> object:
    if dtype == Int64:
        return int(rng.integers(0, 1000))
    if dtype == Float64:
        return float(rng.random())
    return rng.random(3).tolist() if dtype == Array(Float64) else f"text {rng.integers(0, 10**9)}"


@asynccontextmanager
async def reader(settings: Settings) -> AsyncIterator[Any]:
    """Yields the FeatureReader of a replica that has joined the fleet: one that has not calls all it reads of customers stale."""
    from prometheus_client import CollectorRegistry

    async with open_rooms(ServerSettings(**settings.model_dump()), Metrics(CollectorRegistry())) as rooms:
        await rooms.fleet.join("127.0.0.1:1")
        yield rooms.services.features


async def ours(features: Any, question: Question) -> Way:
    """Returns what reads the question by the server's own reader, once it was seen to find every value."""
    keys = [EntityKey(**{question.join_key: one}) for one in question.ids]

    async def ask() -> FeatureTable:
        table: FeatureTable = await features.read(service="", refs=question.refs, entities=keys)
        return table

    async def asked() -> list[float]:
        seconds = []
        for _ in range(_IN_A_ROW):
            started = perf_counter()
            await ask()
            seconds.append(perf_counter() - started)
        return seconds

    if any(None in values for values in (await ask()).values.values()):
        raise RuntimeError("some of the values asked for are missing")
    return asked


def blocking(ask: Callable[[], object]) -> Way:
    """Returns a way that waits for its answers in a thread, so that the replica beside it lives on."""

    def asked() -> list[float]:
        seconds = []
        for _ in range(_IN_A_ROW):
            started = perf_counter()
            ask()
            seconds.append(perf_counter() - started)
        return seconds

    return lambda: asyncio.to_thread(asked)


async def in_turn(ways: Mapping[str, Way], *, rounds: int) -> dict[str, list[float]]:
    """Gives every way its turn each round; returns the seconds each answer took, but for those of the first round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + rounds):
        for name, ask in ways.items():
            taken = await ask()
            if number:
                seconds[name] += taken
    return seconds


def raw(settings: Settings, question: Question) -> Way:
    """Returns what reads the same keys and fields by redis-py, and decodes nothing."""
    layouts, client = load_registry(settings).layouts, redis.Redis.from_url(settings.redis_url)
    views = dict.fromkeys(ref.partition(":")[0] for ref in question.refs)
    fields = [layouts[view].fields[layouts[view].features.index(name)] for view, _, name in (ref.partition(":") for ref in question.refs)]
    fields += [layouts[view].timestamp_field for view in views]
    keys = [entity_key(question.join_key, one, settings.project) for one in question.ids]

    def ask() -> object:
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.hmget(key, fields)  # type: ignore[arg-type]
        return pipeline.execute()

    return blocking(ask)


def sdk(store: FeatureStore, question: Question) -> Way:
    """Returns what reads the question by Feast's SDK."""
    rows = [{question.join_key: one} for one in question.ids]
    return blocking(lambda: store.get_online_features(features=question.refs, entity_rows=rows).to_dict())


def over_http(port: int, question: Question) -> Way:
    """Returns what asks Feast's feature server."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    asked = body(question.ids, join_key=question.join_key, refs=question.refs)

    def ask() -> object:
        connection.request("POST", "/get-online-features", asked, {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(answer.read()[:500].decode())
        return json.loads(answer.read())

    return blocking(ask)


def over_grpc(channel: grpc.Channel, question: Question) -> Way:
    """Returns what asks our server."""
    entities = [features_pb2.EntityRow(**{question.join_key: one}) for one in question.ids]
    request = features_pb2.GetOnlineFeaturesRequest(features=features_pb2.FeatureList(feature_refs=question.refs), entities=entities)
    stub = features_pb2_grpc.FeatureServiceStub(channel)
    return blocking(lambda: stub.GetOnlineFeatures(request, timeout=10))


async def measured(settings: Settings, questions: Sequence[Question], *, ports: tuple[int, int], rounds: int) -> Figures:
    """Asks the questions in all ways: in this process, of our server and of Feast's on the two ports."""
    store = feature_store(settings)
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        async with reader(settings) as features:
            return {
                question.name: await in_turn(
                    {
                        "ours": await ours(features, question),
                        "raw Redis": raw(settings, question),
                        "Feast's SDK": sdk(store, question),
                        "ours over gRPC": over_grpc(channel, question),
                        "Feast's server over HTTP": over_http(ports[1], question),
                    },
                    rounds=rounds,
                )
                for question in questions
            }


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with prepared_shop() as settings, contextlib.ExitStack() as stack:
        with psycopg.connect(settings.postgres_dsn) as connection:
            customer = connection.execute(_CUSTOMER).fetchone()
            items = [row[0] for row in connection.execute("SELECT item_id FROM items ORDER BY item_id LIMIT 100")]
        assert customer is not None
        # The server first: at its start it applies the repository, which takes away what is not in it, such as these views.
        server_ports = stack.enter_context(running_server(WORK, CONCORD_REGISTRY_SECONDS="1"))
        add_item_views(feature_store(settings), items)
        time.sleep(3)  # until it has looked at the registry again
        ports = server_ports["port"], stack.enter_context(feature_server(settings))
        questions = [Question("1 customer", "user_id", [customer[0]], FEATURES), Question("100 items", "item_id", items, ITEM_FEATURES)]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            seconds = runner.run(measured(settings, questions, ports=ports, rounds=options.rounds))
    table = Table("milliseconds", *(f"{name}, {what}" for name in seconds for what in ("p50", "p99")), title="21 features over 2 views")
    for way in seconds["1 customer"]:
        cells = [f"{1e3 * percentile(found[way], share):.3f}" for found in seconds.values() for share in (0.5, 0.99)]
        table.add_row(way, *cells)
    console.print(table)
    middle = {name: {way: 1e3 * median(found) for way, found in ways.items()} for name, ways in seconds.items()}
    one, many = middle["1 customer"], middle["100 items"]
    bars = {
        "one_over_sdk": one["Feast's SDK"] / one["ours"],
        "many_over_sdk": many["Feast's SDK"] / many["ours"],
        "one_over_raw": one["ours"] / one["raw Redis"],
        "many_over_raw": many["ours"] / many["raw Redis"],
        "one_grpc_over_http": one["Feast's server over HTTP"] / one["ours over gRPC"],
        "many_grpc_over_http": many["Feast's server over HTTP"] / many["ours over gRPC"],
    }
    met = bars["one_over_sdk"] >= 3 and bars["many_over_sdk"] >= 8 and bars["one_over_raw"] <= 1.5 and bars["many_over_raw"] <= 1.5
    print(Verdict("online_features", many["ours"], many["Feast's SDK"], many["raw Redis"], "ms", met).line(**bars))


if __name__ == "__main__":
    main()
