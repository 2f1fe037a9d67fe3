"""Models side by side: all rank the same customers from the same moment, and a difference comes with its uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from features.signals import CollaborativeWeights
from training import collaborative
from training.checkpoint import Trained
from training.dataset import Shop, join_customers, take_snapshots
from training.estimates import bootstrap
from training.events import Micros
from training.labels import Label, keys_of
from training.metrics import Tally
from training.queries import queries_of, vectors_by

_RESAMPLES = 9_999


@dataclass(frozen=True)
class Contender:
    """A model to compare. ``weights``: item-to-item weights over the shop's items; None means fitted on all before the cut."""

    trained: Trained
    weights: CollaborativeWeights | None = None


@dataclass(frozen=True)
class Gain:
    """A mean difference per customer, and the bounds of its bootstrap confidence interval."""

    mean: float
    low: float
    high: float


def measure(shop: Shop, contenders: Sequence[Contender], labels: Sequence[Label], *, cut: Micros) -> list[Tally]:
    """Ranks for each label's customer with each model, from what was known strictly before ``cut``.

    All see the same customers, item snapshots and events. Customers without a wanted item that was on sale are not
    measured; who that is does not depend on the model, so row k of every tally is the same customer.

    Args:
        shop: the shop.
        contenders: the models; none may have been fitted on anything from ``cut`` on.
        labels: what the customers turned to, all of time ``cut``.
        cut: microseconds of Unix time.
    """
    days = min(contender.trained.config.snapshot_days for contender in contenders)
    snapshots = take_snapshots(shop, start=cut, cut=cut, every_days=days)
    customers = join_customers(shop.store, keys_of(labels))
    fitted: dict[tuple[float, ...], CollaborativeWeights] = {}
    tallies = []
    for contender in contenders:
        config, tally = contender.trained.config, Tally()
        key = (config.ease_lambda, config.ease_half_life_days, config.ease_max_items, config.collaborative_top_k)
        weights = contender.weights or fitted.get(key)
        if weights is None:
            weights = fitted[key] = collaborative.fit(shop.log, len(shop.table), until=cut, config=config)
        queries = queries_of(
            shop,
            labels,
            customers,
            snapshots=snapshots,
            trained=contender.trained,
            vectors=vectors_by(contender.trained),
            until=cut,
            weights=weights,
        )
        for query in queries:
            if wanted := {row for row in query.label.items if query.allowed[row]}:
                tally.add(contender.trained.ranker.order(query), wanted)
        tallies.append(tally)
    return tallies


def paired_bootstrap(champion: Sequence[float], challenger: Sequence[float], *, confidence: float, seed: int) -> Gain:
    """Returns how much the challenger gains per customer, with the percentile interval over resampled customers.

    Customers are resampled as pairs (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993): most of the spread
    between customers is common to both models and does not blur their difference.

    Args:
        champion: a score per customer.
        challenger: scores of the same customers in the same order.
        confidence: share of resamples inside the interval, in (0, 1).
        seed: of the resampling.

    Raises:
        ValueError: the two differ in length, or there are fewer than two customers.
    """
    difference = np.subtract(np.asarray(challenger, np.float64), np.asarray(champion, np.float64))
    if len(difference) < 2:
        raise ValueError(f"{len(difference)} customers: a comparison needs two at least")
    (found,) = bootstrap(difference, seed=seed, resamples=_RESAMPLES, level=confidence)
    assert found.low is not None
    assert found.high is not None
    return Gain(found.value, found.low, found.high)
