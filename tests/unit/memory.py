"""The stores of a shop in memory, with the rules the real ones keep and hooks to move versions while somebody looks."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from time import sleep
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psycopg
import redis.exceptions
from prometheus_client import CollectorRegistry

from features.activity import ACTIVITY_VIEW, PROFILE_VIEW
from features.behaviour import ACTIONS, Activity, Behaviour
from features.layout import FeatureValue, Status
from features.signals import CollaborativeWeights, SignalConfig
from server.catalog.offers import Offer, OfferTable
from server.domain import Answer, RecommendQuery, Subject
from server.errors import NotFoundError
from server.ingest.identities import Identities, Known
from server.metrics import Metrics
from server.online.shown import Shown
from server.online.states import MergedError, Recorded
from server.online.store import Fleet, Standing
from server.recommend.ahead import Ahead
from server.recommend.computing import Computing
from server.recommend.known import KnownSlates
from server.recommend.recommender import Recommender
from server.recommend.rooms import recommender_of
from server.recommend.snapshot import Snapshot
from server.recommend.standing import Standings
from server.settings import ServerSettings
from tests.unit.tables import DAY, table

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
COUNT = 60
# The feature snapshot that every epoch of these shops ranks with, unless it names another one.
FIRST = datetime(2025, 1, 1, tzinfo=UTC)
PROFILE = {"purchase_count": 2, "price_mean": 10.0, "price_low": 5.0, "price_high": 20.0}


def _nothing() -> None:
    pass


@dataclass
class Truth:
    """PostgreSQL: what every customer did, who was merged into whom, and the versions the fleet should be at.

    ``profiles`` are the feature snapshots, the same profile for everybody; ``epochs`` says which one an epoch ranks with.
    """

    customers: dict[str, Activity] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    identities: dict[Subject, str] = field(default_factory=dict)
    membership: dict[str, int] = field(default_factory=dict)
    fleet: Fleet = field(default_factory=lambda: Fleet("m1", 1, 1, 1))
    profiles: dict[datetime, dict[str, Any]] = field(default_factory=lambda: {FIRST: PROFILE})
    epochs: dict[int, datetime | None] = field(default_factory=dict)
    away: bool = False
    reads: int = 0

    async def ask(self) -> None:
        """One query."""
        self.reads += 1
        await asyncio.sleep(0)
        if self.away:
            raise psycopg.OperationalError("away")

    def add(self, user_id: str, *item_ids: str) -> int:
        """The customer views items, one after the other; returns the new version."""
        known = self.customers.get(user_id, Activity(0))
        for item_id in item_ids:
            seen = Behaviour(item_id, "view", "web", 20_000 * DAY + known.version)
            known = Activity(known.version + 1, (seen, *known.behaviours))
        self.customers[user_id] = known
        return known.version

    def add_search(self, user_id: str, text: str) -> int:
        """The customer searches; returns the new version."""
        known = self.customers.get(user_id, Activity(0))
        seen = Behaviour("", "search", "web", 20_000 * DAY + known.version, text)
        self.customers[user_id] = Activity(known.version + 1, (seen, *known.behaviours))
        return known.version + 1


@dataclass
class MemoryOnline:
    """Redis: customers, committed slates and the fleet's pointers. ``on_read`` runs after each read, before its answer is used."""

    customers: dict[str, Activity] = field(default_factory=dict)
    membership: dict[str, int] = field(default_factory=dict)
    slates: dict[tuple[str, str], bytes] = field(default_factory=dict)
    fleet: Fleet | None = field(default_factory=lambda: Fleet("m1", 1, 1, 1))
    now: datetime = START
    reads: int = 0
    on_read: Callable[[], None] = _nothing
    away: bool = False
    full: bool = False
    behind: bool = False
    unwatched: bool = False
    materialized: datetime | None = FIRST

    def check(self) -> None:
        if self.away:
            raise redis.exceptions.ConnectionError("away")

    async def read(self, user_id: str, slot: str) -> Standing:
        self.check()
        self.reads += 1
        known = self.customers.get(user_id)
        version, membership = known.version if known else None, self.membership.get(user_id, 0)
        seen = Standing(version, self.slates.get((user_id, slot)), self.fleet, self.now, membership=membership)
        self.on_read()
        await asyncio.sleep(0)
        return seen

    async def commit(self, user_id: str, slot: str, *, user_version: int, payload: bytes, ttl_seconds: float) -> bytes:
        await asyncio.sleep(0)
        self.check()
        if self.full:
            raise redis.exceptions.OutOfMemoryError("used memory > 'maxmemory'")
        now = round(self.now.timestamp() * 1000)
        standing = self.slates.get((user_id, slot))
        if standing is not None:
            version, expires, _ = standing.split(b":", 2)
            if int(version) > user_version or (int(version) == user_version and int(expires) > now):
                return standing
        self.slates[user_id, slot] = b"%d:%d:%b" % (user_version, now + round(ttl_seconds * 1000), payload)
        return self.slates[user_id, slot]


@dataclass
class MemoryStates:
    """Reads customers from Redis, and rebuilds them from the truth."""

    truth: Truth
    online: MemoryOnline
    shown: Shown = field(default_factory=Shown)
    rebuilds: int = 0
    stale: bool = False
    on_recorded: Callable[[], None] = _nothing

    async def rebuild(self, user_id: str) -> int:
        self.rebuilds += 1
        version = (await self._recorded(user_id)).user_version
        self.online.check()
        self.online.customers[user_id] = self.truth.customers[user_id]
        self.online.membership[user_id] = self.truth.membership.get(user_id, 0)
        return version

    async def recorded(self, user_id: str) -> Recorded:
        seen = await self._recorded(user_id)
        self.on_recorded()
        return seen

    async def _recorded(self, user_id: str) -> Recorded:
        await self.truth.ask()
        if user_id in self.truth.merged:
            raise MergedError(self.truth.merged[user_id])
        if user_id and user_id not in self.truth.customers:
            raise NotFoundError("no such customer", reason="SUBJECT_UNKNOWN", field="subject.user_id")
        return Recorded(self.truth.customers[user_id].version, self.truth.membership.get(user_id, 0)) if user_id else Recorded(0)

    async def features(self, user_id: str, *, now: datetime) -> dict[str, dict[str, FeatureValue]]:
        await asyncio.sleep(0)
        self.online.check()
        if user_id not in self.online.customers:
            await self.rebuild(user_id)
        return self._views(self.online.customers[user_id], self.online.materialized, now)

    async def recorded_features(self, user_id: str, *, now: datetime) -> dict[str, dict[str, FeatureValue]]:
        await self._recorded(user_id)
        return self._views(self.truth.customers[user_id], max(self.truth.profiles, default=None), now)

    async def profile_at(self, _user_id: str, at: datetime, *, user_version: int, now: datetime) -> dict[str, FeatureValue]:
        await self.truth.ask()
        return self._profile(at, now)

    def _views(self, known: Activity, at: datetime | None, now: datetime) -> dict[str, dict[str, FeatureValue]]:
        columns = {
            "version": known.version,
            "recent_items": [b.item_id for b in known.behaviours],
            "recent_action_codes": [1 + ACTIONS.index(b.action) for b in known.behaviours],
            "recent_channels": [b.channel for b in known.behaviours],
            "recent_times": [b.occurred_at for b in known.behaviours],
            "recent_texts": [b.text for b in known.behaviours],
            "purchased_items": list(known.purchased_items),
            "purchased_days": list(known.purchased_days),
        }
        return {
            ACTIVITY_VIEW: {name: FeatureValue(value, Status.PRESENT, now) for name, value in columns.items()},
            PROFILE_VIEW: self._profile(at, now),
        }

    def _profile(self, at: datetime | None, now: datetime) -> dict[str, FeatureValue]:
        if at is None or at not in self.truth.profiles:
            return dict.fromkeys(PROFILE, FeatureValue(None, Status.MISSING, None))
        stale = self.stale or now - at > timedelta(days=1000)
        return {name: FeatureValue(v, Status.STALE if stale else Status.PRESENT, at) for name, v in self.truth.profiles[at].items()}


class MemoryIdentities(Identities):
    """The real one, asking the truth instead of PostgreSQL; ``known`` is what a former look has left in the cache."""

    def __init__(self, truth: Truth, known: dict[Subject, str]) -> None:
        super().__init__(cast("Any", None), new_user_id=lambda: "new")
        self._truth = truth
        self._known = known
        self._cache.update((subject, Known(user_id, 0)) for subject, user_id in known.items())

    async def look_up(self, subject: Subject) -> Known:
        await self._truth.ask()
        user_id = self._truth.identities.get(subject) or self._known.get(subject, "")
        user_id = self._truth.merged.get(user_id, user_id)
        return Known(user_id if user_id in self._truth.customers else "", self._truth.membership.get(user_id, 0))


@dataclass
class MemoryFleet:
    """A replica's snapshots; the model is plain arithmetic that counts its runs and can be told to fail."""

    truth: Truth
    online: MemoryOnline
    current: Snapshot | None = None
    computations: int = 0
    seconds: float = 0.005
    error: Exception | None = None
    loaded: dict[tuple[str, int], Snapshot] = field(default_factory=dict)

    async def ensure(self, fleet: Fleet) -> Snapshot:
        await asyncio.sleep(0)
        key = (fleet.model_version, fleet.index_version)
        self.current = self.loaded.setdefault(key, self.snapshot(*key))
        return self.current

    def held(self, model_version: str, index_version: int) -> Snapshot | None:
        return self.loaded.get((model_version, index_version))

    async def pointers(self) -> Fleet:
        await self.truth.ask()
        return self.truth.fleet

    async def sync(self) -> Fleet:
        await self.truth.ask()
        self.online.fleet = self.truth.fleet
        return self.truth.fleet

    def snapshot(self, model_version: str, index_version: int) -> Snapshot:
        items = replace(table(COUNT, index_version=index_version), features_as_of=self.truth.epochs.get(index_version, FIRST))
        if not model_version:
            return Snapshot(None, items, np.zeros((COUNT, 0), np.float32), CollaborativeWeights.empty(COUNT))
        rng = np.random.default_rng(list(model_version.encode()))
        vectors = rng.standard_normal((COUNT, 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        mixer = rng.standard_normal(23).astype(np.float32)

        def rank(matrix: Any) -> Any:
            self.computations += 1
            sleep(self.seconds)  # in a thread: long enough that concurrent calls overlap
            if self.error is not None:
                raise self.error
            return np.einsum("cf,f->c", matrix, mixer)

        model = SimpleNamespace(
            model_version=model_version,
            signals=SignalConfig(),
            user_vector=lambda seen, items, _: next((vectors[items.rows[b.item_id]] for b in seen.behaviours if b.item_id), None),
            text_vector=lambda _text: vectors[0],
            rank=rank,
        )
        return Snapshot(cast("Any", model), items, vectors, CollaborativeWeights.empty(COUNT))


@dataclass
class MemoryOffers:
    """Every item at its own price plus the offers' version in cents, so that a price says which version it is of."""

    truth: Truth
    version: int = -1
    asked: list[int] = field(default_factory=list)

    async def at_least(self, offer_version: int) -> OfferTable:
        self.asked.append(offer_version)
        if self.version < offer_version:
            await self.truth.ask()
            self.version = offer_version
        price = self.version * 10_000
        return OfferTable(
            self.version, {f"i{k:03d}": Offer((k + 1) * 1_000_000 + price, "EUR", None, frozenset(), "") for k in range(COUNT)}
        )


@dataclass
class MemoryJournal:
    logged: list[tuple[Answer, str, str]] = field(default_factory=list)
    personas: list[str] = field(default_factory=list)

    def log(self, answer: Answer, query: RecommendQuery, *, answered_at: datetime, persona_id: str) -> None:
        self.logged.append((answer, query.channel, query.surface))
        self.personas.append(persona_id)


@dataclass
class Replica:
    """A recommender with its own copies, over stores that all replicas share."""

    recommender: Recommender
    fleet: MemoryFleet
    states: MemoryStates
    offers: MemoryOffers
    journal: MemoryJournal
    identities: Identities
    registry: CollectorRegistry

    def count(self, result: str) -> float:
        """How many slates were a hit or a miss."""
        return self.registry.get_sample_value("concord_slate_total", {"result": result}) or 0.0


@dataclass
class Shop:
    """The shared stores."""

    truth: Truth = field(default_factory=Truth)
    online: MemoryOnline = field(default_factory=MemoryOnline)

    def views(self, user_id: str, *item_ids: str, seen: bool = True) -> int:
        """Stores views; ``seen`` says whether Redis caught up."""
        version = self.truth.add(user_id, *item_ids)
        if seen:
            self.online.customers[user_id] = self.truth.customers[user_id]
        self.online.membership[user_id] = self.truth.membership.get(user_id, 0)
        return version

    def point(self, **changes: Any) -> None:
        """Moves pointers of the fleet everywhere."""
        self.truth.fleet = self.online.fleet = self.truth.fleet._replace(**changes)

    def pass_time(self, seconds: float) -> None:
        self.online.now += timedelta(seconds=seconds)

    def replica(self, *, ttl_seconds: float = 900.0, known: Sequence[tuple[Subject, str]] = (), **settings: Any) -> Replica:
        registry = CollectorRegistry()
        states, fleet = MemoryStates(self.truth, self.online), MemoryFleet(self.truth, self.online)
        identities = MemoryIdentities(self.truth, dict(known))
        offers, journal = MemoryOffers(self.truth), MemoryJournal()
        configured = ServerSettings(slate_size=40, slate_ttl_seconds=ttl_seconds, **settings)
        computing = Computing(threads=configured.compute_threads, waiting=configured.compute_waiting)
        recommender = recommender_of(
            configured,
            known=KnownSlates(configured.known_slates),
            identities=identities,
            states=cast("Any", states),
            standings=Standings(cast("Any", states), cast("Any", self.online), cast("Any", fleet), now=lambda: self.online.now),
            computing=computing,
            ahead=Ahead(computing, identities, cast("Any", self.online), current=lambda: None),
            online=cast("Any", self.online),
            fleet=cast("Any", fleet),
            offers=cast("Any", offers),
            journal=cast("Any", journal),
            metrics=Metrics(registry),
            now=lambda: self.online.now,
        )
        return Replica(recommender, fleet, states, offers, journal, identities, registry)
