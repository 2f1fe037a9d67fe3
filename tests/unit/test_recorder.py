"""Group commit: batches form by themselves, one bad call does not fail its neighbours, a full queue says so."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import psycopg
import pytest
import redis.exceptions
from prometheus_client import CollectorRegistry

from server.domain import EventOutcome, IncomingEvent, Stored, Subject, Token
from server.errors import OverloadedError
from server.ingest.recorder import EventRecorder
from server.ingest.writer import Written
from server.metrics import Metrics


class FakeWriter:
    """Keeps what it is given; a call with the text "poison" fails as PostgreSQL does on a bad value."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.stored: list[IncomingEvent] = []
        self.struck: list[Mapping[str, int]] = []
        self.misses = 0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, calls: Sequence[Sequence[IncomingEvent]]) -> list[Written]:
        await self.gate.wait()
        self.batches.append(len(calls))
        if self.error is not None:
            raise self.error
        if any(event.text == "poison" for call in calls for event in call):
            raise psycopg.DataError("bad value")
        self.stored += [event for call in calls for event in call]
        return [Written(tuple(EventOutcome(Stored.STORED, "u") for _ in call), (Token(f"u{len(call)}", 1),)) for call in calls]

    def caught_up(self, versions: Mapping[str, int]) -> None:
        self.struck.append(versions)

    def missed(self) -> None:
        self.misses += 1


class FakeStates:
    """Remembers who was recomputed and written to Redis together; version 2 is what it finds of everybody."""

    def __init__(self) -> None:
        self.down = False
        self.error: Exception = redis.exceptions.ConnectionError()
        self.refreshed: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def refresh(self, user_ids: Sequence[str]) -> dict[str, int]:
        self.refreshed.append(list(user_ids))
        await self.gate.wait()
        if self.down:
            raise self.error
        return dict.fromkeys(user_ids, 2)


def event(number: int, text: str = "") -> IncomingEvent:
    return IncomingEvent(Subject("u"), UUID(int=number), "web", "view", datetime(2026, 1, 1, tzinfo=UTC), "i", text)


@asynccontextmanager
async def recording(**limits: int) -> AsyncIterator[tuple[EventRecorder, FakeWriter, FakeStates]]:
    writer, online = FakeWriter(), FakeStates()
    bounds = {"queue_events": 100, "batch_events": 50} | limits
    recorder = EventRecorder(cast("Any", writer), cast("Any", online), Metrics(CollectorRegistry()), **bounds)
    task = asyncio.create_task(recorder.run())
    try:
        yield recorder, writer, online
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_calls_that_wait_share_the_next_commit() -> None:
    async with recording() as (recorder, writer, _):
        writer.gate.clear()
        calls = [asyncio.create_task(recorder.record([event(k)])) for k in range(20)]
        await asyncio.sleep(0.05)
        writer.gate.set()
        answers = await asyncio.gather(*calls)
    assert sum(writer.batches) == 20
    assert len(writer.batches) <= 2
    assert all(answer.online and answer.tokens == (Token("u1", 1),) for answer in answers)


async def test_a_batch_keeps_its_bound() -> None:
    async with recording(batch_events=5) as (recorder, writer, _):
        writer.gate.clear()
        calls = [asyncio.create_task(recorder.record([event(2 * k), event(2 * k + 1)])) for k in range(10)]
        await asyncio.sleep(0.05)
        writer.gate.set()
        await asyncio.gather(*calls)
    assert max(writer.batches) == 2  # two calls of two events fit into five


async def test_one_bad_call_fails_alone() -> None:
    async with recording() as (recorder, writer, _):
        writer.gate.clear()
        good = [asyncio.create_task(recorder.record([event(k)])) for k in range(3)]
        bad = asyncio.create_task(recorder.record([event(9, "poison")]))
        await asyncio.sleep(0.05)
        writer.gate.set()
        assert len(await asyncio.gather(*good)) == 3
        with pytest.raises(psycopg.DataError):
            await bad
    assert {e.event_id.int for e in writer.stored} == {0, 1, 2}


async def test_a_full_queue_is_said_at_once_and_nothing_of_the_call_is_stored() -> None:
    async with recording(queue_events=3) as (recorder, writer, _):
        writer.gate.clear()
        first = asyncio.create_task(recorder.record([event(0)]))
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(recorder.record([event(1), event(2), event(3)]))
        await asyncio.sleep(0.02)
        with pytest.raises(OverloadedError):
            await recorder.record([event(4)])
        writer.gate.set()
        await asyncio.gather(first, waiting)
    assert [e.event_id.int for e in writer.stored] == [0, 1, 2, 3]


async def test_a_caller_who_leaves_takes_nothing_with_them() -> None:
    async with recording() as (recorder, writer, _):
        writer.gate.clear()
        leaving = asyncio.create_task(recorder.record([event(0)]))
        staying = asyncio.create_task(recorder.record([event(1)]))
        await asyncio.sleep(0.05)
        leaving.cancel()
        writer.gate.set()
        await staying
    assert {e.event_id.int for e in writer.stored} == {0, 1}


async def test_events_are_acknowledged_while_redis_is_away() -> None:
    async with recording() as (recorder, writer, online):
        online.down = True
        assert not (await recorder.record([event(0)])).online
        assert writer.struck == []  # the outbox must go on naming whom Redis lacks
        assert writer.misses == 1  # and the other replicas are asked to write it
        online.down = False
        assert (await recorder.record([event(1)])).online
        assert (writer.struck, writer.misses) == ([{"u1": 2}], 1)


async def test_the_next_group_is_committed_while_one_is_made_visible_and_those_that_wait_for_it_share_the_next_turn() -> None:
    async with recording() as (recorder, writer, states):
        states.gate.clear()
        calls = [asyncio.create_task(recorder.record([event(0)]))]
        for number in (1, 2, 3):
            await asyncio.sleep(0.01)
            calls.append(asyncio.create_task(recorder.record([event(10 * number + k) for k in range(1 + number % 2)])))
        await asyncio.sleep(0.01)
        assert (len(writer.stored), writer.batches) == (6, [1, 1, 1, 1])  # all are committed while the first is being written
        assert states.refreshed == [["u1"]]  # Redis has not taken anything yet,
        assert not any(call.done() for call in calls)  # so nothing is acknowledged
        states.gate.set()
        answers = await asyncio.gather(*calls)
    assert states.refreshed == [["u1"], ["u1", "u2"]]
    assert all(answer.online for answer in answers)
    assert writer.struck == [{"u1": 2}, {"u1": 2, "u2": 2}]


async def test_an_outage_fails_the_waiting_calls_once_and_the_next_ones_are_stored() -> None:
    async with recording() as (recorder, writer, _):
        writer.gate.clear()
        writer.error = psycopg.OperationalError("the server closed the connection")
        calls = [asyncio.create_task(recorder.record([event(k)])) for k in range(5)]
        await asyncio.sleep(0.02)
        writer.gate.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [psycopg.OperationalError] * 5
        assert len(writer.batches) <= 2  # no call is tried again behind its caller's back
        writer.error = None
        assert (await recorder.record([event(9)])).online
    assert [e.event_id.int for e in writer.stored] == [9]


async def test_a_queue_that_was_full_takes_calls_again() -> None:
    async with recording(queue_events=2) as (recorder, writer, _):
        for turn in range(3):
            writer.gate.clear()
            calls = [asyncio.create_task(recorder.record([event(10 * turn + k)])) for k in range(2)]
            await asyncio.sleep(0.01)
            calls += [asyncio.create_task(recorder.record([event(10 * turn + k)])) for k in (2, 3)]
            await asyncio.sleep(0.01)
            with pytest.raises(OverloadedError):
                await recorder.record([event(99)])
            writer.gate.set()
            await asyncio.gather(*calls)
    assert len(writer.stored) == 12


async def test_each_call_gets_the_outcomes_of_its_own_events() -> None:
    async with recording() as (recorder, writer, _):
        writer.gate.clear()
        calls = [asyncio.create_task(recorder.record([event(10 * n + k) for k in range(n)])) for n in range(1, 6)]
        await asyncio.sleep(0.02)
        writer.gate.set()
        assert [len((await call).outcomes) for call in calls] == [1, 2, 3, 4, 5]


async def test_while_a_group_is_made_visible_no_smaller_one_is_committed() -> None:
    async with recording() as (recorder, writer, states):
        states.gate.clear()
        calls = [asyncio.create_task(recorder.record([event(k) for k in range(4)]))]
        await asyncio.sleep(0.01)
        calls += [asyncio.create_task(recorder.record([event(number)])) for number in (4, 5, 6)]
        await asyncio.sleep(0.01)
        assert writer.batches == [1]
        calls.append(asyncio.create_task(recorder.record([event(7)])))
        await asyncio.sleep(0.01)
        assert writer.batches == [1, 4]
        calls.append(asyncio.create_task(recorder.record([event(8)])))
        await asyncio.sleep(0.01)
        assert writer.batches == [1, 4]
        states.gate.set()  # then whoever waits is committed at once
        assert all(answer.online for answer in await asyncio.gather(*calls))
    assert writer.batches == [1, 4, 1]


async def test_whatever_the_online_store_fails_with_committed_events_are_acknowledged_and_later_ones_too() -> None:
    async with recording() as (recorder, _, online):
        online.down, online.error = True, RuntimeError("a defect")
        async with asyncio.timeout(2):
            assert not (await recorder.record([event(0)])).online
            online.down = False
            assert (await recorder.record([event(1)])).online
