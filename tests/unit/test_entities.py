"""What texts speak of: names of the catalogue, orders, prices and quantities, in English and Chinese, where they stand, in any text."""

import random
from dataclasses import replace
from typing import Any

import pytest

from server.understand.entities import READ_CHARS, Entity, EntityKind, find_entities
from server.understand.names import CatalogueNames
from server.understand.patterns import Bound, orders, prices, quantities
from tests.unit.tables import table

ITEMS = (
    ("KIT-001", "Dailyware Origin gooseneck kettle", "Dailyware", "kitchen/coffee"),
    ("KIT-002", "Maison Orval Aurora gooseneck kettle", "Maison Orval", "kitchen/coffee"),
    ("KIT-003", "Dailyware Terra stand mixer", "Dailyware", "kitchen/baking"),
    ("GAR-004", "Greenpatch potting soil 20 l", "Greenpatch", "garden/planting"),
    ("GAR-005", "L'Olivier women's gloves", "L'Olivier", "garden/planting"),
    ("plain", "绿田 传承系列 育苗盘", "绿田", "园艺/种植"),
)


def names(items: tuple[tuple[str, str, str, str], ...] = ITEMS) -> CatalogueNames:
    ids, titles, brands, categories = zip(*items, strict=True) if items else ((), (), (), ())
    return CatalogueNames.of(replace(table(len(items)), ids=ids, titles=titles, brand_names=brands, category_names=categories))


NAMES = names()


def said(text: str, kind: EntityKind, catalogue: CatalogueNames = NAMES) -> list[tuple[str, str]]:
    return [(one.text, one.value) for one in find_entities(text, catalogue) if one.kind is kind]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("is the Dailyware Origin gooseneck kettle in stock?", [("Dailyware Origin gooseneck kettle", "KIT-001")]),
        ("two ORIGIN gooseneck KETTLES please", [("ORIGIN gooseneck KETTLES", "KIT-001")]),
        ("the Orval aurora kettle, the gooseneck one", [("Orval aurora kettle, the gooseneck", "KIT-002")]),
        ("how much is kit-003", [("kit-003", "KIT-003")]),
        ("L’Olivier womens gloves", [("L’Olivier womens gloves", "GAR-005")]),
        ("绿田传承系列育苗盘多少钱", [("绿田传承系列育苗盘", "plain")]),
        ("a kettle", []),
        ("mixer", []),
        ("plain", []),
    ],
)
def test_items_are_named_by_their_id_or_most_of_their_title(text: str, expected: list[tuple[str, str]]) -> None:
    assert said(text, EntityKind.ITEM) == expected


def test_words_far_apart_name_nothing() -> None:
    far = "the origin of this question is long, it is about coffee and water and a gooseneck, and then maybe, who knows, a kettle"
    assert said(far, EntityKind.ITEM) == []


def test_items_of_one_name_are_all_said_and_confidence_tells_how_much_of_it() -> None:
    found = [one for one in find_entities("do you have a gooseneck kettle?", names(ITEMS[:2])) if one.kind is EntityKind.ITEM]
    assert found == []  # half of each title: both brands have one
    twins = names((("a-1", "Red mug", "", ""), ("a-2", "Red mug", "", ""), ("a-3", "Blue mug", "", "")))
    found = [one for one in find_entities("the red mug", twins) if one.kind is EntityKind.ITEM]
    assert [(one.value, one.confidence) for one in found] == [("a-1", 1.0), ("a-2", 1.0)]


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("anything by maison orval?", EntityKind.BRAND, [("maison orval", "Maison Orval")]),
        ("maison", EntityKind.BRAND, []),
        ("绿田有什么", EntityKind.BRAND, [("绿田", "绿田")]),
        ("show me coffee", EntityKind.CATEGORY, [("coffee", "kitchen/coffee")]),
        ("Kitchen things", EntityKind.CATEGORY, [("Kitchen", "kitchen/baking"), ("Kitchen", "kitchen/coffee")]),
        ("kitchen / coffee", EntityKind.CATEGORY, [("kitchen / coffee", "kitchen/coffee")]),
        ("种植用品", EntityKind.CATEGORY, [("种植", "园艺/种植")]),
    ],
)
def test_brands_and_categories_are_named_in_full_or_by_a_part_of_the_path(
    text: str, kind: EntityKind, expected: list[tuple[str, str]]
) -> None:
    assert said(text, kind) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("where is my order #AB-12345?", ["AB-12345"]),
        ("order number 00123842 is late", ["00123842"]),
        ("purchase no. 991-22", ["991-22"]),
        ("订单号123456到哪了", ["123456"]),
        ("订单：A1B2C3", ["A1B2C3"]),
        ("INV-20391 and ord-20392", ["INV-20391"]),
        ("order today", []),
        ("order", []),
        ("#12", []),
        ("border 12345", []),
        ("order " + "1" * 40, []),
    ],
)
def test_order_ids(text: str, expected: list[str]) -> None:
    assert [one.order_id for one in orders(text)] == expected
    assert [text[slice(*one.span)] for one in orders(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("under 30", [(30, "", Bound.MOST)]),
        ("under 30 days", []),
        ("over 5 kg", []),
        ("cheaper than $19.99 please", [(19.99, "USD", Bound.MOST)]),
        ("1,299.50 usd or less", [(1299.5, "USD", Bound.MOST)]),
        ("€5", [(5, "EUR", Bound.EXACT)]),
        ("US$ 12", [(12, "USD", Bound.EXACT)]),
        ("at least 50 pounds", [(50, "GBP", Bound.LEAST)]),
        ("between 20 and 30 euros", [(20, "EUR", Bound.LEAST), (30, "EUR", Bound.MOST)]),
        ("£10-£20", [(10, "GBP", Bound.LEAST), (20, "GBP", Bound.MOST)]),
        ("from $30 to 20 euros", [(30, "USD", Bound.EXACT), (20, "EUR", Bound.EXACT)]),
        ("20到30元的杯子", [(20, "CNY", Bound.LEAST), (30, "CNY", Bound.MOST)]),
        ("不超过30元", [(30, "CNY", Bound.MOST)]),
        ("30块以下", [(30, "CNY", Bound.MOST)]),
        ("100元以上", [(100, "CNY", Bound.LEAST)]),
        ("１２元", [(12, "CNY", Bound.EXACT)]),
        ("room 101 in 2024", []),
        ("12 poundsterling", []),
    ],
)
def test_prices(text: str, expected: list[tuple[float, str, Bound]]) -> None:
    assert [(one.micros / 1e6, one.currency, one.bound) for one in prices(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I need 3 pieces and two bottles", [3, 2]),
        ("x2", [2]),
        ("qty: 4", [4]),
        ("买3件，两个杯子，十二只", [3, 2, 12]),
        ("数量是5", [5]),
        ("0 pieces", []),
        ("12345 pieces", []),
        ("one order", []),
    ],
)
def test_quantities(text: str, expected: list[int]) -> None:
    assert [one.number for one in quantities(text)] == expected


def test_a_count_before_an_items_name_and_no_number_inside_it() -> None:
    found = find_entities("2 of the Greenpatch potting soil 20 l, under 30 dollars, for order #A-77", NAMES)
    assert [(one.kind, one.text, one.value) for one in found] == [
        (EntityKind.QUANTITY, "2", ""),
        (EntityKind.ITEM, "Greenpatch potting soil 20 l", "GAR-004"),
        (EntityKind.BRAND, "Greenpatch", "Greenpatch"),
        (EntityKind.PRICE, "30 dollars", ""),
        (EntityKind.ORDER_ID, "A-77", "A-77"),
    ]
    assert (found[0].count, found[3].price_micros, found[3].currency, found[3].bound) == (2, 30_000_000, "USD", Bound.MOST)


ODD = {
    "empty": "",
    "spaces": " \t\n",
    "long": "kettle under 30 " * 700,
    "control": "ket\x01tle\x7f\u200b order\u202e #A1",
    "mixed": "Red kettle 红色杯子 красная кружка κούπα 20 元",
    "right to left": "طلب رقم 12345 ספל אדום under 30",
    "emoji": "🛒👩‍👩‍👧‍👦🎉" * 50,
    "html": '<b onclick="alert(1)">kettle</b> order #<script>1</script>',
    "sql": "'; DROP TABLE items; -- order 1' OR '1'='1",
    "digits": "1" * 10_000,
    "formats": "%s {0} ${x} $(id) $",
    "half a pair": "\ud7ff\U0010ffff\ufffd",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("catalogue", [NAMES, names(())], ids=["catalogue", "no items"])
def test_any_text_has_entities_that_stand_where_they_say(text: str, catalogue: CatalogueNames) -> None:
    found = find_entities(text, catalogue)
    assert found == find_entities(text, catalogue)
    assert len(found) <= 50
    for one in found:
        assert text[one.start : one.end] == one.text
        assert 0 <= one.start < one.end <= READ_CHARS
        assert 0 < one.confidence <= 1


def test_any_mixture_of_pieces_has_entities_that_stand_where_they_say() -> None:
    dice = random.Random(5)
    pieces = [
        *ODD.values(),
        "gooseneck",
        "Dailyware Origin",
        "订单",
        "order",
        "#",
        "$",
        "30",
        "元",
        "between",
        "to",
        "两",
        "个",
        "x",
        ",",
        ".",
        "-",
    ]
    for _ in range(300):
        text = dice.choice(("", " ")).join(piece[:40] for piece in dice.choices(pieces, k=dice.randint(1, 12)))
        for one in find_entities(text, NAMES):
            assert text[one.start : one.end] == one.text


def test_equal_catalogues_give_equal_entities_to_the_bit() -> None:
    def bits(found: list[Entity]) -> Any:
        return [(vars(one) | {"confidence": one.confidence.hex()}) for one in found]

    text = "two gooseneck kettles by Dailyware Origin under 30, 绿田育苗盘"
    assert bits(find_entities(text, names())) == bits(find_entities(text, names()))
