"""Connections to PostgreSQL that are waited for, and statements that hang."""

import asyncio
from contextlib import AsyncExitStack
from time import monotonic

import psycopg
import pytest

from features.catalogue import Item
from server.catalog.service import Catalog
from server.database import connector, postgres_breaker, postgres_pool
from server.models import Models
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop


@pytest.fixture(scope="module")
def settings(new_shop: NewShop) -> ServerSettings:
    return new_shop().model_copy(update={"postgres_pool_size": 3, "postgres_timeout_seconds": 1.0})


async def test_waiting_for_a_busy_pool_says_nothing_against_postgres(settings: ServerSettings) -> None:
    breaker = postgres_breaker(settings, lambda _: None)
    async with postgres_pool(settings, breaker) as pool, AsyncExitStack() as held:
        for _ in range(settings.postgres_pool_size):
            await held.enter_async_context(pool.connection())

        async def wait() -> None:
            async with asyncio.timeout(0.6), pool.connection():
                raise AssertionError("there was none left")

        outcomes = await asyncio.gather(*(wait() for _ in range(2 * settings.breaker_failures)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {TimeoutError}
        with pytest.raises(psycopg.OperationalError):
            await pool.getconn()  # the pool's own timeout
        await asyncio.sleep(0.2)
        assert not breaker.is_open


async def test_statements_of_threads_end_like_those_of_the_pool(settings: ServerSettings) -> None:
    fleet: object = None
    connect = connector(settings)
    catalog = Catalog(fleet, fleet, connect=connect, epoch_seconds=1.0)  # type: ignore[arg-type]
    with psycopg.connect(settings.postgres_dsn) as blocker:
        blocker.execute("LOCK TABLE items, model_versions IN ACCESS EXCLUSIVE MODE")
        started = monotonic()
        for call in (catalog.upsert([Item("i", "t")], []), Models(fleet, connect=connect).list()):  # type: ignore[arg-type]
            with pytest.raises(psycopg.errors.QueryCanceled):
                await call
        assert monotonic() - started < 4.0
