"""Pages of slates as they are shown, kept while they are asked for again: each channel shows a customer the same one."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from server.catalog.offers import OfferTable
from server.domain import RecommendQuery, ShownItem, Versions
from server.recommend.shelf import Cards, RankedItems, Shelf, page_token
from server.recommend.slate import Slate, SlateFlag
from server.recommend.snapshot import Snapshot

# Some 6 KB each with 20 items, their message and their row.
_MOST_PAGES = 4_096


@dataclass(frozen=True)
class Page:
    """What an answer shows of a slate; ``forms`` as in Answer."""

    items: tuple[ShownItem, ...]
    versions: Versions
    next_page_token: str
    forms: dict[str, Any] = field(default_factory=dict)


class Pages:
    """Pages by slate, prices and what was asked for; the least recently shown are forgotten.

    Equal slate ids mean the same customer, versions and ranking, and equal offer versions the same prices, so no page can be out of
    date: it took 60 µs to make one of 20 items, its message and its row for every answer.
    """

    def __init__(self, cards: Cards, *, hide_out_of_stock: bool) -> None:
        self._cards = cards
        self._hide_out_of_stock = hide_out_of_stock
        self._pages: OrderedDict[tuple[Any, ...], Page] = OrderedDict()

    def of(self, slate: Slate, snapshot: Snapshot, offers: OfferTable, query: RecommendQuery, *, start: int, name: str) -> Page:
        """Returns the page that begins at ``start``; ``name`` is what its page token calls the slate."""
        key = (slate.slate_id, offers.offer_version, query.channel, query.filters, start, query.limit)
        page = self._pages.get(key)
        if page is not None:
            self._pages.move_to_end(key)
            return page
        ranked = RankedItems(snapshot.table, slate.rows, slate.scores, slate.sources, SlateFlag.NEWCOMER in slate.flags)
        shelf = Shelf(query.channel, query.filters, self._hide_out_of_stock, self._cards)
        items, rest = shelf.page(ranked, offers, start=start, limit=query.limit)
        page = self._pages[key] = Page(
            items=tuple(items),
            versions=Versions(slate.user_version, snapshot.model_version, snapshot.index_version, offers.offer_version),
            next_page_token="" if rest is None else page_token(name, rest),
        )
        if len(self._pages) > _MOST_PAGES:
            self._pages.popitem(last=False)
        return page
