"""Notices between replicas, by PostgreSQL's NOTIFY: whoever cannot write a customer to Redis asks the others to do it at once.

They also make a short story of the start of an outage of Redis: who is asked and cannot reach it either says so (server/fleet.py),
and as soon as all have, what PostgreSQL holds may be shown (server/online/states.py). A notice that is lost costs time, no more:
recovery looks at the outbox by itself.
"""

import asyncio

import psycopg
import structlog
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

from server.database import ONLINE_AWAY, ONLINE_REFUSES, Pool
from server.ingest.recovery import Recovery
from server.online.breaker import CircuitBreaker
from server.online.states import UserStates

_log = structlog.get_logger(__name__)

CHANNEL = "concord_online_outbox"
_LISTEN = f"LISTEN {CHANNEL}"
_NOTIFY = "SELECT pg_notify(%s, '')"
# One notice speaks for all customers that lag, so those of a burst are one.
_PAUSE_SECONDS = 0.02
# Probes of Redis before a replica believes that it is away, when it had not noticed by itself.
_TRIES = 3
_ATTEMPTS = 3
_RECONNECT_SECONDS = 0.5


class Notices:
    """Sends a notice when this replica missed a write, and works the outbox off when one arrives, its own included."""

    def __init__(self, pool: Pool, states: UserStates, recovery: Recovery, breaker: CircuitBreaker, *, dsn: str) -> None:
        self._pool = pool
        self._states = states
        self._recovery = recovery
        self._breaker = breaker
        self._dsn = dsn
        self._asked = asyncio.Event()

    async def run(self) -> None:
        """Sends, listens and helps until cancelled."""
        await asyncio.gather(self._send(), self._listen(), self._help())

    async def _send(self) -> None:
        while True:
            await self._states.missed.wait()
            self._states.missed.clear()
            try:
                async with self._pool.connection() as connection:
                    await connection.execute(_NOTIFY, [CHANNEL])
            except psycopg.Error as error:
                _log.warning("the other replicas are not told that Redis lags", error=type(error).__name__)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _listen(self) -> None:
        # Nothing is sent over an idle connection: the kernel finds out in 10 + 3 x 5 s that the other side is gone.
        dsn = make_conninfo(self._dsn, connect_timeout=3, keepalives_idle=10, keepalives_interval=5, keepalives_count=3)
        deaf = False
        while True:
            try:
                async with await AsyncConnection.connect(dsn, autocommit=True) as connection:
                    await connection.execute(_LISTEN)
                    deaf = False
                    async for _ in connection.notifies():
                        self._asked.set()
            except psycopg.Error as error:
                if not deaf:
                    _log.warning("not told when Redis lags; recovery looks by itself", error=type(error).__name__)
                deaf = True
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _help(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self.help()
            await asyncio.sleep(_PAUSE_SECONDS)

    async def help(self) -> None:
        """Writes to Redis whoever lags; finds out whether Redis is there, and has it doubted where it refuses writes.

        Where Redis is away or in doubt already, the breaker's probes do all this.
        """
        for _ in range(_ATTEMPTS):
            await self._breaker.examine(tries=_TRIES)
            if self._breaker.is_open or self._breaker.behind:
                return
            try:
                await self._recovery.recover_all()
            except ONLINE_REFUSES:
                # Reads go on, but what they find is older than what must be answered to tokens: say so until writes succeed.
                self._breaker.doubt()
            except ONLINE_AWAY as error:
                _log.warning("the outbox waits for Redis", error=type(error).__name__)
                continue
            except psycopg.Error as error:
                _log.warning("the outbox waits for PostgreSQL", error=type(error).__name__)
            return
