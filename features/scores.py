"""Scores of a catalogue's items for one customer, kept for those items alone that have one: the work follows them, not the catalogue."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.item_table import FloatArray, IntArray

# Adding up in an array of all items costs 1 ns an item, sorting the amounts 40 ns each.
_DENSE = 32


@dataclass(frozen=True)
class Scores:
    """Scores of k of n items; every other item scores 0.

    Attributes:
        count: n.
        rows: int32[k], ascending.
        values: float32[k], the score of each row.
    """

    count: int
    rows: IntArray
    values: FloatArray

    @staticmethod
    def of_all(values: FloatArray) -> "Scores":
        """Returns scores that are given for every item, float32[n]."""
        return Scores(len(values), np.arange(len(values), dtype=np.int32), values)

    @staticmethod
    def none(count: int) -> "Scores":
        """Returns scores of ``count`` items of which none has any."""
        return Scores(count, np.zeros(0, np.int32), np.zeros(0, np.float32))

    @staticmethod
    def summed(count: int, rows: IntArray, amounts: FloatArray) -> "Scores":
        """Returns for each row the sum of its amounts, added up in float64 in the order they are given."""
        if len(rows) * _DENSE > count:
            given = np.zeros(count, np.bool_)
            given[rows] = True
            found = np.flatnonzero(given)
            total = np.bincount(rows, weights=amounts, minlength=count)[found]
        else:
            found, place = np.unique(rows, return_inverse=True)
            total = np.bincount(place, weights=amounts, minlength=len(found))
        return Scores(count, found.astype(np.int32), total.astype(np.float32))

    def at(self, rows: IntArray) -> FloatArray:
        """Returns float32[c], the scores of some rows."""
        if len(self.rows) == self.count:
            return self.values[rows]
        found = np.zeros(len(rows), np.float32)
        if len(self.rows):
            place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
            known = self.rows[place] == rows
            found[known] = self.values[place[known]]
        return found

    def everywhere(self) -> FloatArray:
        """Returns float32[n], the scores of all items."""
        scores = np.zeros(self.count, np.float32)
        scores[self.rows] = self.values
        return scores

    def where(self, allowed: npt.NDArray[np.bool_]) -> "Scores":
        """Returns the scores of the items allowed, bool[n]; all others score 0."""
        kept = allowed[self.rows]
        return Scores(self.count, self.rows[kept], self.values[kept])

    def best(self, limit: int, *, excluded: npt.NDArray[np.bool_]) -> list[int]:
        """Returns the rows of the highest scores above 0, ties by row: an order that does not depend on the sorting algorithm.

        Args:
            limit: rows at the most.
            excluded: bool[n], items that must not appear.
        """
        allowed = np.flatnonzero(~excluded[self.rows] & (self.values > 0))
        if len(allowed) > limit:
            threshold = np.partition(self.values[allowed], len(allowed) - limit)[len(allowed) - limit]
            allowed = allowed[self.values[allowed] >= threshold]
        order = np.lexsort((self.rows[allowed], -self.values[allowed]))
        return [int(row) for row in self.rows[allowed[order]][:limit]]

    def reciprocal_ranks(self, rows: IntArray) -> FloatArray:
        """Returns float32[c]: 1 / (1 + rank) of some rows with a score above 0, 0 of others; equal scores rank by row."""
        values, given = self.at(rows), self.values > 0
        # Keys that ascend as scores fall and rows rise: sorting them takes a third of sorting rows by score, 0.15 ms of 10,000.
        rank = np.searchsorted(np.sort(_keys(self.values[given], self.rows[given])), _keys(values, rows))
        return np.where(values > 0, np.float32(1) / (1 + rank).astype(np.float32), np.float32(0))


def _keys(values: FloatArray, rows: IntArray) -> npt.NDArray[np.uint64]:
    """Returns the bits of each score, which rise with scores above 0, turned over; below them the row."""
    return (~values.view(np.uint32)).astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64)
