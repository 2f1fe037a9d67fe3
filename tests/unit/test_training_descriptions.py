"""Items are described as they were before a time, and so are the relations between them."""

import numpy as np

from features.item_table import Description
from tests.unit.training_shop import item_table
from training.descriptions import Described, Descriptions, Edge


def description(title: str, category: str = "cups", price: int | None = 2_000_000) -> Description:
    return Description(title, "", category, "", price, title)


def test_an_item_is_called_what_it_was_called_then() -> None:
    table = item_table(3)
    items = [
        Described(1, 50, description("old", "ladles")),
        Described(1, 100, description("newer")),
        Described(1, 200, description(table.titles[1])),
    ]
    known = Descriptions(table, items=items, epochs={1: 50, 2: 100, 3: 200}, edges=[])
    assert [known.before(time).titles[1] for time in (1, 100, 101, 200, 201)] == ["old", "old", "newer", "newer", table.titles[1]]
    old, new = known.before(100), known.before(201)
    assert new is table
    assert known.before(7) is old
    assert old.titles[0] == table.titles[0]
    assert old.texts[1] == "old. ladles"
    assert (old.category_names[1], old.categories[1] not in old.categories[[0, 2]]) == ("ladles", True)
    assert old.log_price[1] == np.float32(np.log(2.0))
    assert old.log_price[0] == table.log_price[0]


def test_a_price_that_was_not_known_then_is_not_known() -> None:
    table = item_table(2)
    items = [Described(0, 50, description("a", price=None)), Described(0, 100, description("b"))]
    known = Descriptions(table, items=items, epochs={1: 50, 2: 100}, edges=[])
    assert np.isnan(known.before(100).log_price[0])


def test_relations_are_those_of_the_epoch_that_stood_then() -> None:
    table = item_table(3).with_relations([("i00", "i02", 0.5)])
    edges = [
        Edge("i00", "i01", 1.0, 1, 3),
        Edge("i00", "i02", 0.5, 2, None),
        Edge("i00", "gone", 1.0, 1, None),
        Edge("i01", "i02", 1.0, 4, None),
    ]
    known = Descriptions(table, items=[], epochs={1: 100, 2: 200, 3: 300}, edges=edges)
    seen = {
        time: list(zip(*(getattr(known.before(time), f"relation_{end}").tolist() for end in ("from", "to")), strict=True))
        for time in (5, 200, 201, 300, 301)
    }
    assert seen == {5: [(0, 1)], 200: [(0, 1)], 201: [(0, 1), (0, 2)], 300: [(0, 1), (0, 2)], 301: [(0, 2)]}


def test_a_catalogue_that_never_changed_is_the_newest_one() -> None:
    table = item_table(3)
    assert Descriptions(table, items=[], epochs={1: 100, 2: 200}, edges=[]).before(1) is table
