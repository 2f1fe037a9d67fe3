"""Candidate generation: which items of the catalogue are worth ranking for one customer. Shared by training and serving."""

from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import numpy.typing as npt

from features.item_table import FloatArray, IntArray, ItemTable
from features.signals import History

# The ranker's graph has this fixed height: equal shapes keep its arithmetic, and so its scores, equal to the bit.
CANDIDATE_COUNT = 256
NEW_ARRIVAL_DAYS = 28.0


class Source(IntFlag):
    """Where a candidate came from; an item may have several sources."""

    RECENT = 1
    COLLABORATIVE = 2
    VECTOR = 4
    RELATION = 8
    POPULAR = 16
    NEW = 32


# Shares of the 256 places, filled in this order; what is left goes to popular items, so that filters leave enough to show.
_QUOTA = {Source.RECENT: 24, Source.COLLABORATIVE: 96, Source.VECTOR: 72, Source.RELATION: 16, Source.NEW: 12, Source.POPULAR: 36}


@dataclass(frozen=True)
class Signals:
    """Scores of all n items for one customer, float32[n] each; ``vector`` is all zero when there is no user vector."""

    vector: FloatArray
    collaborative: FloatArray
    relation: FloatArray


@dataclass(frozen=True)
class Candidates:
    """The chosen rows, int32[c] with c ≤ 256, and for each a bit set of Source, uint8[c]."""

    rows: IntArray
    sources: npt.NDArray[np.uint8]


def popularity_score(table: ItemTable) -> FloatArray:
    """Returns float32[n]: recent purchases, then all purchases, then recent views; the order shown to a new customer."""
    p = table.popularity
    return np.asarray(p[:, 1] + 0.05 * p[:, 2] + 0.02 * p[:, 4], np.float32)


def generate(signals: Signals, past: History, table: ItemTable, *, excluded: npt.NDArray[np.bool_]) -> Candidates:
    """Chooses up to 256 items, each source giving its best within its quota.

    Args:
        signals: scores of every item.
        past: the customer's history; items touched but not bought are candidates themselves.
        table: the epoch's items.
        excluded: bool[n], items that must not appear (already bought, by policy).
    """
    recent = np.zeros(len(table), np.float32)
    recent[past.rows] = past.weights
    newness = np.where(table.age_days <= NEW_ARRIVAL_DAYS, NEW_ARRIVAL_DAYS + 1 - table.age_days, 0).astype(np.float32)
    scores = {
        Source.RECENT: recent,
        Source.COLLABORATIVE: signals.collaborative,
        Source.VECTOR: signals.vector,
        Source.RELATION: signals.relation,
        Source.NEW: newness,
        Source.POPULAR: popularity_score(table),
    }
    found: dict[int, int] = {}
    for source, quota in _QUOTA.items():
        for row in _best(scores[source], quota, excluded, positive=source is not Source.POPULAR):
            found[row] = found.get(row, 0) | source
    for row in _best(scores[Source.POPULAR], CANDIDATE_COUNT, excluded, positive=False):
        if len(found) >= CANDIDATE_COUNT:
            break
        found[row] = found.get(row, 0) | Source.POPULAR
    return Candidates(np.fromiter(found.keys(), np.int32, len(found)), np.fromiter(found.values(), np.uint8, len(found)))


def _best(scores: FloatArray, count: int, excluded: npt.NDArray[np.bool_], *, positive: bool) -> list[int]:
    """Returns the rows of the highest scores, ties by row: an order that does not depend on the sorting algorithm."""
    allowed = np.flatnonzero(~excluded & (scores > 0) if positive else ~excluded)
    if len(allowed) > count:
        threshold = np.partition(scores[allowed], len(allowed) - count)[len(allowed) - count]
        allowed = allowed[scores[allowed] >= threshold]
    order = np.lexsort((allowed, -scores[allowed]))
    return [int(row) for row in allowed[order][:count]]
