"""The sample shop's shelves: items of every brand and good, and how they relate."""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import combinations, product

import numpy as np

from features.catalogue import Item, Relation
from features.sample_shop.vocabulary import DEPARTMENTS, DESCRIPTIONS, EDITIONS, SERIES, Department, Good, Name, Shelf

HISTORY_DAYS = 90
_CHANNEL_LIMITS = (("store",), ("store", "call_centre"), ("web", "app", "mini_program"), ("app", "mini_program", "social"))
_YUAN_PER_DOLLAR = 7


@dataclass(frozen=True)
class ShelfItem:
    """An item and where it stands.

    Attributes:
        shelf: number of its sub-category.
        brand: 0 cheap, 1 middle, 2 dear.
        place: position of its good in the shelf's buying order.
        appeal: how often it is chosen among equals, around 1.
        words: what a customer would type to find it.
    """

    item: Item
    shelf: int
    brand: int
    place: int
    appeal: float
    words: tuple[str, str, str]


def stock_shelves(rng: np.random.Generator, count: int, *, start: datetime, language: str) -> list[ShelfItem]:
    """Returns ``count`` items; about one in eight is listed after ``start``, while the shop is open.

    Raises:
        ValueError: more items are wanted than there are names for.
    """
    shelves = [(number, department, shelf) for number, (department, shelf) in enumerate(_shelves())]
    goods = max(len(shelf.goods) for _, _, shelf in shelves)
    places = product(range(len(EDITIONS)), range(goods), range(3), shelves)
    found = [_stock(rng, place, start=start, language=language) for place, _ in zip(places, range(count), strict=False)]
    if len(found) < count:
        raise ValueError(f"at most {len(found)} items, not {count}")
    return found


def _shelves() -> list[tuple[Department, Shelf]]:
    return [(department, shelf) for department in DEPARTMENTS for shelf in department.shelves]


def _stock(
    rng: np.random.Generator, where: tuple[int, int, int, tuple[int, Department, Shelf]], *, start: datetime, language: str
) -> ShelfItem:
    edition, place, brand, (number, department, shelf) = where
    good = shelf.goods[place]
    words = _words(department.brands[brand], _series(number, brand), good, language)
    item = Item(
        item_id=f"{department.name.en[:3].upper()}-{number:02d}{brand}{place}{edition}",
        title=_title(words, EDITIONS[edition], language),
        text=DESCRIPTIONS[language][int(rng.integers(4))].format(brand=words[0], series=words[1], good=words[2]),
        category=f"{_in(department.name, language)}/{_in(shelf.name, language)}",
        brand=words[0],
        price_micros=_price(rng, good.price * (0.7, 1.0, 1.6)[brand], language),
        currency="CNY" if language == "zh" else "USD",
        stock=0 if rng.random() < 0.02 else int(rng.integers(5, 400)),
        channels=_CHANNEL_LIMITS[int(rng.integers(4))] if rng.random() < 0.06 else (),
        image_ref=f"images/{department.name.en}/{number:02d}{brand}{place}{edition}.jpg",
        attributes={"series": words[1], **({"edition": _in(EDITIONS[edition], language)} if edition else {})},
        listed_at=_listed_at(rng, start),
    )
    return ShelfItem(item, number, brand, place, float(np.exp(rng.normal(0, 0.25))), words)


def _series(shelf: int, brand: int) -> Name:
    return SERIES[(shelf * 3 + brand * 5) % len(SERIES)]


def _in(name: Name | Good, language: str) -> str:
    return name.zh if language == "zh" else name.en


def _words(brand: Name, series: Name, good: Good, language: str) -> tuple[str, str, str]:
    return _in(brand, language), _in(series, language), _in(good, language)


def _title(words: tuple[str, str, str], edition: Name, language: str) -> str:
    brand, series, good = words
    if language == "zh":
        return f"{brand} {series}系列 {good}" + (f" {edition.zh}" if edition.zh else "")
    return f"{brand} {series} {good}" + (f", {edition.en}" if edition.en else "")


def _price(rng: np.random.Generator, dollars: float, language: str) -> int:
    """Returns a price as shops write them: 23.95 dollars, 169 yuan."""
    dollars *= 0.9 + 0.2 * rng.random()
    if language == "zh":
        return max(1, round(dollars * _YUAN_PER_DOLLAR)) * 1_000_000
    return max(1, round(dollars)) * 1_000_000 - 50_000


def _listed_at(rng: np.random.Generator, start: datetime) -> datetime:
    if rng.random() < 0.12:
        return start + timedelta(hours=int(rng.integers(24, (HISTORY_DAYS - 10) * 24)))
    return start - timedelta(hours=int(rng.integers(24, 400 * 24)))


def relate(shelf_items: list[ShelfItem]) -> list[Relation]:
    """Returns the knowledge graph: next goods of a series complement, goods of other brands substitute, a series belongs together."""
    series, goods = defaultdict(list), defaultdict(list)
    for entry in shelf_items:
        series[entry.shelf, entry.brand].append(entry)
        goods[entry.shelf, entry.place].append(entry)
    edges = [edge for group in series.values() for a, b in combinations(group, 2) for edge in _within_series(a, b)]
    edges += [edge for group in goods.values() for a, b in combinations(group, 2) for edge in _both(a, b, "substitute", 0.8)]
    return edges


def _within_series(a: ShelfItem, b: ShelfItem) -> list[Relation]:
    if a.place == b.place:
        return []  # two editions of one good: they substitute each other
    first, second = (a, b) if a.place < b.place else (b, a)
    edges = _both(a, b, "same_series", 0.5)
    distance = second.place - first.place
    if distance <= 2:
        edges.append(Relation(first.item.item_id, second.item.item_id, "complement", 1.0 / distance))
    return edges


def _both(a: ShelfItem, b: ShelfItem, relation: str, weight: float) -> list[Relation]:
    return [Relation(x.item.item_id, y.item.item_id, relation, weight) for x, y in ((a, b), (b, a))]
