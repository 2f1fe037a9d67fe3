"""`RankItems`: 100 items for a customer, 100 requests a second.

    python bench/rank_items.py

Every call names 100 random items and one of 200 customers whose user vector is known to the server, as it is once any surface has
been asked for since their last event. Calls come at a fixed rate from ``http2_load.py``, a process of its own, whether or not the
answers keep up. The peer is a published figure, not measured here: Metarank says 10 ms at the 99th percentile for 100 items. Beside it
stand the same calls with customers whose vector must first be computed: each has just done something.
"""

import argparse
import asyncio
from collections.abc import Sequence

import grpc
import numpy as np
import psycopg
from rich.table import Table

from cli.stack import running_server
from concord import Concord, user
from concord.v1 import common_pb2, recommendation_pb2
from features.settings import Settings
from harness import WORK, Verdict, console, loaded, prepared_shop, returning_customers

_PATH = "/concord.v1.RecommendationService/RankItems"
_CUSTOMERS, _ITEMS, _BAR = 200, 100, 10.0


def requests(settings: Settings, *, offset: int) -> list[bytes]:
    """Returns a request of 100 random items for each of 200 customers with a history."""
    rng = np.random.default_rng(0)
    customers = returning_customers(settings, _CUSTOMERS, offset=offset)
    with psycopg.connect(settings.postgres_dsn) as connection:
        items = [row[0] for row in connection.execute("SELECT item_id FROM items WHERE NOT removed ORDER BY item_id")]
    return [
        recommendation_pb2.RankItemsRequest(
            subject=common_pb2.Subject(user_id=customer), channel="web", surface="home", item_ids=rng.choice(items, _ITEMS, replace=False)
        ).SerializeToString()
        for customer in customers
    ]


def load(address: str, messages: Sequence[bytes], *, rate: float, seconds: float, warm_up: float) -> dict[str, float]:
    """Returns the figures of a load at a fixed rate."""
    words = ("--rate", str(rate), "--prompt", "--seconds", str(seconds), "--warm-up", str(warm_up))
    return loaded("http2_load.py", address, _PATH, messages, *words)


def ask(address: str, message: bytes) -> None:
    """Makes one call."""
    with grpc.insecure_channel(address) as channel:
        channel.unary_unary(_PATH)(message, timeout=20)


async def act(address: str, messages: Sequence[bytes]) -> None:
    """Has every customer of the messages look at something, so that their vectors must be computed anew."""
    async with Concord(address, channel="web", timeout=10) as web:
        for message in messages:
            request = recommendation_pb2.RankItemsRequest.FromString(message)
            await web.record(web.event(user(request.subject.user_id), "view", item_id=request.item_ids[0]))


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with prepared_shop() as settings, running_server(WORK) as ports:
        address = f"127.0.0.1:{ports['port']}"
        known, fresh = requests(settings, offset=0), requests(settings, offset=_CUSTOMERS)
        for message in known:  # computed once, as any other surface would have done
            ask(address, message)
        warm = load(address, known, rate=options.rate, seconds=options.seconds, warm_up=2.0)
        asyncio.run(act(address, fresh))
        cold = load(address, fresh, rate=options.rate / 5, seconds=5 * _CUSTOMERS / options.rate, warm_up=0)
    table = Table("customers", "requests/s", "p50 ms", "p99 ms", "answered", title="RankItems, 100 items")
    for name, rate, found in (("vector known", options.rate, warm), ("vector computed", options.rate / 5, cold)):
        row = (f"{found['answer_ms_p50']:.2f}", f"{found['answer_ms_p99']:.2f}", f"{found['answered_per_second'] / rate:.0%}")
        table.add_row(name, f"{rate:.0f}", *row)
    console.print(table)
    p99 = warm["answer_ms_p99"]
    met = p99 <= _BAR and warm["answered_per_second"] >= 0.99 * options.rate
    figures = {"p50_ms": warm["answer_ms_p50"], "computed_p50_ms": cold["answer_ms_p50"], "computed_p99_ms": cold["answer_ms_p99"]}
    print(Verdict("rank_items", p99, _BAR, None, "ms, p99", met).line(**figures))


if __name__ == "__main__":
    main()
