"""Slates: policy, bytes, shelf, and that computing one gives the same bits whoever computes it, however often."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.candidates import Source
from features.ranking import Profile
from features.signals import CollaborativeWeights, SignalConfig
from server.catalog.offers import Offer, OfferTable
from server.domain import ItemFilter
from server.errors import InvalidRequestError
from server.recommend.compute import Policy, compute_slate, score_items
from server.recommend.policy import diversify
from server.recommend.shelf import RankedItems, Shelf, page_token, read_page_token
from server.recommend.slate import Place, SlateFlag, decode_slate, encode_payload
from server.recommend.snapshot import Snapshot
from tests.unit.tables import activity, table

NOW = datetime(2026, 3, 1, 12, 30, 15, 123456, UTC)
POLICY = Policy(slate_size=30, exclude_purchased=True, max_per_category=3)


def snapshot(count: int = 300) -> Snapshot:
    """A snapshot whose model is plain arithmetic: real enough to rank, with no graph behind it."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((count, 8)).astype(np.float32)
    mixer = rng.standard_normal(23).astype(np.float32)
    model = SimpleNamespace(
        signals=SignalConfig(),
        user_vector=lambda seen, *_: vectors[len(seen.behaviours)] if seen.behaviours else None,
        rank=lambda matrix: np.einsum("cf,f->c", matrix, mixer),
    )
    return Snapshot(cast("Any", model), table(count), vectors, CollaborativeWeights.empty(count))


CUSTOMER = activity(("i003", "view", 0), ("i007", "add_to_cart", 1), ("i010", "purchase", 2), purchased=(("i010", 19_998),))


def test_a_slate_is_the_same_bits_from_any_thread_any_time() -> None:
    shot = snapshot()
    first = compute_slate(shot, CUSTOMER, Profile(), POLICY)
    with ThreadPoolExecutor(8) as pool:
        others = list(pool.map(lambda _: compute_slate(shot, CUSTOMER, Profile(), POLICY), range(50)))
    assert len(first.rows) == POLICY.slate_size
    for other in others:
        assert other.rows.tobytes() == first.rows.tobytes()
        assert other.scores.tobytes() == first.scores.tobytes()


def test_what_was_bought_is_left_out_unless_the_shop_wants_it() -> None:
    shot, bought = snapshot(60), 10
    assert bought not in compute_slate(shot, CUSTOMER, Profile(), replace(POLICY, slate_size=60)).rows
    assert bought in compute_slate(shot, CUSTOMER, Profile(), replace(POLICY, slate_size=60, exclude_purchased=False)).rows


def test_given_items_get_the_scores_the_slate_gave_them() -> None:
    shot = snapshot()
    slate = compute_slate(shot, CUSTOMER, Profile(), POLICY)
    ranked = score_items(shot, CUSTOMER, Profile(), np.sort(slate.rows))
    of_slate = dict(zip(slate.rows.tolist(), slate.scores.tolist(), strict=True))
    assert [of_slate[row] for row in ranked.rows.tolist()] == ranked.scores.tolist()
    assert ranked.scores.tolist() == sorted(of_slate.values(), reverse=True)


def test_without_a_model_popularity_orders_and_it_is_said() -> None:
    shot = replace(snapshot(), model=None)
    slate = compute_slate(shot, activity(), Profile(), replace(POLICY, max_per_category=99))
    assert slate.rows.tolist() == list(range(30))
    assert slate.flags == SlateFlag.NO_MODEL | SlateFlag.NEWCOMER


def test_an_empty_catalogue_gives_an_empty_slate() -> None:
    shot = replace(snapshot(0), model=None)
    assert len(compute_slate(shot, CUSTOMER, Profile(), POLICY).rows) == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 60))
def test_diversity_keeps_its_rule_where_it_can(codes: list[int], most: int, size: int) -> None:
    items = replace(table(len(codes)), categories=np.array(codes, np.int32))
    order = np.arange(len(codes))
    final = diversify(np.arange(len(codes), dtype=np.int32), order, items, size=size, max_per_category=most).positions.tolist()
    assert len(final) == len(set(final)) == min(size, len(codes))
    left = set(range(len(codes))) - set(final)
    for place, position in enumerate(final):
        window = [codes[other] for other in final[max(0, place - 9) : place]]
        if codes[position] and window.count(codes[position]) >= most:  # broken only when nothing else was left
            waiting = left | set(final[place:])
            assert all(codes[other] and window.count(codes[other]) >= most for other in waiting)
    if most >= 10:
        assert final == order.tolist()[:size]


@given(st.integers(0, 256), st.integers(0, 2**40), st.sampled_from(list(SlateFlag)))
def test_slates_survive_their_bytes(count: int, version: int, flag: SlateFlag) -> None:
    rng = np.random.default_rng(count)
    rows, scores = rng.integers(0, 9999, count).astype(np.int32), rng.standard_normal(count).astype(np.float32)
    sources = rng.integers(0, 63, count).astype(np.uint8)
    payload = encode_payload(rows, scores, sources, flags=flag, as_of=NOW)
    standing = f"{version}:{int((NOW + timedelta(minutes=15)).timestamp() * 1000)}:".encode() + payload
    slate = decode_slate(standing, "u", "slot")
    assert slate is not None
    assert (slate.user_version, slate.as_of, slate.flags) == (version, NOW, flag)
    assert (slate.rows.tolist(), slate.scores.tobytes(), slate.sources.tolist()) == (rows.tolist(), scores.tobytes(), sources.tolist())
    again = decode_slate(standing, "u", "slot")
    assert again is not None
    assert again.slate_id == slate.slate_id
    other = decode_slate(standing, "v", "slot")
    assert other is not None
    assert other.slate_id != slate.slate_id


@pytest.mark.parametrize("damaged", [b"1:2:", b"1:2:\x02" + bytes(20), b"1:2:" + bytes([1, 0, 9, 0]) + bytes(8)])
def test_bytes_of_another_layout_are_no_slate(damaged: bytes) -> None:
    assert decode_slate(damaged, "u", "slot") is None


def test_slots_tell_contexts_and_versions_apart() -> None:
    slots = {
        Place("home").slot("m1", 1),
        Place("home").slot("m2", 1),
        Place("home").slot("m1", 2),
        Place("product", ("a", "b")).slot("m1", 1),
        Place("product", ("b", "a")).slot("m1", 1),
        Place("product", ("ab",)).slot("m1", 1),
    }
    assert len(slots) == 6


def offers(count: int, **changes: Offer) -> OfferTable:
    everyone = {f"i{k:03d}": Offer(k * 1_000_000 + 1_000_000, "EUR", None, frozenset(), "") for k in range(count)}
    return OfferTable(7, everyone | changes)


def ranked(count: int) -> RankedItems:
    rows = np.random.default_rng(1).permutation(count).astype(np.int32)
    return RankedItems(table(count), rows, np.linspace(1, 0, count).astype(np.float32), np.full(count, int(Source.POPULAR), np.uint8))


@given(
    st.sets(st.sampled_from(["c1", "c2", "c3", "c4"])),
    st.none() | st.integers(0, 30),
    st.none() | st.integers(0, 30),
    st.sets(st.integers(0, 39).map(lambda k: f"i{k:03d}"), max_size=10),
)
def test_filters_only_remove_and_never_reorder(categories: set[str], low: int | None, high: int | None, excluded: set[str]) -> None:
    wanted = ItemFilter(
        categories=frozenset(categories),
        min_price_micros=None if low is None else low * 1_000_000,
        max_price_micros=None if high is None else high * 1_000_000,
        exclude_item_ids=frozenset(excluded),
    )
    whole, _ = Shelf("web", ItemFilter(), hide_out_of_stock=True).page(ranked(40), offers(40), start=0, limit=100)
    kept, _ = Shelf("web", wanted, hide_out_of_stock=True).page(ranked(40), offers(40), start=0, limit=100)
    assert [item for item in whole if item in kept] == kept
    for item in whole:
        price = item.card.price_micros or 0
        passes = (
            (not categories or item.card.category in categories)
            and (low is None or price >= low * 1_000_000)
            and (high is None or price <= high * 1_000_000)
            and item.item_id not in excluded
        )
        assert (item in kept) == passes


def test_a_channel_shows_only_what_it_sells_and_what_can_be_had() -> None:
    table_ = offers(
        6,
        i000=Offer(1, "EUR", 0, frozenset(), ""),
        i001=Offer(1, "EUR", 5, frozenset({"store"}), ""),
        i002=Offer(None, "EUR", 5, frozenset(), ""),
    )
    shown = {item.item_id for item in Shelf("web", ItemFilter(), hide_out_of_stock=True).page(ranked(6), table_, start=0, limit=9)[0]}
    assert shown == {"i003", "i004", "i005"}
    flagged, _ = Shelf("store", ItemFilter(), hide_out_of_stock=False).page(ranked(6), table_, start=0, limit=9)
    assert {item.item_id: item.card.in_stock for item in flagged}["i000"] is False
    assert "i001" in {item.item_id for item in flagged}


def test_pages_join_without_gap_or_overlap() -> None:
    shelf, everything = Shelf("web", ItemFilter(), hide_out_of_stock=True), ranked(23)
    whole, end = shelf.page(everything, offers(23), start=0, limit=100)
    assert end is None
    joined, start = [], 0
    while start is not None:
        part, start = shelf.page(everything, offers(23), start=start, limit=5)
        joined += part
    assert joined == whole


def test_page_tokens_are_read_back_and_others_refused() -> None:
    assert read_page_token(page_token("abc", 17)) == ("abc", 17)
    for wrong in ("?", "eHg", "", "YTpi"):
        with pytest.raises(InvalidRequestError):
            read_page_token(wrong)
