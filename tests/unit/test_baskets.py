"""The basket ranker: fair lists, a right loss, no look into the future, the same seed the same ranking, and better than popularity."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.basket_shop import chain_frame, day, frame, random_frame
from training.basket_features import basket_features
from training.basket_log import PurchaseLog, next_new_baskets, past, purchase_log
from training.baskets import BasketConfig, Lists, Trained, choose, join, list_loss, make_lists, rank, train
from training.metrics import Tally, best_rows

CONFIG = BasketConfig(cuts=3, newest_cut_days=10, cut_step_days=10, label_days=15, hard_negatives=12, random_negatives=8, nets=2, epochs=6)
END = 100
WITHOUT_TEXT = frozenset({"text"})
NO_TITLES = np.zeros((40, 1), np.float32)


def trained(log: PurchaseLog, seed: int = 0, config: BasketConfig = CONFIG) -> Trained:
    return train(log, NO_TITLES, end=day(END), config=config, seed=seed, without=WITHOUT_TEXT)


def orders(log: PurchaseLog, model: Trained) -> list[list[int]]:
    known = past(log, day(END))
    users = np.arange(known.shape[0], dtype=np.int32)
    ranked = rank(model.nets, basket_features(known, NO_TITLES, without=WITHOUT_TEXT), known, users=users, depth=20)
    return [order.tolist() for order in ranked]


@pytest.fixture(scope="module")
def chain() -> PurchaseLog:
    return purchase_log(chain_frame())


@pytest.fixture(scope="module")
def model(chain: PurchaseLog) -> Trained:
    return trained(chain)


def test_it_beats_popularity_where_customers_follow_a_chain(chain, model):
    known = past(chain, day(END))
    labels = next_new_baskets(chain, known, cut=day(END), until=day(END + 28))
    ranked, bought, ours, popular = orders(chain, model), known.matrix().toarray(), Tally(), Tally()
    for row, user in enumerate(labels.user):
        wanted = set(labels.wanted[row].indices.tolist())
        ours.add(ranked[user], wanted)
        popular.add(best_rows(bought.sum(0), bought[user] == 0, 20), wanted)
    assert len(labels.user) > 100
    assert ours.means()["ndcg_at_10"] > popular.means()["ndcg_at_10"] + 0.3
    assert model.validation["ndcg_at_10"] > 0.5
    assert model.validation["users"] > 100


def test_nobody_is_ranked_what_they_have(chain, model):
    bought = past(chain, day(END)).matrix().toarray()
    for user, order in enumerate(orders(chain, model)):
        assert len(set(order)) == len(order) == min(20, int((bought[user] == 0).sum()))
        assert not bought[user][order].any()


def test_a_seed_decides_everything(chain, model):
    again, other = trained(chain), trained(chain, seed=1)
    assert orders(chain, again) == orders(chain, model)
    assert again.validation == model.validation
    assert not torch.equal(other.nets[0].linear.weight, model.nets[0].linear.weight)
    assert not torch.equal(model.nets[0].linear.weight, model.nets[1].linear.weight)


def test_training_leaves_the_global_random_state_alone(chain):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trained(chain, config=replace(CONFIG, nets=1, epochs=1))
    assert torch.equal(torch.rand(1), expected)


def test_nothing_at_or_after_the_end_changes_the_ranker():
    table = random_frame(days=130)
    late = (table.time >= "2011-04-11").to_numpy()  # day 100
    assert 0 < late.sum() < len(late)
    changed = table.copy()
    changed.loc[late, "item"] = np.roll(changed.loc[late, "item"].to_numpy(), 7)
    model, again = trained(purchase_log(table)), trained(purchase_log(changed))
    assert model.lists == again.lists > 20
    for net, other in zip(model.nets, again.nets, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_labels_end_with_the_window_and_the_log():
    # ann's next basket comes 5 days after the cut, bob's 20 days after it
    rows = [("ann", "1", 1.0), ("bob", "2", 1.0), ("cid", "3", 1.0), ("ann", "2", 95.0), ("bob", "1", 110.0)]
    log = purchase_log(frame(rows))
    config = replace(CONFIG, cuts=1, nets=1, epochs=1)
    assert trained(log, config=config).lists == 1
    assert train(log, NO_TITLES, end=day(105), config=replace(config, newest_cut_days=15), seed=0, without=WITHOUT_TEXT).lists == 1
    assert train(log, NO_TITLES, end=day(120), config=replace(config, newest_cut_days=30), seed=0, without=WITHOUT_TEXT).lists == 1
    long = replace(config, newest_cut_days=30, label_days=28)
    assert train(log, NO_TITLES, end=day(120), config=long, seed=0, without=WITHOUT_TEXT).lists == 2
    with pytest.raises(ValueError, match="too short"):
        train(log, NO_TITLES, end=day(94), config=config, seed=0, without=WITHOUT_TEXT)


def test_cuts_step_back_from_the_end():
    assert [(day(200) - cut) / (day(1) - day(0)) for cut in BasketConfig().training_cuts(day(200))] == [17, 36, 55, 74, 93, 112, 131, 150]


def test_a_list_stands_for_all_items_but_the_customers_own():
    rng = np.random.default_rng(0)
    own, hard = rng.random((50, 40)) < 0.2, rng.normal(size=(50, 40)).astype(np.float32)
    wanted = (rng.random((50, 40)) < 0.1) & ~own
    items, offset = choose(hard, wanted, own=own, config=CONFIG, rng=rng)
    assert items.shape == (50, 20)
    for row in range(50):
        assert len(set(items[row].tolist())) == 20
        standing = items[row][offset[row] > -1e8]
        assert set(np.flatnonzero(wanted[row])) <= set(standing.tolist())
        assert not own[row][standing].any()
        assert np.exp(offset[row]).sum() == pytest.approx((~own[row]).sum(), rel=1e-5)
        best = np.argsort(-np.where(own[row] | wanted[row], -np.inf, hard[row]))[: 12 - wanted[row].sum()]
        assert set(best.tolist()) <= set(standing.tolist())


def test_a_small_shop_is_listed_whole():
    own = np.array([[True, False, False]])
    items, offset = choose(np.zeros((1, 3), np.float32), ~own, own=own, config=CONFIG, rng=np.random.default_rng(0))
    assert sorted(items[0][offset[0] > -1e8].tolist()) == [1, 2]
    assert items.shape == (1, 3)


def test_the_loss_is_softmax_cross_entropy_with_what_each_item_stands_for():
    lists = Lists(
        features=torch.zeros(1, 4, 1),
        context=torch.zeros(1, 1),
        offset=torch.tensor([[0.0, 0.0, np.log(5.0), -1e9]]),
        wanted=torch.tensor([[True, True, False, False]]),
        time=torch.zeros(1, dtype=torch.int64),
    )
    scores = torch.tensor([[1.0, 2.0, 0.5, 30.0]])
    total = np.exp(1) + np.exp(2) + 5 * np.exp(0.5)
    assert list_loss(scores, lists).item() == pytest.approx(np.log(total) - 1.5, rel=1e-5)


def test_narrow_lists_join_wide_ones(chain):
    def lists_at(cut: float) -> Lists:
        known = past(chain, day(cut))
        labels = next_new_baskets(chain, known, cut=day(cut), until=day(cut + 10))
        features = basket_features(known, NO_TITLES, without=WITHOUT_TEXT)
        return make_lists(features, known, labels, config=CONFIG, rng=np.random.default_rng(0))

    narrow, wide = lists_at(2), lists_at(60)
    narrow = Lists(narrow.features[:, :9], narrow.context, narrow.offset[:, :9], narrow.wanted[:, :9], narrow.time)
    both = join([narrow, wide])
    assert len(both) == len(narrow) + len(wide)
    assert both.features.shape[1] == wide.features.shape[1]
    assert torch.equal(both.offset[: len(narrow), :9], narrow.offset)
    assert (both.offset[: len(narrow), 9:] < -1e8).all()
    assert torch.equal(both[torch.tensor([len(narrow)])].features, wide.features[:1])
