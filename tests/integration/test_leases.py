"""What replicas say of themselves in PostgreSQL, and what a replica may show because of that."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from time import monotonic

import psycopg
import pytest

from features.replicas import list_replicas
from server.database import Pool, postgres_breaker, postgres_pool
from server.errors import UnavailableError
from server.membership import _REPORT, Membership, Report
from server.online.states import AheadOfOnlineError, UserStates
from server.settings import ServerSettings
from tests.integration.replicas import NewShop, Pair, replica, view, web

REPORT = Report("m", 1, 1, {}, {}, "", "cpu", online_away=False)
AWAY = replace(REPORT, online_away=True)


@pytest.fixture(scope="module")
def settings(new_shop: NewShop) -> ServerSettings:
    return new_shop().model_copy(update={"postgres_pool_size": 3})


@pytest.fixture(scope="module")
async def two(settings: ServerSettings) -> AsyncIterator[Pair]:
    async with replica(settings) as first, replica(settings) as second:
        yield first, second


@asynccontextmanager
async def pool_of(settings: ServerSettings) -> AsyncIterator[Pool]:
    async with postgres_pool(settings, postgres_breaker(settings, lambda _: None)) as pool:
        yield pool


class Clock:
    time = 0.0

    def __call__(self) -> float:
        return self.time


def member(pool: Pool, name: str, clock: Clock | None = None) -> Membership:
    return Membership(pool, replica_id=name, config="c", pause_seconds=0.5, epoch_wait_seconds=1.0, clock=clock or monotonic)


async def test_a_lease_lapses_and_is_said_to_have_lapsed_by_the_report_that_renews_it(settings: ServerSettings) -> None:
    clock = Clock()
    async with pool_of(settings) as pool:
        members = member(pool, "lease", clock)
        assert members.lapsed
        await members.join("here:1", AWAY)
        assert not members.lapsed
        clock.time = 2.9
        assert await members.report("here:1", REPORT)
        clock.time = 5.8  # 2.9 s after the report was sent: PostgreSQL takes this replica for alive for 3 s
        assert not members.lapsed
        clock.time = 6.0
        assert members.lapsed
        assert not await members.report("here:1", REPORT)
        assert not members.lapsed
        await members.leave()


async def test_a_report_that_arrives_late_changes_nothing(settings: ServerSettings) -> None:
    async with pool_of(settings) as pool:
        members = member(pool, "late", None)
        await members.join("here:2", AWAY)
        late = members._row("here:2", AWAY)  # sent, and held up on its way
        assert await members.report("here:2", REPORT)
        async with pool.connection() as connection:
            await connection.execute(_REPORT, late)
        with psycopg.connect(settings.postgres_dsn) as connection:
            assert [one.online_away for one in list_replicas(connection) if one.address == "here:2"] == [False]
        await members.leave()


async def test_what_redis_lacks_is_shown_only_while_no_other_replica_reads_it(two: Pair, settings: ServerSettings) -> None:
    ann = two[0]
    states = UserStates(ann.pool, ann.online, ann.states._codec, replica_id="me")
    async with pool_of(settings) as pool:
        mine, other = member(pool, "me"), member(pool, "other")
        token = await ann.record(web("shared"), "a")
        await mine.join("here:3", REPORT)
        await other.join("here:4", REPORT)
        assert (await states.recorded(token.user_id)).user_version == 1  # Redis holds it
        await ann.writer.write([[view(web("shared"), "b")]])  # and not published
        assert not states.missed.is_set()
        for read in (states.recorded(token.user_id), states.recorded_at_least(token.user_id, 0, now=datetime.now(UTC))):
            with pytest.raises(AheadOfOnlineError) as refused:
                await read
            assert (refused.value.reason, isinstance(refused.value, UnavailableError)) == ("ONLINE_STORE_LAGGING", True)
        assert states.missed.is_set()
        await other.report("here:4", AWAY)
        assert (await states.recorded(token.user_id)).user_version == 2
        await other.report("here:4", REPORT)
        with pytest.raises(AheadOfOnlineError):
            await states.recorded(token.user_id)
        await states.rebuild(token.user_id)
        await states.caught_up({token.user_id: 2})
        assert (await states.recorded(token.user_id)).user_version == 2
        await mine.leave()
        await other.leave()
