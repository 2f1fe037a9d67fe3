"""The model registry: which bundles are published, and the one pointer that says which of them answers."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from psycopg import Connection
from psycopg.rows import TupleRow

from features.bundle import Manifest, read_bundle, upload


class UnknownModelError(Exception):
    """No model version of that name is published."""


@dataclass(frozen=True)
class ModelVersion:
    """A published bundle: its address, manifest and whether the fleet answers with it."""

    model_version: str
    uri: str
    manifest: dict[str, Any]
    published_at: datetime
    activated_at: datetime | None
    active: bool


@dataclass(frozen=True)
class Activation:
    """The outcome of an activation: the version now active, the one before, and the running number of pointer moves."""

    model_version: str
    previous: str
    activation: int


_COLUMNS = "m.model_version, m.uri, m.manifest, m.published_at, m.activated_at, m.model_version = s.model_version"


def publish(connection: Connection[TupleRow], folder: Path, models_url: str) -> Manifest:
    """Verifies a bundle, copies it under ``models_url`` and registers it; publishing the same bundle twice changes nothing.

    Raises:
        BundleError: the folder is not a whole bundle.
        ValueError: another bundle is already published under the same version name.
    """
    manifest = read_bundle(folder)
    uri = f"{models_url.rstrip('/')}/{manifest.model_version}"
    row = connection.execute("SELECT manifest FROM model_versions WHERE model_version = %s", [manifest.model_version]).fetchone()
    if row is not None and row[0]["files"] != manifest.files:
        raise ValueError(f"model version {manifest.model_version} is already published with other files")
    upload(folder, uri)
    connection.execute(
        "INSERT INTO model_versions (model_version, uri, manifest) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
        [manifest.model_version, uri, json.dumps(manifest.model_dump(mode="json"))],
    )
    return manifest


def list_models(connection: Connection[TupleRow]) -> list[ModelVersion]:
    """Returns all published versions, newest first."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM model_versions m, fleet_state s ORDER BY m.published_at DESC, 1"  # noqa: S608 - constant columns
    ).fetchall()
    return [ModelVersion(*row) for row in rows]


def find_model(connection: Connection[TupleRow], model_version: str) -> ModelVersion:
    """Returns one published version.

    Raises:
        UnknownModelError: it is not published.
    """
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM model_versions m, fleet_state s WHERE m.model_version = %s",  # noqa: S608 - constant columns
        [model_version],
    ).fetchone()
    if row is None:
        raise UnknownModelError(f"model version {model_version!r} is not published")
    return ModelVersion(*row)


def activate(connection: Connection[TupleRow], model_version: str) -> Activation:
    """Moves the fleet's pointer to ``model_version`` in the caller's transaction; moving it where it stands is a no-op.

    Raises:
        UnknownModelError: it is not published.
    """
    find_model(connection, model_version)
    row = connection.execute("SELECT model_version, activation FROM fleet_state FOR UPDATE").fetchone()
    assert row is not None
    previous, activation = row
    if previous != model_version:
        activation += 1
        connection.execute("UPDATE fleet_state SET model_version = %s, activation = %s", [model_version, activation])
        connection.execute("UPDATE model_versions SET activated_at = now() WHERE model_version = %s", [model_version])
    return Activation(model_version, previous, activation)
