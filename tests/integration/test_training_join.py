"""Feast's join by shards: what it gives is what plain Feast gives, in bounded memory, and it goes on where it was killed."""

import os
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import psycopg
import pyarrow.parquet as pq
import pytest

from features.catalogue import Item, upsert_items
from features.snapshots import snapshot_grid, take_snapshot
from features.store import feature_store
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop, add_events
from tests.integration.times import START
from training import join as joining
from training.config import TrainConfig
from training.dataset import customer_job, join_customers, open_shop
from training.events import from_micros, read_events, stream_events, to_micros
from training.exposures import with_exposures
from training.join import join
from training.labels import Label, visit_labels
from training.on_sale import read_on_sale
from training.progress import quiet
from training.sets import write_set

USERS = (*(f"user {k}" for k in range(12)), "zoë", "客户")
ITEMS = tuple(f"item{k}" for k in range(9))


@pytest.fixture(scope="module")
def filled(new_shop: NewShop) -> ServerSettings:
    settings, rng = new_shop(), random.Random(5)
    with psycopg.connect(settings.postgres_dsn) as connection:
        upsert_items(connection, [Item(item, f"the {item}", price_micros=12_000_000, currency="EUR", listed_at=START) for item in ITEMS])
    actions = ("view", "add_to_cart", "purchase", "search")
    drawn = [(rng.choice(USERS), rng.choice(actions), rng.choice(ITEMS), rng.randrange(30 * 1440)) for _ in range(600)]
    add_events(settings.postgres_dsn, [(u, action, "web", None if action == "search" else item, at) for u, action, item, at in drawn])
    with psycopg.connect(settings.postgres_dsn) as connection:
        for as_of in snapshot_grid(connection, every_days=7):
            take_snapshot(connection, as_of)
    return settings


def keys_of(settings: ServerSettings) -> list[tuple[str, int]]:
    """Every moment of every customer, one before everything, one of nobody."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        rows = connection.execute("SELECT user_id, occurred_at FROM events").fetchall()
    return [*((user, to_micros(at)) for user, at in rows), (USERS[0], to_micros(START)), ("nobody", to_micros(START) + 10**9)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_the_join_is_plain_feasts_join(filled: ServerSettings, tmp_path: Path) -> None:
    keys = keys_of(filled)
    job = joining.Job(feature_store(filled), customer_job(feature_store(filled)).features, rows_per_shard=300)
    shards = join(job, iter(keys + keys[:20]), tmp_path)
    ours = rows_of(tmp_path)
    assert len(shards.paths()) == -(-len(set(keys)) // 300)
    assert [(row["at"], row["user_id"].encode()) for row in ours] == sorted((at, user.encode()) for user, at in set(keys))
    frame = pd.DataFrame([{"user_id": user, "at": at, "event_timestamp": from_micros(at - 1)} for user, at in set(keys)])
    with quiet():
        plain = feature_store(filled).get_historical_features(entity_df=frame, features=list(job.features)).to_arrow().to_pylist()
    theirs = {(row["user_id"], row["at"]): row for row in plain}
    for row in ours:
        expected = theirs[row["user_id"], row["at"]]
        assert row == {name: expected[name] for name in row}
    assert sum(row["version"] is None for row in ours) >= 2
    assert any(row["price_mean"] for row in ours)


def test_a_customer_is_found_by_key_in_whatever_order(filled: ServerSettings) -> None:
    keys = keys_of(filled)
    customers = join_customers(feature_store(filled), keys)
    random.Random(1).shuffle(keys)
    for user, at in keys:
        newest = customers[user, at].activity.newest
        assert newest < at
    with pytest.raises(KeyError):
        customers["nobody", 1]


def test_a_killed_join_goes_on_after_its_last_whole_shard(filled: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, store = keys_of(filled), feature_store(filled)
    job = joining.Job(store, customer_job(store).features, rows_per_shard=200)
    whole = rows_of(join(job, keys, tmp_path / "whole").folder)
    call, calls = joining._call, []

    def dying(connection: Any, *arguments: Any, shard: int, turn: int) -> Any:
        calls.append(shard)
        if shard == 2:
            connection.close()  # as the death of the process would: its schema stays behind
            raise KeyboardInterrupt
        return call(connection, *arguments, shard=shard, turn=turn)

    monkeypatch.setattr(joining, "_call", dying)
    with pytest.raises(KeyboardInterrupt):
        join(job, keys, tmp_path / "killed")
    assert len(rows_of(tmp_path / "killed")) == 400
    assert schemas(filled) != []
    monkeypatch.setattr(
        joining, "_call", lambda *arguments, shard, turn: (calls.append(shard), call(*arguments, shard=shard, turn=turn))[1]
    )
    calls.clear()
    add_events(filled.postgres_dsn, [(USERS[0], "view", "web", ITEMS[0], 40 * 1440)])  # the shop goes on, after every row
    assert rows_of(join(job, reversed(keys), tmp_path / "killed").folder) == whole
    assert min(calls) == 2
    assert schemas(filled) == []
    calls.clear()
    add_events(filled.postgres_dsn, [(USERS[0], "view", "web", ITEMS[0], 1)])  # late: rows of before it are wrong now
    join(job, keys, tmp_path / "killed")
    assert min(calls) == 0


def schemas(settings: ServerSettings) -> list[Any]:
    with psycopg.connect(settings.postgres_dsn) as connection:
        return connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'concord_join_%'").fetchall()


_PEAK = """
import resource, sys
from pathlib import Path
from features.settings import Settings
from features.store import feature_store
from training.dataset import customer_job
from training.join import Job, join
store = feature_store(Settings())
job = Job(store, customer_job(store).features, rows_per_shard=250)
for count in (500, 2_000):
    rows = ((f"h{k % 64}", 1_767_225_600_000_000 + 60_000_000 * (200 + k)) for k in range(count))
    for group in join(job, rows, Path(sys.argv[1]) / str(count)).groups():
        group.to_pylist()
    print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_rows(new_shop: NewShop, tmp_path: Path) -> None:
    """Rows of 50 behaviours, 500 and then 2,000 of them in one process: as Python values the 1,500 more would be some 40 MB."""
    settings = new_shop()
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute("INSERT INTO users (user_id, version) SELECT 'h' || n, 70 FROM generate_series(0, 63) n")
        connection.execute(
            "INSERT INTO events (user_id, event_id, channel, action, item_id, text, occurred_at) "
            "SELECT 'h' || n, gen_random_uuid(), 'web', 'view', 'item' || m, repeat('words ', 20), "
            "%s::timestamptz + m * interval '1 minute' FROM generate_series(0, 63) n, generate_series(1, 70) m",
            [START],
        )
    environment = os.environ | {"CONCORD_POSTGRES_DSN": settings.postgres_dsn, "CONCORD_REDIS_URL": settings.redis_url}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert peaks[1] - peaks[0] < 16 * 1024, peaks


def test_a_log_in_pieces_is_the_log(filled: ServerSettings) -> None:
    shop = open_shop(filled)
    with psycopg.connect(filled.postgres_dsn) as connection:
        pieces = list(stream_events(connection, shop.table, rows=60))
    assert len(pieces) > 3
    assert tuple(user for piece in pieces for user in piece.users) == shop.log.users
    assert sum(map(len, pieces)) == len(shop.log)
    window = {"start": shop.log.window()[0], "end": shop.log.window()[1]}
    whole = visit_labels(shop.log, ("purchase",), **window)
    parted = [label for piece in pieces for label in visit_labels(piece, ("purchase",), **window)]
    assert sorted(parted, key=lambda label: (label.time, label.user_id)) == whole
    assert whole


def test_a_set_for_outside_use_describes_itself(filled: ServerSettings, tmp_path: Path) -> None:
    report = write_set(filled, TrainConfig(cut=(START + timedelta(days=24)).isoformat()), tmp_path)
    rows = rows_of(tmp_path)
    assert report.row_count == len(rows) > 50
    assert {row["part"] for row in rows} == {"tower", "ranker", "holdout"}
    assert all(meaning for name, _, meaning in report.columns if name not in {"price_mean"})
    assert all(max(row["recent_times"] or [0]) < row["at"] for row in rows)
    for row in rows:
        assert not set(row["targets"]) & set(row["bought"])
        if row["part"] != "holdout":
            assert set(row["targets"]) <= set(row["taken"])
        assert set(row["purchased_items"] or ()) == set(row["bought"])
    schema = (tmp_path / "schema.json").read_text()
    assert all(f'"{name}"' in schema for name in rows[0])


@pytest.fixture
def connection(filled: ServerSettings) -> Iterator["psycopg.Connection[tuple[Any, ...]]"]:
    with psycopg.connect(filled.postgres_dsn) as opened:
        yield opened
        opened.rollback()


def test_exposures_follow_their_persona_and_keep_to_the_past(filled: ServerSettings, connection: Any) -> None:
    shop = open_shop(filled)

    def show(user: str, items: list[str], minutes: float, origin: str | None = None) -> None:
        connection.execute(
            "INSERT INTO exposures (user_id, origin_id, exposure_id, slate_id, channel, surface, user_version, model_version, "
            "index_version, offer_version, as_of, item_ids, scores, prices_micros, degraded, stale, answered_at) "
            "VALUES (%s, %s, %s, 's', 'web', 'home', 1, '', 1, 1, now(), %s, '{}', '{}', false, false, %s)",
            [user, origin, uuid.uuid4(), items, START + timedelta(minutes=minutes)],
        )

    connection.execute("INSERT INTO users (user_id, merged_into) VALUES ('ann', NULL), ('left', NULL), ('guest', 'ann')")
    add = "INSERT INTO events (user_id, event_id, channel, action, item_id, occurred_at) VALUES (%s, %s, 'web', %s, %s, %s)"
    for user, action, item in (("left", "add_to_cart", "item5"), ("left", "view", "item6"), ("ann", "view", "item1")):
        connection.execute(add, [user, uuid.uuid4(), action, item, START + timedelta(minutes=90)])
    show("left", ["item5", "item6"], 80)
    show("ann", ["item1", "item2", "unknown"], 100)
    show("guest", ["item3"], 120)  # merged since: hers now
    show("ann", ["item4"], 130, origin="left")  # of a persona that has left her
    show("ann", ["item7"], 200)  # at the very time of the visit
    rows, time = {name: shop.table.rows[name] for name in ITEMS}, to_micros(START + timedelta(minutes=200))
    labels = [Label("ann", time, (rows["item0"],), frozenset({rows["item2"]})), Label("left", time, (rows["item0"],), frozenset())]
    ann, left = with_exposures(connection, labels, shop.table, read_events(connection, shop.table))
    assert ann.shown == (rows["item3"], rows["item1"])
    assert left.shown == (rows["item4"], rows["item6"])  # the last shown first; item5 was put into the cart


def test_what_was_removed_is_off_sale_until_it_returns(filled: ServerSettings, connection: Any) -> None:
    shop = open_shop(filled)
    history = "INSERT INTO offer_history VALUES (%s, %s, 1, 'EUR', NULL, '{}', %s, %s)"
    for version, removed, day in ((10, True, 5), (11, True, 6), (12, False, 8), (13, True, 20)):
        connection.execute(history, ["item1", version, removed, START + timedelta(days=day)])
    there = read_on_sale(connection, shop.table, shop.log)
    row = shop.table.rows["item1"]
    days = [5, 5.01, 7, 8, 8.01, 20.01, 90]
    seen = there.at([to_micros(START + timedelta(days=day)) for day in days])
    assert seen[:, row].tolist() == [True, False, False, False, True, False, False]
    assert seen[:, shop.table.rows["item2"]].all()
    assert not there.at([to_micros(START)]).any()
