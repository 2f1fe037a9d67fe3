"""Negatives of the tower: what a customer could have taken on a visit, and did not.

Label by label: an item was on sale before the label's time; the customer neither had bought it nor took it on that visit; and an
item they were shown before and passed over is no plain negative but one of its own, with the weight ``exposure_negatives``.
The softmax that a label is trained on is therefore

    exp(s_target) / (exp(s_target) + Σ_plain exp(s_j) + w · Σ_shown exp(s_j))

and a step estimates its sums from a pool: the targets of the batch, ``negative_count`` items drawn for all its labels together, and up to
eight shown items of each label. An item's logit is reduced by log q, where q is how often it is to be expected in the pool
(Yi et al., RecSys 2019); then the sum over the pool has the whole sum as its expectation.

The rules leave that true. Whether an item counts for a label is a mask, which restricts the sum and its estimate alike; q belongs
to the pool and knows no labels. Only the drawing is limited, to items that were on sale for some label of the batch, lest an early batch
waste its draws, and q is that of the limited draw. Shown items are drawn for their label alone, without replacement: of n shown,
k drawn have q = k / n, and the weight adds log w.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.item_table import FloatArray
from training.config import TrainConfig
from training.labels import Label
from training.on_sale import BoolArray, OnSale

_SHOWN_PER_LABEL = 8


@dataclass(frozen=True)
class Drawn:
    """The pool of a step of b labels: b targets, s sampled items, e shown ones.

    Attributes:
        rows: int64[b + s + e], item rows, the targets first.
        log_q: float32[b, b + s + e], what each logit is reduced by.
        wrong: bool[b, b + s + e], pairs that are no negatives; a label's own target is never among them.
    """

    rows: npt.NDArray[np.int64]
    log_q: FloatArray
    wrong: BoolArray


class NegativeSampler:
    """Draws the negatives of each step."""

    def __init__(self, labels: Sequence[Label], on_sale: OnSale, config: TrainConfig, rng: np.random.Generator) -> None:
        self._counts = np.zeros(len(on_sale.first))
        np.add.at(self._counts, [row for label in labels for row in label.items], 1.0)
        self._weights = (self._counts + 1.0) ** config.negative_power
        self._on_sale, self._config, self._rng = on_sale, config, rng

    def draw(self, labels: Sequence[Label], targets: npt.NDArray[np.int64]) -> Drawn:
        """Returns the pool of a step: for each label its target and what competes with it."""
        on_sale = self._on_sale.at([label.time for label in labels])
        drawable = np.asarray(on_sale.any(0), np.bool_)
        drawable[targets] = True
        sampled, expected = self._sample(drawable)
        pool = np.concatenate([targets, sampled])
        excluded = [self._excluded(label) for label in labels]
        wrong = ~on_sale[:, pool] | np.array([[row in out for row in pool.tolist()] for out in excluded])
        np.fill_diagonal(wrong, False)
        log_q = np.tile(np.log(expected[pool]).astype(np.float32), (len(labels), 1))
        return self._with_shown(Drawn(pool, log_q, wrong), labels, on_sale)

    def pick(self, label: Label, count: int) -> list[int]:
        """Returns up to ``count`` plain negatives of one label, drawn as often as items are taken; never one of ``_excluded``."""
        allowed = self._on_sale.at([label.time])[0]
        allowed[list(self._excluded(label))] = False
        weights = np.where(allowed, self._counts, 0.0)
        if not weights.any():
            return []
        return [int(row) for row in self._rng.choice(len(weights), count, p=weights / weights.sum())]

    def _sample(self, drawable: BoolArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Draws items with replacement; also returns how often each item is to be expected in the pool."""
        weights = np.where(drawable, self._weights, 0.0)
        probability = weights / weights.sum()
        sampled = self._rng.choice(len(weights), self._config.negative_count, p=probability)
        in_batch = self._config.batch_size * self._counts / max(self._counts.sum(), 1.0)
        return sampled, in_batch + self._config.negative_count * probability

    def _excluded(self, label: Label) -> set[int]:
        shown = label.shown if self._config.exposure_negatives else ()
        return {*label.bought, *label.items, *label.taken, *shown}

    def _with_shown(self, plain: Drawn, labels: Sequence[Label], on_sale: BoolArray) -> Drawn:
        """Adds columns of items shown to one label each."""
        if not self._config.exposure_negatives:
            return plain
        rows: list[int] = []
        owners: list[int] = []
        log_qs: list[float] = []
        for place, label in enumerate(labels):
            gone = {*label.bought, *label.items, *label.taken}
            candidates = [row for row in label.shown if on_sale[place, row] and row not in gone]
            count = min(len(candidates), _SHOWN_PER_LABEL)
            if count:
                rows += self._rng.permutation(candidates)[:count].tolist()
                owners += [place] * count
                log_qs += [float(np.log(count / len(candidates) / self._config.exposure_negatives))] * count
        log_q = np.tile(np.array(log_qs, np.float32), (len(labels), 1))
        wrong = np.arange(len(labels))[:, None] != np.array(owners, np.int64)[None, :]
        return Drawn(
            np.concatenate([plain.rows, np.array(rows, np.int64)]),
            np.concatenate([plain.log_q, log_q], axis=1),
            np.concatenate([plain.wrong, wrong], axis=1),
        )
