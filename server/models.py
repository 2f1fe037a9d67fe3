"""The registry's door for operators: list, look up and activate model versions; and what opens a published bundle here."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import TypeVar

from psycopg import Connection
from psycopg.rows import TupleRow

from features import models
from features.bundle import BundleError, fetch
from features.models import Activation, ActivationInProgressError, ModelVersion, OnUnready, ReplicaUnreadyError, UnknownModelError
from features.registry import read_registry, unmet
from features.replicas import Replica, list_replicas
from server.database import connector
from server.errors import ConflictError, NotFoundError, PreconditionError, UnavailableError
from server.fleet import FleetWatch
from server.inference.model import LoadedModel, load_model
from server.inference.tokens import Tokenizers
from server.settings import ServerSettings

T = TypeVar("T")
_PAUSE_SECONDS = 0.1  # between looks at what the replicas report


class BundleLoader:
    """Brings a published bundle to this machine and opens it. Called with a model version; everything runs off the event loop.

    Not at a lower priority: ONNX Runtime's threads would inherit it for as long as the model answers.
    """

    def __init__(self, settings: ServerSettings, *, provider: str, threads: int, precision: str = "fp32") -> None:
        self._settings = settings
        self._provider = provider
        self._threads = threads
        self._precision = precision
        self._tokenizers = Tokenizers()

    async def __call__(self, model_version: str) -> LoadedModel:
        """Fetches, verifies and opens a bundle, and checks its feature contract against the Feast registry.

        Raises:
            BundleError: the bundle is damaged or cannot be opened.
            UnavailableError: the version is not published, or the registry no longer offers what it was trained on.
        """
        return await asyncio.to_thread(self._load, model_version)

    def _load(self, model_version: str) -> LoadedModel:
        with connector(self._settings)() as connection:
            try:
                published = models.find_model(connection, model_version)
            except UnknownModelError as error:
                raise UnavailableError(str(error), reason="MODEL_UNAVAILABLE") from None
        folder = self._settings.data_dir / "bundles" / model_version
        try:
            manifest = fetch(published.uri, Path(folder))
        except OSError as error:
            raise BundleError(f"{model_version}: cannot be kept here: {error.strerror}") from error
        with connector(self._settings)() as connection:
            registry = read_registry(connection, self._settings.project)
        if missing := unmet(manifest.contract, registry):
            raise UnavailableError(
                f"model {model_version} was trained on features the registry no longer offers: {', '.join(missing)}",
                reason="CONTRACT_UNMET",
            )
        return load_model(
            Path(folder), provider=self._provider, threads=self._threads, precision=self._precision, tokenizers=self._tokenizers
        )


class Models:
    """Operators' calls on the registry and the fleet."""

    def __init__(self, fleet: FleetWatch, *, connect: Callable[[], Connection[TupleRow]]) -> None:
        self._fleet = fleet
        self._connect = connect

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

    async def replicas(self) -> Sequence[Replica]:
        """Returns the replicas by their last reports."""
        return await self._call(list_replicas)

    async def activate(self, model_version: str, *, on_unready: OnUnready, wait_seconds: float) -> Activation:
        """Has every live replica load a version, and only then moves the fleet's pointer to it, in PostgreSQL, then in Redis.

        When it returns, every call that starts later is answered by this version.

        Raises:
            NotFoundError: it is not published.
            ConflictError: another activation is in progress.
            PreconditionError: this replica cannot load it (BUNDLE_INVALID, CONTRACT_UNMET), or another cannot or has not
                answered within ``wait_seconds`` (REPLICA_UNREADY); the pointer stays where it is.
        """
        try:
            claimed = await self._call(lambda connection: models.claim(connection, model_version))
            try:
                activation = await self._rollout(model_version, claimed, on_unready, monotonic() + wait_seconds)
            finally:
                await self._call(lambda connection: models.abandon(connection, claimed))
        except UnknownModelError as error:
            raise NotFoundError(str(error), reason="MODEL_UNKNOWN", field="model_version") from None
        except ActivationInProgressError as error:
            raise ConflictError(str(error), reason="ACTIVATION_IN_PROGRESS", field="model_version") from None
        except ReplicaUnreadyError as error:
            raise PreconditionError(str(error), reason="REPLICA_UNREADY", field="model_version") from None
        await self._fleet.sync()
        return activation

    async def _rollout(self, model_version: str, claimed: str, on_unready: OnUnready, until: float) -> Activation:
        preparing = asyncio.ensure_future(self._fleet.prepared(model_version))
        try:
            while True:
                outcome = await self._call(lambda connection: models.attempt(connection, model_version, claimed))
                if isinstance(outcome, Activation):
                    return outcome
                if on_unready is OnUnready.FAIL and preparing.done() and (reason := preparing.result()):
                    code, _, message = reason.partition(": ")
                    raise PreconditionError(message, reason=code, field="model_version")
                # A bundle that nobody can load is better told by this replica's own verdict: others' words wait for it.
                if preparing.done() or monotonic() > until:
                    models.judge(model_version, outcome, on_unready=on_unready, late=monotonic() > until)
                await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            preparing.cancel()

    async def _call(self, act: Callable[[Connection[TupleRow]], T]) -> T:
        def run() -> T:
            with self._connect() as connection:
                return act(connection)

        return await asyncio.to_thread(run)
