"""Features of (customer, item) pairs: they read nothing after the cut, and each group gives known answers."""

import numpy as np
import numpy.typing as npt
import pytest

from tests.unit.basket_shop import day, log_of, random_frame
from training import basket_signals
from training.basket_features import GROUPS, basket_features, buyers, context, item_numbers, standard
from training.basket_log import Past, past, purchase_log
from training.collaborative import ease

CUT = 60
FloatArray = npt.NDArray[np.float32]


def unit_titles(count: int) -> FloatArray:
    vectors = np.random.default_rng(5).normal(size=(count, 8)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def column(known: Past, name: str, user: str, titles: FloatArray | None = None) -> dict[str, float]:
    """One feature of one customer by item id."""
    features = basket_features(known, unit_titles(known.shape[1]) if titles is None else titles)
    values = features.of(np.array([known.log.users.index(user)], np.int32))[0, :, features.names.index(name)]
    return dict(zip(known.log.items, values.tolist(), strict=True))


def test_nothing_at_or_after_the_cut_changes_a_feature():
    table, titles = random_frame(), unit_titles(30)
    known = past(purchase_log(table), day(CUT))
    users = np.arange(known.shape[0], dtype=np.int32)
    features = basket_features(known, titles)
    values = features.of(users)
    assert values.shape == (len(users), known.shape[1], len(features.names))
    assert np.isfinite(values).all()
    changed = table.copy()
    late = (changed.time >= "2011-03-02").to_numpy()  # day 60
    assert 0 < late.sum() < len(late)
    rng = np.random.default_rng(3)
    for name in ("user", "item", "basket", "quantity", "price", "abroad", "title"):
        changed.loc[late, name] = rng.permutation(changed.loc[late, name].to_numpy())
    changed.loc[late, "quantity"] += 1000
    changed.loc[late, "title"] = "other"
    for other in (changed, table[~late]):
        again = past(purchase_log(other), day(CUT))
        assert again.log.titles == known.log.titles
        assert np.array_equal(basket_features(again, titles).of(users), values)
        assert np.array_equal(basket_features(again, titles).context, features.context)
    earlier = basket_features(past(purchase_log(table), day(CUT - 10)), titles)
    assert not np.array_equal(earlier.context, features.context[: len(earlier.context)])


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_a_group_can_be_left_out(group):
    known = past(purchase_log(random_frame()), day(CUT))
    full = basket_features(known, unit_titles(30))
    users = np.array([3, 0], np.int32)
    fewer = basket_features(known, np.zeros((30, 1), np.float32) if group == "text" else unit_titles(30), without=frozenset({group}))
    gone = set(full.names) - set(fewer.names)
    marks = {
        "text": {"text_mean", "text_closest", "text_last", "text_trend"},
        "sequence": {"together_last_relative", "together_late_relative", "follow_relative"},
        "collaborative": {name for name in full.names if name.startswith(("ease", "cosine", "neighbours"))},
        "recency": {
            name
            for name in full.names
            if name.startswith(("new_", "trend_", "first_", "last_", "ease_decayed", "buyers_"))
            or name.endswith(("lately_relative", "_trend"))
        }
        - {"buyers_all"},
    }
    assert gone == marks[group]
    assert fewer.context.shape[1] == full.context.shape[1] - (group == "recency")
    kept = [full.names.index(name) for name in fewer.names]
    assert np.array_equal(fewer.of(users), full.of(users)[:, :, kept])


def test_buyers_count_customers_of_a_window_and_new_ones_once():
    known = past(log_of([("ann", "cup", 1), ("ann", "cup", 9), ("bob", "cup", 9), ("bob", "cup", 9.5), ("bob", "pan", 2)]), day(10))
    assert buyers(known, 3.0, new=False).tolist() == [2, 0]
    assert buyers(known, 3.0, new=True).tolist() == [1, 0]
    assert buyers(known, 9.5, new=True).tolist() == [2, 1]


def test_popularity_is_standardised_over_the_items_and_trends_rise():
    rows = (
        [(f"u{k}", "up", 60 - k) for k in range(6)]
        + [(f"u{k}", "down", 8 + k) for k in range(6)]
        + [("u0", "flat", 20), ("u1", "flat", 58)]
    )
    known = past(log_of(rows), day(61))
    for name in ("trend_7_28", "new_7", "buyers_14"):
        trend = column(known, name, "u0")
        assert trend["up"] > trend["flat"] > trend["down"]
        assert np.mean(list(trend.values())) == pytest.approx(0.0, abs=1e-6)
    assert column(known, "last_sold", "u0")["down"] > column(known, "last_sold", "u0")["flat"] > column(known, "last_sold", "u0")["up"]
    assert column(known, "first_sold", "u0")["down"] > column(known, "first_sold", "u0")["flat"] > column(known, "first_sold", "u0")["up"]
    assert standard(np.ones(3)).tolist() == [0, 0, 0]


def test_collaborative_signals_are_those_of_their_formulas():
    known = past(purchase_log(random_frame()), day(CUT))
    x = known.matrix()
    users = np.array([4, 7], np.int32)
    block = basket_signals.collaborative(known, decayed=True)
    values = dict(zip(block.names, block.score(users), strict=True))
    assert np.allclose(values["ease"], x[users] @ ease(x, 300.0), atol=1e-6)
    faded = known.decayed(60.0)
    assert np.allclose(values["ease_decayed"], faded[users] @ ease(faded, 100.0), atol=1e-6)
    assert np.array_equal(values["ease_relative"], basket_signals.relative(values["ease"]))


def test_neighbours_are_the_customers_with_the_rarest_items_in_common():
    rows = [
        ("ann", "rare", 1),
        ("ann", "cup", 1),
        ("bob", "rare", 2),
        ("bob", "jar", 2),
        ("cid", "cup", 3),
        ("cid", "pan", 3),
        ("dan", "cup", 4),
    ]
    known = past(log_of(rows), day(5))
    near = basket_signals.Neighbours(known.matrix()).of(np.array([0], np.int32)).toarray()[0]
    assert near[0] == 0  # never oneself
    assert near[1] > near[2] > 0
    assert near[3] > near[2]
    scores = column(known, "neighbours_relative", "ann")
    assert scores["jar"] > scores["pan"] > 0


def test_relative_is_the_log_of_how_far_above_the_average():
    assert basket_signals.relative(np.array([[3.0, 1.0, -5.0, 0.0], [0, 0, 0, 0]], np.float32)) == pytest.approx(
        np.log1p(np.array([[3, 1, 0, 0], [0, 0, 0, 0]]))
    )


def test_what_follows_the_last_basket_is_new_and_in_the_next_one():
    rows = [
        ("ann", "cup", 1),
        ("ann", "pan", 2),
        ("ann", "cup", 3),
        ("bob", "cup", 1),
        ("bob", "pan", 2),
        ("bob", "pot", 3),
        ("cid", "cup", 3),
    ]
    known = past(log_of(rows), day(4))
    earlier, later = basket_signals.consecutive_baskets(known)
    owners = {int(number): known.log.users[user] for number, user in zip(known.log.basket, known.log.user, strict=True)}
    assert len(earlier) == 4
    assert all(owners[a] == owners[b] and a < b for a, b in zip(earlier.tolist(), later.tolist(), strict=True))
    follows = basket_signals.follow_up(known)
    cup, pan, pot = (known.log.items.index(item) for item in ("cup", "pan", "pot"))
    # cup → pan twice, of 2 baskets with a cup that have a next one and 2 with a new pan; damped by 20
    assert follows[cup, pan] == pytest.approx(2 / (2 + 20))
    assert follows[pan, pot] == pytest.approx(1 / (2**0.5 + 20))
    assert follows[pan, cup] == 0  # ann had a cup before
    scores = column(known, "follow_relative", "cid")
    assert max(scores, key=scores.__getitem__) == "pan"


def test_what_is_bought_together_with_the_last_basket_stands_out():
    rows = [("ann", "cup", 1), ("ann", "saucer", 1), ("bob", "cup", 2), ("bob", "saucer", 2), ("cid", "pan", 1), ("cid", "cup", 3)]
    rows += [("dan", "pan", 1), ("dan", "lid", 1)]
    scores = column(past(log_of(rows), day(4)), "together_last_relative", "cid")
    assert scores["saucer"] > 0
    assert scores["lid"] == 0  # it goes with an earlier basket
    scores = column(past(log_of(rows), day(4)), "together_late_relative", "cid")
    assert scores["saucer"] > scores["lid"] > 0


def test_text_is_the_closeness_of_titles():
    rows = [("ann", "cup", 1), ("ann", "pan", 2), ("bob", "mug", 3)]
    known = past(log_of(rows), day(4))
    titles = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)  # cup, pan, mug
    assert column(known, "text_mean", "ann", titles)["mug"] == pytest.approx(0.7)
    assert column(known, "text_closest", "ann", titles)["mug"] == pytest.approx(0.8)
    assert column(known, "text_last", "ann", titles)["mug"] == pytest.approx(0.8)
    assert column(known, "text_closest", "bob", titles)["cup"] == pytest.approx(0.6)
    similar = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], np.float32)
    assert basket_signals.kindred(similar, np.array([5.0, 1.0, 9.0], np.float32)) == pytest.approx([1, 5, 3], abs=1e-3)


def test_attributes_match_item_and_customer():
    rows = [("ann", "cup", 1), ("bob", "pan", 1), ("cid", "cup", 2), ("cid", "pan", 2)]
    known = past(log_of(rows, quantity=[1, 10, 1, 10], price=[2, 8, 2, 8], abroad=[True, False, True, False]), day(3))
    price = column(known, "price_match", "ann")
    assert price["cup"] == pytest.approx(0, abs=1e-6)
    assert price["pan"] == pytest.approx(-np.log(4))
    assert column(known, "quantity_match", "bob")["cup"] == pytest.approx(-np.log(10))
    # the mean log size of baskets: one of 1 and one of 2 for both items; cid's baskets are of 2
    assert column(known, "basket_size_match", "cid")["cup"] == pytest.approx(-np.log(2) / 2)
    assert column(known, "abroad_match", "ann")["cup"] == pytest.approx(1)
    assert column(known, "abroad_match", "bob") == {"cup": 0, "pan": 0}
    assert column(known, "abroad_match", "cid")["pan"] == pytest.approx(-0.5)


def test_codes_of_a_series_are_close():
    assert item_numbers(["85123A", "22423", "POST", "M"]).tolist() == [85123, 22423, -3_000_000, -4_000_000]
    known = past(log_of([("ann", "20101A", 1), ("ann", "30001", 1), ("bob", "20111", 2), ("bob", "POST", 2), ("bob", "20299", 2)]), day(3))
    share, closest = column(known, "family_share", "ann"), column(known, "code_closest", "ann")
    assert share["20111"] == pytest.approx(0.5**0.5)
    assert share["POST"] == share["20299"] == 0
    assert closest["20111"] == pytest.approx(np.exp(-1))
    assert closest["POST"] == 0


def test_context_describes_the_customer():
    known = past(log_of([("ann", "cup", 1), ("ann", "pan", 1), ("ann", "cup", 3)], quantity=[1, 4, 1], price=[1, 1, 1]), day(4))
    assert context(known, recency=True)[0] == pytest.approx([np.log(3), np.log(3), np.log(4) / 3, 0, 0, np.log(2)])
