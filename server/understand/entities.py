"""What a text speaks of: items, brands and categories of the catalogue, order ids, prices and quantities, with where they stand."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from server.understand.names import CatalogueNames, Named, words_of
from server.understand.patterns import Bound, Span, orders, overlap, prices, quantities

# Characters in which entities are looked for: a message is far shorter, and what follows would cost 0.03 ms each hundred.
READ_CHARS = 2_000
_MOST = 50  # entities of one text


class EntityKind(Enum):
    """What an entity is."""

    ITEM = "item"
    BRAND = "brand"
    CATEGORY = "category"
    ORDER_ID = "order_id"
    PRICE = "price"
    QUANTITY = "quantity"


@dataclass(frozen=True)
class Entity:
    """Something that a text speaks of.

    Attributes:
        kind: what it is.
        start, end: from its first character to behind its last, counted in Unicode code points.
        text: what stands there.
        value: the item's id; the brand or category as the catalogue writes it; the order id as it was written; else empty.
        confidence: 1 for what was said in full, for an item the share of its title that was said.
        price_micros, currency, bound: of a price; the currency is empty where the text names none.
        count: of a quantity.
    """

    kind: EntityKind
    start: int
    end: int
    text: str
    value: str = ""
    confidence: float = 1.0
    price_micros: int | None = None
    currency: str = ""
    bound: Bound = Bound.EXACT
    count: int | None = None


def find_entities(text: str, names: CatalogueNames) -> list[Entity]:
    """Returns the entities of a text's first 2,000 characters in the order they stand in, 50 at the most.

    A function of the text and the catalogue's names alone. What is read as an order id is no price and no quantity, and a number
    inside an item's name is none either; a brand or category inside an item's name is said as well as the item.
    """
    text = text[:READ_CHARS]
    found = list(_entities(text, names))
    order = list(EntityKind)
    return sorted(found, key=lambda one: (one.start, -one.end, order.index(one.kind), -one.confidence, one.value))[:_MOST]


def _entities(text: str, names: CatalogueNames) -> Iterator[Entity]:
    words = words_of(text)
    items = names.items(text, words)
    brands, categories = names.brands_in(text, words), names.categories_in(text, words)
    taken: list[Span] = [one.span for one in items]
    for kind, named in ((EntityKind.ITEM, items), (EntityKind.BRAND, brands), (EntityKind.CATEGORY, categories)):
        yield from (_named(text, kind, one) for one in named)
    for order in orders(text):
        if _free(order.span, taken):
            taken.append(order.span)
            yield _entity(text, EntityKind.ORDER_ID, order.span, value=order.order_id)
    for price in prices(text):
        if _free(price.span, taken):
            taken.append(price.span)
            yield _entity(text, EntityKind.PRICE, price.span, price_micros=price.micros, currency=price.currency, bound=price.bound)
    for quantity in quantities(text, [one.span for one in (*items, *categories, *brands)]):
        if _free(quantity.span, taken):
            taken.append(quantity.span)
            yield _entity(text, EntityKind.QUANTITY, quantity.span, count=quantity.number)


def _free(span: Span, taken: list[Span]) -> bool:
    return not any(overlap(span, other) for other in taken)


def _named(text: str, kind: EntityKind, one: Named) -> Entity:
    return _entity(text, kind, one.span, value=one.value, confidence=one.confidence)


def _entity(text: str, kind: EntityKind, span: Span, **values: object) -> Entity:
    return Entity(kind, *span, text[span[0] : span[1]], **values)  # type: ignore[arg-type]
