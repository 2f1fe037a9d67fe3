"""Exposures: what was shown to whom, under which versions, written to PostgreSQL in batches off the path of any call."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import psycopg
import structlog

from server.database import Pool
from server.domain import Answer
from server.metrics import Metrics

_log = structlog.get_logger(__name__)
_BATCH = 1_000
_COPY = (
    "COPY exposures (user_id, exposure_id, slate_id, channel, surface, user_version, model_version, index_version, offer_version, "
    "as_of, item_ids, scores, prices_micros, degraded, stale, answered_at) FROM STDIN"
)


@dataclass(frozen=True)
class _Exposure:
    exposure_id: UUID
    answer: Answer
    channel: str
    surface: str
    answered_at: datetime


class Journal:
    """A bounded queue in front of the exposures table.

    What it can lose, and nothing else: the exposures of the last pause (``journal_seconds``) when the process is killed, and
    those beyond the queue's bound, which are counted.
    """

    def __init__(self, pool: Pool, metrics: Metrics, *, bound: int, pause_seconds: float, new_id: Callable[[], UUID]) -> None:
        self._pool = pool
        self._metrics = metrics
        self._queue: deque[_Exposure] = deque()
        self._bound = bound
        self._pause = pause_seconds
        self._new_id = new_id

    @property
    def queued(self) -> int:
        """Exposures that wait to be written."""
        return len(self._queue)

    def log(self, answer: Answer, *, channel: str, surface: str, answered_at: datetime) -> None:
        """Queues an exposure; never waits."""
        if len(self._queue) >= self._bound:
            self._metrics.journal_dropped()
            return
        self._queue.append(_Exposure(self._new_id(), answer, channel, surface, answered_at))

    async def run(self) -> None:
        """Writes what is queued until cancelled; while PostgreSQL is away it waits."""
        while True:
            await asyncio.sleep(self._pause)
            try:
                await self.flush()
            except psycopg.Error as error:
                _log.warning("exposures wait for PostgreSQL", error=type(error).__name__, queued=len(self._queue))

    async def flush(self) -> None:
        """Writes everything queued; what could not be written stays queued."""
        while self._queue:
            batch = [self._queue[k] for k in range(min(_BATCH, len(self._queue)))]
            async with self._pool.connection() as connection, connection.cursor() as cursor, cursor.copy(_COPY) as copy:
                for exposure in batch:
                    await copy.write_row(_row(exposure))
            for _ in batch:
                self._queue.popleft()
            self._metrics.journal_written(len(batch))


def _row(exposure: _Exposure) -> tuple[object, ...]:
    answer, versions = exposure.answer, exposure.answer.versions
    return (
        answer.user_id,
        exposure.exposure_id,
        answer.slate_id,
        exposure.channel,
        exposure.surface,
        versions.user_version,
        versions.model_version,
        versions.index_version,
        versions.offer_version,
        answer.as_of,
        [item.item_id for item in answer.items],
        [item.score for item in answer.items],
        [item.price_micros for item in answer.items],
        bool(answer.degraded_reasons),
        answer.stale,
        exposure.answered_at,
    )
