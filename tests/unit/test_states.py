"""Recomputing customers: those that are known are written, and a large group in shares that each come to their end."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import psycopg
import pytest

from features.activity import UserState
from server.online.states import UserStates


class Stores:
    """Notes what is written."""

    def __init__(self) -> None:
        self.written: list[list[str]] = []

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[None]:
        yield None

    async def write_users(self, states: Sequence[UserState]) -> None:
        self.written.append([state.user_id for state in states])


class Read(UserStates):
    async def recompute(self, connection: Any, user_ids: Sequence[str]) -> list[UserState]:
        if "away" in user_ids:
            raise psycopg.OperationalError
        return [UserState(user_id, 3, b"", ()) for user_id in user_ids if user_id != "unknown"]


async def test_nothing_is_written_that_was_not_read() -> None:
    stores = Stores()
    states = Read(cast("Any", stores), cast("Any", stores), cast("Any", None))
    assert await states.refresh(["a", "b", "unknown"]) == {"a": 3, "b": 3}
    assert stores.written == [["a", "b"]]
    with pytest.raises(psycopg.OperationalError):
        await states.refresh(["away"])
    assert len(stores.written) == 1


async def test_a_large_group_is_read_in_shares_and_each_comes_to_its_end() -> None:
    stores = Stores()
    states = Read(cast("Any", stores), cast("Any", stores), cast("Any", None))
    crowd = [f"u{k}" for k in range(450)]
    assert await states.refresh(crowd) == dict.fromkeys(crowd, 3)
    assert sorted(user_id for user_ids in stores.written for user_id in user_ids) == sorted(crowd)
    stores.written.clear()
    with pytest.raises(psycopg.OperationalError):
        await states.refresh(["away", *crowd])
    assert sorted(user_id for user_ids in stores.written for user_id in user_ids) == sorted(crowd[::2])
