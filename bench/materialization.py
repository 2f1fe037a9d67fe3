"""How fast, and in how much memory, features get from PostgreSQL into the online store: two views of 21 features of a million users.

    python bench/materialization.py                                  # everything, on an embedded stack in a temporary folder
    python bench/materialization.py --users 100000 --sample 5000     # a look, in less time

The peer is Feast's own ``store.materialize``, of the very Feast this process has, on a sample of the same table: it holds a view whole in
memory and would take many minutes for the million. On the sample both take turns and must leave the same bytes. The limit is HSET of
the same keys, fields and values, prepared beforehand and pipelined over two connections: what Redis can take with nobody reading,
encoding or comparing. Client, PostgreSQL and Redis share this machine's cores. A row is one user in one view. Peak memory is that of a
process of its own, most of which is Feast loaded.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
import redis
from feast import Entity, FeatureStore, FeatureView, Field, ValueType
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.types import Array, Bool, Float32, Float64, Int64, String
from rich.table import Table

from cli.stack import running_stack
from features.batch_views import materialize_view, newest_rows, stream
from features.bulk_write import Commands, commands, encoded, send
from features.layout import view_layout
from features.overlap import overlapped
from features.schema import migrate
from features.settings import Settings, load_settings
from features.store import apply_repository, feature_store
from harness import Verdict, console, in_turn

TIMES_FEAST, MEGABYTES, GROWTH = 10.0, 500.0, 1.1
"""The bars: rows a second over Feast's on the same sample, peak memory, and that of all users over that of a quarter."""

_AT = datetime(2026, 1, 1, 12, 0, 0, 250_000, tzinfo=UTC)
_TABLES = {
    "profile": """
        CREATE TABLE profile AS SELECT n AS number, 'c' || n AS user_id, %(at)s::timestamptz AS event_timestamp,
            n %% 300 AS event_count, n %% 7 AS purchase_count, n * 0.37::float8 AS purchase_value,
            (n %% 90) * 1.1::float8 AS days_since_event, n * 1.01::float8 AS price_mean,
            CASE WHEN n %% 3 > 0 THEN (n %% 90) * 1.7::float8 END AS days_since_purchase,
            n * 0.9::float8 AS price_low, n * 1.1::float8 AS price_high,
            ARRAY['kitchen' || n %% 5, 'toys' || n %% 3, 'books'] AS top_categories, ARRAY[0.5, 0.3, 0.2]::float8[] AS top_category_shares,
            ARRAY['acme' || n %% 50, 'zenith'] AS top_brands, ARRAY[0.6, 0.4]::float8[] AS top_brand_shares,
            ARRAY['web', 'app'] AS channel_names, ARRAY[0.7, 0.3]::float8[] AS channel_shares
        FROM generate_series(1::bigint, %(users)s) n""",
    "habits": """
        CREATE TABLE habits AS SELECT n AS number, 'c' || n AS user_id, %(at)s::timestamptz AS event_timestamp,
            n %% 40 AS visits_7d, n %% 1000 AS visits_total, n %% 9 AS returns_total, (n %% 24)::float8 AS usual_hour,
            (n %% 100 / 100.0)::float4 AS discount_share, (ARRAY['web', 'app', 'store'])[1 + n %% 3] AS usual_channel,
            n %% 2 = 0 AS subscribed
        FROM generate_series(1::bigint, %(users)s) n""",
}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "profile": dict.fromkeys(("event_count", "purchase_count"), Int64)
    | dict.fromkeys(("purchase_value", "days_since_event", "days_since_purchase", "price_mean", "price_low", "price_high"), Float64)
    | dict.fromkeys(("top_categories", "top_brands", "channel_names"), Array(String))
    | dict.fromkeys(("top_category_shares", "top_brand_shares", "channel_shares"), Array(Float64)),
    "habits": dict.fromkeys(("visits_7d", "visits_total", "returns_total"), Int64)
    | {"usual_hour": Float64, "discount_share": Float32, "usual_channel": String, "subscribed": Bool},
}


def fill(dsn: str, users: int) -> None:
    """Makes the two tables, with the key that the shop's own snapshots have."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for name, made in _TABLES.items():
            connection.execute(made, {"at": _AT, "users": users})
            connection.execute(f"ALTER TABLE {name} ADD PRIMARY KEY (user_id, event_timestamp)")
            connection.execute(f"CREATE INDEX ON {name} (number)")
            connection.execute(f"VACUUM ANALYZE {name}")


def views(users: int) -> list[FeatureView]:
    """Returns the two views of the first ``users``."""
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    return [
        FeatureView(
            name=f"{name}_{users}",
            entities=[user],
            schema=[Field(name=feature, dtype=dtype) for feature, dtype in schema.items()],
            source=PostgreSQLSource(
                name=f"{name}_{users}", query=f"SELECT * FROM {name} WHERE number <= {users}", timestamp_field="event_timestamp"
            ),
            ttl=timedelta(0),
        )
        for name, schema in _SCHEMAS.items()
    ]


def ours(settings: Settings, store: FeatureStore, users: int) -> None:
    """Materializes both views as ``concord materialize`` does."""
    written = sum(materialize_view(settings, store, f"{name}_{users}", _AT, _AT) for name in _SCHEMAS)
    assert written == 2 * users


def feasts(store: FeatureStore, users: int) -> None:
    """Materializes both views by Feast."""
    with quiet():
        store.materialize(_AT, _AT, feature_views=[f"{name}_{users}" for name in _SCHEMAS])


def prepared(settings: Settings, store: FeatureStore, users: int) -> list[Commands]:
    """Returns the HSET of every row."""
    made = []
    for view in (store.get_feature_view(f"{name}_{users}") for name in _SCHEMAS):
        layout = view_layout(view.to_proto())
        rows = stream(settings.postgres_dsn, newest_rows(view, layout, _AT, _AT))
        fields = (layout.timestamp_field, *layout.fields)
        for batch in rows:
            key, *values = encoded(layout, batch, project=settings.project)
            made.append(commands([b"HSET", key, *(part for pair in zip(fields, values, strict=True) for part in pair)]))
    return made


def alone(users: int) -> dict[str, float]:
    """Runs this file in a process of its own that materializes ``users``; returns its seconds and peak memory."""
    done = subprocess.run([sys.executable, __file__, "--only", str(users)], stdout=subprocess.PIPE, check=True, env=os.environ)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def only(users: int) -> None:
    """What that process does."""
    settings = load_settings(Settings)
    store = feature_store(settings)
    started = time.perf_counter()
    ours(settings, store, users)
    seconds = time.perf_counter() - started
    # Not getrusage: what that calls the peak begins with the memory of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"seconds": seconds, "peak_mb": int(status["VmHWM"].split()[0]) / 1024}))


def compare(settings: Settings, store: FeatureStore, client: redis.Redis, sample: int, rounds: int) -> dict[str, float]:
    """Returns the median seconds of Feast and of ours on the sample, into an empty Redis, where both must leave the same."""
    questions = {"ours": partial(ours, settings, store, sample), "feast": partial(feasts, store, sample)}
    left = set()
    for materialize in questions.values():
        client.flushdb()
        materialize()
        left.add(client.execute_command("DEBUG", "DIGEST"))
    assert len(left) == 1, "Feast and ours left different bytes"
    seconds = in_turn({name: partial(into_empty, client, question) for name, question in questions.items()}, rounds=rounds, warm_up=0)
    return {name: median(taken) for name, taken in seconds.items()}


def into_empty(client: redis.Redis, question: Callable[[], None]) -> None:
    """Empties Redis first, so that every turn writes all rows."""
    client.flushdb()
    question()


def limit(client: redis.Redis, batches: Sequence[Commands]) -> float:
    """Returns the rows a second that two connections pipeline into an empty Redis: one has answers to read while the other sends."""
    client.flushdb()
    started = time.perf_counter()
    for _ in overlapped(partial(send, client), batches, threads=2):
        pass
    return sum(batch.count for batch in batches) / (time.perf_counter() - started)


def measure(settings: Settings, users: int, sample: int, rounds: int) -> tuple[Verdict, dict[str, float]]:
    """Makes the tables, has Feast and ours take turns on the sample, then the limit and ours on a quarter and on all users."""
    fill(settings.postgres_dsn, users)
    store = feature_store(settings)
    quarter = users // 4
    with quiet():
        store.apply([view for size in (sample, quarter, users) for view in views(size)])
    with contextlib.closing(redis.Redis.from_url(settings.redis_url)) as client:
        on_sample = compare(settings, store, client, sample, rounds)
        batches = prepared(settings, store, quarter)
        limits, parts = [], []
        for size in (quarter, users):
            limits.append(limit(client, batches))
            client.flushdb()
            parts.append(alone(size))
        limits.append(limit(client, batches))
        client.flushdb()
    figures = {
        "users": users,
        "seconds": parts[1]["seconds"],
        "peak_mb": parts[1]["peak_mb"],
        "quarter_peak_mb": parts[0]["peak_mb"],
        "sample_users": sample,
        "sample_rows_per_second": 2 * sample / on_sample["ours"],
        "sample_ratio_peer": on_sample["feast"] / on_sample["ours"],
    }
    met = figures["sample_ratio_peer"] >= TIMES_FEAST and figures["peak_mb"] <= min(MEGABYTES, GROWTH * figures["quarter_peak_mb"])
    rate, peer = 2 * users / figures["seconds"], 2 * sample / on_sample["feast"]
    return Verdict("materialization", rate, peer, median(limits), "rows/s", met, lower_is_better=False), figures


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what Feast and pandas print and warn of to themselves."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def show(verdict: Verdict, figures: dict[str, float]) -> None:
    """Prints the table."""
    table = Table("", "ours", "Feast", "limit", title="PostgreSQL to Redis, two views of 14 and 7 features; a row is one user in one view")
    rows = f"{verdict.ours:,.0f}", "", f"{verdict.limit:,.0f}"
    table.add_row(f"rows/s, {figures['users']:,} users", *rows)
    table.add_row(f"rows/s, {figures['sample_users']:,} users", f"{figures['sample_rows_per_second']:,.0f}", f"{verdict.peer:,.0f}", "")
    table.add_row("times Feast, same users", f"{figures['sample_ratio_peer']:.1f}", "1", "")
    table.add_row("share of the limit", f"{verdict.ratio_limit:.0%}", "", "100%")
    table.add_row("peak memory, MB", f"{figures['peak_mb']:.0f}", "", "")
    table.add_row("peak memory of a quarter of the users, MB", f"{figures['quarter_peak_mb']:.0f}", "", "")
    console.print(table)


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=200_000, help="users that Feast is measured on")
    parser.add_argument("--rounds", type=int, default=1, help="turns of Feast and ours on the sample")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        return only(arguments.only)
    with tempfile.TemporaryDirectory(prefix="concord-bench-", ignore_cleanup_errors=True) as folder, running_stack(Path(folder)):
        settings = load_settings(Settings)
        migrate(settings.postgres_dsn)
        apply_repository(settings)
        verdict, figures = measure(settings, arguments.users, arguments.sample, arguments.rounds)
    show(verdict, figures)
    print(verdict.line(**figures))
    return None


if __name__ == "__main__":
    main()
