"""A circuit breaker: while a store does not answer, calls to it fail at once instead of each waiting for its own timeout."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType

import structlog

_log = structlog.get_logger(__name__)
_TICK = 0.05  # seconds between looks at the event loop's own lag and at whether a probe is due

# True in the task that probes and catches up: its own calls pass an open breaker.
_probing: ContextVar[bool] = ContextVar("probing", default=False)


@dataclass(frozen=True)
class BreakerRules:
    """When a store counts as away.

    Attributes:
        failures: opens after this many calls in a row that failed or were slow.
        slow_seconds: a call that succeeds after longer than this counts as one that failed.
        hang_seconds: so does a call whose caller gave up after at least this long.
        pause_seconds: time between probes of a store that is away.
        probe_seconds: longest time a probe may take.
        is_failure: says of an exception whether it means that the store is away.
        refusal: makes the exception of a call that is not let through.
    """

    failures: int
    slow_seconds: float
    hang_seconds: float
    pause_seconds: float
    probe_seconds: float
    is_failure: Callable[[BaseException], bool]
    refusal: Callable[[], Exception]


async def _certain() -> bool:
    return True


async def _nobody() -> None:
    pass


def _nothing() -> None:
    pass


def _unnoticed(_is_open: bool) -> None:
    pass


class CircuitBreaker:
    """Closed: calls pass and are watched. Open: they are refused within microseconds, and a probe runs every pause.

    No caller pays for a probe: ``run`` makes it (half-open). When it succeeds, ``catch_up`` brings the store up to date before
    callers see it, and once more after the first of them may have: until that is done the store is ``behind``. In between
    ``announce`` tells whoever acts on it that this process relies on the store again: what they show from then on is in the store,
    and what they showed before, the second ``catch_up`` brings there.

    Attributes:
        is_open: True while calls are refused.
        behind: True while the store answers but may lag behind what was already shown without it.
        catch_up: brings the store up to date; returns False when it cannot be sure to have.
        announce: returns when it is known that the store is ``relied_on``.
        on_doubt: called when it no longer is.
    """

    def __init__(
        self,
        rules: BreakerRules,
        *,
        probe: Callable[[], Awaitable[object]],
        concurrency: int = 1_000_000,
        on_change: Callable[[bool], None] = _unnoticed,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._rules = rules
        self._probe = probe
        self._slots = asyncio.Semaphore(concurrency)
        self._on_change = on_change
        self._clock = clock
        self._streak = 0
        self._lag = 0.0
        self._due = 0.0
        self._attempting = asyncio.Lock()
        self._announcing = False
        self._doubts = 0
        self.is_open = False
        self.behind = False
        self.catch_up: Callable[[], Awaitable[bool]] = _certain
        self.announce: Callable[[], Awaitable[None]] = _nobody
        self.on_doubt: Callable[[], None] = _nothing

    @property
    def relied_on(self) -> bool:
        """True while what the store answers is believed, and from just before: from when it is announced."""
        return not self.is_open and (self._announcing or not self.behind)

    def doubt(self) -> None:
        """Puts the store ``behind`` until it has been announced and caught up anew, which is tried at once."""
        self.behind, self._due = True, self._clock()
        self._disown()

    def call(self, *, in_time: bool = False) -> "_Call":
        """Returns an async context for one call to the store; entering it raises the rules' refusal while the breaker is open.

        With ``in_time``, leaving it raises the refusal too when the call succeeded but was slow, or the breaker opened meanwhile:
        what a store says after it hung may be older than what was answered without it in that time.
        """
        return _Call(self, in_time=in_time)

    async def run(self) -> None:
        """Probes a store that is away, and measures how late the event loop is, until cancelled."""
        while True:
            before = self._clock()
            await asyncio.sleep(_TICK)
            self._lag = max(0.0, self._clock() - before - _TICK)
            if (self.is_open or self.behind) and self._clock() >= self._due:
                await self.attempt()

    async def attempt(self) -> None:
        """Probes once; closes the breaker when the store answers and has caught up."""
        async with self._attempting:
            await self._attempt()

    async def _attempt(self) -> None:
        token = _probing.set(True)
        try:
            async with asyncio.timeout(self._rules.probe_seconds):
                await self._probe()
            certain = await self.catch_up()
            if self.is_open:
                self._close()
            if certain:  # what was written between its last look and the announcement is still missing
                doubts, self._announcing = self._doubts, True
                await self.announce()
                certain = await self.catch_up()
                self.behind = not certain or self._doubts != doubts
        except Exception as error:  # noqa: BLE001 - whatever it is, the store cannot be used yet
            _log.debug("store still away", error=type(error).__name__)
        finally:
            self._announcing = False
            _probing.reset(token)
            self._due = self._clock() + self._rules.pause_seconds

    async def examine(self, *, tries: int = 1) -> None:
        """Probes the store for somebody who suspects that it is away, and opens when no try is answered."""
        for _ in range(tries):
            if self.is_open:
                return
            try:
                async with asyncio.timeout(self._rules.probe_seconds):
                    await self._probe()
            except Exception as error:  # noqa: BLE001 - whatever it is, the store did not answer
                problem = error
            else:
                return
        if not self.is_open:
            self._open(problem)

    def _admit(self) -> None:
        if self.is_open and not _probing.get():
            raise self._rules.refusal()

    def _ended(self, seconds: float, error: BaseException | None) -> bool:
        """Takes note of a call's end; says whether it speaks against the store."""
        if isinstance(error, asyncio.CancelledError):
            if seconds < self._rules.hang_seconds:
                return False  # a caller who leaves early says nothing of the store
            failed = True
        else:
            # A late loop makes every call look slow twice: when it is sent and when its answer is read.
            failed = seconds - 2 * self._lag > self._rules.slow_seconds or (error is not None and self._rules.is_failure(error))
        self._streak = self._streak + 1 if failed else 0
        if self._streak >= self._rules.failures and not self.is_open:
            self._open(error)
        return failed

    def _open(self, error: BaseException | None) -> None:
        self.is_open = True
        self._due = self._clock() + self._rules.pause_seconds
        self._on_change(True)
        self._disown()
        _log.error("store away; calls to it fail at once", error=type(error).__name__ if error else "slow")

    def _disown(self) -> None:
        self._announcing = False
        self._doubts += 1
        self.on_doubt()

    def _close(self) -> None:
        self.is_open, self.behind, self._streak = False, True, 0
        self._on_change(False)
        _log.info("store back")


class _Call:
    """One call on its way through the breaker."""

    __slots__ = ("_breaker", "_in_time", "_started")

    def __init__(self, breaker: CircuitBreaker, *, in_time: bool) -> None:
        self._breaker = breaker
        self._in_time = in_time
        self._started = 0.0

    async def __aenter__(self) -> None:
        breaker = self._breaker
        breaker._admit()
        await breaker._slots.acquire()
        try:
            breaker._admit()  # it may have opened while we waited
        except BaseException:
            breaker._slots.release()
            raise
        self._started = breaker._clock()

    async def __aexit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        breaker = self._breaker
        breaker._slots.release()
        failed = breaker._ended(breaker._clock() - self._started, error)
        if self._in_time and error is None and not _probing.get() and (failed or breaker.is_open):
            raise breaker._rules.refusal()
