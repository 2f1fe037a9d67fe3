"""Recovery: customers whose online state lags (a process died, Redis was away) are recomputed from PostgreSQL."""

import asyncio
import contextlib

import psycopg
import redis.exceptions
import structlog

from server.database import Pool
from server.ingest.forget import Erasure
from server.metrics import Metrics
from server.online.states import UserStates
from server.online.store import OnlineStore

_log = structlog.get_logger(__name__)
_BATCH = 500
_CATCH_UP_SECONDS = 5.0  # beyond it Redis is used, and answers are flagged, while the rest is caught up
_WAITING = "SELECT count(*) FROM online_outbox WHERE enqueued_at <= %s"
_LAGGING = """
SELECT user_id, extract(epoch FROM now() - enqueued_at)::double precision FROM online_outbox
WHERE enqueued_at < now() - make_interval(secs => %s) ORDER BY enqueued_at LIMIT %s FOR UPDATE SKIP LOCKED
"""


class Recovery:
    """Walks the outbox. Several replicas may do so at once: each takes rows nobody else holds."""

    def __init__(
        self, pool: Pool, states: UserStates, online: OnlineStore, erasure: Erasure, metrics: Metrics, *, after_seconds: float
    ) -> None:
        self._pool = pool
        self._states = states
        self._online = online
        self._erasure = erasure
        self._metrics = metrics
        self._after = after_seconds

    async def run(self) -> None:
        """Recovers until cancelled; while a store is away it tries again."""
        while True:
            try:
                recovered = await self.recover()
                await self._erasure.finish()
            except (psycopg.Error, redis.exceptions.RedisError) as error:
                _log.warning("recovery waits for a store", error=type(error).__name__)
                recovered = 0
            if recovered < _BATCH:
                await asyncio.sleep(self._after / 2)

    async def catch_up(self) -> bool:
        """Recovers everybody whose state lags now, whoever takes them; returns False when that takes too long.

        Raises:
            psycopg.Error, redis.exceptions.RedisError: a store is away (again).
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CATCH_UP_SECONDS):
                await self._erasure.finish()
                async with self._pool.connection() as connection:
                    now = await (await connection.execute("SELECT clock_timestamp()")).fetchone()
                while True:
                    if await self.recover(after_seconds=0.0):
                        continue
                    async with self._pool.connection() as connection:
                        left = await (await connection.execute(_WAITING, now)).fetchone()
                    if left == (0,):
                        return True
                    await asyncio.sleep(0.02)  # another replica holds the rest
        return False

    async def recover_all(self) -> None:
        """Recovers everybody whose state lags and whom no other replica has taken.

        Raises:
            psycopg.Error, redis.exceptions.RedisError: a store is away.
        """
        while await self.recover(after_seconds=0.0) == _BATCH:
            pass

    async def recover(self, *, after_seconds: float | None = None) -> int:
        """Recomputes one batch of customers lagging for longer than ``after_seconds``; returns how many there were."""
        after = self._after if after_seconds is None else after_seconds
        async with self._pool.connection() as connection, connection.transaction():
            rows = await (await connection.execute(_LAGGING, [after, _BATCH])).fetchall()
            self._metrics.set_online_lag(rows[0][1] if rows else 0.0)
            if not rows:
                return 0
            users = [str(row[0]) for row in rows]
            states = await self._states.recompute(connection, users)
            await self._online.write_users(states)
            await self._online.erase_users(sorted(set(users) - {state.user_id for state in states}))
            # The rows are locked, so no newer version can have been enqueued since.
            await connection.execute("DELETE FROM online_outbox WHERE user_id = ANY(%s)", [users])
        _log.info("recovered online state", users=len(users))
        return len(users)
