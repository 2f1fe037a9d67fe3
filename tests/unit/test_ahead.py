"""User vectors ahead of their answers: computed once, only while nothing else is, and not for ever for nobody."""

import asyncio
import threading
from datetime import datetime
from types import SimpleNamespace
from typing import Any, cast

from features.activity import UserState
from features.behaviour import Activity
from server.recommend.ahead import Ahead
from server.recommend.computing import Computing
from server.recommend.snapshot import Snapshot


class Codec:
    def activity_of(self, state: UserState, _now: datetime) -> Activity | None:
        return Activity(state.version) if state.version else None


class Room:
    """An Ahead over a tower that notes for whom it runs and, while the gate is shut, does not come to an end."""

    def __init__(self, *, threads: int = 2) -> None:
        self.ran: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.seconds = 0.0
        self.computing = Computing(threads=threads, waiting=4)
        model = SimpleNamespace(user_vector=self.tower)
        snapshot = cast("Snapshot", SimpleNamespace(model=model, table=(), vectors=()))
        self.snapshot: Snapshot | None = snapshot
        self.ahead = Ahead(self.computing, cast("Any", Codec()), current=lambda: self.snapshot, clock=lambda: self.seconds)

    def tower(self, activity: Activity, *_: Any) -> None:
        self.ran.append(activity.version)
        self.gate.wait(10)
        if self.error is not None:
            raise self.error

    async def commits(self, *versions: int, user_id: str = "u") -> None:
        """One commit of a customer at each version; what is started comes to its end, or to the gate."""
        for version in versions:
            self.ahead.committed([UserState(user_id, version, b"", ())])
            await self.settled()

    async def settled(self) -> None:
        while self.gate.is_set() and self.ahead._busy:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)


async def test_an_answer_waits_for_the_run_that_is_under_way_and_for_no_other() -> None:
    room = Room()
    room.gate.clear()
    await room.commits(1)
    waiting = asyncio.create_task(room.ahead.asked("u"))
    async with asyncio.timeout(2):
        await room.ahead.asked("somebody else")
    await asyncio.sleep(0.02)
    assert room.ran == [1]
    assert not waiting.done()
    room.gate.set()
    async with asyncio.timeout(2):
        await waiting
        await room.ahead.asked("u")  # long done


async def test_a_caller_who_leaves_does_not_end_the_run_for_others() -> None:
    room = Room()
    room.gate.clear()
    await room.commits(1)
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
    await room.commits(1)
    other.set()
    await slate
    assert room.ran == []
    await room.commits(2)
    assert room.ran == [2]


async def test_one_run_at_a_time_even_of_commits_that_come_at_once() -> None:
    room = Room()
    for version in (1, 2):
        room.ahead.committed([UserState("u", version, b"", ())])
    await room.settled()
    assert room.ran == [1]


async def test_a_commit_of_several_customers_starts_nothing_nor_does_one_of_nobody_or_without_a_snapshot() -> None:
    room = Room()
    room.ahead.committed([UserState(name, 1, b"", ()) for name in "ab"])
    room.ahead.committed([])
    room.snapshot = None
    room.ahead.committed([UserState("u", 1, b"", ())])
    await room.settled()
    assert room.ran == []


async def test_a_merged_persona_has_no_vector() -> None:
    room = Room()
    await room.commits(0)
    assert room.ran == []


async def test_runs_that_nobody_asks_for_are_bounded_and_those_asked_for_are_not() -> None:
    room = Room()
    await room.commits(*range(1, 12))
    assert room.ran == list(range(1, 9))
    await room.ahead.asked("somebody else")
    await room.commits(20)
    assert room.ran[8:] == []
    for version in (21, 22, 23):
        await room.ahead.asked("u")
        await room.commits(version)
    assert room.ran[8:] == [21, 22, 23]
    room.seconds += 8
    await room.commits(30)
    assert room.ran[11:] == [30]


async def test_a_run_that_fails_leaves_the_telling_to_the_answer() -> None:
    room = Room()
    room.error = RuntimeError("no vector")
    await room.commits(1)
    async with asyncio.timeout(2):
        await room.ahead.asked("u")
    room.error = None
    await room.commits(2)
    assert room.ran == [1, 2]
