"""User vectors ahead of their answers: of the behaviours an event leads to, only while nothing else runs, and not for ever for nobody."""

import asyncio
import threading
import uuid
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from features.behaviour import ACTIVITY_LENGTH, Activity, Behaviour
from server.domain import IncomingEvent, Subject
from server.ingest.identities import Known
from server.recommend import ahead as module
from server.recommend.ahead import Ahead
from server.recommend.computing import Computing
from server.recommend.snapshot import Snapshot

START = datetime(2026, 1, 1, tzinfo=UTC)
MICROS = int(START.timestamp()) * 10**6


def event(
    item_id: str, user_id: str = "u", *, seconds: int = 0, text: str = "", action: str = "view", value: float | None = None
) -> IncomingEvent:
    at = START + timedelta(seconds=seconds)
    return IncomingEvent(Subject(user_id=user_id), uuid.uuid4(), "web", action, at, item_id or None, text or None, value)


class Online:
    """Customers who have done what is said of them; nobody else has a state."""

    def __init__(self) -> None:
        self.certain = True
        self.known: dict[str, Activity | None] = {"u": Activity(0), "v": Activity(0)}

    async def user_features(self, user_id: str, _now: datetime) -> dict[str, Any]:
        return {module.ACTIVITY_VIEW: self.known[user_id]}


class Identities:
    async def customer_of(self, subject: Subject) -> Known:
        return Known(subject.user_id.removeprefix("merged into "))


class Room:
    """An Ahead over a tower that notes what it reads and, while the gate is shut, does not come to an end."""

    def __init__(self) -> None:
        self.ran: list[tuple[Behaviour, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.seconds = 0.0
        self.online = Online()
        self.computing = Computing(threads=2, waiting=4)
        self.snapshot: Snapshot | None = self.of(SimpleNamespace(user_vector=self.tower))
        self.ahead = Ahead(self.computing, Identities(), self.online, current=lambda: self.snapshot, clock=lambda: self.seconds)

    @staticmethod
    def of(model: object) -> Snapshot:
        return cast("Snapshot", SimpleNamespace(model=model, table=(), vectors=()))

    def tower(self, activity: Activity, *_: Any) -> None:
        self.ran.append(activity.behaviours)
        self.gate.wait(10)
        if self.error is not None:
            raise self.error

    @property
    def items(self) -> list[str]:
        """The newest item of each run."""
        return [behaviours[0].item_id for behaviours in self.ran]

    async def acts(self, *item_ids: str, user_id: str = "u") -> None:
        """One event for each item; what is started comes to its end, or to the gate."""
        for item_id in item_ids:
            self.ahead.arriving([event(item_id, user_id)])
            await self.settled()

    async def settled(self) -> None:
        await asyncio.sleep(0.01)
        while self.gate.is_set() and self.ahead._busy:
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def as_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activities are read as they are: how the view's columns become one is tested elsewhere."""
    monkeypatch.setattr(module, "activity_of", lambda activity: activity)


async def test_the_tower_reads_what_the_event_will_lead_to() -> None:
    room = Room()
    before = (Behaviour("late", "view", "web", MICROS + 5_000_000), Behaviour("old", "view", "web", MICROS))
    room.online.known["u"] = Activity(2, before)
    room.ahead.arriving([event("", seconds=1, text="x" * 200, action="search")])
    await room.settled()
    searched = Behaviour("", "search", "web", MICROS + 1_000_000, "x" * 160)
    assert room.ran == [(before[0], searched, before[1])]
    for text, said in (("", "4.5 of 5"), ("soft", "4.5 of 5: soft")):
        room.ahead.arriving([event("it", seconds=9, text=text, action="review", value=4.5)])
        await room.settled()
        assert room.ran.pop()[0].text == said
    room.online.known["u"] = Activity(60, tuple(Behaviour(str(k), "view", "web", MICROS - k) for k in range(ACTIVITY_LENGTH)))
    await room.acts("new")
    assert [behaviour.item_id for behaviour in room.ran[1]] == ["new", *map(str, range(ACTIVITY_LENGTH - 1))]


async def test_an_answer_waits_for_the_run_that_is_under_way_and_for_no_other() -> None:
    room = Room()
    room.gate.clear()
    await room.acts("1")
    waiting = asyncio.create_task(room.ahead.asked("u"))
    async with asyncio.timeout(2):
        await room.ahead.asked("somebody else")
    await asyncio.sleep(0.02)
    assert room.items == ["1"]
    assert not waiting.done()
    room.gate.set()
    async with asyncio.timeout(2):
        await waiting
        await room.ahead.asked("u")  # long done


async def test_a_caller_who_leaves_does_not_end_the_run_for_others() -> None:
    room = Room()
    room.gate.clear()
    await room.acts("1")
    leaving, staying = (asyncio.create_task(room.ahead.asked("u")) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0.01)
    assert not staying.done()
    room.gate.set()
    async with asyncio.timeout(2):
        await staying


async def test_nothing_runs_beside_other_work() -> None:
    room, other = Room(), threading.Event()
    slate = asyncio.create_task(room.computing.run(other.wait, 10))
    await asyncio.sleep(0)
    await room.acts("1")
    other.set()
    await slate
    assert room.ran == []
    await room.acts("2")
    assert room.items == ["2"]


async def test_one_run_at_a_time_even_of_events_that_come_at_once() -> None:
    room = Room()
    for item_id in "12":
        room.ahead.arriving([event(item_id)])
    await room.settled()
    assert room.items == ["1"]


async def test_nothing_runs_for_many_events_nor_without_a_model_a_state_or_an_online_store() -> None:
    room = Room()
    room.ahead.arriving([event("1"), event("2")])
    room.ahead.arriving([])
    await room.acts("3", user_id="")  # an identity nobody has met
    room.online.known["u"] = None
    await room.acts("4")
    room.online.known["u"], room.online.certain = Activity(0), False
    await room.acts("5")
    room.online.certain, room.snapshot = True, Room.of(None)
    await room.acts("6")
    room.snapshot = None
    await room.acts("7")
    assert room.ran == []


async def test_a_persona_that_was_merged_counts_for_its_customer() -> None:
    room = Room()
    room.gate.clear()
    await room.acts("1", user_id="merged into v")
    waiting = asyncio.create_task(room.ahead.asked("v"))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    room.gate.set()
    async with asyncio.timeout(2):
        await waiting


async def test_runs_that_nobody_asks_for_are_bounded_and_those_asked_for_are_not() -> None:
    room = Room()
    await room.acts(*map(str, range(1, 12)))
    assert room.items == [str(item) for item in range(1, 9)]
    await room.ahead.asked("somebody else")
    await room.acts("20")
    assert room.items[8:] == []
    for item_id in ("21", "22", "23"):
        await room.ahead.asked("u")
        await room.acts(item_id)
    assert room.items[8:] == ["21", "22", "23"]
    room.seconds += 8
    await room.acts("30")
    assert room.items[11:] == ["30"]


async def test_a_run_that_fails_leaves_the_telling_to_the_answer() -> None:
    room = Room()
    room.error = RuntimeError("no vector")
    await room.acts("1")
    async with asyncio.timeout(2):
        await room.ahead.asked("u")
    room.error = None
    await room.acts("2")
    assert room.items == ["1", "2"]
