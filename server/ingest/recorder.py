"""Group commit: events of concurrent calls share one transaction, then their customers become visible in Redis together.

While one group is made visible the next is committed: PostgreSQL and this process each have a core to themselves. All groups that
were committed meanwhile are made visible together, so a customer of several of them is recomputed once.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import psycopg
import structlog

from server.domain import IncomingEvent, RecordOutcome
from server.errors import OverloadedError
from server.ingest.writer import EventWriter, Written
from server.metrics import Metrics
from server.online.states import UserStates
from server.tracing import Origin, on_behalf_of, origin, span

_log = structlog.get_logger(__name__)


@dataclass
class _Waiting:
    events: Sequence[IncomingEvent]
    done: "asyncio.Future[tuple[Written, bool]]"
    since: float
    origin: Origin


class EventRecorder:
    """Collects events while a transaction is under way and commits them together in the next one.

    Batching by waiting for the previous commit needs no timer: a lone call commits at once, a busy server commits large groups.

    Attributes:
        arriving: told the events of a call before they are recorded; it must return at once.
    """

    def __init__(self, writer: EventWriter, states: UserStates, metrics: Metrics, *, queue_events: int, batch_events: int) -> None:
        self._writer = writer
        self._states = states
        self._metrics = metrics
        self._queue: deque[_Waiting] = deque()
        self._queued_events = 0
        self._queue_events = queue_events
        self._batch_events = batch_events
        self._wake = asyncio.Event()
        self._committed: list[tuple[_Waiting, Written]] = []
        self._publishing_events = 0
        self._wake_publishing = asyncio.Event()
        self.arriving: Callable[[Sequence[IncomingEvent]], None] = _nobody

    @property
    def queued_events(self) -> int:
        """Events that wait to be committed."""
        return self._queued_events

    async def record(self, events: Sequence[IncomingEvent]) -> RecordOutcome:
        """Stores events and makes them visible; returns after PostgreSQL committed, and Redis holds their customers or is away.

        Raises:
            OverloadedError: the queue is full; nothing was stored.
            psycopg.Error: PostgreSQL did not commit (or its answer was lost: retry with the same event ids).
        """
        if self._queued_events + len(events) > self._queue_events:
            raise OverloadedError("too many events are waiting to be committed", reason="INGEST_QUEUE_FULL")
        waiting = _Waiting(events, asyncio.get_running_loop().create_future(), perf_counter(), origin())
        self._queue.append(waiting)
        self._queued_events += len(events)
        self._wake.set()
        with span("record"):
            self.arriving(events)
            written, online = await waiting.done
        statuses = [outcome.status for outcome in written.outcomes]
        for status in set(statuses):
            self._metrics.events(status.value, statuses.count(status))
        return RecordOutcome(written.outcomes, written.tokens, online)

    async def run(self) -> None:
        """Commits batches and makes them visible until cancelled."""
        await asyncio.gather(self._run_commits(), self._run_publishing())

    async def _run_commits(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            # What is committed sooner would wait for the publishing under way all the same, in a smaller group: as many events
            # as that holds keep both halves at work, and of 4,000 under way touch 0.45 customers an event instead of 0.7.
            while self._queue and self._queued_events >= min(self._publishing_events, self._batch_events):
                batch = self._take()
                with on_behalf_of([waiting.origin for waiting in batch], "group commit"):
                    await self._commit(batch)

    async def _run_publishing(self) -> None:
        while True:
            await self._wake_publishing.wait()
            self._wake_publishing.clear()
            group, self._committed = self._committed, []
            self._publishing_events = sum(len(waiting.events) for waiting, _ in group)
            with on_behalf_of([waiting.origin for waiting, _ in group], "group publish"):
                online = await self._publish([written for _, written in group])
            for waiting, written in group:
                _settle(waiting, (written, online))
            self._publishing_events = 0
            self._wake.set()

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        count = 0
        while self._queue and (not batch or count + len(self._queue[0].events) <= self._batch_events):
            waiting = self._queue.popleft()
            count += len(waiting.events)
            batch.append(waiting)
        self._queued_events -= count
        return batch

    async def _commit(self, batch: list[_Waiting]) -> None:
        started = perf_counter()
        for waiting in batch:
            self._metrics.observe_ingest_stage("queue", started - waiting.since)
        try:
            with span("commit"):
                written = await self._writer.write([waiting.events for waiting in batch])
        except psycopg.DataError as error:
            await self._commit_apart(batch, error)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the waiting calls, not to this loop
            for waiting in batch:
                _settle(waiting, error)
            return
        self._metrics.observe_ingest_stage("commit", perf_counter() - started)
        self._committed += zip(batch, written, strict=True)
        self._wake_publishing.set()

    async def _commit_apart(self, batch: list[_Waiting], error: psycopg.DataError) -> None:
        """One call's bad value must not fail its neighbours: each call is committed by itself."""
        if len(batch) == 1:
            _settle(batch[0], error)
            return
        for waiting in batch:
            await self._commit([waiting])

    async def _publish(self, written: Sequence[Written]) -> bool:
        """Recomputes the customers concerned and writes them to Redis; if that fails the outbox still names them."""
        users = sorted({token.user_id for part in written for token in part.tokens})
        started = perf_counter()
        try:
            with span("online_write"):
                versions = await self._states.refresh(users)
        except Exception as error:  # noqa: BLE001 - whatever it is, the events are committed, and later calls wait for this loop
            _log.warning("online store missed a write; the outbox holds it", error=type(error).__name__, users=len(users))
            self._writer.missed()
            return False
        self._metrics.observe_ingest_stage("online_write", perf_counter() - started)
        self._writer.caught_up(versions)
        return True


def _nobody(_events: Sequence[IncomingEvent]) -> None:
    pass


def _settle(waiting: _Waiting, result: tuple[Written, bool] | Exception) -> None:
    if waiting.done.done():  # the caller was cancelled; its events are stored all the same
        return
    if isinstance(result, Exception):
        waiting.done.set_exception(result)
    else:
        waiting.done.set_result(result)
