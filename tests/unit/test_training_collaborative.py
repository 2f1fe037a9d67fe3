"""Item-to-item weights: the closed form, what they may see, and what pruning keeps."""

import numpy as np
import scipy.sparse as sp

from tests.unit.training_shop import DAY, START, chain_log, event_log
from training.collaborative import co_visitation, ease, fit, history_matrix, prune
from training.config import TrainConfig


def test_ease_minimises_its_objective() -> None:
    rng = np.random.default_rng(1)
    x = sp.csr_matrix((rng.random((40, 6)) < 0.4).astype(np.float64))

    def objective(b: np.ndarray) -> float:
        return float(np.square(x.toarray() - x.toarray() @ b).sum() + 3.0 * np.square(b).sum())

    b = ease(x, 3.0).astype(np.float64)
    assert not np.diag(b).any()
    for _ in range(50):
        step = rng.normal(0, 0.01, b.shape)
        np.fill_diagonal(step, 0)
        assert objective(b) < objective(b + step)


def test_weights_do_not_see_what_comes_later() -> None:
    log = chain_log()
    until = START + 30 * DAY
    early = log.time < until
    past = type(log)(log.users, log.user[early], log.item[early], log.action[early], log.time[early], log.visit[early])
    config = TrainConfig(ease_lambda=5)
    expected = fit(past, 12, until=until, config=config).weights
    assert np.array_equal(fit(log, 12, until=until, config=config).weights, expected)
    assert not np.array_equal(fit(log, 12, until=START + 99 * DAY, config=config).weights, expected)


def test_history_takes_the_strongest_action_and_halves_with_age() -> None:
    log = event_log([("a", "purchase", 0, 0, 0), ("a", "view", 1, 10, 1), ("a", "add_to_cart", 1, 10, 1), ("a", "search", -1, 20, 2)])
    x = history_matrix(log, 3, until=START + 99 * DAY, half_life_days=10).toarray()
    assert np.allclose(x, [[0.5, 0.8, 0.0]])


def test_customers_who_buy_along_a_chain_teach_the_next_item() -> None:
    weights = fit(chain_log(customers=200), 12, until=START + 99 * DAY, config=TrainConfig(ease_lambda=5, ease_half_life_days=1000))
    scores = weights.scores(np.array([4], np.int32), np.array([1.0], np.float32)).everywhere()
    assert set(np.argsort(-scores)[:2].tolist()) == {3, 5}


def test_pruning_keeps_the_largest_weights_in_order() -> None:
    dense = np.array([[0, 3, -5, 1], [1, 0, 0, 0], [0, 0, 0, 0], [4, 2, 1, 0]], np.float32)
    kept = prune(dense, 2)
    assert kept.indptr.tolist() == [0, 2, 3, 3, 5]
    assert kept.indices.tolist() == [1, 2, 0, 0, 1]
    assert kept.weights.tolist() == [3, -5, 1, 4, 2]


def test_co_visitation_stands_in_for_large_catalogues() -> None:
    log = chain_log(customers=100)
    small = fit(log, 12, until=START + 99 * DAY, config=TrainConfig(ease_max_items=11))
    assert (small.weights > 0).all()
    expected = co_visitation(history_matrix(log, 12, until=START + 99 * DAY, half_life_days=90))
    assert np.isclose(small.weights.sum(), expected.sum())
