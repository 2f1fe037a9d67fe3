"""Materialization: a feature snapshot, an index epoch over it, and everything into the online store."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import psycopg
import redis
from feast import FeatureStore
from psycopg import Connection
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from features.activity import CAUGHT_UP, READ_STATE, WRITE_STATE, UserStateCodec
from features.batch_views import materialize_view
from features.catalogue import publish_epoch
from features.overlap import overlapped
from features.registry import load_registry
from features.settings import Settings
from features.snapshots import MATERIALIZING, SnapshotReport, free_time, newest_event_time, take_snapshot
from features.store import feature_store

BATCH_VIEWS = ("user_profile", "item_profile", "item_popularity")
# PostgreSQL does two thirds of a rebuild, so several batches are read at once; beyond four this process is what they wait for.
# Together they hold 500 customers: one with 50 texts and 300 purchases is some 30 kB, several times over while it is encoded.
_REBUILDERS = 4
_USERS_PER_BATCH = 125

Progress = Callable[[str, int, int], None]
"""Called with a stage name, steps done and steps in all."""


@dataclass(frozen=True)
class MaterializeReport:
    """What a materialization did."""

    snapshot: SnapshotReport
    index_version: int
    users_online: int


def materialize(settings: Settings, *, as_of: datetime | None = None, progress: Progress = lambda _s, _d, _t: None) -> MaterializeReport:
    """Takes a snapshot, publishes an index epoch over it, and writes all views to the online store.

    Batch views are written as Feast's own materialization would write them; ``user_activity`` is recomputed from the events and
    written by compare-and-set, so that a materialization never takes a customer back.

    Args:
        settings: where PostgreSQL, Redis and the Feast project are.
        as_of: snapshot time; by default that of the newest event (so that windows of an imported history are not empty). A time
            that an epoch already ranks with is moved on by a microsecond, so that answers of that epoch stay reproducible.
        progress: called per stage and batch.
    """
    with psycopg.connect(settings.postgres_dsn, autocommit=True) as guard:
        guard.execute("SELECT pg_advisory_lock_shared(%s, %s)", MATERIALIZING)
        return _materialize(settings, as_of, progress)


def _materialize(settings: Settings, as_of: datetime | None, progress: Progress) -> MaterializeReport:
    with psycopg.connect(settings.postgres_dsn) as connection:
        as_of = free_time(connection, as_of or newest_event_time(connection) or datetime.now(UTC))
        progress("snapshot", 0, 1)
        snapshot = take_snapshot(connection, as_of)
        progress("snapshot", 1, 1)
        index_version = publish_epoch(connection, as_of)
    store = feature_store(settings)
    _materialize_views(settings, store, as_of, progress)
    users = rebuild_users(settings, progress=progress)
    return MaterializeReport(snapshot, index_version, users)


def _materialize_views(settings: Settings, store: FeatureStore, as_of: datetime, progress: Progress) -> None:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    for done, view in enumerate(BATCH_VIEWS):
        progress("batch views", done, len(BATCH_VIEWS))
        start, end = (epoch, datetime.now(UTC)) if view == "item_profile" else (as_of, as_of)
        materialize_view(settings, store, view, start, end)
    progress("batch views", len(BATCH_VIEWS), len(BATCH_VIEWS))


def rebuild_users(settings: Settings, *, progress: Progress = lambda _s, _d, _t: None) -> int:
    """Writes every customer's online state from PostgreSQL; customers already up to date are left as they are.

    Returns:
        How many customers were looked at.
    """
    codec = UserStateCodec(load_registry(settings).layouts, settings.project)
    done = 0
    with (
        psycopg.connect(settings.postgres_dsn, row_factory=dict_row, autocommit=True) as connection,
        ConnectionPool(settings.postgres_dsn, min_size=1, max_size=_REBUILDERS, open=False) as pool,
        contextlib.closing(redis.Redis.from_url(settings.redis_url)) as client,
    ):
        row = connection.execute("SELECT count(*) AS n FROM users WHERE merged_into IS NULL").fetchone()
        total = int(row["n"]) if row else 0
        rebuild = partial(_rebuild, pool, client, codec)
        for looked_at in overlapped(rebuild, _user_batches(connection), threads=_REBUILDERS):
            done += looked_at
            progress("online user state", done, total)
    return done


def _rebuild(pool: ConnectionPool, client: redis.Redis, codec: UserStateCodec, users: Sequence[str]) -> int:
    """Reads, writes and takes off the outbox one batch of customers; returns how many they were."""
    script = client.register_script(WRITE_STATE)
    with pool.connection() as connection, client.pipeline(transaction=False) as pipeline:
        states = [codec.state(row) for row in connection.cursor(row_factory=dict_row).execute(READ_STATE, [users])]
        for state in states:
            script(keys=[state.key], args=list(state.arguments), client=pipeline)
        pipeline.execute()
        connection.execute(CAUGHT_UP, [[state.user_id for state in states], [state.version for state in states]])
    return len(users)


def _user_batches(connection: "Connection[dict[str, object]]") -> Iterator[Sequence[str]]:
    last = ""
    while True:
        rows = connection.execute(
            "SELECT user_id FROM users WHERE merged_into IS NULL AND user_id > %s ORDER BY user_id LIMIT %s", [last, _USERS_PER_BATCH]
        ).fetchall()
        if not rows:
            return
        last = str(rows[-1]["user_id"])
        yield [str(row["user_id"]) for row in rows]
