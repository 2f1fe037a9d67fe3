"""What a replica depends on, watched in the background, and which services can answer with what is there."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import psycopg
import redis.exceptions
import structlog
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from redis.asyncio import Redis

from features.activity import ACTIVITY_VIEW
from features.registry import Registry
from server.errors import ConcordError, UnavailableError
from server.fleet import FleetWatch
from server.metrics import Metrics
from server.online.store import OnlineStore

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Probe:
    """How to ask a dependency: ``act`` returns when it answers and raises when it does not; at most once per ``pause_seconds``."""

    act: Callable[[], Coroutine[Any, Any, None]]
    pause_seconds: float = 0.0


PROBE_SECONDS = 2.0
_SLOW_SECONDS = 10.0  # an encoder run takes 7 ms, reading a feature view some milliseconds of a thread
# One lost ping is no outage; a dependency that answers is up at once.
FAILURES = 2

DEPENDENCIES = {
    "postgres": "PostgreSQL answers SELECT 1.",
    "redis": "Redis answers PING.",
    "snapshot": "This replica holds the model and index epoch that the fleet answers with.",
    "model": "A model is active, and its encoder answers here.",
    "index": "An index epoch with items in it has been published.",
    "registry": "The Feast registry can be read.",
}

Needs = tuple[tuple[str, ...], ...]
"""All groups must hold; of the dependencies in a group one is enough."""

# Writes need the system of record. A slate can be had from either store, but by none without a snapshot of the fleet's versions.
_RECORD: Needs = (("postgres",),)
NEEDS: Mapping[str, Needs] = {
    "concord.v1.EventService": _RECORD,
    "concord.v1.IdentityService": _RECORD,
    "concord.v1.CatalogService": _RECORD,
    "concord.v1.ModelService": _RECORD,
    "concord.v1.ArticleService": _RECORD,
    "concord.v1.AssistantService": (("snapshot",), ("postgres",)),  # the message is stored first
    "concord.v1.ProfileService": _RECORD,  # it lists the customer's identities, which only PostgreSQL holds
    "concord.v1.FeatureService": (("postgres", "redis"),),
    "concord.v1.RecommendationService": (("snapshot",), ("postgres", "redis")),
    "concord.v1.SearchService": (("snapshot",), ("postgres", "redis")),
    "concord.v1.UnderstandingService": (("snapshot",), ("postgres", "redis")),  # one of them names the model that answers
}
OVERALL = "concord.v1.RecommendationService"
"""The whole replica is SERVING while it can answer recommendations, which is what most calls ask for."""


@dataclass
class _Seen:
    """What the probes of one dependency said so far; nothing is up before it has answered once."""

    up: bool = False
    failures: int = FAILURES
    asking: "asyncio.Task[None] | None" = None
    due: float = 0.0


@dataclass(frozen=True)
class Health:
    """Which dependencies are up, and which services can answer."""

    dependencies: Mapping[str, bool]
    services: Mapping[str, bool] = field(init=False)

    def __post_init__(self) -> None:
        served = {name: all(any(self.dependencies[d] for d in group) for group in needs) for name, needs in NEEDS.items()}
        object.__setattr__(self, "services", served)

    @property
    def overall(self) -> bool:
        """True while the replica can answer recommendations."""
        return self.services[OVERALL]


class HealthWatch:
    """Probes every dependency at a pace, each by itself, so that one that hangs hides nothing about the others.

    A probe that hangs is not cancelled: psycopg answers a cancellation by waiting for the server once more. It counts as failed
    until it ends, and no second one is started beside it.
    """

    def __init__(self, probes: Mapping[str, Probe], metrics: Metrics, publish: Callable[[Health], Awaitable[None]]) -> None:
        self._probes = probes
        self._metrics = metrics
        self._publish = publish
        self._seen = {name: _Seen() for name in probes}
        self._looking = asyncio.Lock()

    async def look(self) -> Health:
        """Asks all that are due and publishes what follows."""
        async with self._looking:
            await asyncio.gather(*(self._ask(name) for name in self._probes))
            health = Health({name: seen.up for name, seen in self._seen.items()})
            for name, up in health.dependencies.items():
                self._metrics.set_dependency(name, up)
            await self._publish(health)
            return health

    async def run(self, pause_seconds: float) -> None:
        """Looks until cancelled."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(pause_seconds)
        finally:
            for seen in self._seen.values():
                if seen.asking is not None:
                    seen.asking.cancel()

    async def _ask(self, name: str) -> None:
        seen, probe = self._seen[name], self._probes[name]
        if seen.asking is None:
            if seen.failures == 0 and monotonic() < seen.due:  # what is away is asked each time, so that it is back soon
                return
            seen.asking = asyncio.create_task(probe.act())
        await asyncio.wait((seen.asking,), timeout=PROBE_SECONDS)
        if not seen.asking.done():
            self._judge(name, "TimeoutError")
            return
        asked, seen.asking = seen.asking, None
        seen.due = monotonic() + probe.pause_seconds
        self._judge(name, _problem(asked))

    def _judge(self, name: str, problem: str) -> None:
        seen = self._seen[name]
        seen.failures = seen.failures + 1 if problem else 0
        up = seen.failures == 0 or (seen.up and seen.failures < FAILURES)
        if up and not seen.up:
            _log.info("dependency is up", dependency=name)
        elif seen.up and not up:
            _log.warning("dependency is away", dependency=name, problem=problem)
        seen.up = up


def _problem(asked: "asyncio.Task[None]") -> str:
    """Says why a probe failed: a reason or the type of an exception, never its text; empty when it did not."""
    if asked.cancelled():
        return "CancelledError"
    error = asked.exception()
    return "" if error is None else error.reason if isinstance(error, ConcordError) else type(error).__name__


class PostgresProbe:
    """Asks over a connection of its own: a pool that is used up under load must not look like a PostgreSQL that is away."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: AsyncConnection[TupleRow] | None = None

    async def __call__(self) -> None:
        """Raises psycopg.Error when PostgreSQL does not answer."""
        if self._connection is None or self._connection.closed:
            self._connection = await AsyncConnection.connect(self._dsn, autocommit=True, connect_timeout=3)
        await self._connection.execute("SELECT 1")

    async def close(self) -> None:
        """Closes the connection."""
        if self._connection is not None:
            await self._connection.close()


def probes(
    postgres: PostgresProbe, client: Redis, online: OnlineStore, fleet: FleetWatch, registry: Callable[[], Registry]
) -> dict[str, Probe]:
    """Returns a probe for each of DEPENDENCIES; ``registry`` reads Feast's, on a thread."""

    async def redis_answers() -> None:
        await client.execute_command("PING")  # type: ignore[no-untyped-call]

    async def model() -> None:
        loaded = fleet.current.model if fleet.current else None
        if loaded is None:
            raise UnavailableError("no model is active", reason="NO_ACTIVE_MODEL")
        await asyncio.to_thread(loaded.item_vector, "health")

    async def index() -> None:
        if fleet.current is None or not len(fleet.current.table):
            raise UnavailableError("no items are published", reason="INDEX_EMPTY")

    async def registered() -> None:
        if ACTIVITY_VIEW not in (await asyncio.to_thread(registry)).layouts:
            raise UnavailableError("the Feast repository is not applied", reason="REGISTRY_EMPTY")

    return {
        "postgres": Probe(postgres),
        "redis": Probe(redis_answers),
        "snapshot": Probe(lambda: _snapshot(online, fleet)),
        "model": Probe(model, _SLOW_SECONDS),
        "index": Probe(index),
        "registry": Probe(registered, _SLOW_SECONDS),
    }


async def _snapshot(online: OnlineStore, fleet: FleetWatch) -> None:
    """Follows the pointers as the next call would, so an idle replica has loaded what its next call needs.

    While the stores are away, what is held stays good; so it does while a newer epoch of the same model is being built.
    """
    held = fleet.current
    try:
        pointers = (await online.read("", "")).fleet
        if pointers is not None:
            if held is None or held.model_version != pointers.model_version:
                await fleet.ensure(pointers)
            else:
                async with asyncio.timeout(PROBE_SECONDS / 2):
                    await fleet.ensure(pointers)
    except (psycopg.Error, redis.exceptions.RedisError, TimeoutError):
        if held is None:
            raise
    if fleet.current is None:
        raise UnavailableError("nothing is loaded yet", reason="NOT_WARM")
