"""Signals about items for one customer: weighted history, collaborative scores, relations. Shared by training and serving.

Ages count from the customer's newest behaviour, not from now: so a signal depends on versions only, and the same versions
give the same slate whenever it is computed.
"""

from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from features.behaviour import MICROS_PER_DAY, Activity
from features.item_table import FloatArray, IntArray, ItemTable
from features.scores import Scores


@dataclass(frozen=True)
class SignalConfig:
    """Constants the ranker was trained with; they travel in the bundle's manifest.

    Attributes:
        half_life_days: age at which a behaviour counts half.
    """

    half_life_days: float = 30.0


@dataclass(frozen=True)
class History:
    """The items a customer touched, newest first: rows int32[h], weights float32[h] in (0, 1], bought bool[h], ages in days float32[h]."""

    rows: IntArray
    weights: FloatArray
    bought: npt.NDArray[np.bool_]
    ages: FloatArray


@dataclass(frozen=True)
class CollaborativeWeights:
    """Item-to-item weights in compressed sparse rows over n items: "what similar customers did next".

    Attributes:
        indptr: int64[n + 1]; indices: int32[nnz], the rows each item speaks for; weights: float32[nnz].
    """

    indptr: npt.NDArray[np.int64]
    indices: IntArray
    weights: FloatArray

    def scores(self, rows: IntArray, weights: FloatArray) -> Scores:
        """Returns for every item the sum of the weights that the history rows give to it."""
        places = _spans(self.indptr[rows], self.indptr[rows + 1])
        amounts = np.repeat(weights, self.indptr[rows + 1] - self.indptr[rows]) * self.weights[places]
        return Scores.summed(len(self.indptr) - 1, self.indices[places], amounts)

    def remapped(self, old_rows: dict[str, int], table: ItemTable) -> "CollaborativeWeights":
        """Returns the weights over ``table``'s rows; items it lacks drop out, items it adds have no weights."""
        new_of_old = np.full(len(self.indptr) - 1, -1, np.int64)
        for item, old in old_rows.items():
            new_of_old[old] = table.rows.get(item, -1)
        source = np.repeat(np.arange(len(new_of_old)), np.diff(self.indptr))
        keep = (new_of_old[source] >= 0) & (new_of_old[self.indices] >= 0)
        rows, columns, weights = new_of_old[source[keep]], new_of_old[self.indices[keep]], self.weights[keep]
        order = np.lexsort((columns, rows))
        indptr = np.zeros(len(table) + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=len(table)), out=indptr[1:])
        return CollaborativeWeights(indptr, columns[order].astype(np.int32), weights[order])

    @staticmethod
    def empty(count: int) -> "CollaborativeWeights":
        """Returns weights over ``count`` items that say nothing."""
        return CollaborativeWeights(np.zeros(count + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


def history(activity: Activity, table: ItemTable, config: SignalConfig) -> History:
    """Merges recent behaviours and past purchases into one weighted item history; unknown items drop out.

    An item counts once, with the largest of its action weights, each halved every ``half_life_days``.
    """
    newest, known = activity.newest, table.rows
    touches = [
        (known.get(behaviour.item_id), behaviour.interest, (newest - behaviour.occurred_at) / MICROS_PER_DAY)
        for behaviour in activity.behaviours
    ]
    # The day of a purchase is known, not its hour: count from the start of the newest behaviour's day, never below zero.
    today = newest // MICROS_PER_DAY
    purchases = [known.get(item_id) for item_id in activity.purchased_items]
    touches += [(row, 1.0, max(today - day, 0)) for row, day in zip(purchases, activity.purchased_days, strict=True)]
    weight: dict[int, float] = {}
    age: dict[int, float] = {}
    for row, strength, age_days in touches:
        if row is None or strength <= 0:
            continue
        faded = strength * 0.5 ** (age_days / config.half_life_days)
        if faded > weight.get(row, -1.0):
            weight[row] = faded
        if age_days < age.get(row, inf):
            age[row] = age_days
    bought = set(purchases)
    rows = sorted(weight, key=lambda row: (age[row], row))
    return History(
        np.array(rows, np.int32),
        # A purchase of long ago must not round to 0 in float32: ranking divides by the sum of the weights.
        np.maximum(np.array([weight[row] for row in rows], np.float32), np.finfo(np.float32).tiny),
        np.array([row in bought for row in rows], np.bool_),
        np.array([age[row] for row in rows], np.float32),
    )


def relation_scores(past: History, table: ItemTable) -> Scores:
    """Returns how strongly the knowledge graph ties each item to the history."""
    by_row = np.argsort(past.rows)  # edges are sorted by source: adding up in their order makes a sum independent of the visits' order
    rows, weights = past.rows[by_row], past.weights[by_row]
    begin, end = (np.searchsorted(table.relation_from, rows, side) for side in ("left", "right"))
    places = _spans(begin, end)
    return Scores.summed(len(table), table.relation_to[places], np.repeat(weights, end - begin) * table.relation_weight[places])


def _spans(begin: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the places from each begin up to its end, one span after the other."""
    lengths = end - begin
    shift = begin - np.cumsum(lengths) + lengths
    return np.asarray(np.arange(lengths.sum()) + np.repeat(shift, lengths), np.int64)
