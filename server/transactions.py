"""Transactions that are tried again when they lose a race against others."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psycopg

from server.errors import ConflictError

T = TypeVar("T")

_PAUSE_SECONDS = 0.01
_LOST_RACES = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)


class RestartError(Exception):
    """What a transaction read before its locks no longer holds; it is rolled back and started again."""


async def retried(transaction: Callable[[], Awaitable[T]], *, attempts: int = 5, spread: Callable[[], float] = random.random) -> T:
    """Runs a transaction again while it loses races against others, after a pause that doubles and is spread out.

    Args:
        transaction: opens, does and commits one transaction; what it lost was rolled back.
        attempts: how often in all.
        spread: a number from 0 to 1 by which a pause is shortened.

    Raises:
        ConflictError: the last attempt had to be restarted.
        psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure: the last attempt lost.
    """
    for attempt in range(1, attempts + 1):
        try:
            return await transaction()
        except (*_LOST_RACES, RestartError) as error:
            if attempt == attempts and isinstance(error, RestartError):
                raise ConflictError("a concurrent change won; try again", reason="CONCURRENT_CHANGE") from None
            if attempt == attempts:
                raise
        await asyncio.sleep(_PAUSE_SECONDS * 2 ** min(attempt, 5) * spread())
    raise AssertionError("unreachable")
