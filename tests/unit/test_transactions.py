"""Transactions that lose races are tried again, a bounded number of times."""

import psycopg
import pytest

from server.errors import ConflictError
from server.transactions import RestartError, retried


class Losing:
    """Fails with the errors given, one after the other, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    async def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"


async def test_lost_races_are_tried_again() -> None:
    lost = Losing(psycopg.errors.DeadlockDetected(), psycopg.errors.SerializationFailure(), RestartError())
    assert await retried(lost, spread=lambda: 0.0) == "done"


async def test_the_last_loss_is_told() -> None:
    with pytest.raises(psycopg.errors.DeadlockDetected):
        await retried(Losing(*[psycopg.errors.DeadlockDetected()] * 5), spread=lambda: 0.0)
    with pytest.raises(ConflictError) as told:
        await retried(Losing(*[RestartError()] * 3), attempts=3, spread=lambda: 0.0)
    assert told.value.reason == "CONCURRENT_CHANGE"


async def test_other_errors_are_nobodys_race() -> None:
    lost = Losing(psycopg.errors.UniqueViolation(), psycopg.errors.UniqueViolation())
    with pytest.raises(psycopg.errors.UniqueViolation):
        await retried(lost, spread=lambda: 0.0)
    assert len(lost.errors) == 1
