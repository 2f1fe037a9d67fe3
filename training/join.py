"""Feast's point-in-time join on PostgreSQL, for any number of rows: keys go in by COPY, shards of Parquet come out.

What it costs is bounded by a shard, on both sides. Three things make that so:

- The keys live in an unlogged table of a schema made for this join, and Feast's entity rows are a query over it: its SDK would
  insert them one by one.
- Feast's view ``user_activity`` has a row per customer and moment, and its join looks at all of them. A table ``activity_moments``
  in that schema, before the view of that name on the search path, holds only each key's last moment. Leaving moments out
  cannot show the future: the join refuses any that is not before the key's time, whatever the table holds.
- Feast compares each key with every moment of its customer in the call, so a call has at most 16 keys of one.
"""

import contextlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
from feast import FeatureStore
from psycopg import Connection, sql
from psycopg.rows import TupleRow

from features.store import joining_store
from training.events import from_micros
from training.progress import bar, quiet
from training.shards import Shards

_PREFIX = "concord_join_"
_ARROW = {
    "Int64": pa.int64(),
    "Float64": pa.float64(),
    "String": pa.string(),
    "Array(Int64)": pa.list_(pa.int64()),
    "Array(Float64)": pa.list_(pa.float64()),
    "Array(String)": pa.list_(pa.string()),
}
ROWS_PER_SHARD = 20_000
_KEYS_PER_CALL = 16


@dataclass(frozen=True)
class Column:
    """A column that travels with each key through the join: its name, SQL type and what it means."""

    name: str
    sql_type: str
    meaning: str

    @property
    def arrow(self) -> pa.DataType:
        """The column's type in Parquet."""
        return {"text": pa.string(), "bigint": pa.int64(), "text[]": pa.list_(pa.string())}[self.sql_type]


AT = Column("at", "bigint", "The row's time in microseconds of Unix time; every feature is from strictly before it.")


@dataclass(frozen=True)
class Job:
    """What to join.

    Attributes:
        store: the shop's Feast store.
        features: references ``view:feature``, all of views with the one join key ``key``.
        key: ``user_id`` or ``item_id``.
        carried: columns that travel along, beside the key and ``at``.
        rows_per_shard: rows of a shard, and at most so many are held at a time.
    """

    store: FeatureStore
    features: Sequence[str]
    key: str = "user_id"
    carried: Sequence[Column] = ()
    rows_per_shard: int = ROWS_PER_SHARD

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of a given row, in order."""
        return (Column(self.key, "text", "The entity the row is about."), AT, *self.carried)


def join(job: Job, rows: Iterable[tuple[Any, ...]], folder: Path, stage: str = "point-in-time join") -> Shards:
    """Joins ``job.features`` to rows as of strictly before their times, and returns the shards.

    Args:
        job: what to join.
        rows: values of ``job.columns``, in any order; of several with the same key and time one is kept. They are read once.
        folder: of the shards. A join of the same rows that was killed goes on after its last whole shard.
        stage: what the progress bar is called.
    """
    shards = Shards(folder, job.key)
    with _scratch(job.store) as (connection, name):
        with quiet():
            store = joining_store(job.store, name)
            schema = schema_of(job)
        _take_in(connection, job, rows)
        shards.begin(_plan(connection, job, schema))
        sizes = connection.execute("SELECT shard, count(*), max(turn) + 1 FROM entity_rows GROUP BY shard ORDER BY shard").fetchall()
        for number, row_count, turns in bar(sizes, stage):
            if not shards.finished(number, row_count):
                calls = [_call(connection, job, store, shard=number, turn=turn).select(schema.names).cast(schema) for turn in range(turns)]
                shards.write(number, pa.concat_tables(calls).sort_by([("at", "ascending"), (job.key, "ascending")]))
    return shards


def schema_of(job: Job) -> pa.Schema:
    """Returns the schema of a job's shards; what a column means stands in its metadata, in Feast's words where it is a feature."""
    known = {f"{view.name}:{field.name}": field for view in job.store.list_feature_views() for field in view.features}
    fields = [pa.field(column.name, column.arrow, metadata={"description": column.meaning}) for column in job.columns]
    for ref in job.features:
        feature = known[ref]
        fields.append(pa.field(feature.name, _ARROW[str(feature.dtype)], metadata={"description": feature.description or ""}))
    return pa.schema(fields)


@contextlib.contextmanager
def _scratch(store: FeatureStore) -> Iterator[tuple[Connection[TupleRow], str]]:
    """Yields a connection whose first schema is a new one, which goes with it; schemas of killed joins go too."""
    schema, offline = f"{_PREFIX}{uuid.uuid4().hex[:12]}", store.config.offline_store
    address = {"host": offline.host, "port": offline.port, "dbname": offline.database, "sslmode": offline.sslmode}
    with psycopg.connect(**address, user=offline.user, password=offline.password, autocommit=True) as connection:
        _clear(connection)
        connection.execute("SELECT pg_advisory_lock(hashtext(%s))", [schema])
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        connection.execute(sql.SQL("SET search_path TO {}, public").format(sql.Identifier(schema)))
        try:
            yield connection, schema
        finally:
            if not connection.closed:
                connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))


def _clear(connection: Connection[TupleRow]) -> None:
    """Drops schemas whose join is gone: a living one holds the lock of its name."""
    names = connection.execute("SELECT nspname FROM pg_namespace WHERE starts_with(nspname, %s)", [_PREFIX]).fetchall()
    for (name,) in names:
        if (connection.execute("SELECT pg_try_advisory_lock(hashtext(%s))", [name]).fetchone() or [False])[0]:
            connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(name)))
            connection.execute("SELECT pg_advisory_unlock(hashtext(%s))", [name])


_PLACED = """
CREATE UNLOGGED TABLE entity_rows AS
SELECT s.*, (row_number() OVER (PARTITION BY shard, {key} ORDER BY at) - 1) / {calls} AS turn
FROM (
    SELECT d.*, (row_number() OVER (ORDER BY at, {key} COLLATE "C") - 1) / {rows} AS shard
    FROM (SELECT DISTINCT ON (at, {key}) * FROM given ORDER BY at, {key}) d
) s
"""


def _take_in(connection: Connection[TupleRow], job: Job, rows: Iterable[tuple[Any, ...]]) -> None:
    """Copies the rows into the database, which sorts them and gives each its shard and its call of the shard."""
    names = sql.SQL(", ").join(sql.Identifier(column.name) for column in job.columns)
    types = sql.SQL(", ").join(sql.SQL("{} {}").format(sql.Identifier(c.name), sql.SQL(c.sql_type)) for c in job.columns)
    connection.execute(sql.SQL("CREATE UNLOGGED TABLE given ({}, event_timestamp timestamptz)").format(types))
    with connection.cursor().copy(sql.SQL("COPY given ({}, event_timestamp) FROM STDIN").format(names)) as copy:
        for row in rows:
            copy.write_row((*row, from_micros(row[1] - 1)))
    placed = sql.SQL(_PLACED).format(key=sql.Identifier(job.key), calls=sql.Literal(_KEYS_PER_CALL), rows=sql.Literal(job.rows_per_shard))
    connection.execute(placed)
    connection.execute("DROP TABLE given")
    connection.execute("CREATE INDEX ON entity_rows (shard, turn)")
    connection.execute("ANALYZE entity_rows")
    connection.execute("CREATE UNLOGGED TABLE activity_moments (user_id text, occurred_at timestamptz)")


# What a row can hold besides its own columns: only the past of the newest row, so that a shop that goes on selling while a killed
# join waits does not make its shards worthless.
_FINGERPRINT = """
WITH newest AS (SELECT max(event_timestamp) AS at FROM entity_rows)
SELECT (SELECT jsonb_build_array(count(*), sum(hashtextextended(r::text, 0))) FROM entity_rows r),
       (SELECT jsonb_build_array(count(*), sum(hashtextextended(user_id || event_id::text, 0))) FROM events, newest
        WHERE occurred_at <= newest.at),
       (SELECT jsonb_build_array(count(*), max(event_timestamp)) FROM user_profile, newest WHERE event_timestamp <= newest.at),
       (SELECT jsonb_build_array(count(*), max(event_timestamp)) FROM item_popularity, newest WHERE event_timestamp <= newest.at)
"""


def _plan(connection: Connection[TupleRow], job: Job, schema: pa.Schema) -> dict[str, Any]:
    rows, events, profiles, popularity = connection.execute(_FINGERPRINT).fetchone() or ("",) * 4
    return {
        "rows": str(rows),
        "events": str(events),
        "profiles": str(profiles),
        "popularity": str(popularity),
        "rows_per_shard": job.rows_per_shard,
        "columns": {field.name: str(field.type) for field in schema},
    }


_LAST_MOMENTS = """
INSERT INTO activity_moments
SELECT DISTINCT r.user_id, e.occurred_at FROM entity_rows r CROSS JOIN LATERAL (
    SELECT occurred_at FROM events e WHERE e.user_id = r.user_id AND e.occurred_at <= r.event_timestamp ORDER BY occurred_at DESC LIMIT 1
) e WHERE r.shard = %s AND r.turn = %s
"""


def _call(connection: Connection[TupleRow], job: Job, store: FeatureStore, *, shard: int, turn: int) -> pa.Table:
    """Has Feast join the rows of one call."""
    if job.key == "user_id":
        connection.execute("TRUNCATE activity_moments")
        connection.execute(_LAST_MOMENTS, [shard, turn])
        connection.execute("ANALYZE activity_moments")
    names = ", ".join(f'"{column.name}"' for column in job.columns)
    entities = f"SELECT {names}, event_timestamp FROM entity_rows WHERE shard = {shard} AND turn = {turn}"  # noqa: S608 - own names
    with quiet():
        return store.get_historical_features(entity_df=entities, features=list(job.features)).to_arrow()
