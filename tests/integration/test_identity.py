"""Identity across channels on real stores: links made and taken back by many at once, through replicas with caches of their own."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from features.activity import ACTIVITY_VIEW, UserStateCodec, activity_of
from features.layout import load_layouts
from features.store import feature_store
from server.database import postgres_breaker, postgres_pool, redis_breaker, redis_client
from server.domain import IncomingEvent, Linked, Stored, Subject, Token
from server.ingest.forget import Erasure
from server.ingest.graph import IdentityGraph
from server.ingest.identities import Identities, Known
from server.ingest.writer import EventWriter
from server.online.states import UserStates
from server.online.store import OnlineStore
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop


@dataclass
class Replica:
    """What one server process has of identity, with its own connections and its own cache."""

    identities: Identities
    graph: IdentityGraph
    erasure: Erasure
    writer: EventWriter
    states: UserStates
    online: OnlineStore

    async def record(self, subject: Subject, *names: str) -> Token:
        """Records views, each event's id made of its name; returns the token."""
        (written,) = await self.writer.write([[view(subject, name) for name in names]])
        assert {outcome.status for outcome in written.outcomes} <= {Stored.STORED, Stored.DUPLICATE}, written.outcomes
        await self.states.publish(written.states)
        return written.tokens[0]

    async def read(self, subject: Subject, token: Token | None = None) -> tuple[str, int, list[str]]:
        """Reads as a recommendation does: cached resolution, one look at Redis, PostgreSQL when that says so."""

        async def act(known: Known) -> tuple[str, int, list[str]]:
            minimum = await self.identities.minimum_version(known.user_id, token)
            if not known.user_id:
                return "", 0, []
            while True:
                standing = await self.online.read(known.user_id, "")
                if standing.user_version is not None and standing.user_version >= minimum:
                    break
                assert await self.states.rebuild(known.user_id) >= minimum
            known.checked(None, standing.membership)
            features = await self.states.features(known.user_id, now=datetime.now(UTC))
            activity = activity_of(features[ACTIVITY_VIEW])
            assert activity is not None
            return known.user_id, activity.version, sorted(seen.item_id for seen in activity.behaviours)

        return await self.identities.following(subject, await self.identities.customer_of(subject), act)


def view(subject: Subject, name: str) -> IncomingEvent:
    return IncomingEvent(subject, uuid.uuid5(uuid.NAMESPACE_OID, name), "web", "view", datetime(2026, 3, 1, tzinfo=UTC), item_id=name)


def web(name: str) -> Subject:
    return Subject(channel="web", channel_user_id=name)


def app(name: str) -> Subject:
    return Subject(channel="app", channel_user_id=name)


@contextlib.asynccontextmanager
async def replica(settings: ServerSettings) -> AsyncIterator[Replica]:
    codec = UserStateCodec(await asyncio.to_thread(lambda: load_layouts(feature_store(settings))), settings.project)
    client = redis_client(settings)
    async with postgres_pool(settings, postgres_breaker(settings, lambda _: None)) as pool:
        online = OnlineStore(client, codec, redis_breaker(settings, client, lambda _: None))
        states = UserStates(pool, online, codec)

        def new_user_id() -> str:
            return f"u_{uuid.uuid4().hex}"

        yield Replica(
            Identities(pool, new_user_id=new_user_id),
            IdentityGraph(pool, states, new_user_id=new_user_id),
            Erasure(pool, online),
            EventWriter(pool, states, new_user_id=new_user_id),
            states,
            online,
        )
        await client.aclose()


@pytest.fixture(scope="module")
def settings(new_shop: NewShop) -> ServerSettings:
    return new_shop().model_copy(update={"postgres_pool_size": 10})


@pytest.fixture(scope="module")
async def two(settings: ServerSettings) -> AsyncIterator[tuple[Replica, Replica]]:
    async with replica(settings) as first, replica(settings) as second:
        yield first, second


@pytest.fixture
def names(request: pytest.FixtureRequest) -> Any:
    """Identities that no other test has."""
    return lambda name: f"{request.node.name}-{name}"


def rows(settings: ServerSettings, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(settings.postgres_dsn) as connection:
        return connection.execute(query, parameters).fetchall()


async def test_a_merge_shows_in_the_next_call_of_every_replica(two: tuple[Replica, Replica], names: Any) -> None:
    first, second = two
    phone, card = app(names("phone")), web(names("card"))
    before = [await first.record(phone, "a", "b"), await second.record(card, "c")]
    for one, subject in itertools.product(two, (phone, card)):
        await one.read(subject)  # cached everywhere
    linked = await first.graph.link(card, phone)
    assert linked == Linked(Token(before[0].user_id, 4), (before[1].user_id,))
    for one, subject in itertools.product(two, (phone, card, Subject(user_id=before[1].user_id))):
        assert await one.read(subject) == (linked.token.user_id, 4, ["a", "b", "c"])
        for token in (*before, linked.token):
            assert await one.read(subject, token) == (linked.token.user_id, 4, ["a", "b", "c"])
    assert await second.graph.link(phone, card) == Linked(linked.token, ())


async def test_an_unlink_gives_every_side_back_what_it_had(two: tuple[Replica, Replica], names: Any) -> None:
    first, second = two
    phone, card, shared = app(names("phone")), web(names("card")), names("shared")
    before = [await first.record(phone, "a", shared), await first.record(card, "b", shared)]
    apart = [await first.read(phone), await first.read(card)]
    linked = await first.graph.link(phone, card)
    assert (await second.read(card))[2] == sorted(["a", "b", shared])
    during = [await second.record(phone, "a2"), await second.record(card, "b2")]
    assert {token.user_id for token in during} == {before[0].user_id}
    unlinked = await second.graph.unlink(card, phone)
    assert (unlinked.removed_links, unlinked.still_linked) == (1, False)
    assert {unlinked.token.user_id, *(token.user_id for token in unlinked.separated)} == {token.user_id for token in before}
    for one in two:
        assert (await one.read(phone))[::2] == (apart[0][0], sorted([*apart[0][2], "a2"]))
        assert (await one.read(card))[::2] == (apart[1][0], sorted([*apart[1][2], "b2"]))
        for subject, token in itertools.product((phone, card), (*before, linked.token, *during, unlinked.token)):
            seen = await one.read(subject, token)
            assert seen[1] > max(token.version for token in (*before, linked.token, *during))
    again = await first.graph.unlink(card, phone)
    assert (again.removed_links, again.still_linked, again.separated, again.token) == (0, False, (), unlinked.token)
