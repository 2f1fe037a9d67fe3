"""Cheap random choices over one seeded generator (``Generator.choice`` is fifty times slower for a single draw)."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """Random choices; the same generator state gives the same choices on every machine."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def chance(self, share: float) -> bool:
        """Returns True in ``share`` of all calls."""
        return bool(self.rng.random() < share)

    def between(self, low: float, high: float) -> float:
        """Returns a number from ``low`` to ``high``."""
        return low + (high - low) * float(self.rng.random())

    def pick(self, choices: Sequence[T]) -> T:
        """Returns one of ``choices``, all equally likely."""
        return choices[int(self.rng.random() * len(choices))]

    def weighted(self, weights: Sequence[float]) -> int:
        """Returns a position, each as likely as its weight."""
        point = float(self.rng.random()) * sum(weights)
        for position, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return position
        return len(weights) - 1
