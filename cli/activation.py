"""How a command activates a model: fetched and verified here, loaded by every replica, then the pointer moves, and it is noted."""

import time

import psycopg
from psycopg import Connection
from psycopg.rows import TupleRow
from rich.console import Console

from cli.context import console, note
from features.bundle import fetch
from features.models import Activation, OnUnready, activate, find_model
from features.replicas import list_replicas
from features.settings import Settings

_out = Console()


def move_pointer(
    settings: Settings, model_version: str, *, on_unready: OnUnready = OnUnready.FAIL, wait_seconds: float = 30.0
) -> Activation:
    """Activates a published model for the fleet and says what became of it.

    Raises:
        UnknownModelError, ActivationInProgressError, ReplicaUnreadyError: as ``features.models.activate``.
        BundleError: the published bundle cannot be read.
    """
    with psycopg.connect(settings.postgres_dsn) as connection:
        fetch(find_model(connection, model_version).uri, settings.data_dir / "bundles" / model_version)
        with console.status(f"preparing the replicas for {model_version}"):
            activation = activate(connection, model_version, on_unready=on_unready, wait_seconds=wait_seconds)
        note(connection, "activate", target=f"model:{activation.model_version}")
        followed = _followed(connection, activation)
    _out.print(f"active: {activation.model_version} (before: {activation.previous or 'none'}, move {activation.activation})")
    if not followed:
        _out.print("No replica has confirmed it yet: they answer with it as soon as they reach PostgreSQL and Redis.")
    return activation


def _followed(connection: Connection[TupleRow], activation: Activation) -> bool:
    """Waits until a replica answers with the move, which is when Redis tells all of them; True at once when none runs."""
    until = time.monotonic() + 5.0
    while True:
        live = [replica for replica in list_replicas(connection) if replica.live]
        connection.commit()
        if not live or any(replica.activation >= activation.activation for replica in live):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
