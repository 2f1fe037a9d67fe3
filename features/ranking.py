"""The ranker's input: one row of features per candidate. Shared by training and serving, so the two cannot differ."""

from dataclasses import dataclass

import numpy as np

from features.candidates import Candidates, Signals
from features.item_table import FloatArray, IntArray, ItemTable
from features.retrieval import VectorArray, exact_scores
from features.scores import Scores
from features.signals import History

RANKING_FEATURES = (
    "vector_score",
    "vector_rank",
    "collaborative_score",
    "collaborative_rank",
    "relation_score",
    "last_item_similarity",
    "purchases_7d",
    "purchases_28d",
    "purchases_total",
    "views_7d",
    "views_28d",
    "buyers_28d",
    "purchase_trend",
    "item_age",
    "category_affinity",
    "brand_affinity",
    "touched_weight",
    "touched_recency",
    "price_gap",
    "price_distance",
    "in_price_band",
    "history_size",
    "purchase_count",
)


@dataclass(frozen=True)
class Profile:
    """What the ranker reads of the ``user_profile`` view; NaN where the customer has no purchases or no profile yet."""

    purchase_count: float = 0.0
    price_mean: float = float("nan")
    price_low: float = float("nan")
    price_high: float = float("nan")


def price_features(log_price: FloatArray, profile: Profile) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Compares prices with the customer's band: log(price / mean), its absolute value, and 1 inside the band. 0 when unknown."""
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.nan_to_num(log_price - np.log(np.float32(profile.price_mean)), nan=0.0, posinf=0.0, neginf=0.0)
        inside = (log_price >= np.log(np.float32(profile.price_low))) & (log_price <= np.log(np.float32(profile.price_high)))
    return gap.astype(np.float32), np.abs(gap).astype(np.float32), inside.astype(np.float32)


def ranking_matrix(
    candidates: Candidates, signals: Signals, past: History, *, table: ItemTable, vectors: VectorArray, profile: Profile
) -> FloatArray:
    """Returns float32[c, 23], the columns named by RANKING_FEATURES; every value is finite.

    Args:
        candidates: the rows to describe.
        signals: the customer's scores.
        past: the customer's history.
        table: the epoch's items.
        vectors: float32[n, d] or float16[n, d], unit item vectors as ``retrieval.stored_type`` says.
        profile: the customer's slow features.
    """
    rows = candidates.rows
    popularity = np.log1p(table.popularity[rows])
    by_row = np.argsort(past.rows)
    touched = Scores(len(table), past.rows[by_row], past.weights[by_row])
    recency = Scores(len(table), past.rows[by_row], (1.0 / (1.0 + np.arange(len(past.rows), dtype=np.float32)))[by_row])
    # The history is newest first, so its first row is the last item touched.
    last = exact_scores(vectors, rows, vectors[past.rows[0]]) if len(past.rows) else np.zeros(len(rows), np.float32)
    gap, distance, inside = price_features(table.log_price[rows], profile)
    columns = [
        signals.vector.at(rows),
        signals.vector.reciprocal_ranks(rows),
        signals.collaborative.at(rows),
        signals.collaborative.reciprocal_ranks(rows),
        signals.relation.at(rows),
        last,
        *popularity.T,
        np.log1p(4 * table.popularity[rows, 0]) - popularity[:, 1],
        np.log1p(table.age_days[rows]),
        _affinity(table.categories[rows], table.categories[past.rows], past.weights),
        _affinity(table.brands[rows], table.brands[past.rows], past.weights),
        touched.at(rows),
        recency.at(rows),
        gap,
        distance,
        inside,
        np.full(len(rows), np.log1p(len(past.rows)), np.float32),
        np.full(len(rows), np.log1p(profile.purchase_count), np.float32),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _affinity(codes: IntArray, touched: IntArray, weights: FloatArray) -> FloatArray:
    """Returns for each code the share of the weighted history, of codes ``touched``, that has it; 0 for items without a code."""
    if not len(touched) or not len(codes):
        return np.zeros(len(codes), np.float32)
    mass = np.bincount(touched, weights=weights, minlength=int(codes.max()) + 1)
    mass[0] = 0
    return np.asarray((mass / weights.sum())[codes], np.float32)
