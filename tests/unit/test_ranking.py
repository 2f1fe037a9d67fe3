"""The ranker's input column by column, and that no shop and no customer makes a value of it infinite or undefined."""

from dataclasses import replace
from math import log, log1p, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.behaviour import Activity, Behaviour
from features.candidates import Candidates, Signals
from features.item_table import ItemTable
from features.ranking import RANKING_FEATURES, Profile, price_features, ranking_matrix
from features.scores import Scores
from features.signals import SignalConfig, history
from tests.unit.tables import DAY, activity, table

CONFIG = SignalConfig(half_life_days=10.0)
NOBODY = Profile()
NOTHING = Scores.none(40)


def described(
    seen: Activity, rows: list[int], *, items: ItemTable | None = None, signals: Signals | None = None, profile: Profile = NOBODY
) -> dict[str, list[float]]:
    items = items or table()
    vectors = np.eye(len(items), 4, dtype=np.float32)
    candidates = Candidates(np.array(rows, np.int32), np.zeros(len(rows), np.uint8))
    past = history(seen, items, CONFIG)
    given = signals or Signals(NOTHING, NOTHING, NOTHING)
    matrix = ranking_matrix(candidates, given, past, table=items, vectors=vectors, profile=profile)
    assert matrix.shape == (len(rows), len(RANKING_FEATURES))
    return dict(zip(RANKING_FEATURES, matrix.T.tolist(), strict=True))


def loud(*values: float) -> Scores:
    return Scores.of_all(np.array([*values, *[0.0] * (40 - len(values))], np.float32))


def test_scores_and_their_ranks_are_those_of_the_candidates() -> None:
    signals = Signals(loud(0.1, -0.5, 0.9), loud(3, 3, 1), loud(0, 0.25))
    seen = described(activity(), [2, 0, 1], signals=signals)
    assert seen["vector_score"] == pytest.approx([0.9, 0.1, -0.5])
    assert seen["vector_rank"] == pytest.approx([1, 1 / 2, 0])  # a negative score has no rank
    assert seen["collaborative_score"] == [1, 3, 3]
    assert seen["collaborative_rank"] == pytest.approx([1 / 3, 1, 1 / 2])  # ties by row
    assert seen["relation_score"] == [0, 0, 0.25]


def test_counts_and_ages_are_logarithms() -> None:
    counts = np.zeros((40, 6), np.float32)
    counts[3] = 2, 10, 50, 4, 20, 9
    ages = np.full(40, 30, np.float32)
    seen = described(activity(), [3, 4], items=replace(table(), popularity=counts, age_days=ages))
    for name, value in zip(RANKING_FEATURES[6:12], counts[3], strict=True):
        assert seen[name] == pytest.approx([log1p(value), 0]), name
    assert seen["purchase_trend"] == pytest.approx([log1p(8) - log1p(10), 0])
    assert seen["item_age"] == pytest.approx([log1p(30)] * 2)


def test_history_speaks_through_category_brand_touch_and_last_item() -> None:
    brands = np.array([1, 2] * 20, np.int32)
    seen = activity(("i001", "view", 0), ("i002", "purchase", 10), ("i009", "view", 0))  # categories 2, 3, 2 at weights .3 .5 .3
    given = described(seen, [5, 2, 1, 0], items=replace(table(), brands=brands))
    assert given["category_affinity"] == pytest.approx([0.6 / 1.1, 0.5 / 1.1, 0.6 / 1.1, 0])
    assert given["brand_affinity"] == pytest.approx([0.6 / 1.1, 0.5 / 1.1, 0.6 / 1.1, 0.5 / 1.1])
    assert given["touched_weight"] == pytest.approx([0, 0.5, 0.3, 0])
    assert given["touched_recency"] == pytest.approx([0, 1 / 3, 1, 0])
    assert given["last_item_similarity"] == [0, 0, 1, 0]  # vectors are unit axes: only itself is similar
    assert given["history_size"] == pytest.approx([log1p(3)] * 4)


def test_no_category_is_nobodys_favourite() -> None:
    bare = replace(table(), categories=np.zeros(40, np.int32), brands=np.zeros(40, np.int32))
    given = described(activity(("i001", "view", 0)), [1, 2], items=bare)
    assert given["category_affinity"] == given["brand_affinity"] == [0, 0]


def test_prices_are_compared_with_the_customers_band() -> None:
    prices = np.log(np.array([10, 5, 40, nan], np.float32))
    gap, distance, inside = price_features(prices, Profile(3, price_mean=10, price_low=5, price_high=20))
    assert gap.tolist() == pytest.approx([0, log(0.5), log(4), 0], abs=1e-6)
    assert distance.tolist() == pytest.approx([0, log(2), log(4), 0], abs=1e-6)
    assert inside.tolist() == [1, 1, 0, 0]
    for unknown in (Profile(), Profile(0, nan, 5, 20), Profile(1, 0.0, 0.0, 0.0)):
        assert not price_features(prices, unknown)[0].any()


def test_a_row_does_not_depend_on_its_company() -> None:
    rng = np.random.default_rng(1)
    signals = Signals(*(Scores.of_all(rng.standard_normal(40).astype(np.float32)) for _ in range(3)))
    seen, profile = activity(("i001", "view", 0), ("i006", "purchase", 3)), Profile(2, 10, 5, 20)
    whole = described(seen, list(range(40)), signals=signals, profile=profile)
    alone = described(seen, [17], signals=signals, profile=profile)
    backwards = described(seen, list(range(39, -1, -1)), signals=signals, profile=profile)
    for name in RANKING_FEATURES:
        assert alone[name] == [whole[name][17]], name
        assert backwards[name] == whole[name][::-1], name


numbers = st.sampled_from([nan, 0.0, 1e-30, 0.5, 20.0, 1e30])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 39), st.sampled_from(["view", "purchase", "return", "search"]), st.integers(0, 9000)), max_size=10),
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 20_000)), max_size=5, unique_by=lambda pair: pair[0]),
    st.builds(Profile, st.sampled_from([0.0, 1.0, 1e6]), numbers, numbers, numbers),
    st.sampled_from([nan, -20.0, 0.0, 20.0]),
    st.booleans(),
)
def test_every_value_is_finite(
    seen: list[tuple[int, str, int]], bought: list[tuple[int, int]], profile: Profile, log_price: float, signalled: bool
) -> None:
    newest = max((day for *_, day in seen), default=0)
    behaviours = tuple(
        Behaviour(f"i{row:03d}" if action != "search" else "", action, "web", (20_000 - newest + day) * DAY)
        for row, action, day in sorted(seen, key=lambda one: -one[2])
    )
    customer = Activity(1, behaviours, tuple(f"i{row:03d}" for row, _ in bought), tuple(day for _, day in bought))
    values = Scores.of_all(np.linspace(-1, 1, 40, dtype=np.float32)) if signalled else NOTHING
    items = replace(table(), log_price=np.full(40, log_price, np.float32))
    columns = described(customer, list(range(40)), items=items, signals=Signals(values, values, values), profile=profile)
    assert {name for name, column in columns.items() if not np.isfinite(column).all()} == set()


def test_a_purchase_of_long_ago_still_counts_a_little() -> None:
    """Halved 200 times a weight is below the smallest float32; a history whose weights sum to zero would divide by it."""
    seen = Activity(2, (Behaviour("", "search", "web", 20_000 * DAY, "mug"),), ("i001",), (18_000,))
    past = history(seen, table(), CONFIG)
    assert (past.weights > 0).all()
    assert described(seen, [1, 5])["category_affinity"] == [1, 1]
