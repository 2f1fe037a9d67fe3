"""Connections: one PostgreSQL pool and one Redis client per process, with explicit timeouts and no hidden retries."""

import re
from functools import lru_cache
from typing import Any

import redis.asyncio
from opentelemetry.trace import SpanKind
from psycopg import AsyncConnection, AsyncCursor
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from server.settings import ServerSettings
from server.tracing import span

_STATEMENT = re.compile(
    r"\s*(?=(SELECT|INSERT|UPDATE|DELETE|COPY|WITH)\b)(?:.*?\b(?:FROM|INTO|(?<!FOR )UPDATE)\s+([a-z_]+)\b(?!\())?",
    re.IGNORECASE | re.DOTALL,
)

Pool = AsyncConnectionPool[AsyncConnection[TupleRow]]


def postgres_pool(settings: ServerSettings) -> Pool:
    """Returns a closed pool; a connection is checked when taken, so a restarted PostgreSQL costs no failed call later on."""
    milliseconds = int(settings.postgres_timeout_seconds * 1000)
    return _Pool(
        settings.postgres_dsn,
        min_size=2,
        max_size=settings.postgres_pool_size,
        timeout=settings.postgres_timeout_seconds,
        open=False,
        check=AsyncConnectionPool.check_connection,
        kwargs={
            "options": f"-c statement_timeout={milliseconds} -c timezone=UTC",
            "connect_timeout": 3,
            "cursor_factory": _Cursor,
        },
        name="concord",
    )


def redis_client(settings: ServerSettings) -> "redis.asyncio.Redis":
    """Returns a client whose calls fail after ``redis_timeout_seconds``: redis-py's own retries turn 0.2 s into 5.5 s."""
    client: redis.asyncio.Redis = _Redis.from_url(
        settings.redis_url,
        socket_timeout=settings.redis_timeout_seconds,
        socket_connect_timeout=settings.redis_timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        max_connections=64,
    )
    return client


class _Pool(AsyncConnectionPool[AsyncConnection[TupleRow]]):
    """A pool whose waits are spans: where they are long it is too small, or PostgreSQL too slow."""

    async def getconn(self, timeout: float | None = None) -> AsyncConnection[TupleRow]:  # noqa: ASYNC109 - psycopg's signature
        with span("postgres connection", {"db.system.name": "postgresql"}):
            return await super().getconn(timeout)


class _Cursor(AsyncCursor[TupleRow]):
    """A cursor whose statements are spans, named by verb and table; neither their text nor their parameters are recorded."""

    async def execute(self, query: Any, params: Any = None, **options: Any) -> "_Cursor":
        if not query:  # the pool's check of a connection
            return await super().execute(query, params, **options)
        with span(_statement_name(query), {"db.system.name": "postgresql"}, kind=SpanKind.CLIENT):
            return await super().execute(query, params, **options)

    async def executemany(self, query: Any, params_seq: Any, *, returning: bool = False) -> None:
        with span(_statement_name(query), {"db.system.name": "postgresql"}, kind=SpanKind.CLIENT):
            await super().executemany(query, params_seq, returning=returning)


@lru_cache(maxsize=512)
def _statement_name(query: Any) -> str:
    text = query.decode() if isinstance(query, bytes) else query
    found = _STATEMENT.match(text) if isinstance(text, str) else None
    return "postgres " + (" ".join(filter(None, (found[1].upper(), found[2]))) if found else "statement")


class _Redis(redis.asyncio.Redis):
    """A client whose round trips are spans, named by their commands."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with span(f"redis {args[0]}", {"db.system.name": "redis"}, kind=SpanKind.CLIENT):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "_Pipeline":
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _Pipeline(redis.asyncio.client.Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with span("redis pipeline", {"db.system.name": "redis", "db.operation.batch.size": len(self.command_stack)}, kind=SpanKind.CLIENT):
            return await super().execute(raise_on_error)
