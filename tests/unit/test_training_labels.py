"""Labels are what came next, and know nothing of it."""

import numpy as np
import pytest

from tests.unit.training_shop import DAY, START, chain_log, event_log
from training.config import TrainConfig
from training.dataset import Split, TrainingDataError, split_of
from training.events import from_micros, to_micros
from training.labels import all_labels, choose_labels, folds, holdout_labels, visit_labels


def test_a_label_is_a_visit_and_its_time_the_first_event_of_it() -> None:
    log = event_log([("a", "purchase", 1, 0, 0), ("a", "view", 3, 5, 1), ("a", "purchase", 2, 5.1, 1), ("a", "purchase", 1, 5.2, 1)])
    (label,) = visit_labels(log, ("purchase",), start=START, end=START + 10 * DAY)
    assert (label.user_id, label.time, label.items, label.bought) == ("a", START + 5 * DAY, (2,), frozenset({1}))


def test_a_first_visit_and_a_visit_outside_the_period_are_no_labels() -> None:
    log = event_log([("a", "purchase", 1, 0, 0), ("a", "purchase", 2, 5, 1), ("a", "purchase", 3, 9, 2), ("b", "purchase", 1, 6, 0)])
    labels = visit_labels(log, ("purchase",), start=START + 4 * DAY, end=START + 9 * DAY)
    assert [(label.user_id, label.items) for label in labels] == [("a", (2,))]


def test_targets_after_the_end_of_the_period_do_not_count() -> None:
    log = event_log([("a", "view", 0, 0, 0), ("a", "purchase", 1, 5, 1), ("a", "purchase", 2, 7, 1)])
    (label,) = visit_labels(log, ("purchase",), start=START, end=START + 6 * DAY)
    assert label.items == (1,)


def test_no_label_contains_what_was_bought_before_it() -> None:
    log = chain_log(customers=20, items=4, visits=9)  # more visits than items: repeated purchases
    labels = visit_labels(log, ("purchase", "view"), start=START, end=START + 99 * DAY)
    assert labels
    for label in labels:
        mine = (log.user == log.users.index(label.user_id)) & (log.action == 5)
        assert label.bought == frozenset(log.item[mine & (log.time < label.time)].tolist())
        assert not label.bought & set(label.items)


def test_holdout_is_the_first_purchase_visit_after_the_cut_ranked_at_the_cut() -> None:
    log = event_log(
        [
            ("a", "purchase", 1, 0, 0),
            ("a", "view", 2, 6, 1),
            ("a", "purchase", 1, 7, 2),
            ("a", "purchase", 3, 7, 2),
            ("a", "purchase", 4, 8, 3),
            ("new", "purchase", 2, 7, 0),
            ("gone", "purchase", 2, 1, 0),
        ]
    )
    (label,) = holdout_labels(log, ("purchase",), cut=START + 5 * DAY)
    assert (label.user_id, label.time, label.items, label.bought) == ("a", START + 5 * DAY, (3,), frozenset({1}))


def test_the_periods_of_a_split_follow_each_other() -> None:
    log = chain_log()
    split = split_of(log, TrainConfig(holdout_fraction=0.2, ranker_fraction=0.25))
    assert split.begin < split.ranker_start < split.cut < split.end
    assert (split.cut - split.begin) / (split.end - split.begin) == pytest.approx(0.8)
    assert (split.cut - split.ranker_start) / (split.cut - split.begin) == pytest.approx(0.25)


def test_a_cut_outside_the_log_is_refused() -> None:
    with pytest.raises(TrainingDataError, match="1999"):
        split_of(chain_log(), TrainConfig(cut="1999-01-01"))


def test_every_kind_of_label_comes_from_its_own_period() -> None:
    log = chain_log()
    config = TrainConfig(holdout_fraction=0.2, ranker_fraction=0.25)
    split = split_of(log, config)
    labels = choose_labels(log, split, config)
    assert labels.tower
    assert labels.ranker
    assert labels.holdout
    assert all(split.begin <= label.time < split.ranker_start for label in labels.tower)
    assert all(split.ranker_start <= label.time < split.cut for label in [*labels.ranker, *labels.validation])
    assert all(label.time == split.cut for label in labels.holdout)


def test_too_few_events_are_refused_with_the_numbers() -> None:
    log = event_log([("a", "purchase", 1, 0, 0), ("a", "view", 1, 9, 1)])
    with pytest.raises(TrainingDataError, match="0 visits to train the tower on"):
        choose_labels(log, Split(START, START + 4 * DAY, START + 8 * DAY, START + 10 * DAY), TrainConfig())


def test_times_are_exact_to_the_microsecond() -> None:
    from datetime import UTC, datetime

    moment = datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
    assert to_micros(moment) == 1_767_323_045_678_901
    assert to_micros(moment.replace(tzinfo=None)) == to_micros(moment)
    assert np.int64(to_micros(moment)) == to_micros(moment)


def test_visits_that_begin_at_one_time_do_not_know_of_each_other() -> None:
    log = event_log([("a", "purchase", 1, 0, 0), ("a", "purchase", 2, 5, 1), ("a", "purchase", 3, 5, 2), ("b", "purchase", 1, 5, 0)])
    labels = visit_labels(log, ("purchase",), start=START, end=START + 10 * DAY)
    assert [(label.items, label.bought) for label in labels] == [((2,), frozenset({1})), ((3,), frozenset({1}))]


def test_what_was_taken_on_a_visit_is_known_until_the_period_ends() -> None:
    events = [("a", "view", 0, 0, 0), ("a", "view", 5, 5, 1), ("a", "add_to_cart", 1, 5.1, 1), ("a", "purchase", 2, 5.2, 1)]
    log = event_log([*events, ("a", "wishlist", 3, 7, 1)])
    (label,) = visit_labels(log, ("purchase",), start=START, end=START + 6 * DAY)
    assert (label.items, label.taken) == ((2,), frozenset({1, 2}))


def test_a_split_by_sessions_holds_out_each_customers_last_visit() -> None:
    visits = [("a", "purchase", k, 10 * k, k) for k in range(4)] + [("b", "purchase", 0, 1, 0), ("b", "purchase", 5, 35, 1)]
    log = event_log([*visits, ("c", "purchase", 0, 2, 0)])
    config = TrainConfig(split="session")
    split = split_of(log, config)
    tower, ranker, holdout = all_labels(log, split, config)
    assert [(label.user_id, label.items) for label in holdout] == [("a", (3,)), ("b", (5,))]
    assert [(label.user_id, label.items) for label in ranker] == [("a", (2,))]
    assert [(label.user_id, label.items) for label in tower] == [("a", (1,))]
    for label in [*tower, *ranker, *holdout]:
        mine = (log.user == log.users.index(label.user_id)) & (log.time == label.time)
        assert label.time == log.time[mine][0]  # each at its own time, not at a common cut


def test_no_visit_of_a_split_by_sessions_has_two_uses_and_the_order_is_kept() -> None:
    log, config = chain_log(), TrainConfig(split="session", tower_actions="purchase,view")
    tower, ranker, holdout = all_labels(log, split_of(log, config), config)
    keys = [{(label.user_id, label.time) for label in labels} for labels in (tower, ranker, holdout)]
    assert all(keys)
    assert not keys[0] & keys[1]
    assert not keys[2] & (keys[0] | keys[1])
    last = {label.user_id: label.time for label in holdout}
    before = {label.user_id: label.time for label in ranker}
    assert all(label.time < before[label.user_id] < last[label.user_id] for label in tower if label.user_id in before)


def test_a_split_by_sessions_ends_at_the_cut() -> None:
    log = event_log([("a", "purchase", k, 10 * k, k) for k in range(4)])
    config = TrainConfig(split="session").with_cut(from_micros(START + 25 * DAY))
    tower, ranker, holdout = all_labels(log, split_of(log, config), config)
    assert [label.items for label in holdout] == [(2,)]
    assert [label.items for label in ranker] == [(1,)]
    assert list(tower) == []
    with pytest.raises(ValueError, match="split"):
        TrainConfig(split="halves")


def test_folds_cut_by_time_and_know_nothing_of_their_own_labels() -> None:
    log = chain_log()
    labels = visit_labels(log, ("purchase",), start=START, end=START + 99 * DAY)
    parts = folds(labels, 3)
    assert [label for _, part in parts for label in part] == sorted(labels, key=lambda label: label.time)
    assert all(until == min(label.time for label in part) for until, part in parts)
    assert max(map(len, (part for _, part in parts))) - min(map(len, (part for _, part in parts))) <= 1
    assert folds([], 3) == []
    assert len(folds(labels[:2], 5)) == 2
