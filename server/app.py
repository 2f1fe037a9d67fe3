"""The rooms of a server process, built in order and ended in reverse."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import structlog

from features.activity import UserStateCodec
from features.registry import Registry, read_registry
from features.settings import SettingsError
from server.assistant.articles import Articles
from server.assistant.rooms import open_assistant
from server.catalog.offers import Offers
from server.catalog.service import Catalog
from server.database import ONLINE_REFUSES, RECORD_AWAY, connector, postgres_breaker, postgres_pool, redis_breaker, redis_client
from server.errors import ConcordError, PreconditionError
from server.fleet import FleetWatch
from server.health import PostgresProbe, Probe, probes
from server.identifiers import new_identifier
from server.inference.model import LoadedModel
from server.ingest.forget import Erasure
from server.ingest.graph import IdentityGraph
from server.ingest.identities import Identities
from server.ingest.notices import Notices
from server.ingest.oblivion import Oblivion
from server.ingest.recorder import EventRecorder
from server.ingest.recovery import Recovery
from server.ingest.writer import EventWriter
from server.journal.exposures import Journal
from server.membership import Membership
from server.metrics import Metrics
from server.models import BundleLoader, Models
from server.online.features import FeatureReader
from server.online.states import UserStates
from server.online.store import OnlineStore
from server.recommend.ahead import Ahead
from server.recommend.compute import policy_fingerprint
from server.recommend.computing import Computing
from server.recommend.known import KnownSlates
from server.recommend.profiles import Profiles
from server.recommend.rooms import policy_of, recommender_of
from server.recommend.searching import rehearse
from server.recommend.snapshot import SnapshotBuilder
from server.recommend.standing import Standings
from server.rpc.ports import Services
from server.search.searcher import Searcher
from server.search.suggester import Suggester
from server.security.audit import AdminAudit
from server.security.gate import open_gate
from server.settings import ServerSettings
from server.understand.embedder import Embedder
from server.understand.intents import Intents
from server.understand.judging import Judge
from server.understand.sentiment import Sentiments
from server.understand.text_runs import TextRuns
from server.vitals import Vitals

_log = structlog.get_logger(__name__)
T = TypeVar("T")


def _now() -> datetime:
    return datetime.now(UTC)


def _new_user_id() -> str:
    return f"u_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Rooms:
    """The services of one process, its view of the fleet, and how to ask what it depends on."""

    services: Services
    fleet: FleetWatch
    probes: Mapping[str, Probe]


@contextlib.asynccontextmanager
async def open_rooms(settings: ServerSettings, metrics: Metrics) -> AsyncIterator[Rooms]:
    """Connects to both stores, starts the background loops, and yields the services; ends them in reverse order."""
    connect = connector(settings)

    def look_up() -> Registry:
        with connect() as connection:
            return read_registry(connection, settings.project)

    registry = await asyncio.to_thread(look_up)
    if not registry.layouts:
        raise SettingsError("the Feast repository is not applied to this database; run `concord apply`")
    codec = UserStateCodec(registry.layouts, settings.project)
    async with contextlib.AsyncExitStack() as stack:
        record_breaker = postgres_breaker(settings, partial(metrics.set_breaker, "record"))
        pool = await stack.enter_async_context(postgres_pool(settings, record_breaker))
        client = redis_client(settings)
        stack.push_async_callback(client.aclose)
        online_breaker = redis_breaker(settings, client, partial(metrics.set_breaker, "online"))
        online = OnlineStore(client, codec, online_breaker)
        replica_id = uuid.uuid4().hex
        states = UserStates(pool, online, codec, replica_id=replica_id)
        identities = Identities(pool, new_user_id=_new_user_id)
        erasure = Erasure(pool, online)
        writer = EventWriter(pool, states, new_user_id=_new_user_id)
        recorder = EventRecorder(
            writer, states, metrics, queue_events=settings.ingest_queue_events, batch_events=settings.ingest_batch_events
        )
        loader = BundleLoader(settings, provider=settings.onnx_provider, threads=settings.onnx_threads, precision=settings.onnx_precision)
        policy = policy_of(settings)
        members = Membership(
            pool,
            replica_id=replica_id,
            config=policy_fingerprint(
                policy,
                hide_out_of_stock=settings.hide_out_of_stock,
                onnx_threads=settings.onnx_threads,
                onnx_precision=settings.onnx_precision,
            ),
            pause_seconds=settings.refresh_seconds,
            epoch_wait_seconds=settings.epoch_wait_seconds,
        )
        builder = SnapshotBuilder(pool, dsn=settings.postgres_dsn)
        fleet = FleetWatch(members, online, builder, loader, metrics, rehearse=lambda snapshot: rehearse(snapshot, policy))
        stack.push_async_callback(fleet.leave)
        journal = Journal(pool, metrics, bound=settings.journal_queue, pause_seconds=settings.journal_seconds, new_id=new_identifier)
        stack.push_async_callback(journal.flush)
        features = FeatureReader(
            client, online_breaker, states, identities, registry=registry, read_registry=look_up, project=settings.project, now=_now
        )
        catalog = Catalog(pool, fleet, connect=connect, epoch_seconds=settings.epoch_seconds)
        recovery = Recovery(pool, states, online, erasure, metrics, after_seconds=settings.recovery_seconds)
        online.is_dead = lambda: members.lapsed
        online_breaker.catch_up = partial(_caught_up, recovery, fleet)
        online_breaker.announce, online_breaker.on_doubt = fleet.report, fleet.report_soon
        known_slates = KnownSlates(settings.known_slates)
        standings = Standings(states, online, fleet, now=_now)
        computing = Computing(threads=settings.compute_threads, waiting=settings.compute_waiting)
        runs = TextRuns(computing, batches=settings.compute_threads, waiting=settings.encode_waiting, metrics=metrics)
        sentiments = Sentiments(partial(_answering, standings), runs)
        ahead = Ahead(computing, identities, online, current=lambda: fleet.current)
        recorder.arriving = ahead.arriving
        offers = Offers(pool)
        recommender = recommender_of(
            settings,
            known=known_slates,
            identities=identities,
            states=states,
            standings=standings,
            computing=computing,
            ahead=ahead,
            online=online,
            fleet=fleet,
            offers=offers,
            journal=journal,
            metrics=metrics,
            now=_now,
        )
        helping = await stack.enter_async_context(
            open_assistant(
                settings,
                pool=pool,
                recorder=recorder,
                identities=identities,
                standings=standings,
                slates=recommender.slates,
                offers=offers,
                fleet=fleet,
                runs=runs,
                computing=computing,
                metrics=metrics,
                now=_now,
            )
        )
        gate, keys = open_gate(settings, pool, now=_now)
        loops = (
            record_breaker.run(),
            online_breaker.run(),
            recorder.run(),
            writer.run(),
            recovery.run(),
            Oblivion(pool, (identities.clear, known_slates.clear), pause_seconds=settings.recovery_seconds / 2).run(),
            fleet.run(settings.refresh_seconds),
            fleet.run_reports(),
            Notices(pool, states, recovery, online_breaker, dsn=settings.postgres_dsn).run(),
            journal.run(),
            catalog.run(),
            features.run(settings.registry_seconds),
            Vitals(pool, client, recorder, journal, runs, fleet, metrics).run(),
            Judge(pool, Sentiments(partial(_loaded, fleet), runs), metrics, pause_seconds=settings.judge_seconds).run(),
            *helping.loops,
            *([keys.run()] if keys else []),
        )
        for loop in loops:
            task = asyncio.create_task(loop)
            task.add_done_callback(report_end)
            stack.push_async_callback(ended, task)
        services = Services(
            recorder=recorder,
            identities=identities,
            graph=IdentityGraph(pool, states, new_user_id=_new_user_id),
            erasure=erasure,
            recommender=recommender,
            searcher=Searcher(recommender, recorder, metrics, hide_out_of_stock=settings.hide_out_of_stock),
            suggester=Suggester(standings, offers, computing, hide_out_of_stock=settings.hide_out_of_stock),
            profiles=Profiles(pool, identities, states, now=_now),
            catalog=catalog,
            features=features,
            embedder=Embedder(standings, runs),
            assistant=helping.assistant,
            articles=Articles(pool, connect=connect),
            intents=Intents(standings, runs),
            sentiments=sentiments,
            models=Models(fleet, connect=connect),
            gate=gate,
            audit=AdminAudit(pool),
        )
        postgres = PostgresProbe(settings.postgres_dsn)
        stack.push_async_callback(postgres.close)
        yield Rooms(services, fleet, probes(postgres, client, online, fleet, look_up))


async def _answering(standings: Standings) -> LoadedModel:
    """Returns the model that the fleet answers with; raises as ``Standings.of_nobody``, and PreconditionError where none is active."""
    return (await standings.of_nobody()).snapshot.require_model()


async def _loaded(fleet: FleetWatch) -> LoadedModel:
    """Returns the model in memory: what can wait asks no store where the fleet stands, and has nothing loaded for its sake."""
    if fleet.current is None:
        raise PreconditionError("no model is loaded yet", reason="NO_ACTIVE_MODEL")
    return fleet.current.require_model()


async def _caught_up(recovery: Recovery, fleet: FleetWatch) -> bool:
    """Brings Redis up to PostgreSQL after it was away: customers whose writes it missed, and the fleet's pointers.

    Returns False where that cannot be done now although Redis answers; its answers are used, flagged stale, and it is tried again.
    """
    try:
        caught_up = await recovery.catch_up()
        await fleet.sync()
    except (*RECORD_AWAY, *ONLINE_REFUSES, ConcordError):
        return False
    return caught_up


def report_end(task: "asyncio.Task[None]") -> None:
    """A background loop only ends when cancelled; anything else is a defect that must not pass in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("a background loop ended", loop=task.get_name(), exc_info=error)


async def ended(task: "asyncio.Task[None]") -> None:
    """Cancels a background loop and waits for its end."""
    task.cancel()
    await asyncio.wait([task])
