"""How fast, and in how much memory, a training set is joined: Feast's point-in-time join by shards, on a made-up shop.

    python bench/training_set.py --rows 1000000        # a shop of its own on an embedded stack, in a temporary folder
    python bench/training_set.py --rows 10000 --plain  # beside plain Feast with the same keys as a data frame, one call

Prints a table and a last line of JSON. Client and PostgreSQL share this machine's cores; peak memory is the client's, and most of
the base is what Feast and its libraries take once loaded.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import psycopg
from rich.console import Console
from rich.table import Table

from cli.stack import running_stack
from features.schema import migrate
from features.settings import Settings, load_settings
from features.snapshots import take_snapshot
from features.store import apply_repository, feature_store
from training.dataset import customer_job
from training.events import from_micros, to_micros
from training.join import Job, join
from training.progress import quiet

EVENTS_PER_CUSTOMER = 21  # the first has no past: 20 rows a customer
START = datetime(2026, 1, 1, tzinfo=UTC)
_USERS = "INSERT INTO users (user_id, version) SELECT 'c' || n, %s FROM generate_series(1, %s) n"
_EVENTS = """
INSERT INTO events (user_id, event_id, channel, action, item_id, value, quantity, occurred_at)
SELECT 'c' || n, gen_random_uuid(), (ARRAY['web', 'app', 'store'])[1 + m %% 3],
       (ARRAY['view', 'view', 'add_to_cart', 'purchase'])[1 + m %% 4], 'item' || (n * 31 + m * m * 17) %% 5000, 9.5, 1,
       %s::timestamptz + ((n %% 1000) + m * 6000) * interval '1 minute'
FROM generate_series(1, %s) n, generate_series(0, %s) m
"""
_KEYS = "SELECT user_id, occurred_at FROM events WHERE occurred_at > %s::timestamptz + interval '3000 minutes' LIMIT %s"


def megabytes() -> float:
    """Returns the most memory this process has ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fill(dsn: str, customers: int) -> None:
    """Makes customers with events every four days or so, and two profile snapshots."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_USERS, [EVENTS_PER_CUSTOMER, customers])
        connection.execute(_EVENTS, [START, customers, EVENTS_PER_CUSTOMER - 1])
        connection.execute("ANALYZE")
        for days in (28, 56):
            take_snapshot(connection, START + timedelta(days=days))
        connection.execute("ANALYZE user_profile")


def keys(dsn: str, count: int) -> Iterator[tuple[str, int]]:
    """Streams (customer, time) of events, in no order."""
    with psycopg.connect(dsn) as connection, connection.cursor(name="bench_keys") as cursor:
        for user, at in cursor.execute(_KEYS, [START, count]):
            yield user, to_micros(at)


def plain_seconds(job: Job, some: list[tuple[str, int]]) -> float:
    """Joins the same keys the usual way: one data frame, uploaded by Feast's SDK."""
    frame = pd.DataFrame([{"user_id": user, "event_timestamp": from_micros(at - 1)} for user, at in some])
    started = time.monotonic()
    with quiet():
        joined = job.store.get_historical_features(entity_df=frame, features=list(job.features)).to_arrow()
    assert len(joined) == len(some)
    return time.monotonic() - started


def measure(settings: Settings, rows: int, *, plain: bool, folder: Path) -> dict[str, float]:
    """Fills a shop and joins ``rows`` keys."""
    fill(settings.postgres_dsn, -(-rows // (EVENTS_PER_CUSTOMER - 1)))
    job = customer_job(feature_store(settings))
    before, started = megabytes(), time.monotonic()
    shards = join(job, keys(settings.postgres_dsn, rows), folder)
    seconds, peak = time.monotonic() - started, megabytes()
    size = sum(path.stat().st_size for path in shards.paths()) / 2**20
    figures = {"rows": len(shards), "seconds": seconds, "rows_per_second": len(shards) / seconds}
    figures |= {"base_mb": before, "peak_mb": peak, "shards": len(shards.paths()), "disk_mb": size}
    if plain:
        figures["plain_feast_seconds"] = plain_seconds(job, list(keys(settings.postgres_dsn, rows)))
        figures["times_faster"] = figures["plain_feast_seconds"] / seconds
    return figures


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--plain", action="store_true", help="join the same keys by plain Feast too; hours for a million")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="concord-bench-", ignore_cleanup_errors=True) as folder, running_stack(Path(folder)):
        settings = load_settings(Settings)
        migrate(settings.postgres_dsn)
        apply_repository(settings)
        figures = measure(settings, arguments.rows, plain=arguments.plain, folder=Path(folder) / "set")
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,.1f}")
    Console().print(table)
    print(json.dumps({"bench": "training_set", **{name: round(value, 2) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
