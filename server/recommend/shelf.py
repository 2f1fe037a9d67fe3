"""From a slate to what one channel shows: eligibility, filters, live offers and paging. Only ever removes, never reorders."""

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass

import numpy.typing as npt
from numpy import uint8

from features.candidates import Source
from features.item_table import FloatArray, IntArray, ItemTable
from server.catalog.offers import Offer, OfferTable
from server.domain import ItemFilter, ShownItem
from server.errors import InvalidRequestError


@dataclass(frozen=True)
class RankedItems:
    """Ranked rows of an item table, best first, with score and sources of each."""

    table: ItemTable
    rows: IntArray
    scores: FloatArray
    sources: npt.NDArray[uint8]
    newcomer: bool = False


@dataclass(frozen=True)
class Shelf:
    """What a channel may show of ranked items.

    Attributes:
        channel: where it is shown.
        filters: what the caller asked for.
        hide_out_of_stock: the shop's rule.
    """

    channel: str
    filters: ItemFilter
    hide_out_of_stock: bool

    def page(self, ranked: RankedItems, offers: OfferTable, *, start: int, limit: int) -> tuple[list[ShownItem], int | None]:
        """Returns up to ``limit`` items from position ``start`` on, and the position to go on from (None at the end)."""
        shown: list[ShownItem] = []
        for position, row, offer in self._eligible(ranked, offers, start):
            if len(shown) == limit:
                return shown, position
            shown.append(_shown(ranked, position, row, offer))
        return shown, None

    def _eligible(self, ranked: RankedItems, offers: OfferTable, start: int) -> Iterator[tuple[int, int, Offer]]:
        for position in range(start, len(ranked.rows)):
            row = int(ranked.rows[position])
            offer = offers.offers.get(ranked.table.ids[row])
            if offer is not None and self._admits(ranked.table, row, offer):
                yield position, row, offer

    def _admits(self, table: ItemTable, row: int, offer: Offer) -> bool:
        wanted, price = self.filters, offer.price_micros or 0
        return (
            offer.sold_in(self.channel)
            and (offer.in_stock or not (self.hide_out_of_stock or wanted.in_stock_only))
            and (not wanted.currency or offer.currency == wanted.currency)
            and (not wanted.categories or table.category_names[row] in wanted.categories)
            and (not wanted.brands or table.brand_names[row] in wanted.brands)
            and (wanted.min_price_micros is None or price >= wanted.min_price_micros)
            and (wanted.max_price_micros is None or price <= wanted.max_price_micros)
            and table.ids[row] not in wanted.exclude_item_ids
        )


def _shown(ranked: RankedItems, position: int, row: int, offer: Offer) -> ShownItem:
    table = ranked.table
    return ShownItem(
        item_id=table.ids[row],
        title=table.titles[row],
        category=table.category_names[row],
        brand=table.brand_names[row],
        image_ref=offer.image_ref,
        score=float(ranked.scores[position]),
        position=position,
        price_micros=offer.price_micros,
        currency=offer.currency,
        in_stock=offer.in_stock,
        sources=Source(int(ranked.sources[position])),
        newcomer=ranked.newcomer,
    )


def page_token(slate_id: str, position: int) -> str:
    """Returns a token that goes on from ``position`` of this very slate."""
    return base64.urlsafe_b64encode(f"{slate_id}:{position}".encode()).decode().rstrip("=")


def read_page_token(token: str) -> tuple[str, int]:
    """Returns slate id and position.

    Raises:
        InvalidRequestError: the text is not a page token.
    """
    try:
        slate_id, text = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode().split(":")
        position = int(text)
    except (ValueError, binascii.Error):
        slate_id, position = "", -1
    # A position below zero would count from the end of the slate, and show its last items first.
    if position < 0 or page_token(slate_id, position) != token:
        raise page_token_refused()
    return slate_id, position


def page_token_refused() -> InvalidRequestError:
    """Returns the error for a text that this service has not returned as a page token."""
    return InvalidRequestError("page_token", "must be a token returned by this service, unchanged", reason="INVALID_TOKEN")
