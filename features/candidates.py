"""Candidate generation: which items of the catalogue are worth ranking for one customer. Shared by training and serving."""

from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import numpy.typing as npt

from features.item_table import IntArray, ItemTable
from features.scores import Scores
from features.signals import History

# The ranker's graph has this fixed height: equal shapes keep its arithmetic, and so its scores, equal to the bit.
CANDIDATE_COUNT = 256


class Source(IntFlag):
    """Where a candidate came from; an item may have several sources. The last two are of a search: its words, its meaning."""

    RECENT = 1
    COLLABORATIVE = 2
    VECTOR = 4
    RELATION = 8
    POPULAR = 16
    NEW = 32
    LEXICAL = 64
    SEMANTIC = 128


# Shares of the 256 places, filled in this order; what is left goes to popular items, so that filters leave enough to show.
_QUOTA = {Source.RECENT: 24, Source.COLLABORATIVE: 96, Source.VECTOR: 72, Source.RELATION: 16, Source.NEW: 12, Source.POPULAR: 36}


@dataclass(frozen=True)
class Signals:
    """Scores of n items for one customer; ``vector`` scores none when there is no user vector, and the nearest in a large catalogue."""

    vector: Scores
    collaborative: Scores
    relation: Scores


@dataclass(frozen=True)
class Candidates:
    """The chosen rows, int32[c] with c ≤ 256, and for each a bit set of Source, uint8[c]."""

    rows: IntArray
    sources: npt.NDArray[np.uint8]


def generate(signals: Signals, past: History, table: ItemTable, *, excluded: npt.NDArray[np.bool_]) -> Candidates:
    """Chooses up to 256 items, each source giving its best within its quota.

    Args:
        signals: scores of every item.
        past: the customer's history; items touched but not bought are candidates themselves.
        table: the epoch's items.
        excluded: bool[n], items that must not appear (already bought, by policy).
    """
    by_row = np.argsort(past.rows)
    scores = {
        Source.RECENT: Scores(len(table), past.rows[by_row], past.weights[by_row]),
        Source.COLLABORATIVE: signals.collaborative,
        Source.VECTOR: signals.vector,
        Source.RELATION: signals.relation,
    }
    orders = {Source.NEW: table.new_rows, Source.POPULAR: table.popular_rows}
    found: dict[int, int] = {}
    for source, quota in _QUOTA.items():
        best = scores[source].best(quota, excluded=excluded) if source in scores else _first(orders[source], quota, excluded)
        for row in best:
            found[row] = found.get(row, 0) | source
    for row in _first(table.popular_rows, CANDIDATE_COUNT, excluded):
        if len(found) >= CANDIDATE_COUNT:
            break
        found[row] = found.get(row, 0) | Source.POPULAR
    return Candidates(np.fromiter(found.keys(), np.int32, len(found)), np.fromiter(found.values(), np.uint8, len(found)))


def _first(order: IntArray, count: int, excluded: npt.NDArray[np.bool_]) -> list[int]:
    """Returns the first rows of an order that are not excluded; looks at no more of it than it has to."""
    size = 2 * count
    while True:
        head = order[:size]
        kept = head[~excluded[head]]
        if len(kept) >= count or size >= len(order):
            return [int(row) for row in kept[:count]]
        size *= 4
