"""What a server process has of identity, without the process: its rooms on real stores, with connections and a cache of its own."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from features.activity import ACTIVITY_VIEW, UserState, UserStateCodec, activity_of
from features.registry import load_registry
from server.database import Pool, postgres_breaker, postgres_pool, redis_breaker, redis_client
from server.domain import EventOutcome, IncomingEvent, Stored, Subject, Token
from server.ingest.forget import Erasure
from server.ingest.graph import IdentityGraph
from server.ingest.identities import Identities, Known
from server.ingest.writer import EventWriter, Written
from server.online.states import UserStates
from server.online.store import OnlineStore
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop

Names = Callable[[str], str]


@dataclass
class Replica:
    """What one server process has of identity, with its own connections and its own cache."""

    identities: Identities
    graph: IdentityGraph
    erasure: Erasure
    writer: EventWriter
    states: UserStates
    online: OnlineStore
    pool: Pool

    async def write(self, subject: Subject, *names: str) -> Written:
        """Records views, each event's id made of its name, and makes them visible."""
        (written,) = await self.writer.write([[view(subject, name) for name in names]])
        await self.states.caught_up(await self.states.refresh([token.user_id for token in written.tokens]))
        return written

    async def record(self, subject: Subject, *names: str) -> Token:
        """Records views that must be taken; returns the token."""
        written = await self.write(subject, *names)
        assert {outcome.status for outcome in written.outcomes} <= {Stored.STORED, Stored.DUPLICATE}, written.outcomes
        return written.tokens[0]

    async def states_of(self, user_id: str) -> list[UserState]:
        """Reads a customer's state from PostgreSQL as this process would before it writes it to Redis."""
        async with self.pool.connection() as connection:
            return await self.states.recompute(connection, [user_id])

    async def outcome(self, subject: Subject, name: str) -> EventOutcome:
        """Records one view and says what became of it."""
        return (await self.write(subject, name)).outcomes[0]

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
    codec = UserStateCodec((await asyncio.to_thread(load_registry, settings)).layouts, settings.project)
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
            pool,
        )
        await client.aclose()


Pair = tuple[Replica, Replica]


@pytest.fixture(scope="module")
def settings(new_shop: NewShop) -> ServerSettings:
    return new_shop().model_copy(update={"postgres_pool_size": 10})


@pytest.fixture(scope="module")
async def two(settings: ServerSettings) -> AsyncIterator[Pair]:
    async with replica(settings) as first, replica(settings) as second:
        yield first, second


@pytest.fixture
def names(request: pytest.FixtureRequest) -> Names:
    """Identities that no other test has."""
    return lambda name: f"{request.node.name}-{name}"


def query(settings: ServerSettings, text: str, *parameters: Any) -> list[dict[str, Any]]:
    with psycopg.connect(settings.postgres_dsn, row_factory=dict_row) as connection:
        return connection.execute(text, parameters).fetchall()


def assert_whole(settings: ServerSettings) -> None:
    """What must hold whenever nothing is under way: rows follow from the links, and nothing points to a merged persona."""
    broken = {
        "events of a merged persona": "SELECT 1 FROM events e JOIN users u USING (user_id) WHERE u.merged_into IS NOT NULL",
        "events of nobody": "SELECT 1 FROM events e WHERE NOT EXISTS (SELECT 1 FROM users u WHERE u.user_id = e.user_id)",
        "events away from their persona": "SELECT 1 FROM events e JOIN users o ON o.user_id = e.origin_id "
        "WHERE coalesce(o.merged_into, o.user_id) <> e.user_id",
        "identities away from their persona": "SELECT 1 FROM identities i JOIN users h ON h.user_id = coalesce(i.home_id, i.user_id) "
        "WHERE coalesce(h.merged_into, h.user_id) <> i.user_id",
        "links between customers": "SELECT 1 FROM identity_links l "
        "JOIN users a ON a.user_id = l.left_id JOIN users b ON b.user_id = l.right_id "
        "WHERE coalesce(a.merged_into, a.user_id) <> coalesce(b.merged_into, b.user_id)",
        "merged without a link": "SELECT 1 FROM users u WHERE merged_into IS NOT NULL "
        "AND NOT EXISTS (SELECT 1 FROM identity_links l WHERE u.user_id IN (l.left_id, l.right_id))",
        "fewer versions than events": "SELECT 1 FROM users u WHERE version < (SELECT count(*) FROM events e WHERE e.user_id = u.user_id)",
        "events of the future": "SELECT 1 FROM events e JOIN users u USING (user_id) WHERE e.version > u.version",
    }
    assert [name for name, text in broken.items() if query(settings, text)] == []
