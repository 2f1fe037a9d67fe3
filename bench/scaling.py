"""What an answer costs as the shop grows: more customers, more items, longer histories, and two workers instead of one.

All cases are up at once and take turns, call by call, so that whatever else the machine does falls on all of them alike:

    python bench/scaling.py --rounds 150

Timed are Recommend of a committed slate (hit) and Recommend just after the customer did something (miss), one call at a time, from
a client that only sends bytes. Bars: two workers within 20 % of one, and 2 KB of Redis for a customer. Prints tables and a last
line of JSON; the plot goes to build/bench/scaling.svg.
"""

import argparse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from statistics import mean

import grpc
import matplotlib as mpl
import psycopg
import redis
from matplotlib.figure import Figure
from rich.table import Table

from concord.v1 import common_pb2, events_pb2, recommendation_pb2
from features.activity import UserStateCodec
from features.registry import load_registry
from features.settings import Settings
from harness import WORK, Verdict, console, in_turn, percentile, prepared_shop
from large_shop import large_shop
from startup import Server

RATIO, BYTES = 1.2, 2048.0
_RECOMMEND, _RECORD = "/concord.v1.RecommendationService/Recommend", "/concord.v1.EventService/RecordEvents"
_MEASURED = 40
"""Customers asked for in turn in each case."""
_HISTORY = 50
"""Events of a customer, where that is not what is varied: as many as an online state holds."""

_HISTORIES = (10, _HISTORY, 1_000)

_CROWD = (
    "INSERT INTO users (user_id, version) SELECT 'crowd-' || n, 1 FROM generate_series(1, %(count)s::int) n ON CONFLICT DO NOTHING",
    "INSERT INTO identities (channel, channel_user_id, user_id) "
    "SELECT 'web', 'w-' || n, 'crowd-' || n FROM generate_series(1, %(count)s::int) n ON CONFLICT DO NOTHING",
)
_CUSTOMERS = "INSERT INTO users (user_id, version) SELECT unnest(%(names)s::text[]), %(events)s ON CONFLICT DO NOTHING"
_EVENTS = """
INSERT INTO events (user_id, event_id, channel, action, item_id, value, quantity, occurred_at)
SELECT u, md5(u || n)::uuid, 'web', CASE WHEN n %% 5 = 0 THEN 'purchase' ELSE 'view' END,
       'sku-' || lpad(((n * 7919 + length(u)) %% %(items)s)::text, 7, '0'), 10, 1, now() - make_interval(mins => n)
FROM unnest(%(names)s::text[]) u, generate_series(1, %(events)s::int) n ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True)
class Case:
    """One point of a curve: a size, and the server and customers that have it."""

    curve: str
    size: int
    address: str
    customers: Sequence[str]

    @property
    def name(self) -> str:
        """For the tables: curve and size."""
        return f"{self.curve} {self.size:,}"


class Caller:
    """Asks one case's customers in turn over a few connections, which the kernel spreads over the workers."""

    def __init__(self, case: Case, connections: int = 4) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        self._channels = [grpc.insecure_channel(case.address, options) for _ in range(connections)]
        recommend = [channel.unary_unary(_RECOMMEND) for channel in self._channels]
        self._record = self._channels[0].unary_unary(_RECORD)
        # As many customers as are coprime to the connections: each is asked for over all of them.
        self._standing = zip(cycle(case.customers[: _MEASURED // 2 + 1]), cycle(recommend))
        self._moving = zip(cycle(case.customers[_MEASURED // 2 + 1 :]), cycle(recommend))
        self._due: Callable[[], object] | None = None
        for customer, ask in islice(self._standing, 4 * len(case.customers)):
            ask(_request(customer), timeout=20)

    def hit(self) -> None:
        """Asks for a slate that stands committed."""
        customer, ask = next(self._standing)
        ask(_request(customer), timeout=20)

    def miss(self) -> None:
        """Asks for a customer who did something since the last slate, with the token of that."""
        assert self._due is not None
        due, self._due = self._due, None
        due()

    def prepare(self) -> None:
        """Records an event of the next customer unless the last one has not been asked for yet."""
        if self._due is None:
            customer, ask = next(self._moving)
            event = events_pb2.Event(
                event_id=str(uuid.uuid4()), channel="web", action="ACTION_VIEW", subject=_subject(customer), item_id="sku-0000001"
            )
            reply = self._record(events_pb2.RecordEventsRequest(events=[event]).SerializeToString(), timeout=20)
            token = events_pb2.RecordEventsResponse.FromString(reply).tokens[0].consistency_token
            self._due = partial(ask, _request(customer, token), timeout=20)

    def close(self) -> None:
        """Closes the connections."""
        for channel in self._channels:
            channel.close()


def _subject(customer: str) -> common_pb2.Subject:
    return common_pb2.Subject(user_id=customer)


def _request(customer: str, token: str = "") -> bytes:
    request = recommendation_pb2.RecommendRequest(
        subject=_subject(customer), channel="web", surface="home", limit=20, consistency_token=token
    )
    message: bytes = request.SerializeToString()
    return message


def add_customers(settings: Settings, prefix: str, *, items: int, events: int = _HISTORY) -> list[str]:
    """Stores customers with a history, as an import would; returns their ids. The server finds them in PostgreSQL."""
    names = [f"{prefix}-{events}-{number}" for number in range(_MEASURED)]
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute(_CUSTOMERS, {"names": names, "events": events})
        connection.execute(_EVENTS, {"names": names, "events": events, "items": items})
    return names


def add_crowd(settings: Settings, size: int) -> None:
    """Stores ``size`` customers nobody asks for: rows in PostgreSQL, and in Redis keys of an online state's size."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        for statement in _CROWD:
            connection.execute(statement.encode(), {"count": size})
    redis.Redis.from_url(settings.redis_url, socket_timeout=120).execute_command("DEBUG", "POPULATE", size, "crowd", 1_000)


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[tuple[list[Case], Settings]]:
    """Yields all cases with their servers up, and the shop of the middle size.

    Cases of one curve are alike but for what is varied: each has a server of its own, or all share one.
    """
    with ExitStack() as stack:
        sample = stack.enter_context(prepared_shop())
        databases = count(1)

        def shop(items: int, name: str = "") -> Settings:
            return stack.enter_context(large_shop(sample, items, redis_database=next(databases), name=name))

        def serve(settings: Settings, **more: str) -> str:
            server = Server(settings, **more)
            stack.callback(server.close)
            return f"127.0.0.1:{server.port}"

        shops = {items: shop(items) for items in arguments.items}
        cases = [Case("items", items, serve(one), add_customers(one, "i", items=items)) for items, one in shops.items()]
        items = arguments.items[len(arguments.items) // 2]
        middle, address = shops[items], next(case.address for case in cases if case.size == items)
        for events in _HISTORIES:
            cases += [Case("events", events, address, add_customers(middle, "h", items=items, events=events))]
        for customers in (1_000, arguments.customers):
            crowded = shop(items, f"customers_{customers}")
            add_crowd(crowded, customers)
            cases += [Case("customers", customers, serve(crowded), add_customers(crowded, "u", items=items))]
        for workers in (1, 2):
            names = add_customers(middle, f"w{workers}", items=items)
            cases += [Case("workers", workers, serve(middle, CONCORD_WORKERS=str(workers)), names)]
        yield cases, middle


def redis_bytes(settings: Settings, customers: Sequence[str]) -> tuple[float, float]:
    """Returns what Redis keeps of a customer on average: the online state, and the slates, which expire."""
    client, codec = redis.Redis.from_url(settings.redis_url), UserStateCodec(load_registry(settings).layouts, settings.project)
    states = [client.memory_usage(codec.key(customer)) for customer in customers]
    slates = [client.memory_usage(f"concord:{settings.project}:slates:{customer}") for customer in customers]
    return mean(size for size in states if size), mean(size for size in slates if size)


def measure(cases: Sequence[Case], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of each kind of question by the case's name."""
    callers = {case.name: Caller(case) for case in cases}

    def prepare() -> None:
        for caller in callers.values():
            caller.prepare()

    prepare()
    try:
        return {
            "hit": in_turn({name: caller.hit for name, caller in callers.items()}, rounds=rounds, warm_up=10),
            "miss": in_turn({name: caller.miss for name, caller in callers.items()}, rounds=rounds // 3, warm_up=5, after=prepare),
        }
    finally:
        for caller in callers.values():
            caller.close()


def plot(cases: Sequence[Case], seconds: Mapping[str, Mapping[str, list[float]]]) -> Path:
    """Draws a panel for every curve, milliseconds against size; returns the file."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.family": "sans-serif"})
    curves = list(dict.fromkeys(case.curve for case in cases))
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    for axes, curve in zip(panels.flat, curves, strict=True):
        points = [case for case in cases if case.curve == curve]
        for kind, found in seconds.items():
            for share, style in ((0.5, "o-"), (0.99, "o:")):
                heights = [1e3 * percentile(found[case.name], share) for case in points]
                axes.plot([case.size for case in points], heights, style, label=f"{kind}, p{share * 100:.0f}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(curve)
        axes.set_ylabel("ms")
    panels[0, 0].legend(fontsize="small")
    file = WORK / "scaling.svg"
    figure.savefig(file, metadata={"Date": None})
    return file


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--customers", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=150)
    arguments = parser.parse_args()
    with opened(arguments) as (cases, middle):
        seconds = measure(cases, arguments.rounds)
        state, slates = redis_bytes(middle, next(case.customers for case in cases if case.name == f"events {_HISTORY}"))
    table = Table("case", "hit p50 ms", "hit p99 ms", "miss p50 ms", "miss p99 ms")
    for case in cases:
        figures = [1e3 * percentile(seconds[kind][case.name], share) for kind in ("hit", "miss") for share in (0.5, 0.99)]
        table.add_row(case.name, *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    console.print(f"Redis keeps {state:.0f} bytes of a customer's state, and {slates:.0f} of slates until they expire")
    console.print(f"plotted in {plot(cases, seconds)}")
    medians = {kind: {name: percentile(values, 0.5) for name, values in found.items()} for kind, found in seconds.items()}
    ratios = {kind: found["workers 2"] / found["workers 1"] for kind, found in medians.items()}
    growth = {
        f"{kind}_{curve}": found[names[-1]] / found[names[0]]
        for kind, found in medians.items()
        for curve in ("items", "events", "customers")
        for names in [[case.name for case in cases if case.curve == curve]]
    }
    worst = max(ratios.values())
    verdict = Verdict("scaling", worst, None, 1.0, "times", worst <= RATIO and state <= BYTES)
    print(verdict.line(workers_hit=ratios["hit"], workers_miss=ratios["miss"], redis_bytes=state, redis_slate_bytes=slates, **growth))


if __name__ == "__main__":
    main()
