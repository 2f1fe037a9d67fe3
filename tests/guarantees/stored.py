"""What the stores hold after a run against what was acknowledged: C6's rules, and the reading of both stores for them."""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psycopg
import redis

from features.activity import UserStateCodec
from features.layout import decode_value
from features.registry import load_registry
from features.settings import Settings
from tests.guarantees.history import History
from tests.guarantees.rules import Finding

Hashes = Mapping[str, Mapping[bytes, bytes]]
"""Online hash of each customer."""


@dataclass(frozen=True)
class Stored:
    """What PostgreSQL holds: (customer, event id) of every event, each customer's version, and who still waits in the outbox."""

    events: Sequence[tuple[str, str]]
    versions: Mapping[str, int]
    outbox: Sequence[str] = ()


def nothing_lost(history: History, stored: Stored, *, before: frozenset[str] = frozenset()) -> Finding:
    """C6: what was acknowledged is stored, and what is stored was attempted. ``before`` are ids from before the run."""
    finding = Finding("C6 acknowledged ⊆ stored ⊆ attempted")
    attempted = {write.event_id for write in history.writes}
    ids = {event_id for _, event_id in stored.events}
    acknowledged = {write.event_id: write for write in history.writes if write.status == "OK"}
    for event_id, write in acknowledged.items():
        finding.checked += 1
        if event_id not in ids:
            finding.broken("acknowledged and not stored", write)
    for event_id in sorted(ids - before):
        finding.checked += 1
        if event_id not in attempted:
            finding.broken("stored and never attempted", event_id)
    return finding


def nothing_twice(stored: Stored, *, regroupings: Mapping[str, int] | None = None) -> Finding:
    """C6: each event is stored once, and a customer's version is the number of their stored events and ``regroupings``."""
    finding = Finding("C6 each event once, version = number of events")
    for (user, event_id), count in Counter(stored.events).items():
        finding.checked += 1
        if count > 1:
            finding.broken(f"{count} times", user, event_id)
    for event_id, count in Counter(event_id for _, event_id in set(stored.events)).items():
        if count > 1:
            finding.broken(f"stored for {count} customers", event_id)
    events = Counter(user for user, _ in stored.events)
    for user, version in stored.versions.items():
        finding.checked += 1
        if version != events[user] + (regroupings or {}).get(user, 0):
            finding.broken(f"version {version} with {events[user]} events", user)
    return finding


def regroupings_of(stored: Stored) -> dict[str, int]:
    """Returns by how much customers' versions exceed their events: what merges before a run added."""
    events = Counter(user for user, _ in stored.events)
    return {user: version - events[user] for user, version in stored.versions.items()}


def caught_up(stored: Stored, online: Mapping[str, int | None]) -> Finding:
    """C6: at the end nobody waits in the outbox, and no customer whom Redis knows lags behind PostgreSQL."""
    finding = Finding("C6 online state caught up")
    for user in stored.outbox:
        finding.broken("still in the outbox", user)
    for user, version in online.items():
        finding.checked += 1
        if version is not None and version != stored.versions.get(user):
            finding.broken(f"Redis holds version {version}, PostgreSQL {stored.versions.get(user)}", user)
    return finding


def same_bytes(before: Hashes, after: Hashes) -> Finding:
    """C6: a wiped online store is rebuilt to the same bytes."""
    finding = Finding("C6 rebuilt to the same bytes")
    for user in sorted({*before, *after}):
        finding.checked += 1
        old, new = before.get(user, {}), after.get(user, {})
        if old != new:
            fields = sorted(field.hex() for field in {*old, *new} if old.get(field) != new.get(field))
            finding.broken(f"{len(fields)} fields differ", user, *fields[:4])
    return finding


def read_stored(dsn: str) -> Stored:
    """Reads PostgreSQL."""
    with psycopg.connect(dsn) as connection:
        return Stored(
            events=connection.execute("SELECT user_id, event_id::text FROM events").fetchall(),
            versions=dict(connection.execute("SELECT user_id, version FROM users WHERE merged_into IS NULL").fetchall()),
            outbox=[row[0] for row in connection.execute("SELECT user_id FROM online_outbox")],
        )


def codec_of(settings: Settings) -> UserStateCodec:
    """Returns the codec of the online hashes."""
    return UserStateCodec(load_registry(settings).layouts, settings.project)


def read_online(settings: Settings, codec: UserStateCodec, users: Sequence[str]) -> dict[str, dict[bytes, bytes]]:
    """Reads whole online hashes; customers Redis does not know are left out."""
    with contextlib.closing(redis.Redis.from_url(settings.redis_url)) as client:
        pipeline = client.pipeline(transaction=False)
        for user in users:
            pipeline.hgetall(codec.key(user))
        return {user: found for user, found in zip(users, pipeline.execute(), strict=True) if found}


def online_versions(codec: UserStateCodec, hashes: Hashes) -> dict[str, int | None]:
    """Returns the version each online hash holds."""
    return {user: decode_value(found[codec.version_field]) if codec.version_field in found else None for user, found in hashes.items()}
