"""Facets count what a channel shows, each regardless of its own filter."""

from dataclasses import replace

import numpy as np
import pytest

from server.catalog.offers import Offer, OfferTable
from server.domain import EVERYTHING, Facets, ItemFilter, PriceRange
from server.recommend.shelf import RankedItems, Shelf
from server.search.facets import count_facets, price_range
from tests.unit.tables import table

EURO = 1_000_000
PRICES = (1, 5, 12, 19, 20, 60)  # euros; the last item is priced in dollars, and one has no offer at all


def counted(filters: ItemFilter = EVERYTHING, *, channel: str = "web", hide: bool = True, stock: int | None = None) -> Facets:
    items = replace(table(7), category_names=("A", "A", "A", "B", "B", "", "C"), brand_names=("x", "y", "x", "x", "y", "y", "z"))
    offers = {
        f"i{k:03d}": Offer(price * EURO, "USD" if k == 5 else "EUR", stock if k == 0 else None, frozenset({"store"} if k == 4 else ()), "")
        for k, price in enumerate(PRICES)
    }
    rows = np.arange(7, dtype=np.int32)
    ranked = RankedItems(items, rows, np.zeros(7, np.float32), np.zeros(7, np.uint8))
    return count_facets(ranked, OfferTable(1, offers), Shelf(channel, filters, hide))


def prices(*ranges: tuple[str, int, int, int]) -> tuple[PriceRange, ...]:
    return tuple(PriceRange(currency, low * EURO, high * EURO - 1, items) for currency, low, high, items in ranges)


def test_what_is_there_is_counted_without_names_for_what_has_none() -> None:
    found = counted()
    assert found.total == 5  # not sold in this channel, and without an offer
    assert found.categories == (("A", 3), ("B", 1))
    assert found.brands == (("x", 3), ("y", 2))
    assert found.price_ranges == prices(("EUR", 1, 2, 1), ("EUR", 5, 10, 1), ("EUR", 10, 20, 2), ("USD", 50, 100, 1))


def test_each_facet_ignores_its_own_filter_and_no_other() -> None:
    found = counted(ItemFilter(categories=frozenset({"A"}), brands=frozenset({"x"})))
    assert found.total == 2
    assert found.categories == (("A", 2), ("B", 1))
    assert found.brands == (("x", 2), ("y", 1))
    assert found.price_ranges == prices(("EUR", 1, 2, 1), ("EUR", 10, 20, 1))
    bounded = counted(ItemFilter(min_price_micros=10 * EURO, currency="EUR"))
    assert (bounded.total, bounded.categories) == (2, (("A", 1), ("B", 1)))
    assert bounded.price_ranges == counted().price_ranges


def test_what_the_channel_may_not_show_is_not_counted() -> None:
    assert counted(channel="store").total == 6
    assert counted(stock=0).total == 4
    assert counted(stock=0, hide=False).total == 5
    assert counted(ItemFilter(in_stock_only=True), stock=0, hide=False).total == 4
    assert counted(ItemFilter(exclude_item_ids=frozenset({"i001"}))).total == 4


@pytest.mark.parametrize(
    ("micros", "bounds"),
    [
        (0, (0, 0)),
        (1, (1, 1)),
        (1_990_000, (1_000_000, 1_999_999)),
        (2_000_000, (2_000_000, 4_999_999)),
        (9_999_999, (5_000_000, 9_999_999)),
        (10_000_000, (10_000_000, 19_999_999)),
        (9_000_000_000_000_000_000, (5_000_000_000_000_000_000, 9_999_999_999_999_999_999)),
    ],
)
def test_a_price_is_within_its_range(micros: int, bounds: tuple[int, int]) -> None:
    assert price_range(micros) == bounds
    assert bounds[0] <= micros <= bounds[1]
