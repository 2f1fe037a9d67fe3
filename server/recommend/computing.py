"""Bounded work: how many computations run and wait at a time, and one computation for all calls that want the same."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from server.errors import OverloadedError

T = TypeVar("T")


class Gate:
    """Lets ``slots`` through at a time and ``waiting`` more wait for their turn; the rest is turned away at once."""

    def __init__(self, *, slots: int, waiting: int, reason: str) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._inside = 0
        self._waiting = waiting
        self._reason = reason
        self.waiting_count = 0

    async def enter(self) -> None:
        """Takes a slot; ``leave`` gives it back.

        Raises:
            OverloadedError: too many wait already.
        """
        if not self._slots.locked():
            await self._slots.acquire()
            self._inside += 1
            return
        if self.waiting_count >= self._waiting:
            raise OverloadedError("too many calls wait to be computed; try again", reason=self._reason)
        self.waiting_count += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting_count -= 1
        self._inside += 1

    def leave(self) -> None:
        """Gives a slot back."""
        self._inside -= 1
        self._slots.release()

    @property
    def empty(self) -> bool:
        """True while nobody holds a slot or waits for one."""
        return not self._inside and not self.waiting_count

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Holds a slot for the body."""
        await self.enter()
        try:
            yield
        finally:
            self.leave()


class Computing:
    """Runs functions in threads behind a gate. A caller who leaves while waiting takes its place in the queue along."""

    def __init__(self, *, threads: int, waiting: int) -> None:
        self._gate = Gate(slots=threads, waiting=waiting, reason="COMPUTE_QUEUE_FULL")
        # Its own threads: what else runs in threads (loading models, building snapshots) must not hold up slates.
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="slate")

    @property
    def idle(self) -> bool:
        """True while nothing is computed and nothing waits for it."""
        return self._gate.empty

    async def run(self, function: Callable[..., T], *arguments: object, starting: Callable[[], None] = lambda: None) -> T:
        """Returns ``function(*arguments)``, computed in a thread; ``starting`` is called when its turn comes.

        Raises:
            OverloadedError: too many wait already.
        """
        await self._gate.enter()
        starting()
        work = partial(copy_context().run, function, *arguments)  # so that its spans and log lines are the call's
        thread = asyncio.get_running_loop().run_in_executor(self._threads, work)
        # A thread cannot be stopped: its slot is free when it ends, whether or not somebody still waits for it.
        thread.add_done_callback(self._ended)
        return await asyncio.shield(thread)

    def _ended(self, thread: "asyncio.Future[Any]") -> None:
        self._gate.leave()
        if not thread.cancelled():
            thread.exception()  # looked at: whoever waited for it may be gone


@dataclass
class _Flight:
    """A computation under way, how many wait for it, and whether it is past the point of being called off."""

    task: "asyncio.Task[Any]"
    waiting_count: int = 0
    started: bool = False


class Flights:
    """One computation per key, however many calls wait for it; the last one to leave before it has started calls it off."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: Hashable, compute: Callable[[Callable[[], None]], Coroutine[Any, Any, T]]) -> T:
        """Returns the result of ``compute``, starting it if nobody has; it calls its argument when it is too late to call it off."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._launch(key, compute)
        flight.waiting_count += 1
        try:
            result: T = await asyncio.shield(flight.task)
            return result
        finally:
            flight.waiting_count -= 1
            if not flight.waiting_count and not flight.started:
                flight.task.cancel()
                self._land(key, flight)  # at once: who comes next must not join a flight that was called off

    def _launch(self, key: Hashable, compute: Callable[[Callable[[], None]], Coroutine[Any, Any, T]]) -> _Flight:
        def start() -> None:
            flight.started = True

        flight = _Flight(asyncio.create_task(compute(start)))
        self._flights[key] = flight
        flight.task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    def _land(self, key: Hashable, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # looked at, so that a failure nobody waits for any more is not reported as forgotten
