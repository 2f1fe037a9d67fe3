"""How the shop's items were described at an earlier time, from the index epochs published by then."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from psycopg import Connection
from psycopg.rows import TupleRow

from features.item_table import Description, ItemTable
from training.events import Micros

# Only items that were ever described otherwise: the others are as the newest epoch has them, at all times.
_DESCRIPTIONS = """
SELECT x.item_id, (extract(epoch FROM e.published_at) * 1000000)::bigint,
       x.title, x.text, x.category, x.brand, x.price_micros, x.content_hash
FROM index_items x JOIN index_epochs e ON e.index_version = x.valid_from
WHERE x.item_id IN (SELECT item_id FROM index_items GROUP BY item_id HAVING count(*) > 1)
ORDER BY x.item_id, x.valid_from
"""
_EPOCHS = "SELECT index_version, (extract(epoch FROM published_at) * 1000000)::bigint FROM index_epochs ORDER BY index_version"
_RELATIONS = "SELECT item_id, related_item_id, weight, valid_from, valid_to FROM item_relations ORDER BY 1, 2, relation, valid_from"


@dataclass(frozen=True)
class Described:
    """What an epoch, published at a time, said of the item in a row."""

    row: int
    published: Micros
    description: Description


@dataclass(frozen=True)
class Edge:
    """A relation between two item ids, and the epochs that hold it: from one, to before another."""

    source: str
    target: str
    weight: float
    valid_from: int
    valid_to: int | None


class Descriptions:
    """The catalogue of the newest epoch, described as of any time.

    What is true of a time is what an epoch published before it says. Before an item's first epoch, that one's description
    holds, for an imported history is older than its catalogue; and before the first epoch of all, its relations.
    """

    def __init__(self, table: ItemTable, *, items: Sequence[Described], epochs: Mapping[int, Micros], edges: Sequence[Edge]) -> None:
        self._table, self._epochs, self._edges = table, epochs, edges
        self._items: dict[int, list[Described]] = {}
        for described in items:
            self._items.setdefault(described.row, []).append(described)
        # Until the second description of an item takes effect the first one holds; so it is with the relations of the first epoch.
        versions = {version for edge in edges for version in (edge.valid_from, edge.valid_to) if version is not None and version in epochs}
        changes = {described.published for known in self._items.values() for described in known[1:]}
        self._changes = sorted(changes | {epochs[version] for version in versions if version > min(epochs)})
        self._as_of = lru_cache(maxsize=8)(self._compute)

    def before(self, time: Micros) -> ItemTable:
        """Returns the items as described strictly before ``time``; times between the same changes give the same object, mostly."""
        return self._as_of(bisect.bisect_left(self._changes, time))

    def _compute(self, changes: int) -> ItemTable:
        if changes == len(self._changes):
            return self._table
        time = self._changes[changes]  # stands for any time after the change before this one, up to this one
        described = {row: [known[0], *(d for d in known[1:] if d.published < time)][-1].description for row, known in self._items.items()}
        version = max((version for version, published in self._epochs.items() if published < time), default=min(self._epochs))
        edges = [edge for edge in self._edges if edge.valid_from <= version and (edge.valid_to is None or edge.valid_to > version)]
        return self._table.with_descriptions(described).with_relations([(edge.source, edge.target, edge.weight) for edge in edges])


def read_descriptions(connection: Connection[TupleRow], table: ItemTable) -> Descriptions:
    """Reads what earlier epochs said of the items of ``table``, which must be of the newest epoch."""
    rows = connection.execute(_DESCRIPTIONS).fetchall()
    items = [Described(table.rows[row[0]], row[1], Description(*row[2:])) for row in rows if row[0] in table.rows]
    epochs = {row[0]: row[1] for row in connection.execute(_EPOCHS)}
    return Descriptions(table, items=items, epochs=epochs, edges=[Edge(*row) for row in connection.execute(_RELATIONS)])
