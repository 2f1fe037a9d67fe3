"""Connections: one PostgreSQL pool and one Redis client per process, with explicit timeouts, breakers and no hidden retries."""

import asyncio
from collections.abc import Callable, Iterable
from math import inf
from time import monotonic
from typing import Any

import psycopg
import redis.asyncio
import redis.exceptions
from psycopg import AsyncConnection, Connection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from server.online.breaker import BreakerRules, CircuitBreaker
from server.online.wire import Wire
from server.settings import ServerSettings
from server.traced import TracedCursor, TracedPool, TracedRedis

Pool = AsyncConnectionPool[AsyncConnection[TupleRow]]


# Redis connections of one process, and so calls to it at a time.
_REDIS_CONNECTIONS = 64
# Whoever waited this long for a connection in vain has PostgreSQL looked at; a check of a connection takes no longer.
_HANG_SECONDS = 0.4
_RECONNECT_SECONDS = 1.0

# What the stores raise when they cannot answer now. A call refused by its breaker raises one of them too.
ONLINE_AWAY = (redis.exceptions.RedisError,)
# What Redis answers when it is there but takes no writes, such as at its memory's limit.
ONLINE_REFUSES = (redis.exceptions.ResponseError,)
RECORD_AWAY = (psycopg.OperationalError, psycopg.InterfaceError)


class GuardedPool(TracedPool):
    """A pool whose connections are refused at once while PostgreSQL is away, or while too many calls wait for one.

    The waiting are counted here: psycopg's own ``max_waiting`` also counts those whose time has run out until the next connection
    is free, and refuses before it would open one, so that after a longer outage it could refuse for good.

    Waiting in vain says nothing of PostgreSQL: the others may be long at work with the connections, or all of them may hang. So
    it is asked, over a connection of its own.
    """

    breaker: CircuitBreaker
    most_asking: int
    _asking = 0
    _looking: "asyncio.Task[None] | None" = None

    async def getconn(self, timeout: float | None = None) -> AsyncConnection[TupleRow]:  # noqa: ASYNC109 - as in the base class
        """Returns a connection that was just checked; raises OperationalError when PostgreSQL gives none."""
        if self._asking >= self.most_asking:
            raise TooManyRequests("too many calls wait for a connection")
        self._asking += 1
        started = monotonic()
        try:
            async with self.breaker.call():
                return await super().getconn(timeout)
        except (asyncio.CancelledError, PoolTimeout):
            if monotonic() - started >= _HANG_SECONDS and (self._looking is None or self._looking.done()):
                self._looking = asyncio.create_task(self.breaker.examine())
            raise
        finally:
            self._asking -= 1

    async def close(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - as in the base class
        """Closes all connections, and looks no more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await super().close(timeout)


def postgres_breaker(settings: ServerSettings, on_change: Callable[[bool], None]) -> CircuitBreaker:
    """Returns the breaker for PostgreSQL; only taking a connection passes it, and waiting for one is no failure (pools get busy)."""

    async def probe() -> None:
        connection = await AsyncConnection.connect(settings.postgres_dsn, autocommit=True)
        try:
            await connection.execute("SELECT 1")
        finally:
            await connection.close()

    rules = BreakerRules(
        failures=settings.breaker_failures,
        slow_seconds=inf,
        hang_seconds=inf,
        pause_seconds=settings.breaker_pause_seconds,
        probe_seconds=1.0,
        is_failure=lambda error: isinstance(error, RECORD_AWAY) and not isinstance(error, TooManyRequests | PoolTimeout),
        refusal=lambda: psycopg.OperationalError("PostgreSQL is away"),
    )
    return CircuitBreaker(rules, probe=probe, on_change=on_change)


def redis_breaker(settings: ServerSettings, client: "redis.asyncio.Redis", on_change: Callable[[bool], None]) -> CircuitBreaker:
    """Returns the breaker all calls to Redis pass. Refusals and lost connections count; an answer that says no does not."""

    async def probe() -> None:
        await client.execute_command("PING")  # type: ignore[no-untyped-call]

    rules = BreakerRules(
        failures=settings.breaker_failures,
        slow_seconds=settings.redis_slow_seconds,
        hang_seconds=settings.redis_slow_seconds,
        pause_seconds=settings.breaker_pause_seconds,
        probe_seconds=settings.redis_slow_seconds,
        is_failure=lambda error: isinstance(
            error, redis.exceptions.ConnectionError | redis.exceptions.TimeoutError | redis.exceptions.ClusterDownError
        ),
        refusal=lambda: redis.exceptions.ConnectionError("Redis is away"),
    )
    return CircuitBreaker(rules, probe=probe, concurrency=_REDIS_CONNECTIONS, on_change=on_change)


async def _checked(connection: AsyncConnection[TupleRow]) -> None:
    """A stopped PostgreSQL answers no check, and a statement timeout is the server's: so a limit of our own."""
    async with asyncio.timeout(_HANG_SECONDS):
        await AsyncConnectionPool.check_connection(connection)


def _session(settings: ServerSettings) -> dict[str, Any]:
    """Returns how every connection of the server is opened."""
    milliseconds = int(settings.postgres_timeout_seconds * 1000)
    return {"options": f"-c statement_timeout={milliseconds} -c timezone=UTC", "connect_timeout": 3}


def connector(settings: ServerSettings) -> Callable[[], Connection[TupleRow]]:
    """Returns what opens a connection for a thread; its statements end after as long as those of the pool."""
    return lambda: psycopg.connect(settings.postgres_dsn, **_session(settings))


def postgres_pool(settings: ServerSettings, breaker: CircuitBreaker) -> Pool:
    """Returns a closed pool; a connection is checked when taken, so a restarted PostgreSQL costs no failed call later on."""
    pool = GuardedPool(
        settings.postgres_dsn,
        min_size=2,
        max_size=settings.postgres_pool_size,
        timeout=settings.postgres_timeout_seconds,
        # Attempts to connect again double their pauses up to this many seconds; given up, the next call to come tries at once.
        reconnect_timeout=_RECONNECT_SECONDS,
        open=False,
        check=_checked,
        kwargs={**_session(settings), "cursor_factory": TracedCursor},
        name="concord",
    )
    pool.breaker, pool.most_asking = breaker, settings.postgres_waiting
    return pool


class _Plainspoken(AbstractConnection):
    """A connection that says it was lost as redis-py expects it.

    A Redis that dies while a connection is being made closes its transport before the first write. asyncio's own transports
    ignore such a write; uvloop's raise RuntimeError, which redis-py passes on and callers would take for a bug.
    """

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        """Writes a command; raises ConnectionError when the transport is closed already."""
        try:
            await super().send_packed_command(command, check_health)
        except RuntimeError as error:
            raise redis.exceptions.ConnectionError("the connection was closed before it was written to") from error


class OnlineClient(TracedRedis):
    """redis-py's client, for what is rare, and beside it the wires of the path of every call.

    Attributes:
        wire: for reads and slates.
        writes: for customers' states, thousands at a time, which nobody's read may have to wait for.
    """

    wire: Wire
    writes: Wire

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Closes all connections."""
        await self.wire.aclose()
        await self.writes.aclose()
        await super().aclose(close_connection_pool)


def redis_client(settings: ServerSettings) -> OnlineClient:
    """Returns a client whose calls fail after ``redis_timeout_seconds``: redis-py's own retries turn 0.2 s into 5.5 s."""
    client = OnlineClient.from_url(
        settings.redis_url,
        socket_timeout=settings.redis_timeout_seconds,
        socket_connect_timeout=settings.redis_timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        max_connections=_REDIS_CONNECTIONS,
    )
    assert isinstance(client, OnlineClient)
    pool = client.connection_pool  # its class depends on the URL: plain, TLS or a socket
    pool.connection_class = type("Connection", (_Plainspoken, pool.connection_class), {})
    client.wire = Wire(pool, timeout_seconds=settings.redis_timeout_seconds)
    client.writes = Wire(pool, timeout_seconds=settings.redis_timeout_seconds)
    return client
