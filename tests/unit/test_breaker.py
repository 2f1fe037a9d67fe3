"""The circuit breaker: refuses while a store is away, lets nobody pay for a probe, and closes only once the store has caught up."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from server.online.breaker import BreakerRules, CircuitBreaker


class StoreError(Exception):
    pass


class RefusedError(Exception):
    pass


@dataclass
class Store:
    """A store whose answers take as long as told, on a clock that only moves when told."""

    away: bool = False
    probes: int = 0
    changes: list[bool] = field(default_factory=list)
    time: float = 0.0

    async def probe(self) -> None:
        self.probes += 1
        if self.away:
            raise StoreError

    def breaker(self) -> CircuitBreaker:
        rules = BreakerRules(
            failures=3,
            slow_seconds=0.1,
            hang_seconds=0.1,
            pause_seconds=1.0,
            probe_seconds=0.05,
            is_failure=lambda error: isinstance(error, StoreError),
            refusal=RefusedError,
        )
        return CircuitBreaker(rules, probe=self.probe, concurrency=4, on_change=self.changes.append, clock=lambda: self.time)

    async def call(self, breaker: CircuitBreaker, *, seconds: float = 0.0, error: BaseException | None = None) -> None:
        async with breaker.call():
            self.time += seconds
            if error is not None:
                raise error


async def fail(store: Store, breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        with pytest.raises(StoreError):
            await store.call(breaker, error=StoreError())


async def test_it_opens_after_failures_in_a_row_and_then_refuses() -> None:
    store = Store()
    breaker = store.breaker()
    await fail(store, breaker, 2)
    await store.call(breaker)  # one that works starts the count again
    await fail(store, breaker, 2)
    assert not breaker.is_open
    await fail(store, breaker, 1)
    assert breaker.is_open
    with pytest.raises(RefusedError):
        await store.call(breaker)
    assert store.changes == [True]


async def test_slow_calls_count_but_a_slow_event_loop_does_not() -> None:
    store = Store()
    breaker = store.breaker()
    for _ in range(3):
        await store.call(breaker, seconds=0.2)
    assert breaker.is_open
    patient = store.breaker()
    patient._lag = 0.06
    for _ in range(3):
        await store.call(patient, seconds=0.2)
    assert not patient.is_open


async def test_an_error_that_is_an_answer_does_not_count() -> None:
    store = Store()
    breaker = store.breaker()
    for _ in range(9):
        with pytest.raises(ValueError, match="no"):
            await store.call(breaker, error=ValueError("no"))
    assert not breaker.is_open


@pytest.mark.parametrize(("seconds", "opens"), [(0.01, False), (0.2, True)])
async def test_callers_who_give_up_count_if_they_waited_long(seconds: float, opens: bool) -> None:
    store = Store()
    breaker = store.breaker()
    for _ in range(3):
        with pytest.raises(asyncio.CancelledError):
            await store.call(breaker, seconds=seconds, error=asyncio.CancelledError())
    assert breaker.is_open is opens


async def test_a_probe_closes_it_when_the_store_answers() -> None:
    store = Store(away=True)
    breaker = store.breaker()
    await fail(store, breaker, 3)
    await breaker.attempt()
    assert breaker.is_open
    store.away = False
    await breaker.attempt()
    assert (breaker.is_open, breaker.behind, store.probes) == (False, False, 2)
    await store.call(breaker)
    assert store.changes == [True, False]


async def test_a_probe_that_hangs_is_given_up() -> None:
    store = Store()
    breaker = store.breaker()
    await fail(store, breaker, 3)
    breaker._probe = lambda: asyncio.sleep(60)
    async with asyncio.timeout(1):
        await breaker.attempt()
    assert breaker.is_open


async def test_the_probe_catches_up_before_and_after_callers_come_back() -> None:
    store = Store()
    breaker = store.breaker()
    await fail(store, breaker, 3)
    states: list[tuple[bool, bool]] = []

    async def catch_up() -> bool:
        states.append((breaker.is_open, breaker.behind))
        await store.call(breaker)  # what catches up passes the open breaker; nobody else does
        return len(states) != 2

    breaker.catch_up = catch_up
    await breaker.attempt()
    assert states == [(True, False), (False, True)]
    assert (breaker.is_open, breaker.behind) == (False, True)
    await breaker.attempt()
    assert not breaker.behind


async def test_a_store_that_fails_while_catching_up_stays_away() -> None:
    store = Store()
    breaker = store.breaker()
    await fail(store, breaker, 3)

    async def catch_up() -> bool:
        raise StoreError

    breaker.catch_up = catch_up
    await breaker.attempt()
    assert breaker.is_open


async def test_callers_pass_no_open_breaker_while_it_probes() -> None:
    store = Store()
    breaker = store.breaker()
    await fail(store, breaker, 3)
    seen: list[type[BaseException]] = []

    async def catch_up() -> bool:
        caller = asyncio.get_running_loop().create_task(outside(), context=before)
        await caller
        return True

    async def outside() -> None:
        try:
            await store.call(breaker)
        except RefusedError as error:
            seen.append(type(error))

    import contextvars

    before = contextvars.copy_context()
    breaker.catch_up = catch_up
    await breaker.attempt()
    assert seen[0] is RefusedError


async def test_calls_beyond_the_connections_wait_and_are_refused_once_it_opens() -> None:
    store = Store()
    breaker = store.breaker()
    gate = asyncio.Event()

    async def held(act: Callable[[], Awaitable[object]]) -> None:
        async with breaker.call():
            await act()
            raise StoreError

    calls = [asyncio.create_task(held(gate.wait)) for _ in range(7)]
    await asyncio.sleep(0)
    gate.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(outcome, StoreError) for outcome in outcomes) >= 4
    assert isinstance(outcomes[-1], RefusedError)


async def test_run_probes_every_pause() -> None:
    store = Store(away=True)
    breaker = store.breaker()
    await fail(store, breaker, 3)
    loop = asyncio.create_task(breaker.run())
    async with asyncio.timeout(2):
        while not store.probes:
            store.time += 0.6
            await asyncio.sleep(0.02)
        store.away = False
        while breaker.is_open:
            store.time += 0.6
            await asyncio.sleep(0.02)
    loop.cancel()


async def test_a_read_that_hung_is_not_believed() -> None:
    store = Store()
    breaker = store.breaker()
    with pytest.raises(RefusedError):
        async with breaker.call(in_time=True):
            store.time += 0.2  # the store was frozen; what it says now may be older than what others answered meanwhile
    async with breaker.call(in_time=True):
        store.time += 0.05
    with pytest.raises(RefusedError):
        async with breaker.call(in_time=True):
            await fail(store, breaker, 3)  # others found it away while this one waited


async def test_it_is_relied_on_only_once_that_is_announced_and_what_was_shown_before_is_caught_up() -> None:
    store = Store()
    breaker = store.breaker()
    seen: list[tuple[str, bool, bool]] = []

    async def catch_up() -> bool:
        seen.append(("catch up", breaker.relied_on, breaker.behind))
        return True

    async def announce() -> None:
        seen.append(("announce", breaker.relied_on, breaker.behind))

    breaker.catch_up, breaker.announce = catch_up, announce
    breaker.on_doubt = lambda: seen.append(("doubt", breaker.relied_on, breaker.behind))
    await fail(store, breaker, 3)
    await breaker.attempt()
    assert seen == [("doubt", False, False), ("catch up", False, False), ("announce", True, True), ("catch up", True, True)]
    assert (breaker.relied_on, breaker.behind) == (True, False)


async def test_a_store_whose_return_cannot_be_announced_stays_behind() -> None:
    store = Store()
    breaker = store.breaker()

    async def announce() -> None:
        raise StoreError

    breaker.announce = announce
    await fail(store, breaker, 3)
    await breaker.attempt()
    assert (breaker.is_open, breaker.behind, breaker.relied_on) == (False, True, False)


async def test_a_doubt_while_it_catches_up_is_not_forgotten() -> None:
    store = Store()
    breaker = store.breaker()
    doubts = iter([True, False])

    async def announce() -> None:
        if next(doubts):  # such as a lease that had lapsed before the announcement
            breaker.doubt()

    breaker.announce = announce
    breaker.doubt()
    assert (breaker.behind, breaker.relied_on) == (True, False)
    await breaker.attempt()
    assert (breaker.behind, breaker.relied_on) == (True, False)
    await breaker.attempt()
    assert (breaker.behind, breaker.relied_on) == (False, True)


async def test_two_attempts_at_a_time_are_one_after_the_other() -> None:
    store = Store()
    breaker = store.breaker()
    announced: list[bool] = []

    async def announce() -> None:
        await asyncio.sleep(0.01)
        announced.append(breaker.relied_on)  # the end of the other attempt must not take this back

    breaker.announce = announce
    breaker.doubt()
    await asyncio.gather(breaker.attempt(), breaker.attempt())
    assert announced == [True, True]


async def test_a_suspicion_opens_it_only_when_no_probe_is_answered() -> None:
    store = Store(away=True)
    breaker = store.breaker()

    async def second_time() -> None:
        store.probes += 1
        if store.probes == 1:
            raise StoreError

    breaker._probe = second_time
    await breaker.examine(tries=2)
    assert not breaker.is_open
    breaker._probe = store.probe
    await breaker.examine(tries=2)
    assert (breaker.is_open, store.probes) == (True, 4)
