"""Point-in-time rows: what was known of customers and items just before a label, joined by Feast on PostgreSQL."""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import psycopg
from feast import FeatureStore
from feast.errors import FeastObjectNotFoundException

from features.behaviour import MICROS_PER_DAY, Activity, Behaviour
from features.catalogue import publish_epoch
from features.item_table import POPULARITY, ItemTable, load_item_table
from features.materialize import take_snapshot
from features.ranking import Profile
from features.settings import Settings
from features.store import contract_of, feature_store
from training.config import TrainConfig
from training.events import EventLog, Micros, read_events, to_micros
from training.progress import bar, quiet

SERVICE = "ranking_v1"
_BEHAVIOURS = ("recent_items", "recent_actions", "recent_channels", "recent_times", "recent_texts")
# Feast uploads entity rows one by one; beyond some thousand a call only grows slower.
_ROWS_PER_CALL = 10_000


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
    the tower; the holdout is what follows the cut.
    """

    begin: Micros
    ranker_start: Micros
    cut: Micros
    end: Micros

    def folds(self, count: int) -> list[tuple[Micros, Micros]]:
        """Returns the ranker's period in ``count`` parts of equal length."""
        edges = np.linspace(self.ranker_start, self.cut, count + 1).astype(np.int64).tolist()
        return list(itertools.pairwise(edges))


@dataclass(frozen=True)
class Shop:
    """All a run reads of the shop: the newest epoch's items, the event log and the Feast store."""

    table: ItemTable
    log: EventLog
    store: FeatureStore
    dsn: str


def open_shop(settings: Settings) -> Shop:
    """Reads catalogue and events; publishes the catalogue's first epoch when there is none yet.

    Raises:
        TrainingDataError: no items, no events, or the Feast repository was not applied.
    """
    with psycopg.connect(settings.postgres_dsn) as connection:
        table = load_item_table(connection)
        if not table.index_version:
            publish_epoch(connection)
            table = load_item_table(connection)
        log = read_events(connection, table)
    if not len(table) or not len(log):
        raise TrainingDataError(f"{len(table)} items and {len(log)} events: import both first")
    with quiet():
        store = feature_store(settings)
        try:
            store.get_feature_service(SERVICE)
        except FeastObjectNotFoundException:
            raise TrainingDataError(f"the Feast registry has no {SERVICE}: apply the repository first") from None
    return Shop(table, log, store, settings.postgres_dsn)


def split_of(log: EventLog, config: TrainConfig) -> Split:
    """Returns the time split of a log.

    Raises:
        TrainingDataError: the cut is not inside the log.
    """
    begin, last = log.window()
    end = last + 1
    cut = to_micros(datetime.fromisoformat(config.cut)) if config.cut else end - int((end - begin) * config.holdout_fraction)
    if not begin < cut < end:
        raise TrainingDataError(f"the cut {config.cut or config.holdout_fraction} is not inside the events' period")
    return Split(begin, cut - int((cut - begin) * config.ranker_fraction), cut, end)


def join_customers(store: FeatureStore, keys: Iterable[tuple[str, Micros]]) -> dict[tuple[str, Micros], Customer]:
    """Returns what was known of each (customer, time) strictly before that time, by point-in-time join."""
    wanted = sorted(set(keys))
    features = _references(store, "user_activity", "user_profile")
    joined: dict[tuple[str, Micros], Customer] = {}
    for start in bar(range(0, len(wanted), _ROWS_PER_CALL), "point-in-time join"):
        part = wanted[start : start + _ROWS_PER_CALL]
        rows = _join(store, "user_id", [(user, time - 1) for user, time in part], features)
        joined.update({(row["user_id"], row["at"] + 1): _customer(row) for row in rows})
    return joined


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
            take_snapshot(connection, _moment(time))
            connection.commit()
    return Snapshots({time: _table_at(shop, time) for time in bar(times, "join item snapshots")})


def visible_items(table: ItemTable) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Returns bool[n]: the items sold at least once by the table's snapshot; offline, only these are ranked."""
    return np.asarray(table.popularity[:, POPULARITY.index("purchases_total")] > 0)


def _table_at(shop: Shop, time: Micros) -> ItemTable:
    """Joins ``item_popularity`` and the reference price as of ``time``; an item described only later keeps its first price."""
    features = _references(shop.store, "item_popularity", "item_profile")
    rows = _join(shop.store, "item_id", [(item, time) for item in shop.table.ids], features)
    popularity = np.zeros((len(shop.table), len(POPULARITY)), np.float32)
    log_price = shop.table.log_price.copy()
    for row in rows:
        place = shop.table.rows[row["item_id"]]
        popularity[place] = [row[name] or 0 for name in POPULARITY]
        if row["price"]:
            log_price[place] = np.log(row["price"])
    return replace(shop.table.with_popularity(popularity, time / MICROS_PER_DAY), log_price=log_price)


def _references(store: FeatureStore, *views: str) -> list[str]:
    """Returns the features that the contract's service takes from ``views``; one entity's views a join, never two keys."""
    return [feature.ref for feature in contract_of(store, SERVICE).features if feature.ref.split(":")[0] in views]


def _join(store: FeatureStore, key: str, entities: Sequence[tuple[str, Micros]], features: list[str]) -> list[dict[str, Any]]:
    """Runs Feast's point-in-time join for (entity, time) rows; each row comes back with its time as ``at``.

    The time travels as a number too, because Feast hands timestamps back in the database's zone, without saying which.
    """
    names, times = zip(*entities, strict=True)
    frame = pd.DataFrame({key: names, "at": times, "event_timestamp": [_moment(time) for time in times]})
    with quiet():
        joined = store.get_historical_features(entity_df=frame, features=features).to_arrow()
    rows: list[dict[str, Any]] = joined.to_pylist()
    return rows


def _customer(row: dict[str, Any]) -> Customer:
    columns = [row[name] or [] for name in _BEHAVIOURS]
    behaviours = tuple(Behaviour(*values) for values in zip(*columns, strict=True))
    activity = Activity(row["version"] or 0, behaviours, tuple(row["purchased_items"] or ()), tuple(row["purchased_days"] or ()))
    nan = float("nan")
    prices = (nan if row[name] is None else float(row[name]) for name in ("price_mean", "price_low", "price_high"))
    return Customer(activity, Profile(float(row["purchase_count"] or 0), *prices))


def _moment(time: Micros) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time)
