"""Answers before any channel or format: facts, and what kind of answer they make."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

T = TypeVar("T", "Quote", "OfferedItem")

# Of suggestions, shown in one answer; the answer keeps more, for channels that lack some.
SHOWN_ITEMS = 5


class Kind(StrEnum):
    """What an answer is."""

    ARTICLE = "article"
    PRICE = "price"
    STOCK = "stock"
    ORDERS = "orders"
    RETURNS = "returns"
    SUGGESTIONS = "suggestions"
    COURTESY = "courtesy"
    CLARIFY = "clarify"
    HANDOVER = "handover"


class Reason(StrEnum):
    """Why a person should take over."""

    UNSPECIFIED = ""
    LOW_CONFIDENCE = "low_confidence"
    ASKED_FOR_PERSON = "asked_for_person"
    OUT_OF_SCOPE = "out_of_scope"
    COMPLAINT = "complaint"


class Format(StrEnum):
    """How an answer is put."""

    PLAIN = "plain"
    RICH = "rich"
    VOICE = "voice"


@dataclass(frozen=True)
class Quote:
    """A passage of an article as it stood; ``channels`` where it may be quoted, empty: everywhere."""

    article_id: str
    title: str
    url: str
    heading: str
    markdown: str
    text: str
    channels: tuple[str, ...]
    confidence: float


@dataclass(frozen=True)
class OfferedItem:
    """An item with its offer; ``channels`` where it is sold, empty: everywhere."""

    item_id: str
    title: str
    price_micros: int
    currency: str
    in_stock: bool
    channels: tuple[str, ...]


@dataclass(frozen=True)
class OrderLine:
    """Something the customer bought or sent back; ``day`` is YYYY-MM-DD, ``title`` empty where the catalogue holds it no longer."""

    event_id: str
    item_id: str
    title: str
    quantity: float | None
    day: str
    returned: bool


@dataclass(frozen=True)
class Answer:
    """What was answered, the same for every channel.

    Attributes:
        language: of the words around the facts, ``en`` or ``zh``.
        quotes: best first; a channel shows the first it may quote.
        items: best first; a channel shows those sold there.
        orders: newest first.
        asks_item: of CLARIFY: which item is meant, and not what the words are.
        phrased: the generator's words for exactly the facts named in ``phrased_for``; empty where there are none.
    """

    kind: Kind
    language: str
    confidence: float = 1.0
    reason: Reason = Reason.UNSPECIFIED
    quotes: tuple[Quote, ...] = ()
    items: tuple[OfferedItem, ...] = ()
    orders: tuple[OrderLine, ...] = ()
    asks_item: bool = False
    phrased: str = ""
    phrased_for: tuple[str, ...] = ()

    def in_channel(self, channel: str) -> "Answer":
        """Returns the answer as one channel may show it; never with another fact, nor in another order.

        An article that no quote is left of becomes a hand-over: there is nothing to answer with.
        """
        quotes = tuple(_shown(self.quotes, channel))[:1]
        shown = replace(self, quotes=quotes, items=tuple(_shown(self.items, channel))[:SHOWN_ITEMS])
        if self.kind is Kind.ARTICLE and not quotes:
            return Answer(Kind.HANDOVER, self.language, self.confidence, Reason.LOW_CONFIDENCE)
        if quotes and self.kind is Kind.ARTICLE:
            shown = replace(shown, confidence=quotes[0].confidence)
        return shown if shown.facts == self.phrased_for else replace(shown, phrased="")

    @property
    def facts(self) -> tuple[str, ...]:
        """Names the facts, in order: two answers of one turn with equal names say the same."""
        quotes = (f"{quote.article_id}#{quote.heading}" for quote in self.quotes)
        return (*quotes, *(item.item_id for item in self.items), *(line.event_id for line in self.orders))

    def encode(self) -> str:
        """Returns the answer as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def decode(given: Mapping[str, Any]) -> Answer:
    """Returns the answer that ``encode`` wrote, from its parsed JSON."""
    values = dict(given)
    return Answer(
        kind=Kind(values.pop("kind")),
        reason=Reason(values.pop("reason")),
        quotes=tuple(Quote(**{**one, "channels": tuple(one["channels"])}) for one in values.pop("quotes")),
        items=tuple(OfferedItem(**{**one, "channels": tuple(one["channels"])}) for one in values.pop("items")),
        orders=tuple(OrderLine(**one) for one in values.pop("orders")),
        phrased_for=tuple(values.pop("phrased_for")),
        **values,
    )


def _shown(facts: Iterable[T], channel: str) -> Iterable[T]:
    return (fact for fact in facts if not fact.channels or channel in fact.channels)
