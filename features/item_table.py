"""The catalogue of one index epoch as columns: what candidates and ranking features are computed from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from psycopg import Connection
from psycopg.rows import TupleRow

from features.catalogue import item_text

if TYPE_CHECKING:
    from features.completions import Completions
    from features.lexical import LexicalIndex

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

NEW_ARRIVAL_DAYS = 28.0
POPULARITY = ("purchases_7d", "purchases_28d", "purchases_total", "views_7d", "views_28d", "buyers_28d")


@dataclass(frozen=True)
class Description:
    """How an epoch describes an item; the price is in millionths of the currency unit, None where there is none."""

    title: str
    text: str
    category: str
    brand: str
    price_micros: int | None
    content_hash: str


@dataclass(frozen=True)
class ItemTable:
    """Columns of n items in item-id order; equal index versions give equal tables on every replica.

    Attributes:
        index_version: the epoch these columns belong to.
        ids: item ids, ascending.
        titles: item titles.
        texts: what the text encoder reads of each item.
        content_hashes: identity of each description.
        category_names, brand_names: category and brand of each item, empty where it has none.
        categories: int32[n], code of each item's category; 0 is "no category".
        brands: int32[n], code of each item's brand; 0 is "no brand".
        log_price: float32[n], natural logarithm of the reference price in major units; NaN where there is none.
        popularity: float32[n, 6], the counts named by POPULARITY.
        age_days: float32[n], days from listing to the popularity snapshot, at least 0.
        relation_from, relation_to, relation_weight: knowledge-graph edges between rows, sorted by source row.
        listed_days: float64[n], when each item was listed, in days since 1970.
        features_as_of: the feature snapshot the epoch ranks with, of items and of customers; None before the first.
    """

    index_version: int
    ids: tuple[str, ...]
    titles: tuple[str, ...]
    texts: tuple[str, ...]
    content_hashes: tuple[str, ...]
    category_names: tuple[str, ...]
    brand_names: tuple[str, ...]
    categories: IntArray
    brands: IntArray
    log_price: FloatArray
    popularity: FloatArray
    age_days: FloatArray
    relation_from: IntArray
    relation_to: IntArray
    relation_weight: FloatArray
    listed_days: npt.NDArray[np.float64]
    features_as_of: datetime | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Item id to row."""
        return {item: row for row, item in enumerate(self.ids)}

    @cached_property
    def popularity_score(self) -> FloatArray:
        """float32[n]: recent purchases, then all purchases, then recent views; the order shown to a new customer."""
        p = self.popularity
        return np.asarray(p[:, 1] + 0.05 * p[:, 2] + 0.02 * p[:, 4], np.float32)

    @cached_property
    def popular_rows(self) -> IntArray:
        """int32[n]: all rows, the most popular first, ties by row; sorted once for all customers."""
        return np.argsort(-self.popularity_score, kind="stable").astype(np.int32)

    @cached_property
    def new_rows(self) -> IntArray:
        """int32[k]: rows listed within NEW_ARRIVAL_DAYS, the newest first, ties by row."""
        rows = np.flatnonzero(self.age_days <= NEW_ARRIVAL_DAYS)
        newness = (NEW_ARRIVAL_DAYS + 1 - self.age_days[rows]).astype(np.float32)
        return rows[np.argsort(-newness, kind="stable")].astype(np.int32)

    # Below, imports stand inside: training's many tables never search, and would load 4 MB of libraries for it.
    @cached_property
    def lexical(self) -> "LexicalIndex":
        """Words of the items: those of titles count three times, of brand and category twice. 0.5 s of 10,000 items."""
        from features.lexical import Field, LexicalIndex

        categories = [name.replace("/", " ") for name in self.category_names]
        # The texts hold each of these once already. Titles are keywords, so it says little that a word stands there twice:
        # with Lucene's k1 and b known items came later (NDCG@10 0.804 instead of 0.820, docs/LOG.md).
        fields = [Field(self.texts), Field(self.titles, weight=2), Field(self.brand_names), Field(categories)]
        return LexicalIndex(fields, k1=0.3, b=0.5)

    @cached_property
    def completions(self) -> "Completions":
        """How what somebody types may go on: phrases of titles, categories and brands."""
        from features.completions import Completions

        return Completions(self)

    def title_of(self, item_id: str) -> str | None:
        """Returns the title of an item, None when this epoch does not hold it."""
        row = self.rows.get(item_id)
        return None if row is None else self.titles[row]

    def with_popularity(self, popularity: FloatArray, as_of_day: float) -> "ItemTable":
        """Returns the table as it stood at another snapshot time (days since 1970): for point-in-time training rows."""
        age = np.maximum(as_of_day - self.listed_days, 0).astype(np.float32)
        return replace(self, popularity=popularity, age_days=age)

    def with_descriptions(self, descriptions: Mapping[int, Description]) -> "ItemTable":
        """Returns the table with some rows described otherwise: as they were in an earlier epoch."""
        if not descriptions:
            return self

        def column(now: Sequence[str], then: Callable[[Description], str]) -> tuple[str, ...]:
            return tuple(then(descriptions[row]) if row in descriptions else value for row, value in enumerate(now))

        categories = column(self.category_names, lambda d: d.category)
        brands = column(self.brand_names, lambda d: d.brand)
        log_price = self.log_price.copy()
        for row, description in descriptions.items():
            log_price[row] = np.log((description.price_micros or np.nan) / 1e6)
        return replace(
            self,
            titles=column(self.titles, lambda d: d.title),
            texts=column(self.texts, lambda d: item_text(d.title, d.text, d.category, d.brand)),
            content_hashes=column(self.content_hashes, lambda d: d.content_hash),
            category_names=categories,
            brand_names=brands,
            categories=_codes(categories),
            brands=_codes(brands),
            log_price=log_price,
        )

    def with_relations(self, edges: Sequence[tuple[str, str, float]]) -> "ItemTable":
        """Returns the table with other knowledge-graph edges; those of items it does not hold drop out."""
        kept = sorted((self.rows[a], self.rows[b], w) for a, b, w in edges if a in self.rows and b in self.rows)
        return replace(
            self,
            relation_from=np.array([k[0] for k in kept], np.int32),
            relation_to=np.array([k[1] for k in kept], np.int32),
            relation_weight=np.array([k[2] for k in kept], np.float32),
        )


_ITEMS = """
SELECT x.item_id, x.title, x.text, x.category, x.brand, x.price_micros, x.content_hash, extract(epoch FROM x.listed_at) / 86400.0,
       p.purchases_7d, p.purchases_28d, p.purchases_total, p.views_7d, p.views_28d, p.buyers_28d
FROM index_items x LEFT JOIN item_popularity p ON p.item_id = x.item_id AND p.event_timestamp = %(as_of)s
WHERE x.valid_from <= %(version)s AND (x.valid_to IS NULL OR x.valid_to > %(version)s)
ORDER BY x.item_id COLLATE "C"
"""
_RELATIONS = """
SELECT item_id, related_item_id, weight FROM item_relations
WHERE valid_from <= %(version)s AND (valid_to IS NULL OR valid_to > %(version)s) ORDER BY 1, 2, relation
"""


def load_item_table(connection: Connection[TupleRow], index_version: int | None = None) -> ItemTable:
    """Reads the table of one epoch (by default the newest); before the first epoch the table is empty with version 0."""
    if index_version is None:
        row = connection.execute("SELECT index_version FROM fleet_state").fetchone()
        index_version = int(row[0]) if row else 0
    epoch = connection.execute("SELECT features_as_of, published_at FROM index_epochs WHERE index_version = %s", [index_version]).fetchone()
    as_of: datetime | None = epoch[0] if epoch else None
    items = connection.execute(_ITEMS, {"version": index_version, "as_of": as_of}).fetchall()
    edges = connection.execute(_RELATIONS, {"version": index_version}).fetchall()
    as_of_day = ((as_of or (epoch[1] if epoch else datetime.now(UTC))).timestamp()) / 86400.0
    return replace(_build(index_version, items, edges, as_of_day), features_as_of=as_of)


def _build(index_version: int, items: Sequence[TupleRow], edges: Sequence[TupleRow], as_of_day: float) -> ItemTable:
    ids = tuple(row[0] for row in items)
    prices = np.array([row[5] if row[5] else np.nan for row in items], np.float64)
    listed = np.array([float(row[7]) for row in items], np.float64)
    table = ItemTable(
        index_version=index_version,
        ids=ids,
        titles=tuple(row[1] for row in items),
        texts=tuple(item_text(row[1], row[2], row[3], row[4]) for row in items),
        content_hashes=tuple(row[6] for row in items),
        category_names=tuple(row[3] for row in items),
        brand_names=tuple(row[4] for row in items),
        categories=_codes([row[3] for row in items]),
        brands=_codes([row[4] for row in items]),
        log_price=np.log(prices / 1e6).astype(np.float32),
        popularity=np.array([[value or 0 for value in row[8:14]] for row in items], np.float32).reshape(len(ids), len(POPULARITY)),
        age_days=np.maximum(as_of_day - listed, 0).astype(np.float32),
        relation_from=np.zeros(0, np.int32),
        relation_to=np.zeros(0, np.int32),
        relation_weight=np.zeros(0, np.float32),
        listed_days=listed,
    )
    return table.with_relations([(edge[0], edge[1], edge[2]) for edge in edges])


def _codes(names: Sequence[str]) -> IntArray:
    """Numbers names in alphabetical order from 1; an empty name is 0."""
    order = {name: code for code, name in enumerate(sorted(set(names) - {""}), start=1)}
    return np.array([order.get(name, 0) for name in names], np.int32)
