"""Recording events: acknowledged and durable events a second, by single calls of 50 and by a stream; and how soon they are online.

    python bench/ingest.py

In turn, round by round, on the same PostgreSQL and Redis: ours over gRPC (eight callers with one call of 50 events each in flight, or
one stream), the limit (psycopg's ``executemany`` of as many rows into the same table, split over as many commits as the stream
made), and Feast's ``push`` to the online store, which makes nothing durable and is given the states ready-made. The peer is a push of
one row: a channel's backend pushes an event when it happens. What 50 rows a call give, which a backend that holds events back could
push, stands beside it. Every event is a new one, of one of 1,000 customers, who begin with 46 events each as the sample shop's have.
Before the rounds, 1,000 events a second, 50 a call: the time until the call is acknowledged, at which Redis is asked for every
customer's version and must hold it. Bars: 0.3 of the limit and 20 times the
peer (the better of calls and stream), 25 ms at the 99th percentile.
"""

import argparse
import asyncio
import contextlib
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median

import grpc
import numpy as np
import pandas as pd
import psycopg
import redis
from feast import FeatureStore
from feast.data_source import PushMode
from rich.table import Table

from cli.stack import running_server
from concord.v1 import common_pb2, events_pb2
from features.activity import UserStateCodec
from features.layout import decode_value
from features.registry import load_registry
from features.settings import Settings
from features.store import feature_store
from harness import WORK, Verdict, console, percentile, prepared_shop

_RECORD, _STREAM = "/concord.v1.EventService/RecordEvents", "/concord.v1.EventService/StreamEvents"
_BATCH, _CALLERS, _CUSTOMERS, _HISTORY = 50, 8, 1_000, 46
_SETTLE_SECONDS = 5.0  # until PostgreSQL has looked through what was written at once
_PUSH, _PUSH_MANY = "Feast's push, 1 row a call", "Feast's push, 50 rows a call"
_INSERT = """
INSERT INTO events (user_id, version, event_id, channel, action, item_id, occurred_at) VALUES (%s, %s, %s, %s, %s, %s, %s)
"""


def batches(customers: Sequence[str], items: Sequence[str], count: int, rng: np.random.Generator) -> list[list[events_pb2.Event]]:
    """Returns ``count`` batches of 50 new views, of random customers and items, in the last hour."""
    now = datetime.now(UTC)
    made = []
    for _ in range(count):
        whose, what = rng.choice(customers, _BATCH), rng.choice(items, _BATCH)
        events = [
            events_pb2.Event(
                event_id=str(uuid.uuid4()),
                subject=common_pb2.Subject(user_id=str(who)),
                channel="web",
                action=common_pb2.ACTION_VIEW,
                item_id=str(item),
            )
            for who, item in zip(whose, what, strict=True)
        ]
        for event in events:
            event.occurred_at.FromDatetime(now - timedelta(seconds=float(rng.uniform(0, 3600))))
        made.append(events)
    return made


async def by_calls(channel: grpc.aio.Channel, made: Sequence[Sequence[events_pb2.Event]]) -> float:
    """Records batches by single calls, eight at a time; returns the seconds."""
    messages = iter([events_pb2.RecordEventsRequest(events=events).SerializeToString() for events in made])
    call = channel.unary_unary(_RECORD)

    async def caller() -> None:
        for message in messages:
            stored(events_pb2.RecordEventsResponse.FromString(await call(message, timeout=30)).results)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(_CALLERS)))
    return time.perf_counter() - started


async def by_stream(channel: grpc.aio.Channel, made: Sequence[Sequence[events_pb2.Event]]) -> float:
    """Records batches over one stream; returns the seconds until the last is acknowledged."""
    messages = [events_pb2.StreamEventsRequest(sequence=k, events=events).SerializeToString() for k, events in enumerate(made, 1)]

    async def sent() -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    started, acknowledged = time.perf_counter(), 0
    async for answer in channel.stream_stream(_STREAM)(sent()):
        stored(events_pb2.StreamEventsResponse.FromString(answer).results)
        acknowledged += 1
    if acknowledged != len(made):
        raise RuntimeError(f"{acknowledged} of {len(made)} batches were acknowledged")
    return time.perf_counter() - started


def stored(results: Sequence[events_pb2.EventResult]) -> None:
    """Every event must have been stored: what is refused quickly is no throughput."""
    if any(result.status != events_pb2.EVENT_STATUS_STORED for result in results):
        raise RuntimeError(f"not stored: {results[0]}")


def inserted(connection: psycopg.Connection, made: Sequence[Sequence[events_pb2.Event]], commits: int) -> float:
    """Inserts the batches as rows, over so many commits; returns the seconds."""
    rows = [
        (e.subject.user_id, 1, e.event_id, e.channel, "view", e.item_id, e.occurred_at.ToDatetime(UTC)) for events in made for e in events
    ]
    parts = [rows[k * len(rows) // commits : (k + 1) * len(rows) // commits] for k in range(commits)]
    started = time.perf_counter()
    for part in parts:
        with connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(_INSERT, part)
    return time.perf_counter() - started


def pushed(store: FeatureStore, frame: pd.DataFrame, made: Sequence[Sequence[events_pb2.Event]]) -> float:
    """Pushes a state for every event to Feast's online store, a batch a call; returns the seconds."""
    frames = [frame.sample(len(events), replace=True).assign(user_id=[e.subject.user_id for e in events]) for events in made]
    started = time.perf_counter()
    for one in frames:
        store.push("user_activity_push", one, to=PushMode.ONLINE)
    return time.perf_counter() - started


def commits_of(port: int) -> float:
    """Returns how many groups the server has committed."""
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith('concord_ingest_stage_seconds_count{stage="commit"}')).split()[-1])


async def visible(channel: grpc.aio.Channel, made: Sequence[Sequence[events_pb2.Event]], online: "Online", rate: float) -> list[float]:
    """Records batches at ``rate`` events a second; returns the milliseconds until each was acknowledged and in Redis."""
    call, taken = channel.unary_unary(_RECORD), []
    messages = [events_pb2.RecordEventsRequest(events=events).SerializeToString() for events in made]

    async def one(message: bytes, at: float) -> None:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        answer = events_pb2.RecordEventsResponse.FromString(await call(message, timeout=30))
        taken.append((time.perf_counter() - at) * 1e3)
        online.check(answer.tokens)

    begin = time.perf_counter() + 0.5
    await asyncio.gather(*(one(message, begin + k * _BATCH / rate) for k, message in enumerate(messages)))
    return taken


class Online:
    """Redis, asked whether it holds the versions that were acknowledged."""

    def __init__(self, settings: Settings) -> None:
        self._codec = UserStateCodec(load_registry(settings).layouts, settings.project)
        self._client = redis.Redis.from_url(settings.redis_url)

    def check(self, tokens: Sequence[events_pb2.UserToken]) -> None:
        """Raises RuntimeError when Redis holds less than what was acknowledged."""
        pipeline = self._client.pipeline(transaction=False)
        for token in tokens:
            pipeline.hget(self._codec.key(token.user_id), self._codec.version_field)  # type: ignore[arg-type]
        for token, found in zip(tokens, pipeline.execute(), strict=True):
            if found is None or decode_value(found) < token.user_version:
                raise RuntimeError(f"{token.user_id} is acknowledged at {token.user_version} and not online")


def customers_of(settings: Settings) -> tuple[list[str], list[str]]:
    """Returns 1,000 customers made for this benchmark, and the shop's items."""
    customers = [f"ingest-{uuid.uuid4().hex[:8]}-{k}" for k in range(_CUSTOMERS)]
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute("INSERT INTO users (user_id) SELECT unnest(%s::text[])", [customers])
        items = [row[0] for row in connection.execute("SELECT item_id FROM items WHERE NOT removed")]
    return customers, items


async def run(settings: Settings, ports: dict[str, int], store: FeatureStore, options: argparse.Namespace) -> dict[str, list[float]]:
    """Plays the rounds; returns events a second by way, and the milliseconds until events are online."""
    rng, count = np.random.default_rng(0), options.events // _BATCH
    customers, items = customers_of(settings)
    frame = store.get_online_features(
        features=[f"user_activity:{f.name}" for f in store.get_feature_view("user_activity").features],
        entity_rows=[{"user_id": customer} for customer in known(settings)],
    ).to_df()
    frame = frame.assign(event_timestamp=datetime.now(UTC), created=datetime.now(UTC))
    rates: dict[str, list[float]] = {name: [] for name in ("calls of 50", "one stream", "rows inserted", _PUSH, _PUSH_MANY)}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['port']}") as channel:
        with psycopg.connect(settings.postgres_dsn, autocommit=True) as connection:
            await by_calls(channel, batches(customers, items, 20, rng))  # every path was taken once
            await by_stream(channel, batches(customers, items, _HISTORY * _CUSTOMERS // _BATCH, rng))
            await asyncio.sleep(_SETTLE_SECONDS)
            made = batches(customers, items, int(options.seconds * 1_000 / _BATCH), rng)
            milliseconds = await visible(channel, made, Online(settings), 1_000)
            for _ in range(options.rounds):
                for name, way in (("calls of 50", by_calls), ("one stream", by_stream)):
                    before = commits_of(ports["metrics_port"])
                    rates[name].append(count * _BATCH / await way(channel, batches(customers, items, count, rng)))
                    commits = int(commits_of(ports["metrics_port"]) - before)
                rates["rows inserted"].append(count * _BATCH / inserted(connection, batches(customers, items, count, rng), commits))
                few = batches(customers, items, 4, rng)
                rates[_PUSH].append(_BATCH / pushed(store, frame, [[event] for event in few[0]]))
                rates[_PUSH_MANY].append(4 * _BATCH / pushed(store, frame, few))
    return {**rates, "milliseconds": milliseconds}


def known(settings: Settings) -> list[str]:
    """Returns customers with a state."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        return [row[0] for row in connection.execute("SELECT user_id FROM users WHERE version > 5 AND merged_into IS NULL LIMIT 20")]


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=20_000, help="in each measurement")
    parser.add_argument("--seconds", type=float, default=20.0, help="at 1,000 events a second")
    options = parser.parse_args()
    with prepared_shop() as settings, contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Feast's own
        ports = stack.enter_context(running_server(WORK))
        rates = asyncio.run(run(settings, ports, feature_store(settings), options))
    taken = rates.pop("milliseconds")
    table = Table("", "events/s, median", "lowest", "highest", title="events recorded, acknowledged and durable")
    for name, found in rates.items():
        table.add_row(name, f"{median(found):,.0f}", f"{min(found):,.0f}", f"{max(found):,.0f}")
    console.print(table)
    p50, p99 = percentile(taken, 0.5), percentile(taken, 0.99)
    console.print(f"at 1,000 events a second: acknowledged and online after {p50:.1f} ms (p50), {p99:.1f} ms (p99)")
    ours = max(median(rates["calls of 50"]), median(rates["one stream"]))
    peer, limit, many = median(rates[_PUSH]), median(rates["rows inserted"]), median(rates[_PUSH_MANY])
    met = ours >= 0.3 * limit and ours >= 20 * peer and p99 <= 25
    figures = {"calls": median(rates["calls of 50"]), "stream": median(rates["one stream"]), "push_50": many, "over_push_50": ours / many}
    figures |= {"visible_ms_p50": p50, "visible_ms_p99": p99}
    print(Verdict("ingest", ours, peer, limit, "events/s", met, lower_is_better=False).line(**figures))


if __name__ == "__main__":
    main()
