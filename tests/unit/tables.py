"""A small item table, a model of plain arithmetic, and customers, for tests of the shared signals."""

import numpy as np

from features.behaviour import MICROS_PER_DAY, Activity, Behaviour
from features.item_table import POPULARITY, ItemTable

DAY = MICROS_PER_DAY


def table(count: int = 40, *, categories: int = 4, index_version: int = 1) -> ItemTable:
    """``count`` items i000, i001, ... in ``categories`` categories; popularity falls with the number."""
    ids = tuple(f"i{k:03d}" for k in range(count))
    codes = np.arange(count, dtype=np.int32) % categories + 1
    popularity = np.zeros((count, len(POPULARITY)), np.float32)
    popularity[:, 1] = np.arange(count, 0, -1)
    return ItemTable(
        index_version=index_version,
        ids=ids,
        titles=tuple(f"title {item}" for item in ids),
        texts=tuple(f"text {item}" for item in ids),
        content_hashes=tuple(f"h{item}" for item in ids),
        category_names=tuple(f"c{code}" for code in codes),
        brand_names=("brand",) * count,
        categories=codes,
        brands=np.ones(count, np.int32),
        log_price=np.log(np.arange(count) + 1.0).astype(np.float32),
        popularity=popularity,
        age_days=np.full(count, 100, np.float32),
        relation_from=np.zeros(0, np.int32),
        relation_to=np.zeros(0, np.int32),
        relation_weight=np.zeros(0, np.float32),
        listed_days=np.zeros(count),
    )


def activity(*behaviours: tuple[str, str, float], purchased: tuple[tuple[str, int], ...] = ()) -> Activity:
    """(item, action, days ago) newest first; purchased as (item, day since 1970)."""
    newest = 20_000 * DAY
    return Activity(
        version=len(behaviours),
        behaviours=tuple(Behaviour(item, action, "web", int(newest - ago * DAY)) for item, action, ago in behaviours),
        purchased_items=tuple(item for item, _ in purchased),
        purchased_days=tuple(day for _, day in purchased),
    )
