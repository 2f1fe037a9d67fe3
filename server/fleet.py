"""The fleet's versions as this replica sees them: it loads what the pointers name before it answers with it."""

import asyncio
from collections.abc import Awaitable, Callable

import psycopg
import redis.exceptions
import structlog

from features.bundle import BundleError
from server.database import Pool
from server.errors import ConcordError, UnavailableError
from server.inference.model import LoadedModel
from server.metrics import Metrics
from server.online.store import Fleet, OnlineStore
from server.recommend.snapshot import Snapshot, SnapshotBuilder

_log = structlog.get_logger(__name__)
_STATE = "SELECT model_version, activation, index_version, offer_version FROM fleet_state"

ModelLoader = Callable[[str], Awaitable[LoadedModel]]


class FleetWatch:
    """Keeps snapshots for the versions in use. PostgreSQL is the truth; the pointers in Redis say when all replicas move.

    A pointer in Redis is only ever moved by a replica that has already loaded what it names, so a bundle nobody can load
    never becomes the fleet's.

    Attributes:
        current: the snapshot this replica answers with, None before the first call.
        newest: what PostgreSQL said last.
    """

    def __init__(self, pool: Pool, online: OnlineStore, builder: SnapshotBuilder, load: ModelLoader, metrics: Metrics) -> None:
        self._pool = pool
        self._online = online
        self._builder = builder
        self._load = load
        self._metrics = metrics
        self._models: dict[str, LoadedModel] = {}
        self._snapshots: dict[tuple[str, int], Snapshot] = {}
        self._building: dict[tuple[str, int], asyncio.Task[Snapshot]] = {}
        self._complaint = ""
        self.current: Snapshot | None = None
        self.newest = Fleet("", 0, 0, 0)

    @property
    def index_version(self) -> int:
        """The epoch this replica answers with, 0 before the first."""
        return self.current.index_version if self.current else 0

    @property
    def loaded(self) -> set[str]:
        """Model versions this replica holds."""
        return set(self._models)

    def held(self, model_version: str, index_version: int) -> Snapshot | None:
        """Returns a snapshot if it is loaded here, without loading it."""
        return self._snapshots.get((model_version, index_version))

    async def ensure(self, fleet: Fleet) -> Snapshot:
        """Returns the snapshot the pointers name and answers with it from now on, loading it first if need be.

        Raises:
            UnavailableError: this replica cannot load it; answering with another model would break the promise.
        """
        snapshot = await self._snapshot(fleet.model_version, fleet.index_version)
        if snapshot is not self.current:
            self.current = snapshot
            self._metrics.set_active_model(snapshot.model_version)
            self._forget_old()
        return snapshot

    async def preload(self, model_version: str) -> None:
        """Loads a model over the current epoch without answering with it.

        Raises:
            UnavailableError: it cannot be loaded.
        """
        fleet = await self._state()
        await self._snapshot(model_version, fleet.index_version)

    async def sync(self) -> Fleet:
        """Loads what PostgreSQL names, then moves the pointers in Redis; returns what PostgreSQL says."""
        fleet = await self._state()
        await self._online.point_offers(fleet.offer_version)
        await self._snapshot(fleet.model_version, fleet.index_version)
        await self._online.point(fleet)
        return fleet

    async def run(self, pause_seconds: float) -> None:
        """Keeps the pointers in step until cancelled; a model that cannot be loaded is reported once, not moved to."""
        while True:
            try:
                await self.sync()
                self._complain("")
            except (psycopg.Error, redis.exceptions.RedisError, ConcordError) as error:
                self._complain(f"{type(error).__name__}: {error}")
            await asyncio.sleep(pause_seconds)

    def _complain(self, problem: str) -> None:
        if problem and problem != self._complaint:
            _log.error("the fleet's versions cannot be followed", problem=problem)
        self._complaint = problem

    async def _state(self) -> Fleet:
        async with self._pool.connection() as connection:
            row = await (await connection.execute(_STATE)).fetchone()
        assert row is not None
        self.newest = Fleet(*row)
        return self.newest

    async def _snapshot(self, model_version: str, index_version: int) -> Snapshot:
        """Builds each snapshot once however many calls wait for it; a cancelled call does not cancel the building."""
        key = (model_version, index_version)
        if key in self._snapshots:
            return self._snapshots[key]
        if key not in self._building:
            self._building[key] = asyncio.create_task(self._build(*key))
        return await asyncio.shield(self._building[key])

    async def _build(self, model_version: str, index_version: int) -> Snapshot:
        try:
            model = None
            if model_version:
                model = self._models.get(model_version) or await self._load(model_version)
                self._models[model_version] = model
            snapshot = await self._builder.build(model, index_version)
        except BundleError as error:
            raise UnavailableError(str(error), reason="BUNDLE_INVALID") from error
        finally:
            del self._building[model_version, index_version]
        self._snapshots[model_version, index_version] = snapshot
        _log.info("snapshot ready", model_version=model_version, index_version=index_version, items=len(snapshot.table))
        return snapshot

    def _forget_old(self) -> None:
        """Keeps the newest four snapshots (a roll-back finds the last model loaded) and the models they use."""
        for key in list(self._snapshots)[:-4]:
            if self._snapshots[key] is not self.current:
                del self._snapshots[key]
        used = {snapshot.model_version for snapshot in self._snapshots.values()}
        self._models = {version: model for version, model in self._models.items() if version in used}
