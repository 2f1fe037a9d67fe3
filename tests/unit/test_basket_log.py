"""Purchases as columns: what is known at a cut, and which new baskets come next."""

import numpy as np
import pandas as pd
import pytest

from tests.unit.basket_shop import day, frame, log_of, random_frame
from training.basket_log import binary, next_new_baskets, past, purchase_log

ROWS = [("ann", "cup", 1.0), ("ann", "pan", 1.0), ("bob", "cup", 2.0), ("ann", "cup", 5.0), ("ann", "pot", 5.0), ("cid", "mug", 9.0)]


def test_those_known_before_a_cut_are_a_prefix():
    log = log_of(ROWS[::-1])  # in any order
    assert (log.users, log.items) == (("ann", "bob", "cid"), ("pan", "cup", "pot", "mug"))
    early = log.before(day(5))  # strictly
    assert (early.users, early.items, len(early)) == (("ann", "bob"), ("pan", "cup"), 3)
    assert early.titles == ("title pan", "title cup")
    with pytest.raises(ValueError, match="no purchases"):
        log.before(day(1))


def test_a_title_is_the_first_one():
    log = log_of(ROWS[:4], title=["a cup", "a pan", "damaged cups", "thrown away"])
    assert log.titles == ("a cup", "a pan")


def test_pairs_know_their_first_and_last_purchase():
    known = past(log_of(ROWS), day(6))
    assert known.shape == (2, 3)
    assert list(zip(known.user, known.item, strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert known.age[known.first].tolist() == pytest.approx([5, 5, 1, 4])
    assert known.age[known.last].tolist() == pytest.approx([1, 5, 1, 4])
    assert known.matrix().toarray().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert known.decayed(4.0).toarray() == pytest.approx(np.array([[0.5**0.25, 0.5**1.25, 0.5**0.25], [0.5, 0, 0]]))
    assert known.last_baskets().toarray().tolist() == [[1, 0, 1], [1, 0, 0]]


def test_a_place_given_twice_counts_once():
    assert binary(np.array([0, 0], np.int32), np.array([1, 1], np.int32), (1, 2)).toarray().tolist() == [[0, 1]]


def labels_of(rows: list[tuple[str, str, float]], *, cut: float, until: float) -> dict[str, set[str]]:
    log = log_of(rows)
    labels = next_new_baskets(log, past(log, day(cut)), cut=day(cut), until=day(until))
    return {log.users[user]: {log.items[item] for item in labels.wanted[row].indices} for row, user in enumerate(labels.user)}


def test_labels_are_the_new_items_of_the_first_basket_in_the_window():
    shop = [("ann", "cup", 1.0), ("bob", "pan", 1.0), ("bob", "pot", 1.0), ("eve", "jar", 1.0)]
    later = [("ann", "cup", 5.0), ("ann", "pan", 5.0), ("ann", "pot", 6.0), ("ann", "new", 5.0), ("cid", "cup", 5.0), ("bob", "cup", 9.0)]
    assert labels_of(shop + later, cut=5, until=9) == {"ann": {"pan"}}  # neither own, second basket, never sold, newcomer, nor too late
    assert labels_of(shop + later, cut=5, until=9.5) == {"ann": {"pan"}, "bob": {"cup"}}
    assert labels_of(shop + later, cut=5.5, until=9) == {"ann": {"pot"}}
    only_old_first = [("ann", "cup", 5.0), ("ann", "pan", 6.0)]
    assert labels_of(shop + only_old_first, cut=5, until=9) == {}  # the first invoice counts, even when nothing in it is new


def test_labels_are_those_of_a_plain_reading_of_the_protocol():
    table = random_frame()
    log, cut, until = purchase_log(table), pd.Timestamp("2011-02-20"), pd.Timestamp("2011-03-20")
    table = table.sort_values("time", kind="stable")
    before, after = table[table.time < cut], table[(table.time >= cut) & (table.time < until)]
    expected = {}
    for user, rows in after.groupby("user"):
        own = set(before[before.user == user].item)
        new = set(rows[rows.basket == rows.basket.iloc[0]].item) & set(before.item) - own
        if own and new:
            expected[user] = (new, rows.time.iloc[0])
    labels = next_new_baskets(log, past(log, day(50)), cut=day(50), until=day(78))
    found = {
        log.users[user]: ({log.items[item] for item in labels.wanted[row].indices}, pd.Timestamp(labels.time[row], unit="us"))
        for row, user in enumerate(labels.user)
    }
    assert found == expected
    assert len(found) > 10


def test_an_invoice_that_spans_the_cut_is_history_before_and_label_after():
    table = frame([("ann", "cup", 1.0), ("bob", "pan", 1.0), ("bob", "pot", 2.9), ("bob", "cup", 3.1)], basket=["a", "b", "c", "c"])
    log = purchase_log(table)
    labels = next_new_baskets(log, past(log, day(3)), cut=day(3), until=day(9))
    assert labels.wanted.toarray().tolist() == [[1, 0, 0]]
