"""Recomputing customers: who wants to know of a state is told before Redis is, and of nothing that was not read."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import psycopg
import pytest

from features.activity import UserState
from server.online.states import UserStates


class Stores:
    """Notes in what order states are told and written."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[str]]] = []

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[None]:
        yield None

    async def write_users(self, states: Sequence[UserState]) -> None:
        self.seen.append(("written", [state.user_id for state in states]))

    def told(self, states: Sequence[UserState]) -> None:
        self.seen.append(("told", [state.user_id for state in states]))


class Read(UserStates):
    async def recompute(self, connection: Any, user_ids: Sequence[str]) -> list[UserState]:
        if "away" in user_ids:
            raise psycopg.OperationalError
        return [UserState(user_id, 3, b"", ()) for user_id in user_ids if user_id != "unknown"]


async def test_a_state_is_told_before_it_is_written() -> None:
    stores = Stores()
    states = Read(cast("Any", stores), cast("Any", stores), cast("Any", None))
    states.recomputed = stores.told
    assert await states.refresh(["a", "b", "unknown"]) == {"a": 3, "b": 3}
    assert stores.seen == [("told", ["a", "b"]), ("written", ["a", "b"])]
    with pytest.raises(psycopg.OperationalError):
        await states.refresh(["away"])
    assert len(stores.seen) == 2


async def test_a_large_group_is_read_in_shares_and_each_comes_to_its_end() -> None:
    stores = Stores()
    states = Read(cast("Any", stores), cast("Any", stores), cast("Any", None))
    crowd = [f"u{k}" for k in range(450)]
    assert await states.refresh(crowd) == dict.fromkeys(crowd, 3)
    written = [user_id for what, user_ids in stores.seen if what == "written" for user_id in user_ids]
    assert sorted(written) == sorted(crowd)
    stores.seen.clear()
    with pytest.raises(psycopg.OperationalError):
        await states.refresh(["away", *crowd])
    assert sorted(user_id for _, user_ids in stores.seen for user_id in user_ids) == sorted(crowd[::2])
