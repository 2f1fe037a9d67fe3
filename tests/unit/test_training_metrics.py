"""Metrics against hand-computed values."""

import numpy as np
import pytest

from training.metrics import Tally, area_under_curve, best_rows, hit_rate, ndcg, recall


def test_ndcg_rewards_early_places() -> None:
    assert ndcg([7, 1, 2], {7}) == 1.0
    assert ndcg([1, 7, 2], {7}) == pytest.approx(1 / np.log2(3))
    assert ndcg([1, 7, 9], {7, 9}) == pytest.approx((1 / np.log2(3) + 0.5) / (1 + 1 / np.log2(3)))
    assert ndcg(list(range(10)), {10}) == 0.0


def test_hit_rate_and_recall_look_at_their_depth_only() -> None:
    ranked = list(range(30))
    assert hit_rate(ranked, {9, 25}) == 1.0
    assert hit_rate(ranked, {10}) == 0.0
    assert recall(ranked, {0, 19, 20, 29}) == 0.5
    assert recall(ranked, set(range(40))) == 1.0


def test_tally_averages_and_counts_what_was_shown() -> None:
    tally = Tally()
    tally.add([1, 2], {1})
    tally.add([2, 3], {9})
    assert tally.means("x_") == {"x_ndcg_at_10": 0.5, "x_hr_at_10": 0.5, "x_recall_at_20": 0.5}
    assert tally.shown == {1, 2, 3}


def test_best_rows_keeps_to_the_allowed_and_breaks_ties_by_row() -> None:
    scores = np.array([1, 3, 3, 9, 0], np.float32)
    assert best_rows(scores, np.array([True, True, True, False, True]), 3) == [1, 2, 0]


def test_area_under_curve_is_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 60).astype(np.float32), rng.random(60) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert area_under_curve(scores, positive) == pytest.approx(np.mean(pairs))
    assert area_under_curve(scores, np.zeros(60, np.bool_)) == 0.5
