"""Import of the knowledge graph's relations and of identities."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa

from features.catalogue import Relation, upsert_relations
from features.importers.batches import BatchImport, Columns, good_rows, open_part
from features.importers.checks import Reasons, is_null
from features.importers.columns import choice_column, number_column, text_column
from features.importers.mapping import IdentitiesMapping, Mapping, MappingError, RelationsMapping
from features.importers.report import ImportReport, Progress
from features.settings import DEFAULT_CHANNELS

RELATIONS = ("complement", "substitute", "same_series")

_NEW_USERS = "INSERT INTO users (user_id) SELECT DISTINCT id FROM unnest(%(users)s::text[]) AS id ORDER BY id ON CONFLICT DO NOTHING"
# An identity that stands is never moved to another customer by an import: that is a merge, and has its own call.
_NEW_IDENTITIES = """
INSERT INTO identities (channel, channel_user_id, user_id, home_id)
SELECT DISTINCT ON (i.channel, i.name) i.channel, i.name, coalesce(u.merged_into, u.user_id), u.user_id
FROM unnest(%(channels)s::text[], %(names)s::text[], %(users)s::text[]) WITH ORDINALITY AS i (channel, name, user_id, position)
JOIN users u USING (user_id)
ORDER BY i.channel, i.name, i.position ON CONFLICT DO NOTHING
"""
# Shared, and in the order of every other lock on users: what a persona is merged into holds until the commit.
_LOCK_USERS = "SELECT count(*) FROM (SELECT 1 FROM users WHERE user_id = ANY(%(users)s) ORDER BY user_id FOR SHARE) locked"
_FORGOTTEN = """
SELECT i.position - 1
FROM unnest(%(channels)s::text[], %(names)s::text[], %(users)s::text[]) WITH ORDINALITY AS i (channel, name, user_id, position)
WHERE EXISTS (SELECT 1 FROM tombstones t WHERE t.kind = 'user' AND t.digest = tombstone_digest('user', i.user_id))
   OR EXISTS (
       SELECT 1 FROM tombstones t WHERE t.kind = 'identity' AND t.digest = tombstone_digest('identity', i.channel || E'\\x1f' || i.name)
   )
"""
_OTHERS = """
SELECT i.position - 1
FROM unnest(%(channels)s::text[], %(names)s::text[], %(users)s::text[]) WITH ORDINALITY AS i (channel, name, user_id, position)
JOIN users u USING (user_id) JOIN identities s ON s.channel = i.channel AND s.channel_user_id = i.name
WHERE s.user_id NOT IN (u.user_id, coalesce(u.merged_into, u.user_id))
"""


def import_relations(dsn: str, source: Path, mapping: Mapping, *, rejects: Path, progress: Progress | None = None) -> ImportReport:
    """Imports relations between items; an edge that stands takes the new weight. They take effect with the next index epoch.

    Raises:
        MappingError: no relations section, or a column the file lacks.
    """
    spec = mapping.relations
    if spec is None:
        raise MappingError(f"the mapping of {mapping.dataset!r} has no [relations] section")
    run = BatchImport("relations", lambda rows, reasons: _relations(rows, spec, reasons), _store_relations)
    return run(dsn, open_part(source, mapping, spec, "relations"), rejects=rejects, progress=progress)


def import_identities(
    dsn: str,
    source: Path,
    mapping: Mapping,
    *,
    rejects: Path,
    channels: Sequence[str] = DEFAULT_CHANNELS,
    progress: Progress | None = None,
) -> ImportReport:
    """Imports identities and the users they name; a row that would move an identity to another customer is rejected.

    Raises:
        MappingError: no identities section, or a column the file lacks.
    """
    spec = mapping.identities
    if spec is None:
        raise MappingError(f"the mapping of {mapping.dataset!r} has no [identities] section")
    run = BatchImport("identities", lambda rows, reasons: _identities(rows, spec, reasons, channels), _store_identities)
    return run(dsn, open_part(source, mapping, spec, "identities"), rejects=rejects, progress=progress)


def _relations(rows: pa.Table, spec: RelationsMapping, reasons: Reasons) -> Columns:
    weight = number_column(rows, spec.weight)
    weights = weight.values.to_numpy(zero_copy_only=False)
    columns = {
        "item_id": text_column(rows, spec.item_id),
        "related_item_id": text_column(rows, spec.related_item_id),
        "relation": choice_column(rows, spec.relation),
        "weight": pa.array(np.where(is_null(weight.values), 1.0, weights)),
    }
    reasons.missing(columns["item_id"], "item_id")
    reasons.missing(columns["related_item_id"], "related_item_id")
    reasons.outside(columns["relation"], RELATIONS, "relation")
    reasons.add(weight.invalid | (weights <= 0) | (weights > 1), "weight is not in (0, 1]")
    same = [a == b for a, b in zip(columns["item_id"].to_pylist(), columns["related_item_id"].to_pylist(), strict=True)]
    reasons.add(np.array(same, bool), "an item related to itself")
    reasons.rules(rows, spec.reject)
    reasons.unstorable(columns.values())
    return columns


def _store_relations(connection: psycopg.Connection, columns: Columns, reasons: Reasons) -> tuple[int, int]:
    edges = {(r[0], r[1], r[2]): Relation(*r) for r in good_rows(columns, reasons)}
    upsert_relations(connection, list(edges.values()))
    return len(edges), 0


def _identities(rows: pa.Table, spec: IdentitiesMapping, reasons: Reasons, channels: Sequence[str]) -> Columns:
    columns = {
        "channel": choice_column(rows, spec.channel),
        "channel_user_id": text_column(rows, spec.channel_user_id),
        "user_id": text_column(rows, spec.user_id),
    }
    reasons.outside(columns["channel"], channels, "channel")
    for name in ("channel_user_id", "user_id"):
        reasons.missing(columns[name], name)
        reasons.longer(columns[name], 256, name)
    reasons.rules(rows, spec.reject)
    reasons.unstorable(columns.values())
    return columns


def _store_identities(connection: psycopg.Connection, columns: Columns, reasons: Reasons) -> tuple[int, int]:
    given = list(dict.fromkeys(good_rows(columns, reasons)))
    forgotten = {given[position] for (position,) in connection.execute(_FORGOTTEN, _parameters(given))}
    kept = [row for row in given if row not in forgotten]
    parameters = _parameters(kept)
    connection.execute(_NEW_USERS, parameters)
    connection.execute(_LOCK_USERS, parameters)
    stored = connection.execute(_NEW_IDENTITIES, parameters).rowcount
    if connection.execute(_FORGOTTEN, parameters).rowcount:  # forgotten while this waited: nothing of them may be created again
        raise psycopg.errors.SerializationFailure("a customer of this batch was forgotten meanwhile; import the file again")
    others = {kept[position] for (position,) in connection.execute(_OTHERS, parameters)}
    rows = list(zip(*(column.to_pylist() for column in columns.values()), strict=True))
    reasons.add(np.array([row in others for row in rows], bool), "identity belongs to another customer")
    reasons.add(np.array([row in forgotten for row in rows], bool), "customer was forgotten")
    return stored, len(kept) - stored - len(others)


def _parameters(rows: Sequence[tuple[Any, ...]]) -> dict[str, list[str]]:
    channels, names, users = zip(*rows, strict=True) if rows else ((), (), ())
    return {"channels": list(channels), "names": list(names), "users": list(users)}
