"""What replicas remember in memory is dropped when a customer is forgotten, on whichever replica that was asked for."""

import asyncio
from collections.abc import Callable, Sequence

import psycopg
import structlog

from server.database import Pool

_log = structlog.get_logger(__name__)
_COUNT = "SELECT count(*) FROM receipts"


class Oblivion:
    """Clears this replica's memories within ``pause_seconds`` of an erasure.

    All of each, not the forgotten customer's part: who that was is nowhere to be read any more. Erasures are rare and what is
    cleared is read again from the stores.
    """

    def __init__(self, pool: Pool, memories: Sequence[Callable[[], None]], *, pause_seconds: float) -> None:
        self._pool = pool
        self._memories = memories
        self._pause = pause_seconds
        self._seen = 0

    async def run(self) -> None:
        """Looks until cancelled; while PostgreSQL is away nobody can be forgotten either."""
        while True:
            try:
                await self.look()
            except psycopg.Error as error:
                _log.warning("erasures cannot be looked for", error=type(error).__name__)
            await asyncio.sleep(self._pause)

    async def look(self) -> None:
        """Clears the memories if there were erasures since the last look."""
        async with self._pool.connection() as connection:
            row = await (await connection.execute(_COUNT)).fetchone()
        assert row is not None
        if row[0] != self._seen:
            self._seen = row[0]
            for clear in self._memories:
                clear()
