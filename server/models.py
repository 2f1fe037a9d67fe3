"""The registry's door for operators: list, look up and activate model versions."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psycopg
from feast import FeatureStore
from psycopg import Connection
from psycopg.rows import TupleRow

from features import models
from features.bundle import fetch
from features.models import Activation, ModelVersion, UnknownModelError
from features.settings import Settings
from features.store import unmet
from server.errors import NotFoundError, PreconditionError, UnavailableError
from server.fleet import FleetWatch
from server.inference.model import LoadedModel, load_model

T = TypeVar("T")


class BundleLoader:
    """Brings a published bundle to this machine and opens it. Called with a model version; everything runs off the event loop."""

    def __init__(self, settings: Settings, store: FeatureStore, *, provider: str, threads: int) -> None:
        self._settings = settings
        self._store = store
        self._provider = provider
        self._threads = threads

    async def __call__(self, model_version: str) -> LoadedModel:
        """Fetches, verifies and opens a bundle, and checks its feature contract against the Feast registry.

        Raises:
            BundleError: the bundle is damaged or cannot be opened.
            UnavailableError: the version is not published, or the registry no longer offers what it was trained on.
        """
        return await asyncio.to_thread(self._load, model_version)

    def _load(self, model_version: str) -> LoadedModel:
        with psycopg.connect(self._settings.postgres_dsn) as connection:
            try:
                published = models.find_model(connection, model_version)
            except UnknownModelError as error:
                raise UnavailableError(str(error), reason="MODEL_UNAVAILABLE") from None
        folder = self._settings.data_dir / "bundles" / model_version
        manifest = fetch(published.uri, Path(folder))
        self._store.refresh_registry()
        if missing := unmet(manifest.contract, self._store):
            raise UnavailableError(
                f"model {model_version} was trained on features the registry no longer offers: {', '.join(missing)}",
                reason="CONTRACT_UNMET",
            )
        return load_model(Path(folder), provider=self._provider, threads=self._threads)


class Models:
    """Operators' calls on the registry."""

    def __init__(self, fleet: FleetWatch, *, dsn: str) -> None:
        self._fleet = fleet
        self._dsn = dsn

    @property
    def loaded(self) -> set[str]:
        """Versions this replica holds."""
        return self._fleet.loaded

    @property
    def activation_count(self) -> int:
        """How often the pointer had moved when this replica last looked."""
        return self._fleet.newest.activation

    async def list(self) -> list[ModelVersion]:
        """Returns all published versions, newest first."""
        return await self._call(models.list_models)

    async def active(self) -> ModelVersion | None:
        """Returns the version the fleet answers with, None while there is none."""
        return next((model for model in await self._call(models.list_models) if model.active), None)

    async def activate(self, model_version: str) -> Activation:
        """Loads a version here, and only then moves the fleet's pointer to it.

        Raises:
            NotFoundError: it is not published.
            PreconditionError: this replica cannot load it (BUNDLE_INVALID, CONTRACT_UNMET); the pointer stays where it is.
        """
        try:
            await self._call(lambda connection: models.find_model(connection, model_version))
            await self._fleet.preload(model_version)
            activation = await self._call(lambda connection: models.activate(connection, model_version))
        except UnknownModelError as error:
            raise NotFoundError(str(error), reason="MODEL_UNKNOWN", field="model_version") from None
        except UnavailableError as error:
            raise PreconditionError(str(error), reason=error.reason, field="model_version") from None
        await self._fleet.sync()
        return activation

    async def _call(self, act: Callable[[Connection[TupleRow]], T]) -> T:
        def run() -> T:
            with psycopg.connect(self._dsn, connect_timeout=3) as connection:
                return act(connection)

        return await asyncio.to_thread(run)
