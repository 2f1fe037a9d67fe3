"""Scores kept for some items only say what scores of all items would say."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.scores import Scores


def some(seed: int, count: int) -> Scores:
    """Few distinct values, so that there are ties; some negative, some 0."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(rng.random(count) < rng.random()).astype(np.int32)
    return Scores(count, rows, rng.integers(-2, 5, len(rows)).astype(np.float32))


cases = given(st.integers(0, 2**32 - 1), st.integers(0, 60))


@cases
def test_looking_up_finds_what_is_given_and_0_elsewhere(seed: int, count: int) -> None:
    scores = some(seed, count)
    rows = np.random.default_rng(seed).permutation(count).astype(np.int32)
    assert scores.at(rows).tolist() == scores.everywhere()[rows].tolist()
    assert Scores.of_all(scores.everywhere()).at(rows).tolist() == scores.everywhere()[rows].tolist()


@cases
def test_best_and_ranks_are_those_of_the_scores_of_all_items(seed: int, count: int) -> None:
    scores = some(seed, count)
    values, excluded = scores.everywhere(), np.random.default_rng(seed).random(count) < 0.3
    order = sorted((row for row in range(count) if values[row] > 0), key=lambda row: (-values[row], row))
    for limit in (1, 7, 99):
        assert scores.best(limit, excluded=excluded) == [row for row in order if not excluded[row]][:limit]
    rows = np.random.default_rng(seed).permutation(count).astype(np.int32)
    ranks = np.zeros(count, np.float32)
    ranks[rows] = scores.reciprocal_ranks(rows)
    assert ranks[order].tolist() == [np.float32(1) / np.float32(1 + place) for place in range(len(order))]
    assert np.count_nonzero(ranks) == len(order)


@cases
def test_what_is_not_allowed_scores_0(seed: int, count: int) -> None:
    scores, allowed = some(seed, count), np.random.default_rng(seed).random(count) < 0.5
    assert scores.where(allowed).everywhere().tolist() == np.where(allowed, scores.everywhere(), 0).tolist()


def test_sums_are_those_of_float64_in_the_order_given() -> None:
    amounts = np.array([1e8, 0.25, 3, 1, 0.25], np.float32)
    summed = Scores.summed(9, np.array([4, 4, 2, 4, 4], np.int32), amounts)
    assert (summed.rows.tolist(), summed.values.tolist()) == ([2, 4], [3, float(np.float32(1e8 + 1.5))])
    assert Scores.summed(10_000, np.array([4, 4, 2, 4, 4], np.int32), amounts).values.tolist() == summed.values.tolist()
    assert Scores.summed(3, np.zeros(0, np.int32), np.zeros(0, np.float32)).everywhere().tolist() == [0, 0, 0]
