"""Connections: one PostgreSQL pool and one Redis client per process, with explicit timeouts and no hidden retries."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psycopg
import redis.asyncio
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from server.errors import ConflictError
from server.settings import ServerSettings

Pool = AsyncConnectionPool[AsyncConnection[TupleRow]]
T = TypeVar("T")

_PAUSE_SECONDS = 0.01
_LOST_RACES = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)


class RestartError(Exception):
    """What a transaction read before its locks no longer holds; it is rolled back and started again."""


async def retried(transaction: Callable[[], Awaitable[T]], *, attempts: int = 5, spread: Callable[[], float] = random.random) -> T:
    """Runs a transaction again while it loses races against others, after a pause that doubles and is spread out.

    Args:
        transaction: opens, does and commits one transaction; what it lost was rolled back.
        attempts: how often in all.
        spread: a number from 0 to 1 by which a pause is shortened.

    Raises:
        ConflictError: the last attempt had to be restarted.
        psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure: the last attempt lost.
    """
    for attempt in range(1, attempts + 1):
        try:
            return await transaction()
        except (*_LOST_RACES, RestartError) as error:
            if attempt == attempts and isinstance(error, RestartError):
                raise ConflictError("a concurrent change won; try again", reason="CONCURRENT_CHANGE") from None
            if attempt == attempts:
                raise
        await asyncio.sleep(_PAUSE_SECONDS * 2 ** min(attempt, 5) * spread())
    raise AssertionError("unreachable")


def postgres_pool(settings: ServerSettings) -> Pool:
    """Returns a closed pool; a connection is checked when taken, so a restarted PostgreSQL costs no failed call later on."""
    milliseconds = int(settings.postgres_timeout_seconds * 1000)
    return AsyncConnectionPool(
        settings.postgres_dsn,
        min_size=2,
        max_size=settings.postgres_pool_size,
        timeout=settings.postgres_timeout_seconds,
        open=False,
        check=AsyncConnectionPool.check_connection,
        kwargs={"options": f"-c statement_timeout={milliseconds} -c timezone=UTC", "connect_timeout": 3},
        name="concord",
    )


def redis_client(settings: ServerSettings) -> "redis.asyncio.Redis":
    """Returns a client whose calls fail after ``redis_timeout_seconds``: redis-py's own retries turn 0.2 s into 5.5 s."""
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
        settings.redis_url,
        socket_timeout=settings.redis_timeout_seconds,
        socket_connect_timeout=settings.redis_timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        max_connections=64,
    )
    return client
