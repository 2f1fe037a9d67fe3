"""What the figures of a model card are computed by: bootstrap intervals, calibration, concentration and popularity bias."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 1000
BINS = 10
# Resampled values held at once: 8 million float64 are 64 MB, whatever the number of customers.
_HELD = 8_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over customers with the ends of its confidence interval; None where there are too few to have one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bin:
    """Predictions of similar size: how many, what they said on average, and what share came true."""

    count: int
    probability: float
    observed: float


@dataclass(frozen=True)
class PopularityBias:
    """How far recommendations lean towards what sells anyway.

    Attributes:
        bought: share of all earlier purchases that went to each tenth of the catalogue, the most bought items first.
        shown: share of the recommendations, likewise.
        taken: share of what customers really turned to, likewise.
        gini_shown, gini_taken: concentration over the items, 0 when all are equal, towards 1 when one has everything.
        coverage: share of the catalogue recommended to anybody.
        mean_shown, mean_taken: earlier purchases of an item, averaged over recommendations and over what was taken.
    """

    bought: tuple[float, ...]
    shown: tuple[float, ...]
    taken: tuple[float, ...]
    gini_shown: float
    gini_taken: float
    coverage: float
    mean_shown: float
    mean_taken: float


def bootstrap(values: npt.ArrayLike, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL) -> list[Estimate]:
    """Returns the mean of each row with its percentile interval over resampled columns (Efron and Tibshirani, 1993, chapter 13).

    Args:
        values: float[m, n], m measures of the same n customers, who are resampled together.
        seed: of the resampling.
        resamples: how many.
        level: of the interval.
    """
    rows = np.atleast_2d(np.asarray(values, np.float64))
    count = rows.shape[1]
    if count < 2:
        return [Estimate(float(row.mean()) if count else 0.0) for row in rows]
    batch = max(_HELD // rows.size, 1)
    options: dict[str, Any] = {"n_resamples": resamples, "confidence_level": level, "batch": batch, "method": "percentile"}
    found = stats.bootstrap((rows,), np.mean, axis=-1, vectorized=True, rng=np.random.default_rng(seed), **options)
    low, high = (np.atleast_1d(end) for end in found.confidence_interval)
    return [Estimate(float(row.mean()), float(low[k]), float(high[k])) for k, row in enumerate(rows)]


def reliability(probability: npt.ArrayLike, observed: npt.ArrayLike, *, bins: int = BINS) -> list[Bin]:
    """Sorts predictions by size into bins of equal number; equal predictions stay together, or chance would tell them apart.

    Args:
        probability: float[n], what was predicted.
        observed: float[n] in [0, 1], what came true.
        bins: how many; fewer where there are fewer different predictions.
    """
    said, came = np.asarray(probability, np.float64), np.asarray(observed, np.float64)
    if not len(said):
        return []
    edges = np.unique(np.quantile(said, np.arange(1, bins) / bins, method="inverted_cdf"))
    place = np.searchsorted(edges, said)
    parts = [place == k for k in np.unique(place)]
    return [Bin(int(part.sum()), float(said[part].mean()), float(came[part].mean())) for part in parts]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Returns the expected calibration error: the mean gap between said and observed, weighted by count (Guo et al., ICML 2017)."""
    total = sum(part.count for part in bins)
    return sum(part.count * abs(part.probability - part.observed) for part in bins) / total if total else 0.0


def gini(counts: npt.ArrayLike) -> float:
    """Returns the Gini coefficient of counts that are not negative; 0 when there is nothing to share out."""
    values = np.sort(np.asarray(counts, np.float64))
    total = values.sum()
    if not total:
        return 0.0
    places = np.arange(1, len(values) + 1)
    return float(2 * (places * values).sum() / (len(values) * total) - (len(values) + 1) / len(values))


def popularity_bias(purchases: npt.ArrayLike, shown: npt.ArrayLike, taken: npt.ArrayLike) -> PopularityBias:
    """Compares recommendations with what customers turned to, over the catalogue sorted by earlier purchases.

    Args:
        purchases: float[n], earlier purchases of each item.
        shown: float[n], how often each item was recommended.
        taken: float[n], how often customers turned to it afterwards.
    """
    bought, given, wanted = (np.asarray(column, np.float64) for column in (purchases, shown, taken))
    tenths = np.array_split(np.argsort(-bought, kind="stable"), 10)

    def shares(counts: Values) -> tuple[float, ...]:
        total = counts.sum() or 1.0
        return tuple(float(counts[part].sum() / total) for part in tenths)

    def mean(weights: Values) -> float:
        return float((bought * weights).sum() / weights.sum()) if weights.sum() else 0.0

    return PopularityBias(
        bought=shares(bought),
        shown=shares(given),
        taken=shares(wanted),
        gini_shown=gini(given),
        gini_taken=gini(wanted),
        coverage=float((given > 0).mean()) if len(given) else 0.0,
        mean_shown=mean(given),
        mean_taken=mean(wanted),
    )
