"""Stores whose round trips are spans: a PostgreSQL pool and cursor, and a Redis client."""

import re
from functools import lru_cache
from typing import Any

import redis.asyncio
from opentelemetry.trace import SpanKind
from psycopg import AsyncConnection, AsyncCursor
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

from server.tracing import span

_STATEMENT = re.compile(
    r"\s*(?=(SELECT|INSERT|UPDATE|DELETE|COPY|WITH)\b)(?:.*?\b(?:FROM|INTO|(?<!FOR )UPDATE)\s+([a-z_]+)\b(?!\())?",
    re.IGNORECASE | re.DOTALL,
)


class TracedPool(AsyncConnectionPool[AsyncConnection[TupleRow]]):
    """A pool whose waits are spans: where they are long it is too small, or PostgreSQL too slow."""

    async def getconn(self, timeout: float | None = None) -> AsyncConnection[TupleRow]:  # noqa: ASYNC109 - psycopg's signature
        """Waits for a connection, as a span."""
        with span("postgres connection", {"db.system.name": "postgresql"}):
            return await super().getconn(timeout)


class TracedCursor(AsyncCursor[TupleRow]):
    """A cursor whose statements are spans, named by verb and table; neither their text nor their parameters are recorded."""

    async def execute(self, query: Any, params: Any = None, **options: Any) -> "TracedCursor":
        """Executes a statement as a span."""
        if not query:  # the pool's check of a connection
            return await super().execute(query, params, **options)
        with span(statement_name(query), {"db.system.name": "postgresql"}, kind=SpanKind.CLIENT):
            return await super().execute(query, params, **options)

    async def executemany(self, query: Any, params_seq: Any, *, returning: bool = False) -> None:
        """Executes a statement many times, as one span."""
        with span(statement_name(query), {"db.system.name": "postgresql"}, kind=SpanKind.CLIENT):
            await super().executemany(query, params_seq, returning=returning)


@lru_cache(maxsize=512)
def statement_name(query: Any) -> str:
    """Returns the name of a statement's span: verb and first table, never a value."""
    text = query.decode() if isinstance(query, bytes) else query
    found = _STATEMENT.match(text) if isinstance(text, str) else None
    return "postgres " + (" ".join(filter(None, (found[1].upper(), found[2]))) if found else "statement")


class TracedRedis(redis.asyncio.Redis):
    """A client whose round trips are spans, named by their commands."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Sends a command as a span."""
        with span(f"redis {args[0]}", {"db.system.name": "redis"}, kind=SpanKind.CLIENT):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "_Pipeline":
        """Returns a pipeline whose one round trip is a span."""
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _Pipeline(redis.asyncio.client.Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with span("redis pipeline", {"db.system.name": "redis", "db.operation.batch.size": len(self.command_stack)}, kind=SpanKind.CLIENT):
            return await super().execute(raise_on_error)
