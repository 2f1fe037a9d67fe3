"""Import of the knowledge graph's relations and of identities: small files, one transaction each."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc

from features.catalogue import Relation, upsert_relations
from features.importers.checks import Reasons
from features.importers.columns import choice_column, number_column, text_column
from features.importers.mapping import IdentitiesMapping, Mapping, MappingError, NumberField, RelationsMapping
from features.importers.rejects import Rejects
from features.importers.report import ImportReport, Progress, Tally
from features.importers.sources import open_source
from features.settings import DEFAULT_CHANNELS

RELATIONS = ("complement", "substitute", "same_series")
_BATCH_ROWS = 65_536

_NEW_USERS = "INSERT INTO users (user_id) SELECT DISTINCT unnest(%s::text[]) AS id ORDER BY id ON CONFLICT DO NOTHING"
# An identity that stands is never moved to another customer by an import: that is a merge, and has its own call.
_NEW_IDENTITIES = """
INSERT INTO identities (channel, channel_user_id, user_id)
SELECT DISTINCT ON (i.channel, i.channel_user_id) i.channel, i.channel_user_id, coalesce(u.merged_into, u.user_id)
FROM unnest(%s::text[], %s::text[], %s::text[]) WITH ORDINALITY AS i (channel, channel_user_id, user_id, position)
JOIN users u USING (user_id)
ORDER BY i.channel, i.channel_user_id, i.position ON CONFLICT DO NOTHING
"""

_Convert = Callable[[pa.Table, Reasons], dict[str, pa.Array]]
_Store = Callable[[psycopg.Connection, pa.Table], int]


def import_relations(dsn: str, source: Path, mapping: Mapping, *, rejects: Path, progress: Progress | None = None) -> ImportReport:
    """Imports relations between items; a stored edge takes the new weight.

    Raises:
        MappingError: no relations section, or a column the file lacks.
    """
    spec = mapping.relations
    if spec is None:
        raise MappingError(f"the mapping of {mapping.dataset!r} has no [relations] section")

    def convert(rows: pa.Table, reasons: Reasons) -> dict[str, pa.Array]:
        return _relation_columns(rows, spec, reasons)

    return _import("relations", dsn, source, mapping, rejects=rejects, progress=progress, convert=convert, store=_store_relations)
