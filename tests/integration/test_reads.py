"""Reads of customers' features on real stores: none older than was shown, none emptied by what happens between two looks."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import redis

from features.activity import ACTIVITY_VIEW, UserState
from features.layout import LayoutError, Status
from features.registry import Registry, load_registry
from features.snapshots import take_snapshot
from server.database import redis_breaker, redis_client
from server.domain import EntityKey, Subject
from server.errors import InvalidRequestError, UnavailableError
from server.ingest.graph import IdentityGraph
from server.online.breaker import CircuitBreaker
from server.online.features import FeatureReader
from server.online.states import RegroupedError, UserStates
from server.recommend.customers import Customers
from server.recommend.profiles import Profiles
from server.recommend.slate import Place
from server.settings import ServerSettings
from tests.integration.replicas import Names, Pair, Replica, app, view, web

EMPTY = Registry({}, frozenset(), {}, {})
VERSION = f"{ACTIVITY_VIEW}:version"


def now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def reading(settings: ServerSettings, of: Replica, states: UserStates) -> AsyncIterator[tuple[FeatureReader, CircuitBreaker]]:
    client = redis_client(settings)
    breaker = redis_breaker(settings, client, lambda _: None)
    read = partial(load_registry, settings)
    registry = await asyncio.to_thread(read)
    yield (
        FeatureReader(client, breaker, states, of.identities, registry=registry, read_registry=read, project=settings.project, now=now),
        breaker,
    )
    await client.aclose()


class Wiped(UserStates):
    """Redis loses everything right after a state was found to be new enough, ``times`` times."""

    def __init__(self, of: Replica, settings: ServerSettings, times: int) -> None:
        super().__init__(of.pool, of.online, of.states._codec)
        self._redis = redis.Redis.from_url(settings.redis_url)
        self._left = times

    async def at_least(self, user_id: str, minimum: int, *, now: datetime) -> Any:
        features = await super().at_least(user_id, minimum, now=now)
        if self._left:
            self._left -= 1
            self._redis.flushdb()
        return features


async def test_a_state_lost_between_the_look_and_the_read_is_not_answered_as_missing(
    two: Pair, settings: ServerSettings, names: Names
) -> None:
    token = await two[0].record(web(names("ann")), "a", "b")
    asked = [EntityKey(user_id="nobody"), EntityKey(user_id=token.user_id, token=token)]
    wiped = redis.Redis.from_url(settings.redis_url)
    wiped.flushdb()
    async with reading(settings, two[0], Wiped(two[0], settings, times=1)) as (reader, _):
        table = await reader.read(service="", refs=[VERSION], entities=asked)
    assert (table.values[VERSION], table.ages[ACTIVITY_VIEW].statuses) == ([None, 2], [Status.MISSING, Status.PRESENT])
    wiped.flushdb()
    async with reading(settings, two[0], Wiped(two[0], settings, times=9)) as (reader, _):
        with pytest.raises(UnavailableError):
            await reader.read(service="", refs=[VERSION], entities=asked)


async def test_without_redis_an_entity_that_lacks_its_id_is_refused_as_ever(two: Pair, settings: ServerSettings, names: Names) -> None:
    token = await two[0].record(web(names("ann")), "a")
    asked = [EntityKey(user_id=token.user_id), EntityKey(item_id="i1")]
    breaker = two[0].online._breaker
    async with reading(settings, two[0], two[0].states) as (reader, _):
        for breaker.is_open in (True, False):
            with pytest.raises(InvalidRequestError) as refused:
                async with asyncio.timeout(2):
                    await reader.read(service="", refs=[VERSION], entities=asked)
            assert refused.value.field == "entities[1].user_id"


async def test_what_was_read_around_redis_is_the_least_that_is_read_from_it_after(
    two: Pair, settings: ServerSettings, names: Names
) -> None:
    """An event is committed and not yet in Redis: whoever was shown it by one call must not miss it in the next."""
    ann = two[0]
    token = await ann.record(web(names("ann")), "a")
    states = UserStates(ann.pool, ann.online, ann.states._codec)
    profiles = Profiles(ann.pool, ann.identities, states, now=now)
    await ann.writer.write([[view(web(names("ann")), "b")]])  # and not published
    assert (await profiles.read(web(names("ann")), token=token)).user_version == 1
    async with reading(settings, ann, states) as (reader, breaker):
        breaker.is_open = True
        around = await reader.read(service="", refs=[VERSION], entities=[EntityKey(user_id=token.user_id)])
        breaker.is_open = False
        after = await reader.read(service="", refs=[VERSION], entities=[EntityKey(user_id=token.user_id)])
    assert [table.values[VERSION] for table in (around, after)] == [[2], [2]]
    assert (await profiles.read(web(names("ann")), token=None)).user_version == 2


async def test_a_view_that_cannot_be_laid_out_does_not_end_the_looks_at_the_registry(two: Pair, settings: ServerSettings) -> None:
    looks = 0

    def two_keys() -> Registry:
        nonlocal looks
        looks += 1
        raise LayoutError("pair: 2 join keys; views here have exactly one")

    async with reading(settings, two[0], two[0].states) as (reader, _):
        known, reader._read_registry = reader._read_registry, two_keys
        looking = asyncio.create_task(reader.run(0.01))
        await asyncio.sleep(0.2)
        assert not looking.done()
        assert looks > 1
        assert reader._registry.layouts
        reader._read_registry, reader._registry = known, EMPTY
        async with asyncio.timeout(5):
            while not reader._registry.layouts:
                await asyncio.sleep(0.01)
        looking.cancel()
        await asyncio.wait([looking])


class Parting(UserStates):
    """A link is taken back right after a state was read, before the profile that goes with it; and Redis misses that."""

    def __init__(self, of: Replica, identity: Subject) -> None:
        super().__init__(of.pool, of.online, of.states._codec)
        unheard = IdentityGraph(of.pool, Unheard(of.pool, of.online, of.states._codec), new_user_id=lambda: "unused")
        self._part = lambda: unheard.unlink(identity, None)

    async def profile_at(self, user_id: str, at: datetime, *, user_version: int, now: datetime) -> Any:
        await self._part()  # more than once it changes nothing
        return await super().profile_at(user_id, at, user_version=user_version, now=now)


class Unheard(UserStates):
    async def publish(self, states: Sequence[UserState]) -> bool:
        return False


async def test_a_profile_of_after_an_unlink_is_not_taken_for_the_version_before_it(
    two: Pair, settings: ServerSettings, names: Names
) -> None:
    """The slate of the version before would be committed with it, and differ from what others computed for that version."""
    ann = two[0]
    await ann.record(web(names("ann")), "a", "b")
    await ann.record(app(names("ann")), "c")
    token = (await ann.graph.link(app(names("ann")), web(names("ann")))).token
    taken = [datetime(2026, 3, day, tzinfo=UTC) for day in (2, 3)]  # Redis has the newer one; the epoch ranks with the older
    with psycopg.connect(settings.postgres_dsn) as connection:
        for at in taken:
            take_snapshot(connection, at)
    redis.Redis.from_url(settings.redis_url).flushdb()
    await ann.states.rebuild(token.user_id)
    snapshot: Any = SimpleNamespace(table=SimpleNamespace(features_as_of=taken[0]))
    states = Parting(ann, app(names("ann")))
    whole = await Customers(ann.states).online(token.user_id, snapshot, as_of=taken[1])
    with pytest.raises(RegroupedError):
        await Customers(states).online(token.user_id, snapshot, as_of=taken[1])
    parted = await Customers(states).online(token.user_id, snapshot, as_of=taken[1])
    assert (len(whole.activity.behaviours), len(parted.activity.behaviours)) == (3, 2)
    assert repr(parted) == repr(await Customers(states).recorded(token.user_id, snapshot, as_of=taken[1]))  # no price is NaN


async def test_newcomers_keep_their_slates_however_many_product_pages_they_look_at(two: Pair) -> None:
    """All of them are the empty user id: in one hash of at most 128 slots, each busy minute wiped the slates of all."""
    slots = [Place("product", (f"item-{k}",)).slot("m1", 1) for k in range(200)]
    for slot in slots:
        await two[0].online.commit("", slot, user_version=0, payload=slot.encode(), ttl_seconds=60)
    stand = [(await two[1].online.read("", slot)).slate for slot in slots]
    assert [slate and slate.endswith(slot.encode()) for slate, slot in zip(stand, slots, strict=True)] == [True] * len(slots)
