"""Which items could be bought at a time: what was not there yet, or taken off sale, is nobody's negative."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from psycopg import Connection
from psycopg.rows import TupleRow

from features.item_table import ItemTable
from training.events import EventLog

_NEVER = np.iinfo(np.int64).max
_LISTED = "SELECT item_id, (extract(epoch FROM listed_at) * 1000000)::bigint FROM items"
# Only items that were ever off sale; the history begins with the release that keeps it.
_REMOVALS = """
SELECT item_id, (extract(epoch FROM changed_at) * 1000000)::bigint, removed FROM offer_history
WHERE item_id IN (SELECT item_id FROM offer_history WHERE removed) ORDER BY item_id, offer_version
"""

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class OnSale:
    """When each of n items could be bought; times in microseconds of Unix time.

    Attributes:
        first: int64[n], when an item was listed or first seen in an event, whichever was earlier.
        gap_rows: int64[g], the item of each time off sale.
        gap_begins, gap_ends: int64[g], from when to before when it was off sale.
    """

    first: npt.NDArray[np.int64]
    gap_rows: npt.NDArray[np.int64]
    gap_begins: npt.NDArray[np.int64]
    gap_ends: npt.NDArray[np.int64]

    @staticmethod
    def always(count: int) -> "OnSale":
        """Returns a shop of ``count`` items that were always there."""
        none = np.zeros(0, np.int64)
        return OnSale(np.full(count, np.iinfo(np.int64).min), none, none, none)

    def at(self, times: Sequence[int]) -> BoolArray:
        """Returns bool[t, n]: which items were on sale just before each time."""
        moments = np.asarray(times, np.int64)[:, None]
        there = self.first < moments
        place, gap = np.nonzero((self.gap_begins < moments) & (moments <= self.gap_ends))
        there[place, self.gap_rows[gap]] = False
        return np.asarray(there)


def read_on_sale(connection: Connection[TupleRow], table: ItemTable, log: EventLog) -> OnSale:
    """Reads when the items of ``table`` were listed, first seen in ``log``, and off sale."""
    first = np.full(len(table), _NEVER)
    for item, listed in connection.execute(_LISTED):
        if (row := table.rows.get(item)) is not None:
            first[row] = listed
    known = log.item >= 0
    np.minimum.at(first, log.item[known], log.time[known])
    off: dict[int, int] = {}
    gaps: list[tuple[int, int, int]] = []
    for item, changed, removed in connection.execute(_REMOVALS):
        if (row := table.rows.get(item)) is None:
            continue
        if removed:
            off.setdefault(row, changed)
        elif row in off:
            gaps.append((row, off.pop(row), changed))
    gaps += [(row, changed, _NEVER) for row, changed in off.items()]
    columns = np.array(gaps, np.int64).reshape(-1, 3).T
    return OnSale(first, *columns)
