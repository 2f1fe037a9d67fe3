"""The item table of one epoch from the rows PostgreSQL returns, and weights that follow items from one table to the next."""

from datetime import UTC, datetime
from math import log
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.catalogue import item_text
from features.item_table import POPULARITY, ItemTable, load_item_table
from features.signals import CollaborativeWeights
from tests.unit.tables import table

DAY = datetime(2026, 3, 1, tzinfo=UTC)
TODAY = DAY.timestamp() / 86400


class FakeConnection:
    """Answers the four questions of ``load_item_table``; remembers what it was asked with."""

    def __init__(self, *, epoch: Any = (DAY, DAY), items: list[Any] | None = None, edges: list[Any] | None = None) -> None:
        self.rows = {
            "fleet_state": [(7,)],
            "index_epochs": [epoch] if epoch else [],
            "index_items": items or [],
            "item_relations": edges or [],
        }
        self.asked: dict[str, Any] = {}

    def execute(self, query: str, parameters: Any = None) -> Any:
        name = next(name for name in self.rows if f"FROM {name}" in query)
        self.asked[name] = parameters
        rows = self.rows[name]

        class Cursor:
            fetchone = staticmethod(lambda: rows[0] if rows else None)
            fetchall = staticmethod(lambda: rows)

        return Cursor()


def load(**rows: Any) -> ItemTable:
    return load_item_table(cast("Any", FakeConnection(**rows)), 7)


def row(
    item: str, *, category: str = "", brand: str = "", price: int | None = 10_000_000, listed: float = TODAY, counts: Any = (None,) * 6
) -> Any:
    return (item, f"the {item}", "text", category, brand, price, f"h-{item}", listed, *counts)


def test_columns_are_those_of_the_rows() -> None:
    items = load(
        items=[
            row("a", category="pans", brand="x", price=2_500_000, listed=TODAY - 3, counts=(1, 2, 3, 4, 5, 6)),
            row("b", category="cups", brand="x", price=None),
            row("c", price=0, listed=TODAY + 5),
            row("d", category="pans"),
        ]
    )
    assert (items.index_version, len(items), items.ids) == (7, 4, ("a", "b", "c", "d"))
    assert items.titles[1] == "the b"
    assert items.texts[0] == item_text("the a", "text", "pans", "x")
    assert items.content_hashes == ("h-a", "h-b", "h-c", "h-d")
    assert (items.category_names, items.categories.tolist()) == (("pans", "cups", "", "pans"), [2, 1, 0, 2])
    assert (items.brand_names, items.brands.tolist()) == (("x", "x", "", ""), [1, 1, 0, 0])
    assert items.log_price.tolist() == pytest.approx([log(2.5), np.nan, np.nan, log(10)], nan_ok=True)
    assert items.popularity.tolist() == [[1, 2, 3, 4, 5, 6], [0] * 6, [0] * 6, [0] * 6]
    assert items.age_days.tolist() == [3, 0, 0, 0]  # what is listed in the future is new, not of negative age
    for column in (items.categories, items.brands, items.relation_from, items.relation_to):
        assert column.dtype == np.int32
    for numbers in (items.log_price, items.popularity, items.age_days, items.relation_weight):
        assert numbers.dtype == np.float32


def test_edges_between_items_of_the_epoch_are_kept_in_order() -> None:
    edges = [("c", "a", 0.5), ("a", "gone", 1.0), ("b", "c", 0.25), ("gone", "a", 1.0), ("a", "c", 1.0), ("a", "b", 0.75)]
    items = load(items=[row("a"), row("b"), row("c")], edges=edges)
    assert items.relation_from.tolist() == [0, 0, 1, 2]
    assert items.relation_to.tolist() == [1, 2, 2, 0]
    assert items.relation_weight.tolist() == [0.75, 1.0, 0.25, 0.5]
    for other in (edges[::-1], sorted(edges, key=str)):  # whatever order PostgreSQL's collation gives
        again = load(items=[row("a"), row("b"), row("c")], edges=other)
        assert again.relation_weight.tobytes() == items.relation_weight.tobytes()


def test_an_empty_epoch_is_an_empty_table() -> None:
    for epoch in (None, (None, DAY)):
        items = load(epoch=epoch)
        assert (len(items), items.rows) == (0, {})
        assert items.popularity.shape == (0, len(POPULARITY))
        assert items.categories.dtype == items.relation_from.dtype == np.int32


def test_ages_count_to_the_popularity_snapshot_or_else_to_the_publication() -> None:
    later = datetime(2026, 3, 11, tzinfo=UTC)
    assert load(epoch=(DAY, later), items=[row("a", listed=TODAY - 1)]).age_days.tolist() == [1]
    assert load(epoch=(None, later), items=[row("a", listed=TODAY - 1)]).age_days.tolist() == [11]


def test_the_newest_epoch_is_read_unless_one_is_named() -> None:
    connection = FakeConnection()
    assert load_item_table(cast("Any", connection)).index_version == 7
    assert load_item_table(cast("Any", connection), 3).index_version == 3
    assert connection.asked["index_items"] == {"version": 3, "as_of": DAY}
    assert connection.asked["item_relations"] == {"version": 3}


def test_items_are_found_by_id() -> None:
    items = table(5)
    assert items.rows == {"i000": 0, "i001": 1, "i002": 2, "i003": 3, "i004": 4}
    assert (items.title_of("i003"), items.title_of("gone")) == ("title i003", None)


def test_another_snapshot_time_changes_popularity_and_age_only() -> None:
    items = load(items=[row("a", listed=100.0), row("b", listed=130.0)])
    counts = np.arange(12, dtype=np.float32).reshape(2, 6)
    then = items.with_popularity(counts, 120.5)
    assert then.popularity is counts
    assert then.age_days.tolist() == [20.5, 0]
    assert (then.ids, then.log_price.tobytes()) == (items.ids, items.log_price.tobytes())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 12))
def test_weights_follow_their_items_to_another_table(seed: int, before: int, after: int) -> None:
    """Against a dense matrix: items that left take their weights along, new ones have none, nobody else's change."""
    rng = np.random.default_rng(seed)
    old_ids = [f"i{k:03d}" for k in rng.permutation(12)[:before]]
    dense = rng.integers(0, 3, (before, before)).astype(np.float32)
    indptr = np.concatenate([[0], np.cumsum((dense != 0).sum(1))]).astype(np.int64)
    weights = CollaborativeWeights(indptr, np.nonzero(dense)[1].astype(np.int32), dense[dense != 0])
    items = table(after)
    moved = weights.remapped({item: k for k, item in enumerate(old_ids)}, items)
    assert (len(moved.indptr), moved.indices.dtype.str, moved.weights.dtype.str) == (after + 1, "<i4", "<f4")
    for a, source in enumerate(items.ids):
        expected = [dense[old_ids.index(source), old_ids.index(target)] if {source, target} <= set(old_ids) else 0 for target in items.ids]
        assert moved.scores(np.array([a], np.int32), np.ones(1, np.float32)).everywhere().tolist() == expected
        span = moved.indices[moved.indptr[a] : moved.indptr[a + 1]].tolist()
        assert span == sorted(span)


def test_weights_that_say_nothing_score_nothing() -> None:
    assert CollaborativeWeights.empty(3).scores(np.array([0, 2], np.int32), np.ones(2, np.float32)).everywhere().tolist() == [0, 0, 0]
    nobody = CollaborativeWeights.empty(0).remapped({}, table(4)).scores(np.array([3], np.int32), np.ones(1, np.float32))
    assert nobody.everywhere().tolist() == [0, 0, 0, 0]
