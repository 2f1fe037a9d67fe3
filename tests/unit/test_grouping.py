"""Who is one customer, and with which versions: the arithmetic on links."""

import itertools
import random
from datetime import UTC, datetime, timedelta

from server.ingest.grouping import Member, regroup, roots

START = datetime(2026, 1, 1, tzinfo=UTC)


def member(user_id: str, *, version: int = 1, root: str = "", minutes: int = 0) -> Member:
    return Member(user_id, START + timedelta(minutes=minutes), version, root or user_id)


def test_the_root_is_the_oldest_and_ties_go_to_the_smaller_id() -> None:
    members = [member("c", minutes=0), member("a", minutes=5), member("b", minutes=5), member("x", minutes=1)]
    assert roots(members, [("a", "b"), ("b", "c")]) == {"a": "c", "b": "c", "c": "c", "x": "x"}
    assert roots(members[1:3], [("a", "b")]) == {"a": "a", "b": "a"}


def test_a_long_chain_in_any_order_has_one_root() -> None:
    members = [member(f"u{k:04d}", minutes=k) for k in range(1000)]
    links = list(itertools.pairwise(each.user_id for each in members))
    random.Random(1).shuffle(links)
    assert set(roots(members, links).values()) == {"u0000"}


def test_a_merge_adds_versions_up_in_whatever_order() -> None:
    members = [member("a", version=5), member("b", version=7), member("c", version=1)]
    plan = regroup(members, [("a", "b"), ("b", "c")])
    assert plan.moves == {"b": ("b", "a"), "c": ("c", "a")}
    assert (plan.versions, plan.merged, plan.roots) == ({"a": 5 + 7 + 1 + 2, "b": 8, "c": 2}, ("b", "c"), ("a",))
    step = regroup([member("a", version=13), member("b", version=8, root="a"), member("c", version=1)], [("a", "b"), ("a", "c")])
    assert step.versions == {"a": 15, "c": 2}


def test_customers_that_were_one_before_do_not_add_up_but_stay_above_their_events() -> None:
    members = [member("a", version=9), member("b", version=9)]
    assert regroup(members, [("a", "b")], events=4).versions == {"a": 10, "b": 10}
    assert regroup(members, [("a", "b")], events=30).versions == {"a": 31, "b": 10}


def test_a_new_persona_changes_no_version() -> None:
    plan = regroup([member("a", version=3), member("z", version=0, minutes=9)], [("a", "z")], fresh={"z"})
    assert (plan.moves, plan.versions, plan.merged) == ({"z": ("z", "a")}, {}, ())
    both = regroup([member("y", version=0), member("z", version=0)], [("y", "z")], fresh={"y", "z"})
    assert (both.moves, both.versions, both.merged) == ({"z": ("z", "y")}, {}, ())


def test_a_split_leaves_all_sides_above_what_they_had_together() -> None:
    members = [member("a", version=20), member("b", version=8, root="a"), member("c", version=30, root="a"), member("d", root="a")]
    plan = regroup(members, [("a", "d")])
    assert plan.moves == {"b": ("a", "b"), "c": ("a", "c")}
    assert (plan.versions, plan.merged, plan.roots) == ({"a": 21, "b": 21, "c": 31}, (), ("a", "b", "c"))


def test_links_that_change_nothing_plan_nothing() -> None:
    members = [member("a", version=9), member("b", version=3, root="a"), member("c", version=3, root="a")]
    plan = regroup(members, [("a", "b"), ("b", "c"), ("a", "c")])
    assert (plan.moves, plan.versions, plan.merged, plan.roots) == ({}, {}, (), ("a",))
