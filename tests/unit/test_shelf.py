"""Shelves: currency and brand filters, live stock, and page tokens that cannot reach outside a slate."""

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.candidates import Source
from server.catalog.offers import Offer, OfferTable
from server.domain import ItemFilter, ShownItem
from server.errors import InvalidRequestError
from server.recommend.shelf import RankedItems, Shelf, page_token, read_page_token
from tests.unit.tables import table

EVERYTHING = ItemFilter()


def stocked(*offers: Offer) -> OfferTable:
    return OfferTable(3, {f"i{k:03d}": offer for k, offer in enumerate(offers)})


def ranked(count: int) -> RankedItems:
    """Best first is the last row first."""
    rows = np.arange(count - 1, -1, -1, dtype=np.int32)
    return RankedItems(table(count), rows, np.linspace(1, 0, count).astype(np.float32), np.full(count, int(Source.VECTOR), np.uint8))


def show(offers: OfferTable, wanted: ItemFilter = EVERYTHING, *, hide: bool = True, channel: str = "web") -> list[ShownItem]:
    items, rest = Shelf(channel, wanted, hide_out_of_stock=hide).page(ranked(len(offers.offers)), offers, start=0, limit=99)
    assert rest is None
    return items


def offer(price: int | None = 1, currency: str = "EUR", stock: int | None = None, *channels: str) -> Offer:
    return Offer(price, currency, stock, frozenset(channels), "pic")


def test_an_item_carries_its_place_in_the_slate_and_the_live_offer() -> None:
    last, first = show(stocked(offer(7), offer(9, "USD", 2)))[::-1]
    assert (first.item_id, first.card.title, first.card.category, first.card.brand) == ("i001", "title i001", "c2", "brand")
    assert (first.position, first.score, first.sources, first.newcomer) == (0, 1.0, Source.VECTOR, False)
    assert (first.card.price_micros, first.card.currency, first.card.in_stock, first.card.image_ref) == (9, "USD", True, "pic")
    assert (last.item_id, last.position) == ("i000", 1)


def test_prices_in_another_currency_do_not_pass_bounds() -> None:
    offers = stocked(offer(5, "EUR"), offer(5, "USD"), offer(50, "EUR"))
    wanted = ItemFilter(min_price_micros=1, max_price_micros=10, currency="EUR")
    assert [item.item_id for item in show(offers, wanted)] == ["i000"]


def test_bounds_are_inclusive_and_zero_is_a_bound() -> None:
    offers = stocked(offer(0), offer(5), offer(6))
    assert [item.item_id for item in show(offers, ItemFilter(max_price_micros=5))] == ["i001", "i000"]
    assert [item.item_id for item in show(offers, ItemFilter(min_price_micros=5))] == ["i002", "i001"]
    assert [item.item_id for item in show(offers, ItemFilter(max_price_micros=0))] == ["i000"]


@pytest.mark.parametrize(("hide", "only", "expected"), [(True, False, 2), (False, True, 2), (False, False, 3), (True, True, 2)])
def test_the_shop_or_the_caller_may_hide_what_is_out_of_stock(hide: bool, only: bool, expected: int) -> None:
    offers = stocked(offer(1, "EUR", 0), offer(1, "EUR", 1), offer(1, "EUR", None))
    assert len(show(offers, ItemFilter(in_stock_only=only), hide=hide)) == expected


def test_brands_filter_and_an_unknown_one_leaves_nothing() -> None:
    offers = stocked(offer(), offer())
    assert len(show(offers, ItemFilter(brands=frozenset({"brand"})))) == 2
    assert show(offers, ItemFilter(brands=frozenset({"other"}))) == []


def test_an_item_without_an_offer_is_not_shown() -> None:
    shelf = Shelf("web", ItemFilter(), hide_out_of_stock=True)
    items, _ = shelf.page(ranked(3), stocked(offer(), offer()), start=0, limit=9)
    assert [item.item_id for item in items] == ["i001", "i000"]


def test_a_page_that_ends_with_the_last_item_has_no_next() -> None:
    shelf = Shelf("web", ItemFilter(), hide_out_of_stock=True)
    offers = stocked(offer(), offer(), offer())
    assert [shelf.page(ranked(3), offers, start=0, limit=limit)[1] for limit in (1, 2, 3, 4)] == [1, 2, None, None]
    assert shelf.page(ranked(3), offers, start=3, limit=1) == ([], None)
    assert shelf.page(ranked(3), offers, start=10**30, limit=1) == ([], None)


@given(st.text("0123456789abcdef", min_size=32, max_size=32), st.integers(0, 256))
def test_every_page_token_comes_back(slate_id: str, position: int) -> None:
    assert read_page_token(page_token(slate_id, position)) == (slate_id, position)


@pytest.mark.parametrize("inside", ["s:-1", "s:+1", "s: 1", "s:1_0", "s:01", "s:١", "s", "s:", "s:1:2", "s:1.0"])
def test_a_token_this_service_never_wrote_is_refused(inside: str) -> None:
    """A negative position would show the end of the slate before its beginning."""
    with pytest.raises(InvalidRequestError) as caught:
        read_page_token(base64.urlsafe_b64encode(inside.encode()).decode().rstrip("="))
    assert (caught.value.field, caught.value.reason) == ("page_token", "INVALID_TOKEN")


@given(st.text(max_size=40) | st.binary(max_size=40).map(lambda raw: base64.urlsafe_b64encode(raw).decode().rstrip("=")))
def test_garbage_is_never_anything_but_refused_or_read(token: str) -> None:
    try:
        slate_id, position = read_page_token(token)
    except InvalidRequestError:
        return
    assert page_token(slate_id, position) == token
