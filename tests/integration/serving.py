"""A served shop for tests: generated, imported, trained with the tiny preset, published, activated and materialized."""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psycopg
import structlog
from prometheus_client import CollectorRegistry

from features.bundle import Manifest
from features.importers import import_folder, load_mapping
from features.materialize import materialize
from features.models import activate, publish
from features.sample_shop import generate, write
from server.app import open_rooms
from server.metrics import Metrics
from server.rpc.server import build_server
from server.settings import ServerSettings
from tests.faults.injection import injected
from tests.integration.times import NOW


def fill(settings: ServerSettings, folder: Path, *, users: int = 150) -> None:
    """Generates a small sample shop and imports it."""
    write(generate(3, end=NOW, users=users), folder)
    import_folder(settings.postgres_dsn, folder, load_mapping("sample_shop"), rejects=folder)


def train_tiny(settings: ServerSettings, out: Path) -> Manifest:
    """Trains, evaluates and exports the random 2-layer model; everything real but its size."""
    from training.config import TrainConfig
    from training.run import export, train

    result = train(settings, TrainConfig.tiny())
    return export(settings, result.run_dir, out)


def deploy(settings: ServerSettings, bundle: Path) -> Manifest:
    """Publishes and activates a bundle, and materializes."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        manifest = publish(connection, bundle, settings.models_base)
        activate(connection, manifest.model_version)
    materialize(settings)
    return manifest


@contextlib.asynccontextmanager
async def served(settings: ServerSettings) -> AsyncIterator[str]:
    """Serves a shop in this process and yields the address; with INJECT_FAULTS set, through seeded faults of its stores."""
    if not (seed := os.environ.get("INJECT_FAULTS", "")):
        async with served_directly(settings) as address:
            yield address
        return
    async with injected(settings, seed=seed) as faulty, served_directly(faulty.settings) as address:
        faulty.arm()
        yield address
        assert sum(faulty.done.values()), "faults were to be injected and none was"


@contextlib.asynccontextmanager
async def served_directly(settings: ServerSettings) -> AsyncIterator[str]:
    """Serves a shop in this process and yields the address, whatever the environment says about faults."""
    metrics = Metrics(CollectorRegistry())
    async with open_rooms(settings, metrics) as rooms:
        server = build_server(rooms.services, settings, metrics, structlog.get_logger())
        await server.start()
        await rooms.fleet.join(f"127.0.0.1:{server.port}")
        await server.set_serving(True)
        try:
            yield f"127.0.0.1:{server.port}"
        finally:
            await server.stop(0.1)


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A bare channel, for calls the client has no words for."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel
