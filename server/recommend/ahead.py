"""User vectors computed before anybody asks: the answer that follows an event finds its longest part done, or well under way."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

import structlog

from features.activity import ACTIVITY_VIEW, activity_of
from features.behaviour import ACTIVITY_LENGTH, OPINIONS, Activity, Behaviour
from server.domain import IncomingEvent, Subject
from server.ingest.identities import Known
from server.online.states import Features
from server.recommend.computing import Computing
from server.recommend.snapshot import Snapshot
from server.tracing import span

_log = structlog.get_logger(__name__)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Runs that nobody made use of, in so many seconds: of MiniLM on 64 tokens they are 2 % of a core. One that is made use of is no work more.
_UNUSED, _SECONDS = 8, 8.0


class Online(Protocol):
    """What is read of the online store."""

    @property
    def certain(self) -> bool:
        """True while the online store holds all that was shown."""
        ...

    async def user_features(self, user_id: str, now: datetime) -> Features:
        """Returns all views of a customer."""
        ...


class Identities(Protocol):
    """Who is who."""

    async def customer_of(self, subject: Subject) -> Known:
        """Returns the customer behind a subject."""
        ...


@dataclass
class _Run:
    """A run of the user tower, done for a customer who is known once identified."""

    task: "asyncio.Task[None] | None" = None
    user_id: str = ""

    @property
    def busy(self) -> bool:
        return self.task is not None and not self.task.done()


class Ahead:
    """Runs the user tower for a customer who is acting, while PostgreSQL commits the event, when nothing else is computed here.

    The customer's behaviours are guessed: those online and the new one. The guess leaves nothing behind but what the model
    remembers of its own runs (see LoadedModel), which is a function of behaviours: an answer is the same with it, without it and
    where it was wrong (an event that was stored already, or came late among others of its time), and that costs a run of the
    encoder. There is no queue: a customer whose turn is not now has none.

    Args:
        computing: the threads that slates are computed in.
        identities: who acts.
        online: what they did before.
        current: returns the snapshot that answers just now.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        computing: Computing,
        identities: Identities,
        online: Online,
        *,
        current: Callable[[], Snapshot | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._computing = computing
        self._identities = identities
        self._online = online
        self._current = current
        self._clock = clock
        self._unused: list[tuple[str, float]] = []
        self._run = _Run()

    def arriving(self, events: Sequence[IncomingEvent]) -> None:
        """Starts on the vector of a customer whose one event is about to be recorded: many events are no time for work that can wait."""
        snapshot, now = self._current(), self._clock()
        self._unused = [(user_id, since) for user_id, since in self._unused if now - since < _SECONDS]
        if len(events) != 1 or snapshot is None or snapshot.model is None or self._busy or len(self._unused) >= _UNUSED:
            return
        if self._online.certain:
            self._run = _Run()
            self._run.task = asyncio.create_task(self._compute(self._run, snapshot, events[0]))

    async def asked(self, user_id: str) -> None:
        """Waits for the run of a customer about whom an answer is to be computed, if it is under way."""
        for place, (acted, _) in enumerate(self._unused):
            if acted == user_id:
                del self._unused[place]
                break
        if self._run.task is not None and self._run.user_id == user_id:
            await asyncio.wait([self._run.task])

    @property
    def _busy(self) -> bool:
        return not self._computing.idle or self._run.busy

    async def _compute(self, run: _Run, snapshot: Snapshot, event: IncomingEvent) -> None:
        try:
            with span("user_vector"):
                user_id = (await self._identities.customer_of(event.subject)).user_id
                if not user_id:  # the customer's first event of all: the next one finds them
                    return
                run.user_id = user_id
                self._unused.append((user_id, self._clock()))
                activity = activity_of((await self._online.user_features(user_id, datetime.now(UTC)))[ACTIVITY_VIEW])
                if activity is not None:
                    await self._computing.run(_vector, snapshot, _after(activity, event))
        except Exception as error:  # noqa: BLE001 - an answer that needs this vector will fail likewise, and tell its caller
            _log.warning("no user vector ahead of the answer", error=type(error).__name__)


def _after(activity: Activity, event: IncomingEvent) -> Activity:
    """Returns the activity that an event will lead to, as far as vectors depend on it."""
    at = (event.occurred_at - _EPOCH) // timedelta(microseconds=1)
    rated = f"{round(event.value, 1):g} of 5" if event.action in OPINIONS and event.value is not None else ""
    words = ": ".join(filter(None, (rated, event.text)))  # as user_activity_at writes them
    new = Behaviour(event.item_id or "", event.action, event.channel, at, words[:160])
    behaviours = sorted((new, *activity.behaviours), key=lambda behaviour: -behaviour.occurred_at)
    return replace(activity, behaviours=tuple(behaviours[:ACTIVITY_LENGTH]))


def _vector(snapshot: Snapshot, activity: Activity) -> None:
    assert snapshot.model is not None
    snapshot.model.user_vector(activity, snapshot.table, snapshot.vectors)
