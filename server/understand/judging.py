"""Judges customers' reviews and messages after they are committed: each once, by the model that is active then.

PostgreSQL is the queue: what has no row in ``event_sentiments`` is still to be judged, whichever process died meanwhile. The
features of ``user_profile`` are made of the rows by ``features/snapshots.py``.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import NamedTuple
from uuid import UUID

import psycopg
import structlog
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from server.database import Pool
from server.errors import ConcordError, PreconditionError
from server.metrics import Metrics
from server.understand.opinions import Analyzed, Leaning
from server.understand.sentiment import Sentiments

_log = structlog.get_logger(__name__)
_BATCH = 64  # texts judged in one transaction
_PAGE = 256  # events looked at in one statement: a millisecond and half a megabyte, however many there are
# One process judges at a time; the others look again after their pause, but a command waits.
_TRY_TURN = "SELECT pg_try_advisory_xact_lock(hashtext('concord judging'))"
_TAKE_TURN = "SELECT pg_advisory_xact_lock(hashtext('concord judging')) IS NOT NULL"
_LOOK = """
SELECT p.received_at, p.user_id, p.event_id, p.origin_id, CASE WHEN s.user_id IS NULL THEN p.text END
FROM (
    SELECT received_at, user_id, event_id, coalesce(origin_id, user_id) AS origin_id, text FROM events
    WHERE action IN ('review', 'message') AND text <> '' AND (received_at, user_id, event_id) > (%s, %s, %s)
    ORDER BY received_at, user_id, event_id LIMIT %s
) p LEFT JOIN event_sentiments s USING (user_id, event_id, origin_id)
ORDER BY p.received_at, p.user_id, p.event_id
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
# A transaction may commit events later than the time they bear says; those later still (an import of hours), and copies that an
# unlink has given back, are found when all of them are looked at again.
_LATE = timedelta(minutes=1)
_WHOLE_SECONDS = 3600.0


class Place(NamedTuple):
    """A place in the order in which events came in; all of up to and including it have been looked at."""

    received_at: datetime
    user_id: str = ""
    event_id: UUID = UUID(int=0)


START = Place(datetime(1970, 1, 1, tzinfo=UTC))


@dataclass(frozen=True)
class Step:
    """What one look found: how many were judged, how far it went, and whether there may be more beyond."""

    judged: int
    place: Place
    more: bool


class Judge:
    """Finds what is not judged and judges it, at most half of the time: it takes half a thread from answers at the most.

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
        place, whole_at = START, self._clock()
        while True:
            started = self._clock()
            try:
                step = await self.step(place)
            except (psycopg.Error, ConcordError) as error:
                if not isinstance(error, PreconditionError):
                    _log.warning("opinions wait to be judged", error=type(error).__name__)
                step = None
            if step is not None and step.more:
                place = step.place
                await asyncio.sleep(self._clock() - started)
                continue
            if started - whole_at >= _WHOLE_SECONDS:
                place, whole_at = START, started
            elif step is not None and step.place > START:
                place = max(Place(step.place.received_at - _LATE), START)
            await asyncio.sleep(self._pause)

    async def step(self, after: Place, *, wait: bool = False) -> Step | None:
        """Looks at the next events beyond a place, 256 at the most, and judges those that are not judged, 64 at the most.

        Returns:
            None while another process judges; with ``wait`` it is waited for.

        Raises:
            PreconditionError: there is no model that judges.
            OverloadedError: too many texts wait.
            UnavailableError: the active model cannot be loaded here.
        """
        await self._sentiments.require_model()
        async with self._pool.connection() as connection, connection.transaction():
            turn = await (await connection.execute(_TAKE_TURN if wait else _TRY_TURN)).fetchone()
            if turn != (True,):
                return None
            rows = await (await connection.execute(_LOOK, [*after, _PAGE])).fetchall()
            missing = [row for row in rows if row[4] is not None]
            batch = missing[:_BATCH]
            if batch:
                await _store(connection, batch, await self._sentiments.judge([row[4] for row in batch]))
        self._metrics.opinions_judged(len(batch))
        seen = rows if len(missing) <= _BATCH else batch
        return Step(len(batch), Place(*seen[-1][:3]) if seen else after, more=len(rows) == _PAGE or len(missing) > _BATCH)

    async def discard(self, model_version: str) -> int:
        """Forgets what other models than this one made of events, so that they are judged again; returns how many they are."""
        async with self._pool.connection() as connection:
            return (await connection.execute(_DISCARD, [model_version])).rowcount


async def _store(connection: AsyncConnection[TupleRow], rows: Sequence[TupleRow], judged: Analyzed) -> None:
    users, events, origins = ([row[k] for row in rows] for k in (1, 2, 3))
    await connection.execute(_HOLD, [sorted({*users, *origins})])
    scores = [None if one.judgement.leaning is Leaning.UNJUDGED else one.judgement.score for one in judged.sentiments]
    languages = [one.language or "" for one in judged.sentiments]
    await connection.execute(_STORE, [judged.model_version, users, events, origins, languages, scores])
