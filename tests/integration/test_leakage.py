"""Nothing from at or after a label's time enters its row: the future is rewritten, and every row must stay what it was to the byte.

That the test can see a leak is shown by planting one in each kind of input.
"""

import random
import uuid
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pytest

from features import snapshots
from features.catalogue import Item, Relation, publish_epoch, upsert_items, upsert_relations
from features.item_table import FloatArray, ItemTable
from features.signals import SignalConfig
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop, add_events
from tests.integration.times import START
from training import collaborative
from training.config import TrainConfig
from training.dataset import behaviour_texts, join_customers, open_shop, take_snapshots
from training.descriptions import Descriptions
from training.events import from_micros, to_micros
from training.exposures import with_exposures
from training.labels import TAKEN, Label, visit_labels
from training.on_sale import read_on_sale
from training.scoring import Model, make_query

USERS = tuple(f"u{k}" for k in range(8))
ITEMS = tuple(f"item{k}" for k in range(10))
ACTIONS = ("view", "click", "search", "add_to_cart", "purchase", "return", "wishlist", "message")
CUT = START + timedelta(days=40)
CONFIG = replace(TrainConfig.tiny(), ease_lambda=5.0)
Connection = psycopg.Connection[tuple[Any, ...]]
Rows = Mapping[str, Mapping[tuple[str, int], bytes]]


@dataclass(frozen=True)
class World:
    """A shop, and the time that divides what its rows may know from what is rewritten."""

    settings: ServerSettings
    turn: int


def record(dsn: str, rng: random.Random, count: int, *, start: datetime, end: datetime, users: tuple[str, ...] = USERS) -> None:
    """Adds events at random times in [start, end), and exposures."""
    minutes = [round((start - START) / timedelta(minutes=1)), round((end - START) / timedelta(minutes=1))]
    drawn = [(rng.choice(users), rng.choice(ACTIONS), rng.choice(ITEMS), rng.randrange(*minutes)) for _ in range(count)]
    add_events(dsn, [(u, action, "web", None if action in ("search", "message") else item, at) for u, action, item, at in drawn])
    with psycopg.connect(dsn) as connection:
        for user, _, _, minute in drawn[: count // 3]:
            show(connection, user, rng.sample(ITEMS, 4), START + timedelta(minutes=minute))


def show(connection: Connection, user: str, items: list[str], at: datetime) -> None:
    connection.execute(
        "INSERT INTO exposures (user_id, exposure_id, slate_id, channel, surface, user_version, model_version, index_version, "
        "offer_version, as_of, item_ids, scores, prices_micros, degraded, stale, answered_at) "
        "VALUES (%s, %s, 's', 'web', 'home', 1, '', 1, 1, %s, %s, '{}', '{}', false, false, %s)",
        [user, uuid.uuid4(), at, items, at],
    )


def catalogue(rng: random.Random, word: str) -> list[Item]:
    listed = START - timedelta(days=3)
    return [
        Item(item, f"{word} {item}", word, f"{word}/{rng.randrange(3)}", word, rng.randrange(1, 9) * 10**6, "EUR", listed_at=listed)
        for item in ITEMS
    ]


@pytest.fixture(scope="module")
def world(new_shop: NewShop) -> World:
    settings, rng = new_shop(), random.Random(3)
    with psycopg.connect(settings.postgres_dsn) as connection:
        upsert_items(connection, catalogue(rng, "plain"))
        upsert_relations(connection, [Relation(ITEMS[0], ITEMS[1], "complement", 0.5), Relation(ITEMS[2], ITEMS[3], "substitute")])
        publish_epoch(connection)
        connection.execute("UPDATE index_epochs SET published_at = %s", [START])
    record(settings.postgres_dsn, rng, 400, start=START, end=CUT)
    times = sorted(label.time for label in labels_of(settings))
    return World(settings, times[len(times) * 2 // 3])


def labels_of(settings: ServerSettings) -> list[Label]:
    log = open_shop(settings).log
    return visit_labels(log, TAKEN, start=to_micros(START), end=to_micros(CUT))


def vectors_of(table: ItemTable) -> FloatArray:
    """Unit vectors that follow the items' texts, as an encoder's would."""
    rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=16) for text in table.texts]
    return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


def rows_before(world: World, keys: list[tuple[str, int]]) -> Rows:
    """Everything a training row is made of, by kind, for (customer, time) up to the world's turn."""
    shop = open_shop(world.settings)
    snapshots = take_snapshots(shop, start=min(at for _, at in keys), cut=to_micros(CUT), every_days=5)
    customers = join_customers(shop.store, keys)
    with psycopg.connect(shop.dsn) as connection:
        on_sale = read_on_sale(connection, shop.table, shop.log)
        known = {key: frozenset(shop.table.rows[item] for item in customers[key].activity.purchased_items) for key in keys}
        labels = with_exposures(connection, [Label(*key, (), known[key]) for key in keys], shop.table, shop.log)
    rows: dict[str, dict[tuple[str, int], bytes]] = defaultdict(dict)
    for key, label, text in zip(keys, labels, behaviour_texts(shop, keys, customers, 16), strict=True):
        customer, table, described = customers[key], snapshots.before(label.time), shop.descriptions.before(label.time)
        weights = collaborative.fit(shop.log, len(shop.table), until=label.time, config=CONFIG)
        user = np.random.default_rng(zlib.crc32(text.encode())).normal(size=16).astype(np.float32)
        model = Model(vectors_of(described), weights, SignalConfig(CONFIG.half_life_days))
        query = make_query(label, customer, user, model=model, table=table)
        rows["activity"][key] = repr(customer.activity).encode() + text.encode()
        rows["profile"][key] = repr(customer.profile).encode()
        rows["popularity"][key] = table.popularity.tobytes() + table.age_days.tobytes()
        rows["descriptions"][key] = repr([table.titles, table.texts, table.category_names, described.titles, described.texts]).encode()
        rows["descriptions"][key] += table.log_price.tobytes() + table.relation_to.tobytes() + table.relation_weight.tobytes()
        rows["collaborative"][key] = weights.indices.tobytes() + weights.weights.tobytes()
        rows["features"][key] = query.candidates.rows.tobytes() + query.features.tobytes()
        rows["exposures"][key] = repr(label.shown).encode()
        rows["on sale"][key] = on_sale.at([label.time]).tobytes()
    return rows


def rewrite_the_future(world: World, seed: int) -> None:
    """Appends, deletes and alters whatever happened at or after the turn; each kind at the very turn too."""
    rng, turn, dsn = random.Random(seed), from_micros(world.turn), world.settings.postgres_dsn
    record(dsn, rng, 150, start=turn + timedelta(minutes=1), end=CUT, users=(*USERS, "newcomer"))
    with psycopg.connect(dsn) as connection:
        for user in USERS:
            connection.execute(
                "INSERT INTO events (user_id, event_id, channel, action, item_id, value, quantity, occurred_at) "
                "VALUES (%s, %s, 'app', 'purchase', %s, 900, 1, %s)",
                [user, uuid.uuid4(), rng.choice(ITEMS), turn],
            )
            show(connection, user, list(ITEMS), turn)
            connection.execute("UPDATE users SET version = version + 1 WHERE user_id = %s", [user])
        gone = connection.execute(
            "DELETE FROM events WHERE occurred_at >= %s AND hashtext(event_id::text) %% 3 = 0 RETURNING user_id", [turn]
        ).fetchall()
        for (user,) in gone:
            connection.execute("UPDATE users SET version = version - 1 WHERE user_id = %s", [user])
        connection.execute(
            "UPDATE events SET action = 'purchase', item_id = %s, value = 77, quantity = 1, text = NULL, session_id = 'other' "
            "WHERE occurred_at >= %s AND hashtext(event_id::text) %% 3 = 1",
            [rng.choice(ITEMS), turn],
        )
        connection.execute("DELETE FROM exposures WHERE answered_at >= %s AND hashtext(exposure_id::text) %% 3 = 0", [turn])
        connection.execute("UPDATE exposures SET item_ids = %s WHERE answered_at > %s", [list(ITEMS[4 + seed :]), turn])
        upsert_items(connection, catalogue(rng, f"future{seed}"))
        upsert_relations(connection, [Relation(ITEMS[0], ITEMS[1], "complement", rng.random()), Relation(ITEMS[4], ITEMS[5], "complement")])
        version = publish_epoch(connection)
        connection.execute("UPDATE index_epochs SET published_at = %s WHERE index_version = %s", [turn, version])
        connection.execute("INSERT INTO offer_history VALUES (%s, %s, 1, 'EUR', NULL, '{}', true, %s)", [ITEMS[seed], 1_000 + seed, turn])


def differing(before: Rows, after: Rows) -> set[str]:
    return {kind for kind, rows in before.items() if dict(rows) != dict(after[kind])}


def keys_up_to(world: World) -> list[tuple[str, int]]:
    """Labels' keys, the last of them at the very turn."""
    found = sorted({(label.user_id, label.time) for label in labels_of(world.settings)}, key=lambda key: key[1])
    return [key for key in found if key[1] <= world.turn]


def test_the_future_can_be_rewritten_without_a_row_changing(world: World) -> None:
    keys = keys_up_to(world)
    assert keys[-1][1] == world.turn
    before = rows_before(world, keys)
    assert sum(len(row) > 0 for row in before["features"].values()) > 30
    assert sum(row != b"()" for row in before["exposures"].values()) > 20
    for rows in before.values():
        assert len(set(rows.values())) > 4 or rows in (before["descriptions"], before["on sale"])
    rewrite_the_future(world, seed=1)
    assert differing(before, rows_before(world, keys)) == set()


def test_a_leak_in_any_input_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each input loses its condition on time; the row's own time stays right, so that Feast's join has no reason to refuse it."""
    keys = keys_up_to(world)
    with psycopg.connect(world.settings.postgres_dsn) as connection:
        row = connection.execute("SELECT pg_get_functiondef('user_activity_at'::regproc)").fetchone()
        assert row is not None
        leaking = row[0].replace("e.occurred_at <= p_as_of", "true").replace("coalesce(latest.at, u.created_at)", "p_as_of")
        assert leaking.count("AND true") == 2
        connection.execute(leaking)
    monkeypatch.setattr(
        snapshots, "_USER_PROFILE", snapshots._USER_PROFILE.replace("e.occurred_at <= %(as_of)s", "%(as_of)s <> 'infinity'")
    )
    monkeypatch.setattr(snapshots, "_ITEM_POPULARITY", snapshots._ITEM_POPULARITY.replace("WHERE occurred_at <= %(as_of)s AND", "WHERE"))
    monkeypatch.setattr(Descriptions, "before", lambda self, time: self._table)
    history = collaborative.history_matrix
    monkeypatch.setattr(collaborative, "history_matrix", lambda log, count, *, until, **more: history(log, count, until=2**62, **more))
    monkeypatch.setattr("training.exposures._shown", lambda answers, time, table, gone: tuple(table.rows[i] for _, s in answers for i in s))
    monkeypatch.setattr("training.on_sale.OnSale.at", lambda self, times: np.isin(np.arange(len(self.first)), self.gap_rows))
    before = rows_before(world, keys)
    rewrite_the_future(world, seed=2)
    after = rows_before(world, keys)
    assert differing(before, after) == set(before)
