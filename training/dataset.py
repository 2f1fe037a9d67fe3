"""Point-in-time rows: what was known of customers and items just before a label, joined by Feast on PostgreSQL."""

import bisect
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from feast import FeatureStore
from feast.errors import FeastObjectNotFoundException

from features.behaviour import BEHAVIOUR_COLUMNS, MICROS_PER_DAY, Activity, behaviour_text, behaviours_of
from features.catalogue import publish_epoch
from features.item_table import POPULARITY, FloatArray, ItemTable, load_item_table
from features.ranking import Profile
from features.settings import Settings
from features.snapshots import take_snapshot
from features.store import contract_of, feature_store
from training.config import TrainConfig
from training.descriptions import Descriptions, read_descriptions
from training.events import EventLog, Micros, from_micros, read_events, to_micros
from training.join import Column, Job, join
from training.progress import bar, quiet
from training.shards import Shards

SERVICE = "ranking_v1"
_GROUPS_IN_MEMORY = 4


class TrainingDataError(Exception):
    """There is nothing to train or evaluate on; the message says what is missing."""


@dataclass(frozen=True)
class Customer:
    """What was known of a customer at one time."""

    activity: Activity
    profile: Profile


@dataclass(frozen=True)
class Split:
    """Times that divide the event log, microseconds of Unix time.

    The tower trains on visits in [begin, ranker_start), the ranker on those in [ranker_start, cut), which also validate
    the tower; the holdout is what follows the cut. A split by sessions has no such times: there, all three
    are the end: the cut, or that of the log.
    """

    begin: Micros
    ranker_start: Micros
    cut: Micros
    end: Micros


@dataclass(frozen=True)
class Shop:
    """All a run reads of the shop: the newest epoch's items and how they were described before, the event log and the Feast store."""

    table: ItemTable
    log: EventLog
    store: FeatureStore
    dsn: str
    descriptions: Descriptions


def open_shop(settings: Settings) -> Shop:
    """Reads catalogue and events; publishes the catalogue's first epoch when there is none yet.

    Raises:
        TrainingDataError: no items, no events, or the Feast repository was not applied.
    """
    with psycopg.connect(settings.postgres_dsn) as connection:
        table = newest_table(connection)
        descriptions = read_descriptions(connection, table)
        log = read_events(connection, table)
    if not len(table) or not len(log):
        raise TrainingDataError(f"{len(table)} items and {len(log)} events: import both first")
    return Shop(table, log, open_store(settings), settings.postgres_dsn, descriptions)


def newest_table(connection: "psycopg.Connection[tuple[Any, ...]]") -> ItemTable:
    """Returns the newest epoch's items; publishes a first epoch when there is none."""
    table = load_item_table(connection)
    if not table.index_version:
        publish_epoch(connection)
        table = load_item_table(connection)
    return table


def open_store(settings: Settings) -> FeatureStore:
    """Returns the Feast store.

    Raises:
        TrainingDataError: the Feast repository was not applied.
    """
    with quiet():
        store = feature_store(settings)
        try:
            store.get_feature_service(SERVICE)
        except FeastObjectNotFoundException:
            raise TrainingDataError(f"the Feast registry has no {SERVICE}: apply the repository first") from None
    return store


def split_of(log: EventLog, config: TrainConfig) -> Split:
    """Returns the split of a log.

    Raises:
        TrainingDataError: the cut is not inside the log.
    """
    return split_between(*log.window(), config)


def split_between(begin: Micros, last: Micros, config: TrainConfig) -> Split:
    """Returns the split of a log whose first and last events are given; raises as ``split_of``."""
    end = last + 1
    if config.split == "session" and not config.cut:
        return Split(begin, end, end, end)
    cut = to_micros(datetime.fromisoformat(config.cut)) if config.cut else end - int((end - begin) * config.holdout_fraction)
    if config.split == "session" and begin < cut:
        return Split(begin, min(cut, end), min(cut, end), min(cut, end))
    if not begin < cut < end:
        raise TrainingDataError(f"the cut {config.cut or config.holdout_fraction} is not inside the events' period")
    return Split(begin, cut - int((cut - begin) * config.ranker_fraction), cut, end)


class Customers:
    """What was known of customers at their times: on disk, by (customer, time); only the groups read last are in memory.

    Looking up in the order of time, as labels are, reads each group once.
    """

    def __init__(self, shards: Shards) -> None:
        index = shards.index()
        self._ends, self._places = [end for end, _ in index], [place for _, place in index]
        self._shards = shards
        self._group = lru_cache(maxsize=_GROUPS_IN_MEMORY)(self._read)

    def __getitem__(self, key: tuple[str, Micros]) -> Customer:
        """Returns the customer; raises KeyError for a key that was not joined."""
        place = bisect.bisect_left(self._ends, (key[1], key[0]))
        if place == len(self._ends):
            raise KeyError(key)
        return self._group(place)[key]

    def _read(self, place: int) -> dict[tuple[str, Micros], Customer]:
        return {(row["user_id"], row["at"]): _customer(row) for row in self._shards.read(*self._places[place]).to_pylist()}


def join_customers(store: FeatureStore, keys: Iterable[tuple[str, Micros]], folder: Path | None = None) -> Customers:
    """Joins what was known of each (customer, time) strictly before that time.

    Args:
        store: the shop's Feast store.
        keys: read once, in any order; the same one may come again.
        folder: keeps what was joined, and lets a killed join of the same keys go on; by default it is gone with the result.
    """
    if folder is not None:
        return Customers(join(customer_job(store), keys, folder))
    temporary = Path(tempfile.mkdtemp(prefix="concord-customers-"))
    customers = Customers(join(customer_job(store), keys, temporary))
    weakref.finalize(customers, shutil.rmtree, temporary, ignore_errors=True)
    return customers


def customer_job(store: FeatureStore, carried: Sequence[Column] = ()) -> Job:
    """Returns the join of everything that the contract's service takes from the views on customers."""
    return Job(store, _references(store, "user_activity", "user_profile"), carried=carried)


def behaviour_texts(shop: Shop, keys: Iterable[tuple[str, Micros]], customers: Customers, limit: int) -> Iterator[str]:
    """Yields the behaviour text of each (customer, time), items called as they were before it; empty where there is nothing to say."""
    for key in keys:
        yield behaviour_text(customers[key].activity, shop.descriptions.before(key[1]).title_of, limit=limit)


class Snapshots:
    """The item table as it stood at each snapshot time of a run."""

    def __init__(self, tables: dict[Micros, ItemTable]) -> None:
        self._times = sorted(tables)
        self._tables = tables

    def before(self, time: Micros) -> ItemTable:
        """Returns the newest table from strictly before ``time``.

        Raises:
            KeyError: there is none.
        """
        place = bisect.bisect_left(self._times, time)
        if not place:
            raise KeyError(time)
        return self._tables[self._times[place - 1]]


def take_snapshots(shop: Shop, *, start: Micros, cut: Micros, every_days: int) -> Snapshots:
    """Takes popularity snapshots every ``every_days`` back from just before the cut until one precedes ``start``, and joins them."""
    step = every_days * MICROS_PER_DAY
    times = [cut - 1 - k * step for k in range((cut - start) // step + 2)]
    with psycopg.connect(shop.dsn) as connection:
        for time in bar(times, "feature snapshots"):
            take_snapshot(connection, from_micros(time))
            connection.commit()
    popularity = {time: np.zeros((len(shop.table), len(POPULARITY)), np.float32) for time in times}
    job = Job(shop.store, _references(shop.store, "item_popularity"), key="item_id")
    keys = ((item, time + 1) for time in times for item in shop.table.ids)  # a row is from strictly before its time
    with tempfile.TemporaryDirectory(prefix="concord-snapshots-") as folder:
        _fill(popularity, join(job, keys, Path(folder), "join item snapshots"), shop.table)
    tables = {time: shop.descriptions.before(time + 1) for time in times}
    return Snapshots({time: table.with_popularity(popularity[time], time / MICROS_PER_DAY) for time, table in tables.items()})


def _fill(popularity: dict[Micros, FloatArray], shards: Shards, table: ItemTable) -> None:
    for group in shards.groups():
        places = [table.rows[item] for item in group["item_id"].to_pylist()]
        counts = zip(*(group[name].to_pylist() for name in POPULARITY), strict=True)
        for at, place, values in zip(group["at"].to_pylist(), places, counts, strict=True):
            popularity[at - 1][place] = [value or 0 for value in values]


def visible_items(table: ItemTable) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Returns bool[n]: the items sold at least once by the table's snapshot; offline, only these are ranked."""
    return np.asarray(table.popularity[:, POPULARITY.index("purchases_total")] > 0)


def listed_items(table: ItemTable) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Returns bool[n]: the items listed before the table's snapshot, or bought or looked at by then."""
    return np.asarray((table.age_days > 0) | (table.popularity > 0).any(1))


def _references(store: FeatureStore, *views: str) -> list[str]:
    """Returns the features that the contract's service takes from ``views``; one entity's views a join, never two keys."""
    return [feature.ref for feature in contract_of(store, SERVICE).features if feature.ref.split(":")[0] in views]


def _customer(row: dict[str, Any]) -> Customer:
    behaviours = behaviours_of(*(row[name] or [] for name in BEHAVIOUR_COLUMNS))
    activity = Activity(row["version"] or 0, behaviours, tuple(row["purchased_items"] or ()), tuple(row["purchased_days"] or ()))
    nan = float("nan")
    prices = (nan if row[name] is None else float(row[name]) for name in ("price_mean", "price_low", "price_high"))
    return Customer(activity, Profile(float(row["purchase_count"] or 0), *prices))
