"""Judges customers' reviews and messages after they are committed: each once, by the model that is active then.

PostgreSQL is the queue: what has no row in ``event_sentiments`` is still to be judged, whichever process died meanwhile. The
features of ``user_profile`` are made of the rows by ``features/snapshots.py``.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic

import psycopg
import structlog
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from server.database import Pool
from server.domain import Analyzed, Leaning
from server.errors import ConcordError, PreconditionError
from server.metrics import Metrics
from server.understand.sentiment import Sentiments

_log = structlog.get_logger(__name__)
_BATCH = 64
# One replica judges at a time; the others look again after their pause.
_TURN = "SELECT pg_try_advisory_xact_lock(hashtext('concord judging'))"
_MISSING = """
SELECT e.user_id, e.event_id, coalesce(e.origin_id, e.user_id), e.text, e.received_at FROM events e
WHERE e.action IN ('review', 'message') AND e.text <> '' AND e.received_at >= %s AND NOT EXISTS (
    SELECT FROM event_sentiments s
    WHERE s.user_id = e.user_id AND s.event_id = e.event_id AND s.origin_id = coalesce(e.origin_id, e.user_id)
)
ORDER BY e.received_at LIMIT %s
"""
# Regrouping and forgetting lock the personas concerned: with this lock an event stays whose it is until its judgement is stored.
_HOLD = "SELECT FROM users WHERE user_id = ANY(%s) ORDER BY user_id FOR KEY SHARE"
_STORE = """
INSERT INTO event_sentiments (user_id, event_id, origin_id, language, score, model_version)
SELECT j.user_id, j.event_id, j.origin_id, j.language, j.score, %s
FROM unnest(%s::text[], %s::uuid[], %s::text[], %s::text[], %s::double precision[]) AS j (user_id, event_id, origin_id, language, score)
JOIN events e ON e.user_id = j.user_id AND e.event_id = j.event_id AND coalesce(e.origin_id, e.user_id) = j.origin_id
ON CONFLICT DO NOTHING
"""
_DISCARD = "DELETE FROM event_sentiments WHERE model_version <> %s"
EVER = datetime(1970, 1, 1, tzinfo=UTC)
# A transaction may commit events long after the time they bear; those later still (an import of hours) are found by a whole look.
_LATE = timedelta(minutes=1)
_WHOLE_SECONDS = 3600.0


class Judge:
    """Finds what is not judged and judges it, at most half of the time, so that it takes half a thread from answers at the most.

    Args:
        pool: connections to PostgreSQL.
        sentiments: judges texts.
        metrics: is told how many were judged.
        pause_seconds: between looks, while there is nothing to do.
        clock: monotonic seconds.
    """

    def __init__(
        self, pool: Pool, sentiments: Sentiments, metrics: Metrics, *, pause_seconds: float, clock: Callable[[], float] = monotonic
    ) -> None:
        self._pool = pool
        self._sentiments = sentiments
        self._metrics = metrics
        self._pause = pause_seconds
        self._clock = clock

    async def run(self) -> None:
        """Judges until cancelled; while there is no model that judges, a store is away or too much waits, it tries again."""
        since, whole_at = EVER, self._clock()
        while True:
            started = self._clock()
            if started - whole_at >= _WHOLE_SECONDS:
                since, whole_at = EVER, started
            try:
                count, newest = await self.judge(since)
            except (psycopg.Error, ConcordError) as error:
                if not isinstance(error, PreconditionError):
                    _log.warning("opinions wait to be judged", error=type(error).__name__)
                count, newest = 0, since
            since = max(since, newest - _LATE)
            await asyncio.sleep(self._clock() - started if count == _BATCH else self._pause)

    async def judge(self, since: datetime = EVER) -> tuple[int, datetime]:
        """Judges the oldest events received since then that are not judged, 64 at the most.

        Returns:
            How many there were, and when the newest of them was received: nothing older is left. None where another replica judges.

        Raises:
            PreconditionError: there is no model that judges.
            OverloadedError: too many texts wait.
            UnavailableError: the active model cannot be loaded here.
        """
        async with self._pool.connection() as connection, connection.transaction():
            turn = await (await connection.execute(_TURN)).fetchone()
            if turn != (True,):
                return 0, since
            rows = await (await connection.execute(_MISSING, [since, _BATCH])).fetchall()
            if not rows:
                return 0, since
            judged = await self._sentiments.judge([row[3] for row in rows])
            await _store(connection, rows, judged)
        self._metrics.opinions_judged(len(rows))
        return len(rows), rows[-1][4]

    async def discard(self, model_version: str) -> int:
        """Forgets what other models than this one made of events, so that they are judged again; returns how many they are."""
        async with self._pool.connection() as connection:
            return (await connection.execute(_DISCARD, [model_version])).rowcount


async def _store(connection: AsyncConnection[TupleRow], rows: Sequence[TupleRow], judged: Analyzed) -> None:
    await connection.execute(_HOLD, [sorted({user for row in rows for user in (row[0], row[2])})])
    scores = [None if one.judgement.leaning is Leaning.UNJUDGED else one.judgement.score for one in judged.sentiments]
    columns = [[row[k] for row in rows] for k in range(3)]
    await connection.execute(_STORE, [judged.model_version, *columns, [one.language for one in judged.sentiments], scores])
