"""Materialization of batch views: their newest rows stream from PostgreSQL to the online store in bounded memory.

The rows are those that Feast's materialization takes and the bytes those that it writes, so ``feast materialize`` works on the
same store, before, after and meanwhile. The driver that reads brings a libpq of its own, which knows TLS but not GSSAPI.
"""

import contextlib
from collections.abc import Generator
from datetime import datetime

import pyarrow as pa
import redis
from adbc_driver_postgresql import StatementOptions, dbapi
from feast import FeatureStore
from feast.feature_view import FeatureView
from psycopg.sql import SQL, Composable, Identifier, Literal

from features.bulk_write import write_view
from features.layout import ViewLayout, view_layout
from features.settings import Settings

# Some 2,500 rows of a profile. Four times as much is no faster, and costs 60 MB: a few batches are in memory, in several forms.
_BATCH_BYTES = 2**20

_COLUMN = {
    "Int32": "integer",
    "Int64": "bigint",
    "Float32": "real",
    "Float64": "double precision",
    "String": "text",
    "Bool": "boolean",
}


def materialize_view(settings: Settings, store: FeatureStore, name: str, start: datetime, end: datetime) -> int:
    """Writes the newest row of every entity from ``start`` to ``end``, both included, to the online store.

    Returns:
        How many rows were written; what stood there and was as new or newer stays.

    Raises:
        LayoutError: the view cannot be stored as it is defined.
        adbc_driver_manager.Error: PostgreSQL went away or refused the query.
        redis.exceptions.RedisError: Redis went away or refused a write. In any case another run completes what one began.
    """
    view = store.get_feature_view(name)
    layout = view_layout(view.to_proto())
    rows = stream(settings.postgres_dsn, newest_rows(view, layout, start, end))
    with contextlib.closing(redis.Redis.from_url(settings.redis_url)) as client, contextlib.closing(rows):
        expire = store.config.online_store.key_ttl_seconds
        written = write_view(client, layout, rows, project=settings.project, expire_seconds=expire)
    store.registry.apply_materialization(view, settings.project, start, end)
    return written


def newest_rows(view: FeatureView, layout: ViewLayout, start: datetime, end: datetime) -> str:
    """Returns the query for entity, event time and features of the newest row of every entity in a window.

    Of rows with one event time the one created last counts, where the source says when that was.
    """
    source = view.batch_source
    time = Identifier("a", source.timestamp_field)
    columns = [SQL("{}::text").format(Identifier("a", layout.join_key)), time]
    columns += [_column(feature, dtype) for feature, dtype in zip(layout.features, layout.dtypes, strict=True)]
    newest = [Identifier("a", field) for field in (source.timestamp_field, source.created_timestamp_column) if field]
    query = SQL("SELECT DISTINCT ON (1) {} FROM {} a WHERE {} BETWEEN {} AND {} ORDER BY 1, {}").format(
        SQL(", ").join(columns),
        SQL(source.get_table_query_string()),
        time,
        Literal(start),
        Literal(end),
        SQL(", ").join(SQL("{} DESC").format(column) for column in newest),
    )
    return query.as_string(None)


def _column(feature: str, dtype: str) -> Composable:
    """Returns a feature as the type that the view says it has, whatever its source's column is."""
    element = dtype.removeprefix("Array(").removesuffix(")")
    return SQL("{}::{}").format(Identifier("a", feature), SQL(_COLUMN[element] + "[]" * (element != dtype)))


def stream(dsn: str, query: str) -> Generator[pa.RecordBatch, None, None]:
    """Yields a query's rows in batches of about 1 MiB, as PostgreSQL sends them."""
    options = {StatementOptions.BATCH_SIZE_HINT_BYTES.value: str(_BATCH_BYTES)}
    with dbapi.connect(dsn, autocommit=True) as connection, connection.cursor(adbc_stmt_kwargs=options) as cursor:
        cursor.execute(query)
        yield from cursor.fetch_record_batch()
