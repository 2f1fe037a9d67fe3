"""Micro-batching: what waits while others are computed runs together, as far as the model allows and padding pays."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Sequence
from contextvars import Context
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from server.errors import OverloadedError

P = TypeVar("P")
R = TypeVar("R")

# What a run costs besides its tokens, in tokens: MiniLM on one core takes 2.4 ms + 0.24 ms a token (docs/LOG.md, 2026-11-30).
RUN_TOKENS = 10
# Tokens of a run, padding counted. With 256 what a run costs besides is 4 % of it, and a slate that waits for it waits 40 ms.
BATCH_TOKENS = 256


class Sharing(Enum):
    """With what a row may share a run without a bit of its result changing."""

    NONE = "none"
    EQUAL_LENGTH = "equal length"
    ANY_LENGTH = "any length"


@dataclass(frozen=True)
class Row(Generic[P]):
    """One input that waits to be computed.

    Attributes:
        lane: rows of different lanes never share a run: another model, another output.
        length: tokens.
        sharing: the same for all rows of a lane.
        payload: what is handed to the computation.
    """

    lane: Hashable
    length: int
    sharing: Sharing
    payload: P


def choose(waiting: Sequence[Row[Any]], budget: int) -> list[int]:
    """The cost rule: returns the places in ``waiting`` of what runs next, in order.

    The one that waits longest runs, so that nothing waits for ever. Beside it run those nearest to it in length, while rows × the
    longest of them stay within ``budget`` tokens, and the padding among these costs no more than the run it saves.
    """
    first = waiting[0]
    if first.sharing is Sharing.NONE:
        return [0]
    able = [place for place, row in enumerate(waiting) if row.lane == first.lane]
    if first.sharing is Sharing.EQUAL_LENGTH:
        able = [place for place in able if waiting[place].length == first.length]
    chosen, longest, filled = [0], first.length, first.length
    for place in sorted(able, key=lambda place: abs(waiting[place].length - first.length)):
        if place == 0:
            continue
        length = waiting[place].length
        computed = (len(chosen) + 1) * max(longest, length)
        if computed > budget or computed - filled - length > RUN_TOKENS:
            break
        chosen.append(place)
        longest, filled = max(longest, length), filled + length
    return sorted(chosen)


class Pool(Protocol):
    """Runs functions in a bounded number of threads; see server.recommend.computing."""

    def run(self, function: Callable[..., R], *arguments: object, starting: Callable[[], None]) -> Coroutine[Any, Any, R]:
        """Returns the function's result; ``starting`` is called when its turn comes, before the thread begins."""
        ...


@dataclass(frozen=True)
class _Waiting(Generic[P, R]):
    row: Row[P]
    done: "asyncio.Future[R]"


class Batcher(Generic[P, R]):
    """Computes rows in batches. It waits for no company: what runs together is what piled up while the threads were busy.

    What a batch holds is chosen when a thread is free for it, so a row whose caller has left by then is never computed.

    Args:
        compute: payloads of one lane to one result each, in order; called in a thread.
        pool: whose threads it is called in.
        batches: how many are under way at a time; more than the pool has threads brings nothing.
        budget: tokens of one batch, padding counted.
        waiting: rows that may wait.
    """

    def __init__(self, compute: Callable[[Sequence[P]], Sequence[R]], pool: Pool, *, batches: int, budget: int, waiting: int) -> None:
        self._compute = compute
        self._pool = pool
        self._batches = batches
        self._budget = budget
        self._most = waiting
        self._queue: list[_Waiting[P, R]] = []
        self._running: set[asyncio.Task[None]] = set()

    @property
    def waiting_count(self) -> int:
        """Rows that wait to be computed."""
        return len(self._queue)

    async def results(self, rows: Sequence[Row[P]]) -> list[R]:
        """Returns the results of rows, in order.

        Raises:
            OverloadedError: too many wait already; none of these is computed.
        """
        if len(self._queue) + len(rows) > self._most:
            raise OverloadedError("too many texts wait to be encoded; try again", reason="ENCODE_QUEUE_FULL")
        loop = asyncio.get_running_loop()
        waiting = [_Waiting[P, R](row, loop.create_future()) for row in rows]
        self._queue.extend(waiting)
        self._start()
        try:
            return await asyncio.gather(*(one.done for one in waiting))
        except BaseException:  # whoever leaves takes along what has not been computed
            for one in waiting:
                one.done.cancel()
            self._queue = [one for one in self._queue if not one.done.done()]
            raise

    def _start(self) -> None:
        if self._queue and len(self._running) < self._batches:
            # A context of its own: the batch is not the call's whose row happened to start it.
            task = asyncio.create_task(self._run_batch(), context=Context())
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self._start()

    async def _run_batch(self) -> None:
        batch: list[_Waiting[P, R]] = []
        try:
            results = await self._pool.run(self._computed, batch, starting=partial(self._take, batch))
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the waiting calls, not to this loop
            self._fail(batch, error)
            return
        for one, result in zip(batch, results, strict=True):
            if not one.done.done():
                one.done.set_result(result)

    def _take(self, batch: list[_Waiting[P, R]]) -> None:
        """Moves what runs next from the queue to ``batch``; nothing when all that waited have left."""
        if not self._queue:
            return
        chosen = choose([one.row for one in self._queue], self._budget)
        batch.extend(self._queue[place] for place in chosen)
        for place in reversed(chosen):
            del self._queue[place]
        self._start()  # the next one gets in line at once

    def _computed(self, batch: Sequence[_Waiting[P, R]]) -> Sequence[R]:
        return self._compute([one.row.payload for one in batch]) if batch else ()

    def _fail(self, batch: list[_Waiting[P, R]], error: Exception) -> None:
        """Tells those whose batch failed; where it did not even begin, the pool is full, and so everybody that waits."""
        failed = batch or self._queue
        if not batch:
            self._queue = []
        for one in failed:
            if not one.done.done():
                one.done.set_exception(error)
