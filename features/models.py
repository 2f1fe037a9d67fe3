"""The model registry: which bundles are published, the one pointer that says which answers, and how that pointer moves."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from psycopg import Connection
from psycopg.rows import TupleRow

from features.bundle import Manifest, read_bundle, upload


class UnknownModelError(Exception):
    """No model version of that name is published."""


class ActivationInProgressError(Exception):
    """Another activation prepares the replicas for its model; one at a time."""


class ReplicaUnreadyError(Exception):
    """The pointer did not move, because replicas are not ready for the model; the message names each and why."""

    def __init__(self, model_version: str, unready: Sequence["Unready"]) -> None:
        told = "; ".join(f"replica {one.address}: {one.reason or 'has not answered in time'}" for one in unready)
        super().__init__(f"not ready for {model_version}: {told}")
        self.unready = tuple(unready)


class OnUnready(Enum):
    """What an activation does when a replica says that it cannot load the model."""

    FAIL = "fail"
    WAIT = "wait"


@dataclass(frozen=True)
class Unready:
    """A live replica that could not answer with the model yet; ``reason`` says why it failed, empty while it has not answered."""

    replica_id: str
    address: str
    reason: str


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


# A claim is renewed at every attempt; that of a preparer which died is free again after this many seconds.
CLAIM_SECONDS = 5.0
_PAUSE_SECONDS = 0.1

_CLAIM = """
UPDATE fleet_state SET preparing_model = %(model)s, preparing_by = gen_random_uuid()::text,
       preparing_until = clock_timestamp() + make_interval(secs => %(seconds)s)
WHERE preparing_until < clock_timestamp() RETURNING preparing_by
"""
_RENEW = "UPDATE fleet_state SET preparing_until = clock_timestamp() + make_interval(secs => %s)"
_RELEASE = "UPDATE fleet_state SET preparing_model = '', preparing_by = '', preparing_until = '-infinity' WHERE preparing_by = %s"
# Only what a replica reported for this very claim counts: it may have unloaded since what it reported before.
_UNREADY = """
SELECT r.replica_id, r.address, CASE WHEN r.claim = s.preparing_by THEN coalesce(r.failed ->> %(model)s::text, '') ELSE '' END
FROM fleet_state s, live_replicas r
WHERE r.claim <> s.preparing_by OR NOT coalesce(r.ready -> %(model)s::text @> to_jsonb(s.answering_index), false)
ORDER BY r.address, r.replica_id
"""


def claim(connection: Connection[TupleRow], model_version: str) -> str:
    """Asks all replicas to prepare for ``model_version``; returns the claim, to be handed to ``attempt`` and ``abandon``.

    Raises:
        UnknownModelError: it is not published.
        ActivationInProgressError: another claim holds.
    """
    with connection.transaction():
        find_model(connection, model_version)
        row = connection.execute(_CLAIM, {"model": model_version, "seconds": CLAIM_SECONDS}).fetchone()
        if row is None:
            raise ActivationInProgressError("another activation is in progress; try again when it has ended")
        return str(row[0])


def attempt(connection: Connection[TupleRow], model_version: str, claimed: str) -> Activation | Sequence[Unready]:
    """Moves the pointer if every live replica is ready to answer with the model, in one transaction, and ends the claim.

    Returns:
        The move (of nothing, where the pointer stands there already), or the replicas that are not ready; the claim holds on.

    Raises:
        ActivationInProgressError: the claim ran out and somebody else has one.
    """
    with connection.transaction():
        query = "SELECT model_version, activation, preparing_by FROM fleet_state FOR UPDATE"
        previous, activation, holder = connection.execute(query).fetchone() or ("", 0, "")
        if holder != claimed:
            raise ActivationInProgressError("another activation took over")
        if previous != model_version:
            # A statement of its own after the lock: it sees every replica that registered before the lock was ours.
            if rows := connection.execute(_UNREADY, {"model": model_version}).fetchall():
                connection.execute(_RENEW, [CLAIM_SECONDS])
                return [Unready(*row) for row in rows]
            activation += 1
            connection.execute("UPDATE fleet_state SET model_version = %s, activation = %s", [model_version, activation])
            connection.execute("UPDATE model_versions SET activated_at = now() WHERE model_version = %s", [model_version])
        connection.execute(_RELEASE, [claimed])
        return Activation(model_version, previous, activation)


def abandon(connection: Connection[TupleRow], claimed: str) -> None:
    """Ends a claim without moving the pointer; a claim that has ended already stays ended."""
    with connection.transaction():
        connection.execute(_RELEASE, [claimed])


def judge(model_version: str, unready: Sequence[Unready], *, on_unready: OnUnready, late: bool) -> None:
    """Decides whether an activation goes on waiting for ``unready`` replicas.

    Raises:
        ReplicaUnreadyError: time is up, or a replica failed and the caller does not want to wait for its repair.
    """
    failed = [one for one in unready if one.reason]
    if late or (failed and on_unready is OnUnready.FAIL):
        raise ReplicaUnreadyError(model_version, unready if late else failed)


def activate(
    connection: Connection[TupleRow],
    model_version: str,
    *,
    on_unready: OnUnready = OnUnready.FAIL,
    wait_seconds: float = 30.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Activation:
    """Prepares every live replica for a model and moves the fleet's pointer to it; moving it where it stands is a no-op.

    What the connection has begun is committed first: the replicas must see it.

    Raises:
        UnknownModelError: it is not published.
        ActivationInProgressError: another activation is under way.
        ReplicaUnreadyError: a replica cannot load it, or did not answer within ``wait_seconds``; the pointer stays.
    """
    connection.commit()
    claimed = claim(connection, model_version)
    until = time.monotonic() + wait_seconds
    try:
        while not isinstance(outcome := attempt(connection, model_version, claimed), Activation):
            judge(model_version, outcome, on_unready=on_unready, late=time.monotonic() > until)
            sleep(_PAUSE_SECONDS)
    finally:
        abandon(connection, claimed)
    return outcome
