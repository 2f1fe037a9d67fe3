"""The batcher over plain functions: what runs together, what is never run, who is turned away, and who is told of a failure."""

import asyncio
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from server.errors import OverloadedError
from server.inference.batching import BATCH_TOKENS, RUN_TOKENS, Batcher, Row, Sharing, choose
from server.recommend.computing import Computing


def rows(*lengths: int, sharing: Sharing = Sharing.ANY_LENGTH, lane: str = "m1") -> list[Row[int]]:
    return [Row(lane, length, sharing, place) for place, length in enumerate(lengths)]


class Encoder:
    """Doubles numbers in a thread, when it is let; ``batches`` is what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.error: Exception | None = None

    def __call__(self, payloads: Sequence[int]) -> list[int]:
        self.free.wait(5)
        self.batches.append(list(payloads))
        if self.error is not None:
            raise self.error
        return [2 * payload for payload in payloads]


def batcher(encoder: Encoder, *, threads: int = 1, waiting: int = 100, pool_waiting: int = 10, budget: int = 100) -> Batcher[int, int]:
    pool = Computing(threads=threads, waiting=pool_waiting)
    return Batcher(encoder, pool, batches=threads, budget=budget, waiting=waiting)


def piece(payload: int, *, length: int = 10, **more: Any) -> list[Row[int]]:
    return [Row(more.get("lane", "m1"), length, more.get("sharing", Sharing.ANY_LENGTH), payload)]


async def begun(*calls: Any) -> "list[asyncio.Task[list[int]]]":
    """Starts calls one after the other, each as far as it gets."""
    tasks = []
    for call in calls:
        tasks.append(asyncio.ensure_future(call))
        for _ in range(5):
            await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize(
    ("waiting", "chosen"),
    [
        (rows(16), [0]),
        (rows(16, 16, 16), [0, 1, 2]),
        (rows(16, 16, 16, sharing=Sharing.NONE), [0]),
        (rows(16, 12, 16, sharing=Sharing.EQUAL_LENGTH), [0, 2]),
        (rows(16, 12, 16), [0, 1, 2]),  # four tokens of padding cost less than a run
        (rows(16, 5, 16), [0, 2]),  # eleven cost more
        (rows(5, 16, 16), [0]),  # and making the first one longer as well
        (rows(10, 15, 13, 30, 10), [0, 2, 4]),  # those of its own length, then the nearest; 15 would pad all of them
        ([*rows(16), *rows(16, lane="m2"), *rows(16)], [0, 2]),
    ],
)
def test_who_runs_with_the_one_that_waits_longest(waiting: list[Row[int]], chosen: list[int]) -> None:
    assert choose(waiting, BATCH_TOKENS) == chosen


def test_no_batch_breaks_the_cost_rule_and_everybody_has_a_turn() -> None:
    dice = random.Random(7)
    for _ in range(300):
        waiting = rows(*(dice.randint(2, 64) for _ in range(dice.randint(1, 80))))
        seen = 0
        while waiting:
            places = choose(waiting, BATCH_TOKENS)
            lengths = [waiting[place].length for place in places]
            computed = len(lengths) * max(lengths)
            assert places[0] == 0
            assert places == sorted(set(places))
            assert len(lengths) == 1 or (computed <= BATCH_TOKENS and computed - sum(lengths) <= RUN_TOKENS)
            seen += len(places)
            waiting = [row for place, row in enumerate(waiting) if place not in places]
        assert seen


def test_one_text_above_the_budget_still_runs() -> None:
    assert choose(rows(BATCH_TOKENS + 1, BATCH_TOKENS + 1), BATCH_TOKENS) == [0]


async def test_what_piles_up_meanwhile_runs_together_and_each_gets_its_own() -> None:
    encoder = Encoder()
    some = batcher(encoder)
    calls = await begun(*(some.results(piece(k)) for k in range(6)))
    encoder.free.set()
    assert await asyncio.gather(*calls) == [[0], [2], [4], [6], [8], [10]]
    assert encoder.batches == [[0], [1, 2, 3, 4, 5]]  # the first waits for nobody
    assert some.waiting_count == 0


async def test_rows_of_one_call_come_back_in_its_order() -> None:
    encoder = Encoder()
    encoder.free.set()
    lengths = [30, 5, 30, 12, 5, 13]
    got = await batcher(encoder).results(rows(*lengths))
    assert got == [2 * k for k in range(6)]
    assert sorted(map(sorted, encoder.batches)) == [[0, 2], [1, 4], [3, 5]]


async def test_nothing_is_computed_for_those_who_left_before_their_turn() -> None:
    encoder = Encoder()
    some = batcher(encoder)
    first, leaving, staying = await begun(some.results(piece(1)), some.results(piece(2)), some.results(piece(3)))
    leaving.cancel()
    await asyncio.wait([leaving])
    assert some.waiting_count == 1
    encoder.free.set()
    assert await asyncio.gather(first, staying) == [[2], [6]]
    assert encoder.batches == [[1], [3]]


async def test_a_turn_that_comes_when_all_have_left_computes_nothing() -> None:
    encoder = Encoder()
    some = batcher(encoder)
    first, leaving = await begun(some.results(piece(1)), some.results(piece(2)))
    leaving.cancel()
    encoder.free.set()
    assert await first == [2]
    assert await some.results(piece(3)) == [6]
    assert encoder.batches == [[1], [3]]


async def test_too_many_are_turned_away_at_once_and_whole() -> None:
    encoder = Encoder()
    some = batcher(encoder, waiting=3)
    calls = await begun(some.results(piece(1)), some.results(piece(2)), some.results(piece(3)))
    with pytest.raises(OverloadedError) as caught:
        await some.results([*piece(4), *piece(5)])
    assert caught.value.reason == "ENCODE_QUEUE_FULL"
    assert some.waiting_count == 2
    encoder.free.set()
    assert await asyncio.gather(*calls) == [[2], [4], [6]]


async def test_a_full_pool_turns_away_those_who_wait_and_serves_later_ones() -> None:
    encoder = Encoder()
    pool = Computing(threads=1, waiting=0)
    some: Batcher[int, int] = Batcher(encoder, pool, batches=1, budget=100, waiting=10)
    slate = asyncio.ensure_future(pool.run(encoder.free.wait, 5))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await some.results(piece(1))
    encoder.free.set()
    await slate
    assert await some.results(piece(2)) == [4]


async def test_a_failure_is_told_to_its_batch_alone() -> None:
    encoder = Encoder()
    some = batcher(encoder)
    encoder.error = MemoryError()
    failing = await begun(some.results(piece(1)))
    encoder.free.set()
    assert [type(error) for error in await asyncio.gather(*failing, return_exceptions=True)] == [MemoryError]
    encoder.error = None
    assert await some.results(piece(2)) == [4]


async def test_lanes_never_mix() -> None:
    encoder = Encoder()
    some = batcher(encoder)
    calls = await begun(*(some.results(piece(k, lane=f"m{k % 2}")) for k in range(7)))
    encoder.free.set()
    await asyncio.gather(*calls)
    assert encoder.batches == [[0], [1, 3, 5], [2, 4, 6]]


async def test_every_thread_of_the_pool_is_used_and_no_more() -> None:
    most, now, lock = 0, 0, threading.Lock()

    def compute(payloads: Sequence[int]) -> list[int]:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        threading.Event().wait(0.01)
        with lock:
            now -= 1
        return list(payloads)

    some: Batcher[int, int] = Batcher(compute, Computing(threads=2, waiting=0), batches=2, budget=20, waiting=100)
    got = await asyncio.gather(*(some.results(piece(k)) for k in range(40)))
    assert got == [[k] for k in range(40)]
    assert most == 2
