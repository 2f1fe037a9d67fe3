"""Policy: what the shop wants of a slate whatever the model says. Each rule says what it kept and what it moved or removed."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.item_table import IntArray, ItemTable
from features.signals import History

_WINDOW = 10


@dataclass(frozen=True)
class Ordered:
    """Positions of the candidates in their final order, and how many of them diversity moved down."""

    positions: npt.NDArray[np.int64]
    moved_count: int


def already_bought(past: History, count: int) -> npt.NDArray[np.bool_]:
    """Returns bool[n], True for items the customer bought."""
    mask = np.zeros(count, np.bool_)
    mask[past.rows[past.bought]] = True
    return mask


def diversify(rows: IntArray, order: npt.NDArray[np.int64], table: ItemTable, *, size: int, max_per_category: int) -> Ordered:
    """Takes the best ``size`` candidates, never more than ``max_per_category`` of one category among 10 consecutive places.

    The best candidate that keeps the rule comes next; when none does, the best one does. Items without a category are free.

    Args:
        rows: item row of each candidate.
        order: candidate positions, best first.
        table: the epoch's items.
        size: places to fill.
        max_per_category: the rule.
    """
    codes = table.categories[rows[order]].tolist()
    waiting = list(range(len(order)))
    chosen: list[int] = []
    while waiting and len(chosen) < size:
        recent = [codes[k] for k in chosen[-(_WINDOW - 1) :]]
        pick = next((k for k in waiting if codes[k] == 0 or recent.count(codes[k]) < max_per_category), waiting[0])
        waiting.remove(pick)
        chosen.append(pick)
    moved = sum(1 for place, k in enumerate(chosen) if k < place)
    return Ordered(order[np.array(chosen, np.int64)], moved)
