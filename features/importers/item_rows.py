"""Rows to items: many rows of one item become one, field by field, in memory that grows with the catalogue and not the file."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import pandas as pd

from features.catalogue import Item

Picks = Mapping[str, str]
_COMPACT_ROWS = 500_000
_COUNTED = ("most_frequent", "median")


class ItemTable:
    """Collects the rows of items and picks each field's value among them.

    Args:
        picks: field to first, last, minimum, maximum, most_frequent or median. Missing values never count; a tie of
            most_frequent goes to the value seen first.
    """

    def __init__(self, picks: Picks) -> None:
        self._simple = {name: pick for name, pick in picks.items() if pick not in _COUNTED}
        self._counted = {name: pick for name, pick in picks.items() if pick in _COUNTED}
        self._kept: list[pd.DataFrame] = []
        self._counts: dict[str, list[pd.DataFrame]] = {name: [] for name in self._counted}
        self._pending = 0

    def add(self, frame: pd.DataFrame) -> None:
        """Adds rows in file order: ``item_id`` and one column per field."""
        self._kept.append(self._merge([frame]))
        for name in self._counted:
            self._counts[name].append(_count(frame, name))
        self._pending += len(frame)
        if self._pending >= max(_COMPACT_ROWS, len(self._kept[0])):
            self._compact()

    def rows(self) -> pd.DataFrame:
        """Returns one row per item, indexed by ``item_id`` in order of first appearance."""
        if not self._kept:
            return pd.DataFrame()
        self._compact()
        picked = self._kept[0].set_index("item_id")
        for name, pick in self._counted.items():
            counts = self._counts[name][0]
            picked[name] = _mode(counts, name) if pick == "most_frequent" else _median(counts, name)
        return picked

    def _compact(self) -> None:
        self._kept = [self._merge(self._kept)]
        for name, parts in self._counts.items():
            merged = pd.concat(parts)
            self._counts[name] = [merged.groupby(["item_id", name], sort=False, as_index=False)["count"].sum()]
        self._pending = 0

    def _merge(self, parts: list[pd.DataFrame]) -> pd.DataFrame:
        """Merges partial picks; each of these picks of picks is the pick of the whole."""
        ways = {"minimum": "min", "maximum": "max"}
        columns = {name: ways.get(pick, pick) for name, pick in self._simple.items()}
        frame = pd.concat(parts)
        grouped = frame.groupby("item_id", sort=False, as_index=False)
        return grouped.agg(columns) if columns else frame[["item_id"]].drop_duplicates()


def _count(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    return frame.groupby(["item_id", name], sort=False).size().reset_index(name="count")


def _mode(counts: pd.DataFrame, name: str) -> pd.Series:
    ranked = counts.sort_values("count", ascending=False, kind="stable")
    return ranked.drop_duplicates("item_id").set_index("item_id")[name]


def _median(counts: pd.DataFrame, name: str) -> pd.Series:
    """Returns the median of counted values, the mean of the middle two when their number is even."""
    ordered = counts.sort_values(["item_id", name])
    below = ordered.groupby("item_id")["count"].cumsum()
    total = ordered.groupby("item_id")["count"].transform("sum")
    lower = ordered[below * 2 >= total].drop_duplicates("item_id").set_index("item_id")[name]
    upper = ordered[below * 2 > total].drop_duplicates("item_id").set_index("item_id")[name]
    return (lower + upper) / 2


def build_items(rows: pd.DataFrame) -> Iterator[Item]:
    """Yields an item per row of ``ItemTable.rows``."""
    for row in rows.reset_index().to_dict("records"):
        yield _item({name: value for name, value in row.items() if _present(value)})


def _present(value: Any) -> bool:
    return isinstance(value, tuple) or not pd.isna(value)


def _item(row: dict[str, Any]) -> Item:
    listed_at: pd.Timestamp | None = row.get("listed_at")
    return Item(
        item_id=row["item_id"],
        title=row["title"],
        text=row.get("text", ""),
        category=row.get("category", ""),
        brand=row.get("brand", ""),
        price_micros=round(row["price"] * 1_000_000) if "price" in row else None,
        currency=row.get("currency", ""),
        stock=int(row["stock"]) if "stock" in row else None,
        channels=row.get("channels", ()),
        image_ref=row.get("image_ref", ""),
        attributes=parse_attributes(row.get("attributes")) or {},
        listed_at=_datetime(listed_at),
    )


def _datetime(value: pd.Timestamp | None) -> datetime | None:
    return None if value is None else value.to_pydatetime()


def parse_attributes(text: str | None) -> dict[str, str] | None:
    """Returns a JSON object as text values, None when it is not an object."""
    try:
        given = json.loads(text or "{}")
    except ValueError:
        return None
    return (
        {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
        if isinstance(given, dict)
        else None
    )


def parse_list(value: Any, separator: str) -> tuple[str, ...] | None:
    """Returns a list given as a list, a JSON array or separated text; None when it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else value.split(separator)
        except ValueError:
            return None
    return tuple(str(part).strip() for part in value or () if str(part).strip())
