"""The listwise re-ranker: candidates by hand, and what a sum of signals cannot say."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from training.blend import SignalSource, fit_neighbours
from training.rerank import Reranker, fit_reranker, rank
from training.sequence import Rows

ITEMS = 30
SEQUENCES = [np.array([0, 1, 2, 3]), np.array([0, 1]), np.array([4, 2])]
NOTHING = np.zeros(ITEMS, np.bool_)
WEIGHTS = np.ones(1, np.float32)


def rows(*items: int) -> Rows:
    return np.array(items, np.int64)


def source(*names: str, tower: "np.ndarray[tuple[int, int], np.dtype[np.float32]] | None" = None) -> SignalSource:
    scores = np.zeros((1, ITEMS), np.float32) if tower is None else tower
    return SignalSource(
        lambda histories: scores[[int(history[-1]) % len(scores) for history in histories]],
        fit_neighbours(SEQUENCES, ITEMS),
        np.zeros((ITEMS, 0), np.float32),
        sp.csr_matrix((ITEMS, ITEMS), dtype=np.float32),
        NOTHING,
        names,
    )


def unchanged(features: int) -> Reranker:
    net = torch.nn.Linear(features, 1)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    return Reranker([net], np.zeros(features, np.float32), np.ones(features, np.float32))


def test_without_a_lesson_the_ranking_is_the_blends_and_leaves_out_what_is_excluded() -> None:
    excluded = NOTHING.copy()
    excluded[5:] = True
    excluded[6] = False
    ranked, probability = rank(source("popularity"), WEIGHTS, unchanged(4), [rows(0, 1)], excluded=excluded, count=4)
    assert ranked[0].tolist() == [2, 3, 4, 6]  # by popularity, ties by row
    np.testing.assert_allclose(probability[0], np.array([3, 2, 2, 1]) / 8, rtol=1e-5)  # the softmax of log(1 + count)


def test_it_learns_what_no_weight_can_say() -> None:
    """The item wanted is the second by the only signal, whatever its score."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(ITEMS, ITEMS)).astype(np.float32)
    made = source("tower", tower=scores)
    histories = [rows(place % ITEMS) for place in range(1_500)]
    targets = [int(np.argsort(-np.where(np.arange(ITEMS) == history[-1], -9, scores[history[-1]]))[1]) for history in histories]
    reranker = fit_reranker(made, WEIGHTS, histories, targets, excluded=NOTHING, seed=0, networks=2)
    ranked, probability = rank(made, WEIGHTS, reranker, histories, excluded=NOTHING, count=3)
    assert (ranked[:, 0] == targets).mean() > 0.8
    plain, _ = rank(made, WEIGHTS, unchanged(4), histories, excluded=NOTHING, count=3)
    assert (plain[:, 0] == targets).mean() == 0
    assert (np.diff(probability, axis=1) <= 0).all()
    again = fit_reranker(made, WEIGHTS, histories, targets, excluded=NOTHING, seed=0, networks=2)
    np.testing.assert_array_equal(rank(made, WEIGHTS, again, histories, excluded=NOTHING, count=3)[1], probability)


def test_targets_that_are_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="no target"):
        fit_reranker(source("popularity"), WEIGHTS, [rows(0)], [0], excluded=NOTHING, seed=0)


def test_customers_who_know_more_of_a_small_catalogue_change_nobodys_shape() -> None:
    few, many = rows(0), np.arange(ITEMS - 4)
    histories = [few] * 300 + [many]  # in different chunks
    ranked, _ = rank(source("popularity"), WEIGHTS, unchanged(4), histories, excluded=NOTHING, count=10)
    assert ranked.shape == (301, 4)
    assert sorted(ranked[-1]) == [26, 27, 28, 29]
    assert (ranked[0] == ranked[299]).all()
