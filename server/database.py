"""Connections: one PostgreSQL pool and one Redis client per process, with explicit timeouts and no hidden retries."""

import redis.asyncio
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from server.settings import ServerSettings
from server.traced import TracedCursor, TracedPool, TracedRedis

Pool = AsyncConnectionPool[AsyncConnection[TupleRow]]


def postgres_pool(settings: ServerSettings) -> Pool:
    """Returns a closed pool; a connection is checked when taken, so a restarted PostgreSQL costs no failed call later on."""
    milliseconds = int(settings.postgres_timeout_seconds * 1000)
    return TracedPool(
        settings.postgres_dsn,
        min_size=2,
        max_size=settings.postgres_pool_size,
        timeout=settings.postgres_timeout_seconds,
        open=False,
        check=AsyncConnectionPool.check_connection,
        kwargs={
            "options": f"-c statement_timeout={milliseconds} -c timezone=UTC",
            "connect_timeout": 3,
            "cursor_factory": TracedCursor,
        },
        name="concord",
    )


def redis_client(settings: ServerSettings) -> "redis.asyncio.Redis":
    """Returns a client whose calls fail after ``redis_timeout_seconds``: redis-py's own retries turn 0.2 s into 5.5 s."""
    client: redis.asyncio.Redis = TracedRedis.from_url(
        settings.redis_url,
        socket_timeout=settings.redis_timeout_seconds,
        socket_connect_timeout=settings.redis_timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        max_connections=64,
    )
    return client
