"""How long a channel waits: a committed slate, and an event in one channel until the new answer in another.

One run, interleaved, against a server that is already up on a shop with customers:

    concord serve &   python bench/read_your_writes.py --server 127.0.0.1:50051 --calls 200

Prints a table of milliseconds and a last line of JSON. Client and server share this machine's cores.
"""

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field

import psycopg
from rich.console import Console
from rich.table import Table

from cli.context import shop
from concord import Concord, user
from features.settings import Settings


@dataclass
class Samples:
    """Milliseconds of each question, in the order they were taken."""

    hit: list[float] = field(default_factory=list)
    record: list[float] = field(default_factory=list)
    write_to_answer: list[float] = field(default_factory=list)


def percentile(values: list[float], share: float) -> float:
    """Returns the value below which ``share`` of the samples lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(address: str, customers: list[str], item_id: str) -> Samples:
    """Asks for a standing slate, records an event, and reads it back in another channel, customer by customer."""
    samples = Samples()
    async with Concord(address, channel="web", timeout=10) as web, Concord(address, channel="store", timeout=10) as store:
        for name in customers:
            await web.recommend(user(name), surface="home")
            started = time.perf_counter()
            await store.recommend(user(name), surface="home")
            samples.hit.append((time.perf_counter() - started) * 1e3)
            started = time.perf_counter()
            recorded = await web.record(web.event(user(name), "view", item_id=item_id))
            acknowledged = time.perf_counter()
            samples.record.append((acknowledged - started) * 1e3)
            await store.recommend(user(name), surface="home", consistency_token=recorded.tokens[0].consistency_token)
            samples.write_to_answer.append((time.perf_counter() - acknowledged) * 1e3)
    return samples


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:50051")
    parser.add_argument("--calls", type=int, default=200)
    arguments = parser.parse_args()
    with shop(Settings) as settings, psycopg.connect(settings.postgres_dsn) as connection:
        query = "SELECT user_id FROM users WHERE version > 0 AND merged_into IS NULL ORDER BY user_id LIMIT %s"
        customers = [row[0] for row in connection.execute(query, [arguments.calls])]
        row = connection.execute("SELECT min(item_id) FROM items").fetchone()
        assert row is not None
        samples = asyncio.run(measure(arguments.server, customers, row[0]))
    table, figures = Table("milliseconds", "p50", "p99"), {}
    for name, values in vars(samples).items():
        p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
        table.add_row(name.replace("_", " "), f"{p50:.1f}", f"{p99:.1f}")
        figures |= {f"{name}_ms_p50": round(p50, 2), f"{name}_ms_p99": round(p99, 2)}
    Console().print(table)
    print(json.dumps({"bench": "read_your_writes", "customers": len(customers), **figures}))


if __name__ == "__main__":
    main()
