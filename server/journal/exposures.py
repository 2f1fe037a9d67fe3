"""Exposures: what was shown to whom, under which versions, written to PostgreSQL in batches off the path of any call."""

import asyncio
from collections import deque
from collections.abc import Callable
from datetime import datetime
from itertools import islice
from typing import NamedTuple
from uuid import UUID

import psycopg
import structlog

from server.arrays import number_array, text_array
from server.database import Pool
from server.domain import EVERYTHING, Answer, RecommendQuery
from server.metrics import Metrics
from server.recommend.shelf import read_page_token

_log = structlog.get_logger(__name__)
_BATCH = 1_000
# Rows written out before calls have their turn again: a thousand in one go would hold all of them up for 3 ms.
_AT_ONCE = 50
_ROW = "row"  # the form of a page that is kept here
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
# First what all exposures of a page share.
_COLUMNS = (
    "user_id, slate_id, channel, surface, query, context_item_ids, user_version, model_version, index_version, offer_version, as_of, "
    "page_start, page_limit, filtered, item_ids, positions, scores, prices_micros, currencies, in_stock, "
    "origin_id, exposure_id, degraded, stale, degraded_reasons, answered_at"
)
_STAGE = "CREATE TEMP TABLE IF NOT EXISTS staged_exposures (LIKE exposures INCLUDING DEFAULTS) ON COMMIT DELETE ROWS"
_COPY = f"COPY staged_exposures ({_COLUMNS}) FROM STDIN"
# The customers' rows are held, in the order every writer takes them, while their exposures are stored: a customer forgotten
# before is not stored, one being forgotten waits and then finds these rows too. So it is with the personas that were answered. A
# customer without an identity has no row.
# Rows that are there already were committed by an attempt whose answer was lost.
_STORE = f"""
WITH known AS MATERIALIZED (
    SELECT user_id FROM users WHERE user_id IN (SELECT user_id FROM staged_exposures UNION SELECT origin_id FROM staged_exposures)
    ORDER BY user_id FOR KEY SHARE
), kept AS MATERIALIZED (
    SELECT {_COLUMNS} FROM staged_exposures s WHERE (s.user_id = '' OR s.user_id IN (SELECT k.user_id FROM known k))
    AND (s.origin_id IS NULL OR s.origin_id IN (SELECT k.user_id FROM known k))
), stored AS (
    INSERT INTO exposures ({_COLUMNS}) SELECT {_COLUMNS} FROM kept ON CONFLICT DO NOTHING
)
SELECT count(*) FROM kept
"""  # noqa: S608 - constant columns


class _Exposure(NamedTuple):
    exposure_id: UUID | str
    answer: Answer
    query: RecommendQuery
    persona_id: str
    answered_at: datetime


class Journal:
    """A bounded queue in front of the exposures table.

    What it can lose, and nothing else: when the process is killed, the exposures answered since the last write, which are at
    most those of ``journal_seconds`` and one write while PostgreSQL answers, and never more than the queue's bound; and those
    beyond the bound, which are dropped and counted. A drained process (SIGTERM) writes what is queued and loses none.
    Exposures of a customer forgotten in the meantime are not stored, and counted apart.
    """

    def __init__(self, pool: Pool, metrics: Metrics, *, bound: int, pause_seconds: float, new_id: Callable[[], UUID | str]) -> None:
        self._pool = pool
        self._metrics = metrics
        self._queue: deque[_Exposure] = deque()
        self._bound = bound
        self._pause = pause_seconds
        self._new_id = new_id
        self._writing = asyncio.Lock()

    @property
    def queued(self) -> int:
        """Exposures that wait to be written."""
        return len(self._queue)

    def log(self, answer: Answer, query: RecommendQuery, *, answered_at: datetime, persona_id: str = "") -> None:
        """Queues an exposure; never waits. ``persona_id`` is which of the customer's personas asked; empty: none is known."""
        if len(self._queue) >= self._bound:
            self._metrics.journal_dropped()
            return
        self._queue.append(_Exposure(self._new_id(), answer, query, persona_id, answered_at))

    async def run(self) -> None:
        """Writes what is queued until cancelled; while PostgreSQL is away it waits."""
        while True:
            await asyncio.sleep(self._pause)
            try:
                await self.flush()
            except psycopg.Error as error:
                _log.warning("exposures wait for PostgreSQL", error=type(error).__name__, queued=len(self._queue))

    async def flush(self) -> None:
        """Writes what is queued by now; what could not be written stays queued.

        What is answered meanwhile waits for the next turn: followed at once, it would be written a dozen rows at a time, which took
        as long as all else about an answer.
        """
        async with self._writing:
            left = len(self._queue)
            while left > 0:
                batch = list(islice(self._queue, min(left, _BATCH)))
                left -= len(batch)
                stored = await self._write(batch)
                for _ in batch:
                    self._queue.popleft()
                self._metrics.journal_written(stored)
                self._metrics.journal_forgotten(len(batch) - stored)

    async def _write(self, batch: list[_Exposure]) -> int:
        async with self._pool.connection() as connection, connection.transaction(), connection.cursor() as cursor:
            await cursor.execute(_STAGE)
            async with cursor.copy(_COPY) as copy:
                for start in range(0, len(batch), _AT_ONCE):
                    await copy.write("".join(map(_row, batch[start : start + _AT_ONCE])))
                    await asyncio.sleep(0)
            kept = await (await cursor.execute(_STORE)).fetchone()
        assert kept is not None
        return int(kept[0])


# Rows are written out here as COPY reads them: psycopg finds out the type of each field, and of each element of each list, anew, which
# took 35 of the 41 µs of a row.
def _row(exposure: _Exposure) -> str:
    """Returns the line of an exposure. What it shares with others that show the same page is written out once."""
    answer = exposure.answer
    shared = None if answer.forms is None else answer.forms.get(_ROW)
    if shared is None:
        shared = _shared(answer, exposure.query)
        if answer.forms is not None:
            answer.forms[_ROW] = shared
    origin_id = exposure.persona_id if exposure.persona_id not in ("", answer.user_id) else None
    return "\t".join(
        (
            shared,
            "\\N" if origin_id is None else _text(origin_id),
            str(exposure.exposure_id),
            str(bool(answer.degraded_reasons)),
            str(answer.stale),
            _text(text_array(answer.degraded_reasons)),
            f"{exposure.answered_at.isoformat()}\n",
        )
    )


def _shared(answer: Answer, query: RecommendQuery) -> str:
    versions = answer.versions
    return "\t".join(
        (
            _text(answer.user_id),
            _text(answer.slate_id),
            _text(query.channel),
            _text(query.surface),
            _text(query.search_text),
            _text(text_array(query.context_item_ids)),
            str(versions.user_version),
            _text(versions.model_version),
            str(versions.index_version),
            str(versions.offer_version),
            answer.as_of.isoformat(),
            str(read_page_token(query.page_token)[1] if query.page_token else 0),
            str(query.limit),
            str(query.filters != EVERYTHING),
            _text(text_array([item.item_id for item in answer.items])),
            number_array([item.position for item in answer.items]),
            number_array([item.score for item in answer.items]),
            number_array([item.card.price_micros for item in answer.items]),
            _text(text_array([item.card.currency for item in answer.items])),
            number_array([item.card.in_stock for item in answer.items]),
        )
    )


def _text(value: str) -> str:
    """Returns a text as COPY reads it."""
    return value.translate(_ESCAPES)
