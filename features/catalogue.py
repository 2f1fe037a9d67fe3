"""The catalogue as the system of record keeps it: items, their versions, and index epochs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from psycopg import Connection, Cursor
from psycopg.rows import TupleRow


@dataclass(frozen=True)
class Item:
    """One thing that can be recommended.

    Attributes:
        price_micros: price in millionths of ``currency``; None means not for sale.
        stock: units on hand; None means not tracked, so never out of stock.
        channels: channels that sell it; empty means all.
        listed_at: when the shop listed it; None means when it is first stored.
    """

    item_id: str
    title: str
    text: str = ""
    category: str = ""
    brand: str = ""
    price_micros: int | None = None
    currency: str = ""
    stock: int | None = None
    channels: tuple[str, ...] = ()
    image_ref: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    listed_at: datetime | None = None


@dataclass(frozen=True)
class Relation:
    """An edge of the knowledge graph: ``relation`` is complement, substitute or same_series; weight in (0, 1]."""

    item_id: str
    related_item_id: str
    relation: str
    weight: float = 1.0


@dataclass(frozen=True)
class UpsertResult:
    """What an upsert did: items stored, how many of them changed, and the versions that now stand."""

    stored_count: int
    redescribed_count: int
    offer_changed_count: int
    content_version: int
    offer_version: int


def content_hash(title: str, text: str, category: str, brand: str) -> str:
    """Returns the identity of what the encoder sees of an item: 32 hex digits of SHA-256."""
    return hashlib.sha256("\x1f".join((title, text, category, brand)).encode()).hexdigest()[:32]


def item_text(title: str, text: str, category: str, brand: str) -> str:
    """Returns the sentence the text encoder reads for an item: title first, then brand, category and description."""
    parts = [title.strip(), brand.strip(), category.strip().replace("/", " "), text.strip()[:200]]
    return ". ".join(part for part in parts if part)


_STAGE = """
CREATE TEMP TABLE IF NOT EXISTS staged_items (LIKE items INCLUDING DEFAULTS) ON COMMIT DELETE ROWS;
ALTER TABLE staged_items ALTER COLUMN content_version DROP NOT NULL, ALTER COLUMN offer_version DROP NOT NULL,
    ALTER COLUMN listed_at DROP NOT NULL;
"""

# The fleet_state row is locked before a version is taken and until commit, so versions order changes by commit: a reader that
# has applied every offer up to version v has missed none.
_UPSERT = """
WITH state AS (
    UPDATE fleet_state SET offer_version = offer_version + %(offer)s, content_version = content_version + %(content)s
    RETURNING offer_version, content_version
), written AS (
    INSERT INTO items AS i
    SELECT s.item_id, s.title, s.text, s.category, s.brand, s.price_micros, s.currency, s.stock, s.channels, s.image_ref,
           s.attributes, s.content_hash, state.content_version, state.offer_version, coalesce(s.listed_at, now()), now(), false
    FROM staged_items s, state
    ON CONFLICT (item_id) DO UPDATE SET
        title = excluded.title, text = excluded.text, category = excluded.category, brand = excluded.brand,
        price_micros = excluded.price_micros, currency = excluded.currency, stock = excluded.stock, channels = excluded.channels,
        image_ref = excluded.image_ref, attributes = excluded.attributes, content_hash = excluded.content_hash,
        content_version = CASE WHEN i.content_hash <> excluded.content_hash OR i.removed
                               THEN excluded.content_version ELSE i.content_version END,
        offer_version = CASE WHEN (i.price_micros, i.currency, i.stock, i.channels, i.image_ref, i.removed) IS DISTINCT FROM
                                  (excluded.price_micros, excluded.currency, excluded.stock, excluded.channels, excluded.image_ref, false)
                             THEN excluded.offer_version ELSE i.offer_version END,
        updated_at = now(), removed = false
    RETURNING item_id, offer_version, price_micros, currency, stock, channels, removed
), kept AS (
    INSERT INTO offer_history (item_id, offer_version, price_micros, currency, stock, channels, removed)
    SELECT w.* FROM written w JOIN state USING (offer_version) WHERE %(offer)s > 0
)
SELECT content_version, offer_version FROM state
"""

_CHANGES = """
SELECT count(*) FILTER (WHERE i.item_id IS NULL OR i.removed OR i.content_hash <> s.content_hash),
       count(*) FILTER (WHERE i.item_id IS NULL OR (i.price_micros, i.currency, i.stock, i.channels, i.image_ref, i.removed)
                              IS DISTINCT FROM (s.price_micros, s.currency, s.stock, s.channels, s.image_ref, false))
FROM staged_items s LEFT JOIN items i USING (item_id)
"""


def upsert_items(connection: Connection[TupleRow], items: Sequence[Item]) -> UpsertResult:
    """Stores ``items`` in the caller's transaction; a later item with the same id in the same call wins.

    ``content_version`` moves only when a description changed, ``offer_version`` only when a price, stock, channel list or image
    did: whatever an answer shows of an item hangs on one of the two.
    """
    unique = {item.item_id: item for item in items}
    with connection.cursor() as cursor:
        cursor.execute(_STAGE)
        _copy_items(cursor, list(unique.values()))
        cursor.execute("SELECT 1 FROM fleet_state FOR UPDATE")  # before comparing, so that two upserts never interleave
        content, offer = cursor.execute(_CHANGES).fetchone() or (0, 0)
        row = cursor.execute(_UPSERT, {"content": int(content > 0), "offer": int(offer > 0)}).fetchone()
        assert row is not None
        cursor.execute("DELETE FROM staged_items")
    return UpsertResult(len(unique), content, offer, row[0], row[1])


def _copy_items(cursor: Cursor[TupleRow], items: Sequence[Item]) -> None:
    columns = (
        "item_id, title, text, category, brand, price_micros, currency, stock, channels, image_ref, attributes, content_hash, listed_at"
    )
    with cursor.copy(f"COPY staged_items ({columns}) FROM STDIN") as copy:
        for i in items:
            digest = content_hash(i.title, i.text, i.category, i.brand)
            copy.write_row(
                (
                    i.item_id,
                    i.title,
                    i.text,
                    i.category,
                    i.brand,
                    i.price_micros,
                    i.currency,
                    i.stock,
                    list(i.channels),
                    i.image_ref,
                    json.dumps(dict(i.attributes), sort_keys=True),
                    digest,
                    i.listed_at,
                )
            )


# A changed edge closes the row that published epochs rank with and opens one for the next epoch, which may change again until
# it is published: so an index_version is reproducible for ever.
_UPSERT_RELATIONS = """
WITH next AS (SELECT index_version + 1 AS version FROM fleet_state),
given AS (
    SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::double precision[]) AS g (item_id, related_item_id, relation, weight)
),
changed AS (
    SELECT g.* FROM given g LEFT JOIN item_relations r USING (item_id, related_item_id, relation)
    WHERE r.valid_to IS NULL AND r.weight IS DISTINCT FROM g.weight
), closed AS (
    UPDATE item_relations r SET valid_to = next.version FROM changed c, next
    WHERE (r.item_id, r.related_item_id, r.relation) = (c.item_id, c.related_item_id, c.relation)
      AND r.valid_to IS NULL AND r.valid_from < next.version
)
INSERT INTO item_relations (item_id, related_item_id, relation, weight, valid_from)
SELECT c.*, next.version FROM changed c, next
ON CONFLICT (item_id, related_item_id, relation, valid_from) DO UPDATE SET weight = excluded.weight
"""


def upsert_relations(connection: Connection[TupleRow], relations: Sequence[Relation]) -> None:
    """Stores knowledge-graph edges in the caller's transaction; they take effect with the next index epoch.

    A later edge between the same items of the same kind in the same call wins.
    """
    edges = {(r.item_id, r.related_item_id, r.relation): r.weight for r in relations}
    columns = [[edge[k] for edge in edges] for k in range(3)]
    connection.execute("UPDATE fleet_state SET content_version = content_version + 1")  # locks, and makes the next epoch due
    connection.execute(_UPSERT_RELATIONS, [*columns, list(edges.values())])


# An epoch closes the rows whose description changed and opens new ones; everything else stays as it was.
_PUBLISH = """
WITH next AS (
    UPDATE fleet_state SET index_version = index_version + 1 RETURNING index_version, content_version
), closed AS (
    UPDATE index_items x SET valid_to = next.index_version FROM next, items i
    WHERE x.item_id = i.item_id AND x.valid_to IS NULL
      AND (i.removed OR x.content_hash <> i.content_hash OR x.price_micros IS DISTINCT FROM i.price_micros)
    RETURNING x.item_id
), opened AS (
    INSERT INTO index_items
    SELECT i.item_id, next.index_version, NULL, i.title, i.text, i.category, i.brand, i.price_micros, i.content_hash, i.listed_at,
           CASE WHEN x.item_id IS NULL THEN i.listed_at ELSE now() END
    FROM next, items i LEFT JOIN index_items x ON x.item_id = i.item_id AND x.valid_to IS NULL
    WHERE NOT i.removed AND (x.item_id IS NULL OR x.content_hash <> i.content_hash OR x.price_micros IS DISTINCT FROM i.price_micros)
)
INSERT INTO index_epochs (index_version, content_version, features_as_of, item_count)
SELECT next.index_version, next.content_version,
       coalesce(%(as_of)s, (SELECT e.features_as_of FROM index_epochs e WHERE e.index_version = next.index_version - 1)),
       (SELECT count(*) FROM items WHERE NOT removed)
FROM next RETURNING index_version
"""


def publish_epoch(connection: Connection[TupleRow], features_as_of: datetime | None = None) -> int:
    """Publishes the catalogue as a new index epoch, in the caller's transaction.

    Args:
        connection: of a transaction.
        features_as_of: the feature snapshot (``item_popularity``, ``user_profile``) the epoch ranks with; by default that of the
            epoch before it, so that a re-described item does not change whom it is ranked for.

    Returns:
        The new ``index_version``. Descriptions and reference prices of the epoch never change afterwards.
    """
    row = connection.execute(_PUBLISH, {"as_of": features_as_of}).fetchone()
    assert row is not None
    return int(row[0])
