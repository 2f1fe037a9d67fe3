"""Behaviours, history, candidates and ranking features: what training and serving compute with the same code."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.behaviour import ACTION_WEIGHT, ACTIONS, Activity, Behaviour, behaviour_text
from features.candidates import CANDIDATE_COUNT, Signals, Source, generate
from features.ranking import RANKING_FEATURES, Profile, ranking_matrix
from features.scores import Scores
from features.signals import CollaborativeWeights, SignalConfig, history, relation_scores
from tests.unit.tables import activity, table

CONFIG = SignalConfig(half_life_days=10.0)


def test_behaviour_text_writes_each_item_once_with_its_strongest_verb() -> None:
    seen = activity(("i001", "view", 0), ("i001", "purchase", 1), ("i002", "add_to_cart", 2), ("i001", "click", 3))
    assert behaviour_text(seen, table().title_of) == "bought title i001; added title i002"


def test_behaviour_text_keeps_searches_and_leaves_out_unknown_items() -> None:
    search = Behaviour("", "search", "app", 5, "red mug")
    gone = Behaviour("gone", "view", "web", 4)
    assert behaviour_text(Activity(2, (search, gone)), table().title_of) == "searched red mug"


behaviours = st.lists(st.tuples(st.sampled_from([f"i{k:03d}" for k in range(12)]), st.sampled_from(ACTIONS)), max_size=50)


@given(behaviours, st.integers(1, 20))
def test_behaviour_text_never_repeats_an_item_and_keeps_the_limit(pairs: list[tuple[str, str]], limit: int) -> None:
    text = behaviour_text(activity(*((item, action, k) for k, (item, action) in enumerate(pairs))), table().title_of, limit=limit)
    phrases = text.split("; ") if text else []
    items = [phrase.rsplit(" ", 1)[-1] for phrase in phrases]
    assert len(items) == len(set(items)) <= limit


def test_every_action_has_a_weight_and_a_verb() -> None:
    assert set(ACTION_WEIGHT) == set(ACTIONS)
    for action in ACTIONS:
        assert behaviour_text(activity(("i001", action, 0)), table().title_of)


def test_history_halves_with_age_and_remembers_purchases_beyond_the_window() -> None:
    past = history(activity(("i003", "view", 0), ("i004", "view", 10), purchased=(("i005", 19_980),)), table(), CONFIG)
    assert [table().ids[row] for row in past.rows] == ["i003", "i004", "i005"]
    assert past.weights == pytest.approx([0.3, 0.15, 0.25])
    assert past.bought.tolist() == [False, False, True]


def test_collaborative_scores_add_up_and_follow_the_table() -> None:
    weights = CollaborativeWeights(np.array([0, 2, 3, 3]), np.array([1, 2, 0], np.int32), np.array([0.5, 1.0, 2.0], np.float32))
    assert weights.scores(np.array([0, 1], np.int32), np.array([1.0, 0.5], np.float32)).everywhere().tolist() == [1.0, 0.5, 1.0]
    small = table(4)
    moved = weights.remapped({"i002": 0, "i001": 1, "gone": 2}, small)
    assert moved.scores(np.array([2], np.int32), np.ones(1, np.float32)).everywhere().tolist() == [0, 0.5, 0, 0]
    assert moved.scores(np.array([1], np.int32), np.ones(1, np.float32)).everywhere().tolist() == [0, 0, 2.0, 0]


def test_relations_reach_from_history_to_related_items() -> None:
    edges = {"relation_from": np.array([1, 1], np.int32), "relation_to": np.array([3, 4], np.int32)}
    related = replace(table(5), **edges, relation_weight=np.array([1, 0.5], np.float32))
    past = history(activity(("i001", "purchase", 0)), related, CONFIG)
    assert relation_scores(past, related).everywhere().tolist() == [0, 0, 0, 1, 0.5]


def test_relations_add_up_alike_in_whatever_order_items_were_seen() -> None:
    """Two weights that cancel each other, and one that only shows when it is added last."""
    edges = {"relation_from": np.array([1, 2, 3], np.int32), "relation_to": np.array([4, 4, 4], np.int32)}
    related = replace(table(5), **edges, relation_weight=np.array([1e17, -1e17, 1], np.float32))
    for order in ((1, 2, 3), (3, 2, 1), (1, 3, 2)):
        past = history(activity(*((f"i00{row}", "purchase", ago) for ago, row in enumerate(order))), related, SignalConfig(1e30))
        assert past.rows.tolist() == list(order)
        assert relation_scores(past, related).everywhere().tolist() == [0, 0, 0, 0, 1]


def silent(count: int) -> Signals:
    nothing = Scores.none(count)
    return Signals(nothing, nothing, nothing)


def test_candidates_fill_up_with_popular_items_and_leave_out_the_excluded() -> None:
    items = table(400)
    excluded = np.zeros(400, np.bool_)
    excluded[:5] = True
    found = generate(silent(400), history(activity(), items, CONFIG), items, excluded=excluded)
    assert len(found.rows) == CANDIDATE_COUNT == len(set(found.rows.tolist()))
    assert set(found.rows.tolist()) == set(range(5, 5 + CANDIDATE_COUNT))
    assert (found.sources == Source.POPULAR).all()


def test_a_candidate_knows_all_its_sources() -> None:
    items = table(400)
    loud = np.zeros(400, np.float32)
    loud[399] = 1.0
    found = generate(
        Signals(Scores.of_all(loud), Scores.of_all(loud), Scores.none(400)),
        history(activity(("i399", "view", 0)), items, CONFIG),
        items,
        excluded=np.zeros(400, np.bool_),
    )
    sources = Source(int(found.sources[found.rows.tolist().index(399)]))
    assert sources == Source.RECENT | Source.COLLABORATIVE | Source.VECTOR


@settings(max_examples=50)
@given(behaviours, st.booleans(), st.floats(0.1, 100) | st.just(float("nan")))
def test_ranking_features_are_finite_whatever_is_missing(pairs: list[tuple[str, str]], priced: bool, mean: float) -> None:
    items = table()
    if not priced:
        items = replace(items, log_price=np.full(len(items), np.nan, np.float32))
    past = history(activity(*((item, action, k) for k, (item, action) in enumerate(pairs))), items, CONFIG)
    found = generate(silent(len(items)), past, items, excluded=np.zeros(len(items), np.bool_))
    vectors = np.ones((len(items), 3), np.float32)
    matrix = ranking_matrix(found, silent(len(items)), past, table=items, vectors=vectors, profile=Profile(price_mean=mean))
    assert matrix.shape == (len(found.rows), len(RANKING_FEATURES))
    assert matrix.dtype == np.float32
    assert np.isfinite(matrix).all()
