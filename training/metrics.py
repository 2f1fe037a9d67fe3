"""Ranking metrics against a set of wanted items, as the usual tables define them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from features.item_table import FloatArray

BoolArray = npt.NDArray[np.bool_]


def ndcg(ranked: Sequence[int], wanted: Collection[int], k: int = 10) -> float:
    """Returns the discounted gain of the wanted items among the first ``k``, relative to the best possible order."""
    gain = sum(1.0 / np.log2(place + 2) for place, row in enumerate(ranked[:k]) if row in wanted)
    ideal = sum(1.0 / np.log2(place + 2) for place in range(min(k, len(wanted))))
    return float(gain / ideal)


def hit_rate(ranked: Sequence[int], wanted: Collection[int], k: int = 10) -> float:
    """Returns 1 when a wanted item is among the first ``k``, else 0."""
    return float(any(row in wanted for row in ranked[:k]))


def recall(ranked: Sequence[int], wanted: Collection[int], k: int = 20) -> float:
    """Returns the share of the wanted items among the first ``k`` (of k, when more are wanted)."""
    return sum(row in wanted for row in ranked[:k]) / min(k, len(wanted))


@dataclass
class Tally:
    """Averages of the three metrics over customers, and the items ever shown in a top ten."""

    scores: list[tuple[float, float, float]] = field(default_factory=list)
    shown: set[int] = field(default_factory=set)

    def add(self, ranked: Sequence[int], wanted: Collection[int]) -> None:
        """Counts one customer's ranking, best item first."""
        self.scores.append((ndcg(ranked, wanted), hit_rate(ranked, wanted), recall(ranked, wanted)))
        self.shown.update(ranked[:10])

    def means(self, prefix: str = "") -> dict[str, float]:
        """Returns ``ndcg_at_10``, ``hr_at_10`` and ``recall_at_20``, each named with ``prefix``."""
        values = np.mean(self.scores, axis=0) if self.scores else np.zeros(3)
        return {f"{prefix}{name}": float(value) for name, value in zip(("ndcg_at_10", "hr_at_10", "recall_at_20"), values, strict=True)}


def best_rows(scores: FloatArray, allowed: BoolArray, count: int) -> list[int]:
    """Returns the rows of the ``count`` highest scores among the allowed ones, ties by row."""
    rows = np.flatnonzero(allowed)
    order = np.argsort(-scores[rows], kind="stable")[:count]
    return [int(row) for row in rows[order]]


def area_under_curve(scores: FloatArray, positive: BoolArray) -> float:
    """Returns the probability that a positive scores higher than a negative (ties count half); 0.5 when one kind is missing."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return 0.5
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
