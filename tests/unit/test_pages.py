"""Pages: one page for all who ask the same of a slate, and another as soon as anything that shows is different."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import pytest

from server.catalog.offers import Offer, OfferTable
from server.domain import ItemFilter, RecommendQuery, Subject
from server.recommend import pages
from server.recommend.pages import Page, Pages
from server.recommend.shelf import Cards, read_page_token
from server.recommend.slate import Slate, SlateFlag
from server.recommend.snapshot import Snapshot
from tests.unit.tables import table

AT = datetime(2026, 5, 1, tzinfo=UTC)
QUERY = RecommendQuery(Subject(user_id="u1"), "web", "home", limit=2)
ROWS = np.array([2, 0, 1], np.int32)
SLATE = Slate("s1", 7, AT, AT, SlateFlag(0), ROWS, np.array([0.75, 0.5, 0.25], np.float32), np.ones(3, np.uint8))


@dataclass
class _Snapshot:
    table: Any
    model_version: str = "m1"
    index_version: int = 3


SNAPSHOT = cast("Snapshot", _Snapshot(table(3)))


def offers(version: int, price: int) -> OfferTable:
    return OfferTable(version, {f"i{k:03d}": Offer(price, "EUR", None, frozenset(), "") for k in range(3)})


PRICES = offers(5, 10)


def asked(of: Pages, *, slate: Slate = SLATE, prices: OfferTable = PRICES, query: RecommendQuery = QUERY, start: int = 0) -> Page:
    return of.of(slate, SNAPSHOT, prices, query, start=start, name=slate.slate_id)


def test_who_asks_the_same_is_given_the_same_page_with_what_was_made_of_it() -> None:
    kept = Pages(Cards(), hide_out_of_stock=True)
    page = asked(kept)
    page.forms["message"] = "made"
    assert [item.item_id for item in page.items] == ["i002", "i000"]
    assert page.versions == (7, "m1", 3, 5)
    assert read_page_token(page.next_page_token) == ("s1", 2)
    other_persona = replace(QUERY, subject=Subject(channel="app", channel_user_id="a1"), log_exposure=False)
    assert asked(kept, query=other_persona) is page
    assert asked(kept, prices=offers(5, 10)) is page


@pytest.mark.parametrize(
    "other",
    [
        {"slate": replace(SLATE, slate_id="s2")},
        {"prices": offers(6, 11)},
        {"query": replace(QUERY, channel="app")},
        {"query": replace(QUERY, filters=ItemFilter(max_price_micros=99, currency="EUR"))},
        {"query": replace(QUERY, limit=1)},
        {"start": 1},
    ],
)
def test_whatever_shows_makes_another_page(other: dict[str, Any]) -> None:
    kept = Pages(Cards(), hide_out_of_stock=True)
    page, second = asked(kept), asked(kept, **other)
    assert second is not page
    assert second.forms is not page.forms
    assert (second.items, second.versions, second.next_page_token) != (page.items, page.versions, page.next_page_token) or "query" in other
    assert asked(kept) is page


def test_a_new_price_is_shown_at_once() -> None:
    kept = Pages(Cards(), hide_out_of_stock=True)
    assert [asked(kept, prices=offers(version, price)).items[0].card.price_micros for version, price in ((5, 10), (6, 11))] == [10, 11]


def test_the_page_shown_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MOST_PAGES", 2)
    kept = Pages(Cards(), hide_out_of_stock=True)
    first, second = asked(kept), asked(kept, start=1)
    assert asked(kept) is first
    asked(kept, start=2)
    assert asked(kept) is first
    assert asked(kept, start=1) is not second
