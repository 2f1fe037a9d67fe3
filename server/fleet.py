"""The fleet's versions as this replica sees them: it loads what the pointers name, and what they will name, before it answers with it."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psycopg
import redis.exceptions
import structlog

from features.bundle import BundleError
from server.errors import ConcordError, UnavailableError
from server.inference.model import LoadedModel
from server.membership import Agreed, Membership, Report
from server.metrics import Metrics
from server.online.store import Fleet, OnlineStore
from server.recommend.snapshot import Snapshot, SnapshotBuilder

_log = structlog.get_logger(__name__)
# A model that could not be loaded is tried again after this long: what was wrong is repaired by people, not in milliseconds.
_RETRY_SECONDS = 1.0
_JOIN_SECONDS = 0.05
_WAIT_SECONDS = 0.5  # between looks whether replicas with other settings have left; they are dead after 3 s at the earliest

ModelLoader = Callable[[str], Coroutine[Any, Any, LoadedModel]]
Key = tuple[str, int]


class FleetWatch:
    """Keeps snapshots for the versions in use. PostgreSQL is the truth; the pointers in Redis say when all replicas move.

    PostgreSQL's pointers move when every live replica has reported that it could follow at once (server/membership.py,
    features/models.py); the ones in Redis follow, moved by a replica that has already loaded what they name. Everything is
    loaded off the event loop, and on a caller's time only when this replica was not waited for.

    Attributes:
        current: the snapshot this replica answers with, None before the first call.
        newest: what PostgreSQL said last.
    """

    def __init__(
        self,
        members: Membership,
        online: OnlineStore,
        builder: SnapshotBuilder,
        load: ModelLoader,
        metrics: Metrics,
        *,
        rehearse: Callable[[Snapshot], None],
    ) -> None:
        self._members = members
        self._online = online
        self._builder = builder
        self._load = load
        self._metrics = metrics
        self._rehearse = rehearse
        self._models: dict[str, asyncio.Task[LoadedModel]] = {}
        self._snapshots: dict[Key, Snapshot] = {}
        self._building: dict[Key, asyncio.Task[Snapshot]] = {}
        self._failed: dict[str, str] = {}
        self._retry_at: dict[str, float] = {}
        self._claim = ""
        self._address = ""  # empty until it has joined
        self._entered = False
        self._recent: list[Key] = []
        self._answering = (0, 0)
        self._complaint = ""
        self._news = asyncio.Event()
        self._reporting = asyncio.Lock()
        self._report_due = asyncio.Event()
        self.current: Snapshot | None = None
        self.newest = Fleet("", 0, 0, 0)

    @property
    def index_version(self) -> int:
        """The epoch this replica answers with, 0 before the first."""
        return self.current.index_version if self.current else 0

    @property
    def loaded(self) -> set[str]:
        """Model versions this replica could answer with."""
        return {model for model, _ in self._snapshots if model}

    def held(self, model_version: str, index_version: int) -> Snapshot | None:
        """Returns a snapshot if it is loaded here, without loading it."""
        return self._snapshots.get((model_version, index_version))

    async def ensure(self, fleet: Fleet) -> Snapshot:
        """Returns the snapshot the pointers name and answers with it from now on, loading it first if need be.

        Raises:
            UnavailableError: this replica cannot load it, and answering with another model would break the promise; or it has
                not joined, and might answer otherwise than those that have.
        """
        if not self._address:
            raise UnavailableError("this replica has not joined the fleet", reason="REPLICA_NOT_JOINED")
        snapshot = await self._snapshot((fleet.model_version, fleet.index_version))
        place = (fleet.activation, fleet.index_version)
        if place >= self._answering and snapshot is not self.current:  # a call that read before a move must not turn it back
            key = (snapshot.model_version, snapshot.index_version)
            self._recent = [*(k for k in self._recent if k != key), key][-4:]
            self._metrics.set_active_model(snapshot.model_version)
            self.current = snapshot
            self._news.set()
        self._answering = max(place, self._answering)
        return snapshot

    async def pointers(self) -> Fleet:
        """Returns the versions that answer by PostgreSQL alone, for when Redis is away."""
        return (await self._agreed()).fleet

    async def sync(self) -> Fleet:
        """Moves the pointers in Redis to what PostgreSQL says, as far as this replica could follow them; returns what it says."""
        fleet = (await self._agreed()).fleet
        await self._point(fleet)
        return fleet

    async def join(self, address: str) -> Snapshot:
        """Enters the fleet under ``address`` and loads what it answers with, and the newest epoch; the last step before serving.

        While replicas live whose settings would give other slates it waits for them to leave: equal versions must give equal
        answers, whichever replica is asked. ``run`` loads meanwhile what it will answer with.

        Raises:
            UnavailableError: this replica cannot load it.
        """
        self._entered = True
        told = ""
        while differing := await self._members.join(address, replace(self._said(), online_away=True)):
            if differing != told:
                _log.warning("waiting to join: other settings decide the slates of replicas that live; stop those", replicas=differing)
            told = differing
            await asyncio.sleep(_WAIT_SECONDS)
        self._address = address
        self._online.doubt()  # until now the others showed what they liked, whatever Redis holds
        published = (await self._agreed()).published_index
        while True:
            agreed = await self._agreed()
            await self._snapshot((agreed.fleet.model_version, agreed.published_index))
            await self._turn()
            if self.newest.index_version >= published and self._could(self.newest.model_version, self.newest.index_version):
                snapshot = await self.ensure(self.newest)
                await self._online.confirm()
                return snapshot
            await asyncio.sleep(_JOIN_SECONDS)

    async def report(self) -> None:
        """Says in PostgreSQL how this replica stands, and returns when that is committed; the newest word comes last.

        A lease that had lapsed puts Redis in doubt before it counts again.
        """
        async with self._reporting:
            if self._address and not await self._members.report(self._address, self._said()):
                self._online.doubt()

    def report_soon(self) -> None:
        """Has ``run_reports`` report now: the others wait for the word that this replica reads Redis no more."""
        self._report_due.set()

    async def run_reports(self) -> None:
        """Reports whenever that is due before the next turn, which may be held up by a store, until cancelled."""
        while True:
            await self._report_due.wait()
            self._report_due.clear()
            with suppress(psycopg.Error):  # the next turn reports again
                await self.report()

    async def leave(self) -> None:
        """Leaves the fleet, so that nobody waits for this replica; without PostgreSQL the others notice by themselves."""
        self._address = ""
        if self._entered:
            self._entered = False
            with suppress(psycopg.Error):
                await self._members.leave()

    async def run(self, pause_seconds: float) -> None:
        """Reports, prepares and follows until cancelled; at once when something became ready, else every ``pause_seconds``."""
        while True:
            self._news.clear()
            try:
                self._complain(await self._turn())
            except (psycopg.Error, redis.exceptions.RedisError, ConcordError) as error:
                self._complain(f"{type(error).__name__}: {error}")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), pause_seconds)

    def look(self) -> None:
        """Looks at PostgreSQL now instead of at the end of the pause, and starts to prepare what it asks for."""
        self._news.set()

    async def prepared(self, model_version: str) -> str:
        """Loads a model over the epoch that answers, for an activation that waits; returns why it failed, empty if it did not."""
        agreed = await self._agreed()
        self._heed(agreed)
        with suppress(ConcordError):
            await self._snapshot((model_version, agreed.fleet.index_version))
        self._news.set()
        return self._failed.get(model_version, "")

    async def _turn(self) -> str:
        """One round: report, start what is asked for, let the epoch move, move Redis, answer with it; returns what is amiss."""
        await self.report()
        agreed = await self._agreed()
        self._heed(agreed)
        wanted = self._wanted(agreed)
        for key in wanted:
            self._prepare(key)
        if agreed.published_index > agreed.fleet.index_version and self._could(agreed.fleet.model_version, agreed.published_index):
            await self._members.advance()
            agreed = await self._agreed()
        await self._point(agreed.fleet)
        if self._address and self._could(agreed.fleet.model_version, agreed.fleet.index_version):
            await self.ensure(agreed.fleet)
        self._forget_old({*wanted, *self._wanted(agreed)}, agreed.fleet.index_version)
        self._metrics.set_replicas(agreed.replica_count)
        return "live replicas differ in the settings that decide a slate; see `concord replicas`" if agreed.config_count > 1 else ""

    def _said(self) -> Report:
        ready: dict[str, list[int]] = {}
        for model, index in sorted(self._snapshots):
            ready.setdefault(model, []).append(index)
        answering = self.current.model if self.current else None
        version, provider = (answering.model_version, answering.provider) if answering else ("", "")
        away = not self._online.relied_on
        return Report(version, self._answering[0], self.index_version, ready, dict(self._failed), self._claim, provider, away)

    async def _agreed(self) -> Agreed:
        agreed = await self._members.agreed()
        self.newest = agreed.fleet
        return agreed

    def _heed(self, agreed: Agreed) -> None:
        """Notes whose preparation this is: for a new one, what failed before is tried again at once."""
        if agreed.claim and agreed.claim != self._claim:
            self._failed.pop(agreed.preparing_model, None)
            self._retry_at.pop(agreed.preparing_model, None)
        self._claim = agreed.claim

    def _wanted(self, agreed: Agreed) -> list[Key]:
        """What answers, what will once the epoch moves, and the same of the model being prepared; most urgent first."""
        models = [agreed.fleet.model_version, *([agreed.preparing_model] if agreed.preparing_model else [])]
        keys = [(model, index) for model in models for index in (agreed.fleet.index_version, agreed.published_index)]
        return list(dict.fromkeys(keys))

    def _could(self, model_version: str, index_version: int) -> bool:
        return (model_version, index_version) in self._snapshots

    def _prepare(self, key: Key) -> None:
        """Starts to build a snapshot unless it is there, on its way, or failed a moment ago."""
        if key in self._snapshots or key in self._building or self._retry_at.get(key[0], 0.0) > asyncio.get_running_loop().time():
            return
        self._start(key)

    async def _point(self, fleet: Fleet) -> None:
        """Moves Redis forward. Prices do not wait for a model or an epoch that is not loaded here."""
        if self._could(fleet.model_version, fleet.index_version):
            await self._online.point(fleet)
        else:
            await self._online.point_offers(fleet.offer_version)

    def _complain(self, problem: str) -> None:
        if problem and problem != self._complaint:
            _log.error("the fleet's versions cannot be followed", problem=problem)
        self._complaint = problem

    async def _snapshot(self, key: Key) -> Snapshot:
        """Builds each snapshot once however many calls wait for it; a cancelled call does not cancel the building."""
        if key in self._snapshots:
            return self._snapshots[key]
        return await asyncio.shield(self._building.get(key) or self._start(key))

    def _start(self, key: Key) -> "asyncio.Task[Snapshot]":
        self._building[key] = asyncio.create_task(self._build(key))
        self._building[key].add_done_callback(_retrieved)  # whoever waited may be gone
        return self._building[key]

    async def _build(self, key: Key) -> Snapshot:
        model_version, index_version = key
        try:
            model = await self._model(model_version) if model_version else None
            snapshot = await self._builder.build(model, index_version)
            await asyncio.to_thread(self._rehearse, snapshot)
        except psycopg.Error:  # PostgreSQL's trouble says nothing of the model
            raise
        except BundleError as error:
            self._note_failure(model_version, f"BUNDLE_INVALID: {error}")
            raise UnavailableError(str(error), reason="BUNDLE_INVALID") from error
        except ConcordError as error:
            self._note_failure(model_version, f"{error.reason}: {error}")
            raise
        except Exception as error:
            self._note_failure(model_version, f"MODEL_UNUSABLE: {type(error).__name__}")
            _log.exception("a snapshot cannot be built", model_version=model_version, index_version=index_version)
            raise UnavailableError(f"model {model_version} cannot answer here", reason="MODEL_UNUSABLE") from error
        finally:
            del self._building[key]
        self._snapshots[key] = snapshot
        self._failed.pop(model_version, None)
        self._news.set()
        _log.info("snapshot ready", model_version=model_version, index_version=index_version, items=len(snapshot.table))
        return snapshot

    async def _model(self, model_version: str) -> LoadedModel:
        """Loads each model once, however many epochs are built over it."""
        if model_version not in self._models:
            self._models[model_version] = asyncio.create_task(self._load(model_version))
        try:
            return await asyncio.shield(self._models[model_version])
        except Exception:
            self._models.pop(model_version, None)
            raise

    def _note_failure(self, model_version: str, reason: str) -> None:
        if self._failed.get(model_version) != reason:
            _log.error("this replica cannot load a model; it answers with the one it has", model_version=model_version, reason=reason)
        self._metrics.model_load_failed()
        self._failed[model_version] = reason
        self._retry_at[model_version] = asyncio.get_running_loop().time() + _RETRY_SECONDS
        self._news.set()

    def _forget_old(self, wanted: set[Key], index_version: int) -> None:
        """Keeps what is wanted, epochs still to come, what answered a moment ago, and the last model, for the roll-back."""
        model_version = self.current.model_version if self.current else ""
        last_other = [key for key in self._recent if key[0] != model_version][-1:]
        kept = {*wanted, *self._recent[-2:], *last_other}
        for key in list(self._snapshots):
            if key not in kept and not (key[0] == model_version and key[1] > index_version):
                del self._snapshots[key]
        used = {model for model, _ in (*self._snapshots, *self._building)}
        for model in [model for model in self._models if model not in used]:
            del self._models[model]
        self._builder.keep({index for _, index in self._snapshots})


def _retrieved(task: "asyncio.Task[Snapshot]") -> None:
    """Takes note of a preparation's outcome; ``_build`` has already recorded why it failed."""
    if not task.cancelled():
        task.exception()
