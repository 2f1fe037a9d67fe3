"""Diversity as the rule says it: the best candidate that keeps the rule, never one more or less than there is to show."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.signals import SignalConfig, history
from server.recommend.policy import Ordered, already_bought, diversify
from tests.unit.tables import activity, table


def diverse(codes: list[int], order: list[int], *, size: int, most: int) -> Ordered:
    """Candidates are the items back to front, so that a candidate's position is not its row."""
    items = replace(table(len(codes)), categories=np.array(codes[::-1], np.int32))
    rows = np.arange(len(codes), dtype=np.int32)[::-1]
    return diversify(rows, np.array(order, np.int64), items, size=size, max_per_category=most)


_CODES = st.lists(st.integers(0, 4), min_size=1, max_size=50)


@given(_CODES, st.randoms(use_true_random=False), st.integers(0, 60), st.integers(1, 10))
def test_the_best_that_keeps_the_rule_comes_next(codes: list[int], dice: object, size: int, most: int) -> None:
    order = list(range(len(codes)))
    dice.shuffle(order)  # type: ignore[attr-defined]
    waiting, expected = order.copy(), list[int]()
    while waiting and len(expected) < size:
        window = [codes[k] for k in expected[-9:]]
        keeping = [k for k in waiting if codes[k] == 0 or window.count(codes[k]) < most]
        expected.append((keeping or waiting)[0])
        waiting.remove(expected[-1])
    assert diverse(codes, order, size=size, most=most).positions.tolist() == expected


@given(st.permutations(list(range(40))), st.integers(1, 40))
def test_nothing_moves_where_nothing_breaks_the_rule(order: list[int], size: int) -> None:
    final = diverse([0] * 40, order, size=size, most=1)
    assert (final.positions.tolist(), final.moved_count) == (order[:size], 0)


def test_among_enough_categories_no_ten_places_break_the_rule() -> None:
    codes = [1 + k // 12 for k in range(60)]  # twelve of each of five, all of one first
    final = diverse(codes, list(range(60)), size=60, most=2).positions.tolist()
    for start in range(50):
        window = [codes[k] for k in final[start : start + 10]]
        assert max(window.count(code) for code in set(window)) <= 2


def test_what_was_moved_is_counted() -> None:
    final = diverse([1, 1, 1, 2, 2], [0, 1, 2, 3, 4], size=5, most=2)
    assert final.positions.tolist() == [0, 1, 3, 4, 2]
    assert final.moved_count == 1


def test_no_candidates_give_no_places() -> None:
    assert diversify(np.zeros(0, np.int32), np.zeros(0, np.int64), table(0), size=9, max_per_category=2).positions.tolist() == []


def test_only_what_was_bought_is_left_out() -> None:
    seen = activity(("i001", "purchase", 0), ("i002", "view", 0), purchased=(("i001", 20_000), ("i005", 1), ("gone", 1)))
    mask = already_bought(history(seen, table(8), SignalConfig()), 8)
    assert np.flatnonzero(mask).tolist() == [1, 5]
