"""User vectors computed before anybody asks: the answer that follows an event finds its longest part done, or well under way."""

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import structlog

from features.activity import UserState, UserStateCodec
from server.recommend.computing import Computing
from server.recommend.snapshot import Snapshot
from server.tracing import span

_log = structlog.get_logger(__name__)
# Runs that nobody made use of, in so many seconds: of MiniLM on 64 tokens they are 2 % of a core. One that is made use of is no work more.
_UNUSED, _SECONDS = 8, 8.0


class Ahead:
    """Runs the user tower for a customer who has just acted, when nothing else is computed here.

    It leaves nothing behind but what the model remembers of its own runs (see LoadedModel), which is a function of the customer's
    behaviours: an answer is the same with it and without. There is no queue: a customer whose turn is not now has none.

    Args:
        computing: the threads that slates are computed in.
        codec: reads states.
        current: returns the snapshot that answers just now.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        computing: Computing,
        codec: UserStateCodec,
        *,
        current: Callable[[], Snapshot | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._computing = computing
        self._codec = codec
        self._current = current
        self._clock = clock
        self._unused: list[tuple[str, float]] = []
        self._running: tuple[str, asyncio.Task[None]] | None = None

    def committed(self, states: Sequence[UserState]) -> None:
        """Starts on the vector of the one customer who has acted; of several none: many events are no time for work that can wait."""
        snapshot, now = self._current(), self._clock()
        self._unused = [(user_id, since) for user_id, since in self._unused if now - since < _SECONDS]
        if len(states) != 1 or snapshot is None or self._busy or len(self._unused) >= _UNUSED:
            return
        user_id = states[0].user_id
        self._unused.append((user_id, now))
        self._running = user_id, asyncio.create_task(self._run(snapshot, states[0]))

    async def asked(self, user_id: str) -> None:
        """Waits for the run of a customer about whom an answer is to be computed, if it is under way."""
        for place, (acted, _) in enumerate(self._unused):
            if acted == user_id:
                del self._unused[place]
                break
        if self._running is not None and self._running[0] == user_id:
            await asyncio.wait([self._running[1]])

    @property
    def _busy(self) -> bool:
        return not self._computing.idle or (self._running is not None and not self._running[1].done())

    async def _run(self, snapshot: Snapshot, state: UserState) -> None:
        try:
            with span("user_vector"):
                await self._computing.run(self._vector, snapshot, state)
        except Exception as error:  # noqa: BLE001 - an answer that needs this vector will fail likewise, and tell its caller
            _log.warning("no user vector ahead of the answer", error=type(error).__name__)

    def _vector(self, snapshot: Snapshot, state: UserState) -> None:
        activity = self._codec.activity_of(state, datetime.now(UTC))
        if activity is not None and snapshot.model is not None:
            snapshot.model.user_vector(activity, snapshot.table, snapshot.vectors)
