"""An evaluation by segment: channel of the visit and of the history, new and known customers, category, price band."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import psycopg

from training.card import Metric, Segment
from training.estimates import bootstrap
from training.evaluate import BASELINES, Visit, Visits, metrics_of
from training.events import from_micros
from training.labels import Label
from training.metrics import Tally
from training.results import PIPELINE, Catalogue, Evaluation, UserResult

DIMENSIONS = {
    "channel": "channel of the visit",
    "history_channel": "channels of the history",
    "customer": "new and known customers",
    "category": "category of the wanted items",
    "price_band": "price of the wanted items",
}
"""What can be told apart, with what a report calls it. A customer counts in each of their history's channels, and in each
category and price band with the wanted items of it alone."""

_METRICS = ("ndcg_at_10", "hr_at_10", "recall_at_20")
_BASELINE = "recent_popularity_"
_BOUGHT = ((1, "new: nothing bought yet"), (5, "known: 1 to 4 items bought"), (20, "known: 5 to 19 items bought"))
_BOUGHT_MOST = "known: 20 and more items bought"

_GAIN = "ndcg_at_10_over_recent_popularity"

Parts = Mapping[str, tuple[int, ...]]
"""A customer's wanted items by the segments they count in."""

Member = tuple[UserResult, tuple[int, ...]]
"""A customer and those of their wanted items that count."""


def metrics_with_intervals(evaluation: Evaluation, *, seed: int = 0) -> list[Metric]:
    """Returns the metrics of an evaluation, those that are means over customers with their intervals.

    ``ndcg_at_10_over_recent_popularity`` is the difference, paired by customer: what the model adds to the order new customers see.
    """
    rows = _rows([(user, user.wanted) for user in evaluation.users], (PIPELINE, *BASELINES))
    rows["candidate_recall"] = [user.candidate_recall for user in evaluation.users]
    rows[_GAIN] = np.subtract(rows["ndcg_at_10"], rows[f"{_BASELINE}ndcg_at_10"])
    estimated = _estimated(rows, seed)
    plain = {name: Metric(name, value) for name, value in metrics_of(evaluation).items()}
    headline = {name: estimated[name] for name in (*_METRICS, _GAIN)}
    return list({**headline, **plain, **estimated}.values())


def all_segments(evaluation: Evaluation, *, seed: int = 0) -> list[Segment]:
    """Returns the segments of every dimension."""
    return [segment for dimension in DIMENSIONS for segment in segments_by(evaluation, dimension, seed=seed)]


def segments_by(evaluation: Evaluation, dimension: str, *, seed: int = 0) -> list[Segment]:
    """Returns a dimension's segments with NDCG@10, HR@10 and Recall@20 and the NDCG@10 of recent popularity.

    Bands come in their order, everything else with the most customers first.

    Args:
        evaluation: of the holdout.
        dimension: one of ``DIMENSIONS``.
        seed: of the intervals.
    """
    divide, order = _divider(evaluation.catalogue, dimension)
    found: dict[str, list[Member]] = defaultdict(list)
    for user in evaluation.users:
        for name, wanted in divide(user).items():
            found[name].append((user, wanted))
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), -len(found[name]), name))
    return [Segment(DIMENSIONS[dimension], name, len(found[name]), _segment_metrics(found[name], seed)) for name in names]


def _segment_metrics(members: Sequence[Member], seed: int) -> tuple[Metric, ...]:
    rows = _rows(members, (PIPELINE, _BASELINE))
    return tuple(_estimated({name: rows[name] for name in (*_METRICS, f"{_BASELINE}ndcg_at_10")}, seed).values())


def _rows(members: Sequence[Member], prefixes: Sequence[str]) -> dict[str, npt.ArrayLike]:
    """Returns each metric of the rankings of these prefixes, float[n] over the members."""
    rows: dict[str, npt.ArrayLike] = {}
    for prefix in prefixes:
        tally = Tally()
        for user, wanted in members:
            tally.add(user.rankings[prefix], wanted)
        scores = np.array(tally.scores, np.float64).reshape(-1, len(_METRICS))
        rows |= {f"{prefix}{name}": column for name, column in zip(_METRICS, scores.T, strict=True)}
    return rows


def _estimated(rows: Mapping[str, npt.ArrayLike], seed: int) -> dict[str, Metric]:
    estimates = zip(rows, bootstrap(np.stack([np.asarray(row) for row in rows.values()]), seed=seed), strict=True)
    return {name: Metric(name, each.value, each.low, each.high) for name, each in estimates}


def _divider(catalogue: Catalogue, dimension: str) -> tuple[Callable[[UserResult], Parts], tuple[str, ...]]:
    """Returns what divides a customer's wanted items, and the order of the segments where they have one."""
    match dimension:
        case "channel":
            return lambda user: {user.channel or "unknown": user.wanted}, ()
        case "history_channel":
            return lambda user: dict.fromkeys(user.history_channels or ("unknown",), user.wanted), ()
        case "customer":
            return lambda user: {bought_band(user.bought_count): user.wanted}, (*(name for _, name in _BOUGHT), _BOUGHT_MOST)
        case "category":
            return lambda user: _grouped(user.wanted, [name or "none" for name in catalogue.categories]), ()
        case _:
            bands, order = price_bands(catalogue)
            return lambda user: _grouped(user.wanted, bands), order


def bought_band(count: int) -> str:
    """Names the band of a customer who bought so many items."""
    return next((name for limit, name in _BOUGHT if count < limit), _BOUGHT_MOST)


def price_bands(catalogue: Catalogue) -> tuple[list[str], tuple[str, ...]]:
    """Returns each item's price band and the bands in order: quarters of the priced items that were sold before the cut."""
    prices = np.array([np.nan if price is None else price for price in catalogue.prices], np.float64)
    sold = prices[~np.isnan(prices) & (np.array(catalogue.purchases) > 0)]
    edges = np.unique(np.quantile(sold, (0.25, 0.5, 0.75)).round(2)) if len(sold) else np.zeros(0)
    between = [f"{low:.2f} to {high:.2f}" for low, high in itertools.pairwise(edges)]
    names = (f"below {edges[0]:.2f}", *between, f"{edges[-1]:.2f} and more") if len(edges) else ("any price",)
    place = np.searchsorted(edges, np.nan_to_num(prices), side="right")
    return ["no price" if np.isnan(price) else names[k] for price, k in zip(prices, place, strict=True)], (*names, "no price")


def _grouped(wanted: Sequence[int], names: Sequence[str]) -> Parts:
    found: dict[str, tuple[int, ...]] = {}
    for row in wanted:
        found[names[row]] = (*found.get(names[row], ()), row)
    return found


# The first wanted event from the label's time on decides: it is on the very visit that the holdout's label is made of.
_TARGET_CHANNELS = """
SELECT DISTINCT ON (user_id) user_id, channel FROM events
JOIN unnest(%(users)s::text[], %(times)s::timestamptz[]) AS l (user_id, since) USING (user_id)
WHERE item_id = ANY(%(items)s) AND action = ANY(%(actions)s) AND occurred_at >= since
ORDER BY user_id, occurred_at, event_id
"""


def visits_of(
    dsn: str, labels: Sequence[Label], histories: Mapping[str, Sequence[str]], *, items: Sequence[str], actions: Sequence[str]
) -> Visits:
    """Looks up where the holdout's visits took place.

    Args:
        dsn: of PostgreSQL.
        labels: of the holdout.
        histories: the channels of each customer's known behaviours, repeated as they come.
        items: ids of the catalogue.
        actions: those that make an item a label.
    """
    users = [label.user_id for label in labels]
    with psycopg.connect(dsn) as connection:
        values = {"users": users, "items": list(items), "actions": list(actions), "times": [from_micros(label.time) for label in labels]}
        channels: dict[str, str] = dict(connection.execute(_TARGET_CHANNELS, values).fetchall())
    return Visits({user: Visit(channels.get(user, ""), tuple(sorted(set(histories.get(user, ()))))) for user in users})
