"""The server process: builds every room, opens the port, and drains on SIGTERM."""

import asyncio
import contextlib
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from prometheus_client import CollectorRegistry

from features.activity import UserStateCodec
from features.layout import load_layouts
from features.store import feature_store
from server.catalog.offers import Offers
from server.catalog.service import Catalog
from server.database import postgres_pool, redis_client
from server.fleet import FleetWatch
from server.health import HealthWatch, PostgresProbe, Probe, probes
from server.ingest.identities import Identities
from server.ingest.recorder import EventRecorder
from server.ingest.recovery import Recovery
from server.ingest.writer import EventWriter
from server.journal.exposures import Journal
from server.metrics import Metrics, serve_metrics
from server.models import BundleLoader, Models
from server.online.features import FeatureReader
from server.online.states import UserStates
from server.online.store import OnlineStore
from server.recommend.compute import Policy
from server.recommend.profiles import Profiles
from server.recommend.recommender import Recommender
from server.recommend.snapshot import SnapshotBuilder
from server.rpc.ports import Services
from server.rpc.server import build_server
from server.settings import ServerSettings
from server.tracing import tracing
from server.vitals import Vitals

_log = structlog.get_logger(__name__)


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
    store = await asyncio.to_thread(feature_store, settings)
    layouts = await asyncio.to_thread(load_layouts, store)
    codec = UserStateCodec(layouts, settings.project)
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(postgres_pool(settings))
        client = redis_client(settings)
        stack.push_async_callback(client.aclose)
        online = OnlineStore(client, codec)
        states = UserStates(pool, online, codec)
        identities = Identities(pool, online, states, new_user_id=_new_user_id)
        writer = EventWriter(pool, states, new_user_id=_new_user_id)
        recorder = EventRecorder(
            writer, online, metrics, queue_events=settings.ingest_queue_events, batch_events=settings.ingest_batch_events
        )
        loader = BundleLoader(settings, store, provider=settings.onnx_provider, threads=settings.onnx_threads)
        fleet = FleetWatch(pool, online, SnapshotBuilder(pool, dsn=settings.postgres_dsn), loader, metrics)
        journal = Journal(pool, metrics, bound=settings.journal_queue, pause_seconds=settings.journal_seconds, new_id=uuid.uuid4)
        stack.push_async_callback(journal.flush)
        features = FeatureReader(client, states, identities, store=store, layouts=layouts, project=settings.project, now=_now)
        catalog = Catalog(pool, fleet, dsn=settings.postgres_dsn, epoch_seconds=settings.epoch_seconds)
        recovery = Recovery(pool, states, online, metrics, after_seconds=settings.recovery_seconds)
        recommender = Recommender(
            identities=identities,
            states=states,
            online=online,
            fleet=fleet,
            offers=Offers(pool),
            journal=journal,
            metrics=metrics,
            policy=Policy(settings.slate_size, settings.exclude_purchased, settings.max_per_category),
            slate_ttl_seconds=settings.slate_ttl_seconds,
            hide_out_of_stock=settings.hide_out_of_stock,
            now=_now,
        )
        loops = (
            recorder.run(),
            writer.run(),
            recovery.run(),
            fleet.run(settings.refresh_seconds),
            journal.run(),
            catalog.run(),
            features.run(settings.registry_seconds),
            Vitals(pool, client, recorder, journal, fleet, metrics).run(),
        )
        for loop in loops:
            task = asyncio.create_task(loop)
            task.add_done_callback(_report)
            stack.push_async_callback(_ended, task)
        services = Services(
            recorder=recorder,
            identities=identities,
            recommender=recommender,
            profiles=Profiles(pool, identities, states, now=_now),
            catalog=catalog,
            features=features,
            models=Models(fleet, dsn=settings.postgres_dsn),
        )
        postgres = PostgresProbe(settings.postgres_dsn)
        stack.push_async_callback(postgres.close)
        yield Rooms(services, fleet, probes(postgres, client, online, fleet, store))


def _report(task: "asyncio.Task[None]") -> None:
    """A background loop only ends when cancelled; anything else is a defect that must not pass in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("a background loop ended", loop=task.get_name(), exc_info=error)


async def _ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


async def serve(settings: ServerSettings, *, announce: Callable[[int, int], None]) -> None:
    """Runs a server until SIGTERM or SIGINT, then lets calls in flight finish.

    Args:
        settings: everything the server can be told.
        announce: called once with the gRPC port and the metrics port (-1 when off) when the server answers.
    """
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    endpoint = serve_metrics(registry, settings.host, settings.metrics_port) if settings.metrics_port >= 0 else None
    traces = tracing(settings)
    try:
        async with open_rooms(settings, metrics) as rooms, contextlib.AsyncExitStack() as stack:
            server = build_server(rooms.services, settings, metrics, _log, tracing=traces)
            await server.start()
            health = HealthWatch(rooms.probes, metrics, server.show_health)
            await health.look()
            watching = asyncio.create_task(health.run(settings.health_seconds))
            watching.add_done_callback(_report)
            stack.push_async_callback(_ended, watching)
            await _warm_up(rooms.fleet)
            await health.look()
            await server.set_serving(True)
            announce(server.port, endpoint.port if endpoint else -1)
            await stop.wait()
            _log.info("draining", seconds=settings.drain_seconds)
            await server.set_serving(False)
            await server.stop(settings.drain_seconds)
    finally:
        await traces.close()
        if endpoint:
            endpoint.close()


async def _warm_up(fleet: FleetWatch) -> None:
    """Loads what the fleet answers with before the first call: model, index and their sessions."""
    snapshot = await fleet.ensure(await fleet.sync())
    provider = snapshot.model.provider if snapshot.model else "none"
    _log.info("ready", model_version=snapshot.model_version, index_version=snapshot.index_version, onnx_provider=provider)
