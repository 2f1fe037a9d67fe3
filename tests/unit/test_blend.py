"""The blend of next-item signals: each signal by hand on a few sequences, and weights that find what predicts."""

import numpy as np
import pytest
import scipy.sparse as sp

from features.item_table import FloatArray
from training.blend import SIGNALS, Neighbours, SignalSource, allowed_items, fit_neighbours, fit_weights
from training.collaborative import co_visitation
from training.sequence import Rows
from training.words import word_similarity, word_vectors

ITEMS = 8
SEQUENCES = [np.array([0, 1, 2, 3]), np.array([0, 1]), np.array([4, 2])]
TITLES = ["red cream", "red cream", "blue cream", "blue nail", "nail file", "file red", "cream red", "nail blue"]
NOTHING = np.zeros(ITEMS, np.bool_)


def rows(*items: int) -> Rows:
    return np.array(items, np.int64)


def text() -> FloatArray:
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 4)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def neighbours() -> Neighbours:
    return fit_neighbours(SEQUENCES, ITEMS)


def source(neighbours: Neighbours, *names: str, cold: tuple[int, ...] = ()) -> SignalSource:
    missing = NOTHING.copy()
    missing[list(cold)] = True
    return SignalSource(
        lambda histories: np.zeros((len(histories), ITEMS), np.float32),
        neighbours,
        text(),
        word_similarity(word_vectors(TITLES)),
        missing,
        names or tuple(SIGNALS),
    )


def test_neighbours_within_three_steps_count_by_distance_and_forward_twice(neighbours: Neighbours) -> None:
    near = neighbours.window.toarray()
    assert near[0, 1] == pytest.approx(2 / np.sqrt(2))  # two customers went from 0 to 1; 1 was taken twice
    assert near[1, 0] == pytest.approx(1 / np.sqrt(2))
    assert near[0, 3] == pytest.approx(1 / 3)
    assert near[3, 0] == pytest.approx(0.5 / 3 / np.sqrt(2))
    assert near[1, 4] == near[3, 4] == 0  # neighbours in the list of all sequences, but not of one customer
    np.testing.assert_array_equal(neighbours.counts, [2, 2, 2, 1, 1, 0, 0, 0])


def test_signals_of_a_history(neighbours: Neighbours) -> None:
    history, vectors = rows(4, 0, 1), text()
    seen = dict(zip(SIGNALS, source(neighbours).signals([history])[0], strict=True))
    near, weights = neighbours.window.toarray(), neighbours.ease
    cosine = co_visitation(_binary()).toarray()
    np.testing.assert_allclose(seen["window_neighbours"], np.log1p(20 * (near[1] + 0.6 * near[0] + 0.4 * near[4])), rtol=1e-5)
    np.testing.assert_allclose(seen["ease"], 24 * (weights[1] + weights[0] + weights[4]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen["ease_recent"], 24 * (weights[1] + 0.6 * weights[0] + 0.36 * weights[4]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen["cosine_neighbours"], np.log1p(10 * (cosine[1] + 0.6 * cosine[0] + 0.36 * cosine[4])), rtol=1e-4)
    np.testing.assert_allclose(seen["popularity"], np.log1p(neighbours.counts))
    np.testing.assert_allclose(seen["text_of_last"], 5 * vectors @ vectors[1], rtol=1e-4, atol=1e-6)
    mean = (vectors[1] + 0.6 * vectors[0] + 0.36 * vectors[4]) / 1.96
    np.testing.assert_allclose(seen["text_of_recent"], 5 * vectors @ mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen["text_of_nearest"], 5 * (vectors @ vectors[history].T).max(1), rtol=1e-4, atol=1e-6)
    step = near / np.maximum(near.sum(1, keepdims=True), 1e-9)
    walk = (step[1] + 0.6 * step[0] + 0.36 * step[4]) @ step
    np.testing.assert_allclose(seen["walk"], np.log1p(200 * walk), rtol=1e-4, atol=1e-6)
    words = word_similarity(word_vectors(TITLES)).toarray()
    np.testing.assert_allclose(seen["words_of_last"], 5 * words[1], rtol=1e-5)
    np.testing.assert_allclose(seen["words_of_recent"], 5 * (words[1] + 0.6 * words[0] + 0.36 * words[4]) / 1.96, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen["words_of_nearest"], 5 * words[history].max(0), rtol=1e-5)


def _binary() -> sp.csr_matrix:
    x = np.zeros((len(SEQUENCES), ITEMS), np.float32)
    for place, sequence in enumerate(SEQUENCES):
        x[place, sequence] = 1
    return sp.csr_matrix(x)


def test_a_history_has_the_same_signals_among_others(neighbours: Neighbours) -> None:
    histories, made = [rows(4, 0, 1), rows(), rows(7), rows(2, 3, 4, 5, 6)], source(neighbours, cold=(6, 7))
    alone = np.concatenate([made.signals([history]) for history in histories])
    np.testing.assert_allclose(made.signals(histories), alone, rtol=1e-5, atol=1e-6)


def test_an_empty_history_says_nothing_of_neighbours(neighbours: Neighbours) -> None:
    seen = dict(zip(SIGNALS, source(neighbours).signals([rows()])[0], strict=True))
    assert not any(seen[name].any() for name in ("window_neighbours", "ease", "cosine_neighbours", "text_of_last"))
    assert np.isfinite(seen["text_of_nearest"]).all()


def test_cold_items_have_an_offset_and_text_weights_of_their_own(neighbours: Neighbours) -> None:
    made = source(neighbours, "tower", "text_of_last", cold=(6, 7))
    assert made.columns == ("tower", "text_of_last", "cold", "cold_tower", "cold_text_of_last")
    signals = made.signals([rows(1)])[0]
    np.testing.assert_array_equal(signals[2], [0, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(signals[4], np.where(signals[2] == 1, signals[1], 0))


def test_weights_turn_to_the_signal_that_predicts(neighbours: Neighbours) -> None:
    rng = np.random.default_rng(0)
    made = source(neighbours, "popularity", "text_of_last")
    histories = [rows(*rng.choice(ITEMS, 2, replace=False)) for _ in range(200)]
    targets = [int(np.argmax(np.where(np.isin(np.arange(ITEMS), history), -9, text() @ text()[history[-1]]))) for history in histories]
    weights = dict(zip(made.columns, fit_weights(made, histories, targets, excluded=NOTHING, seed=0), strict=True))
    assert weights["text_of_last"] > 1
    assert weights["text_of_last"] > 3 * abs(weights["popularity"])
    scores = np.einsum("s,usn->un", list(weights.values()), made.signals(histories))
    scores[~np.array([allowed_items(history, NOTHING) for history in histories])] = -np.inf
    assert (scores.argmax(1) == targets).mean() > 0.95


def test_a_target_of_the_history_teaches_nothing(neighbours: Neighbours) -> None:
    made = source(neighbours, "popularity")
    weights = fit_weights(made, [rows(0), rows(1)], [0, 2], excluded=NOTHING, seed=0)
    assert np.isfinite(weights).all()
