"""From a slate to what one channel shows: eligibility, filters, live offers and paging. Only ever removes, never reorders."""

import base64
import binascii
from dataclasses import dataclass, field

import numpy.typing as npt
from numpy import uint8

from features.candidates import Source
from features.item_table import FloatArray, IntArray, ItemTable
from server.catalog.offers import Offer, OfferTable
from server.domain import EVERYTHING, ItemCard, ItemFilter, ShownItem
from server.errors import InvalidRequestError

# All sets of sources a byte can hold: making one takes longer than all else about an item.
_SOURCES = tuple(Source(bits) for bits in range(256))
# Epochs whose cards are kept: that which answers, and the one before or after it during a change.
_EPOCHS = 2


@dataclass(frozen=True)
class RankedItems:
    """Ranked rows of an item table, best first, with score and sources of each."""

    table: ItemTable
    rows: IntArray
    scores: FloatArray
    sources: npt.NDArray[uint8]
    newcomer: bool = False


class Cards:
    """Items' cards, made once for each description and offer: made for every answer they took half the time of a page.

    Equal index versions mean equal descriptions, and an offer that changes is another object, so no card outlives what it shows.
    """

    def __init__(self) -> None:
        self._epochs: dict[int, dict[int, tuple[Offer, ItemCard]]] = {}

    def of(self, table: ItemTable, row: int, offer: Offer) -> ItemCard:
        """Returns the card of an item."""
        epoch = self._epochs.get(table.index_version)
        if epoch is None:
            if len(self._epochs) >= _EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            epoch = self._epochs[table.index_version] = {}
        known = epoch.get(row)
        if known is not None and known[0] is offer:
            return known[1]
        card = _card(table, row, offer)
        epoch[row] = offer, card
        return card


@dataclass(frozen=True)
class Shelf:
    """What a channel may show of ranked items.

    Attributes:
        channel: where it is shown.
        filters: what the caller asked for.
        hide_out_of_stock: the shop's rule.
        cards: the process's cards.
    """

    channel: str
    filters: ItemFilter
    hide_out_of_stock: bool
    cards: Cards = field(default_factory=Cards)

    def page(self, ranked: RankedItems, offers: OfferTable, *, start: int, limit: int) -> tuple[list[ShownItem], int | None]:
        """Returns up to ``limit`` items from position ``start`` on, and the position to go on from (None at the end)."""
        table, found = ranked.table, offers.offers
        shown: list[ShownItem] = []
        rows, scores, sources = ranked.rows.tolist(), ranked.scores.tolist(), ranked.sources.tolist()
        anything = self.filters == EVERYTHING
        for position in range(start, len(rows)):
            row = rows[position]
            offer = found.get(table.ids[row])
            if offer is None or not self.offered(offer) or not (anything or self._wanted(table, row, offer)):
                continue
            if len(shown) == limit:
                return shown, position
            card = self.cards.of(table, row, offer)
            shown.append(ShownItem(card, scores[position], position, _SOURCES[sources[position]], ranked.newcomer))
        return shown, None

    def offered(self, offer: Offer) -> bool:
        """Says whether the channel may show an item at all, whatever was asked for."""
        return offer.sold_in(self.channel) and (not self.hide_out_of_stock or offer.in_stock)

    def _wanted(self, table: ItemTable, row: int, offer: Offer) -> bool:
        return (
            self.of_wanted_category(table, row)
            and self.of_wanted_brand(table, row)
            and self.of_wanted_price(offer)
            and self.not_ruled_out(table, row, offer)
        )

    def of_wanted_category(self, table: ItemTable, row: int) -> bool:
        """Says whether an item is of a category asked for."""
        return not self.filters.categories or table.category_names[row] in self.filters.categories

    def of_wanted_brand(self, table: ItemTable, row: int) -> bool:
        """Says whether an item is of a brand asked for."""
        return not self.filters.brands or table.brand_names[row] in self.filters.brands

    def of_wanted_price(self, offer: Offer) -> bool:
        """Says whether a price is within the bounds asked for, and in their currency."""
        wanted, price = self.filters, offer.price_micros or 0
        return (
            (not wanted.currency or offer.currency == wanted.currency)
            and (wanted.min_price_micros is None or price >= wanted.min_price_micros)
            and (wanted.max_price_micros is None or price <= wanted.max_price_micros)
        )

    def not_ruled_out(self, table: ItemTable, row: int, offer: Offer) -> bool:
        """Says whether neither its stock nor its id keeps an item out."""
        return (offer.in_stock or not self.filters.in_stock_only) and table.ids[row] not in self.filters.exclude_item_ids


def _card(table: ItemTable, row: int, offer: Offer) -> ItemCard:
    return ItemCard(
        item_id=table.ids[row],
        title=table.titles[row],
        category=table.category_names[row],
        brand=table.brand_names[row],
        image_ref=offer.image_ref,
        price_micros=offer.price_micros,
        currency=offer.currency,
        in_stock=offer.in_stock,
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
