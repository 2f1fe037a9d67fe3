"""What a replay stands on: every epoch, every offer and every customer's activity can be read as it was."""

import time
import uuid
from datetime import timedelta

import psycopg

from features.catalogue import Item, Relation, publish_epoch, upsert_items, upsert_relations
from features.item_table import load_item_table
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.integration.times import START


def items(count: int, *, price: int = 1_000_000) -> list[Item]:
    return [Item(f"i{k:04d}", f"thing {k}", price_micros=price + k, currency="EUR", stock=k) for k in range(count)]


def test_every_epoch_keeps_its_relations(shop: ServerSettings) -> None:
    def edge(version: int) -> list[float]:
        with psycopg.connect(shop.postgres_dsn) as connection:
            return [round(float(weight), 3) for weight in load_item_table(connection, version).relation_weight]

    def relate(*weights: float, publish: bool = True) -> int:
        with psycopg.connect(shop.postgres_dsn) as connection:
            for weight in weights:
                upsert_relations(connection, [Relation("i0001", "i0002", "complement", weight)])
            return publish_epoch(connection) if publish else 0

    with psycopg.connect(shop.postgres_dsn) as connection:
        upsert_items(connection, items(5))
    first, second = relate(0.5), relate(0.7)
    relate(0.9, publish=False)  # not yet part of any epoch
    assert (edge(first), edge(second)) == ([0.5], [0.7])
    third, fourth = relate(0.9, 0.8, 0.7), relate(0.7)  # back to where it was, and the same again
    fifth = relate(0.5)
    assert [edge(version) for version in (first, second, third, fourth, fifth)] == [[0.5], [0.7], [0.7], [0.7], [0.5]]
    with psycopg.connect(shop.postgres_dsn) as connection:
        upsert_relations(connection, [Relation("i0001", "i0002", "complement", weight) for weight in (0.1, 0.2)])
        newest = publish_epoch(connection)
    assert edge(newest) == [0.2]  # of two edges in one call the later wins


def test_every_offer_is_kept_with_its_version(new_shop: NewShop) -> None:
    shop = new_shop()
    with psycopg.connect(shop.postgres_dsn) as connection:
        upsert_items(connection, items(3))
        upsert_items(connection, items(3))  # changes nothing, so leaves no trace
        upsert_items(connection, [Item("i0001", "renamed", price_micros=1_000_001, currency="EUR", stock=1)])  # nor does a new title
        upsert_items(connection, [Item("i0001", "renamed", price_micros=9_000_000, currency="EUR", stock=1)])
        upsert_items(connection, [Item("i0001", "renamed", price_micros=9_000_000, currency="EUR", stock=0, channels=("web",))])
        rows = connection.execute(
            "SELECT item_id, offer_version, price_micros, stock, channels FROM offer_history ORDER BY item_id, offer_version"
        ).fetchall()
        standing = connection.execute("SELECT item_id, offer_version, price_micros, stock, channels FROM items ORDER BY item_id").fetchall()
    assert rows == [
        ("i0000", 1, 1_000_000, 0, []),
        ("i0001", 1, 1_000_001, 1, []),
        ("i0001", 2, 9_000_000, 1, []),
        ("i0001", 3, 9_000_000, 0, ["web"]),
        ("i0002", 1, 1_000_002, 2, []),
    ]
    assert standing == [rows[0], rows[3], rows[4]]


def test_four_thousand_items_import_in_seconds_with_their_history(new_shop: NewShop) -> None:
    shop = new_shop()
    with psycopg.connect(shop.postgres_dsn) as connection:
        for price in (1_000_000, 2_000_000):
            started = time.monotonic()
            upsert_items(connection, items(4_000, price=price))
            assert time.monotonic() - started < 5
        row = connection.execute("SELECT count(*), count(DISTINCT offer_version) FROM offer_history").fetchone()
    assert row == (8_000, 2)


def test_activity_is_known_as_it_was_at_every_version(new_shop: NewShop) -> None:
    shop = new_shop()
    query = "SELECT version, recent_items, purchased_items, views_7d FROM user_activity_at('u', 'infinity', %s)"
    with psycopg.connect(shop.postgres_dsn) as connection:
        connection.execute("INSERT INTO users (user_id) VALUES ('u')")
        # The second arrives late: it happened before the first. One of before versions were noted (an old import) counts always.
        for version, item, action, minutes in (
            (1, "a", "view", 10),
            (2, "b", "purchase", 5),
            (None, "old", "view", 1),
            (4, "c", "view", 20),
        ):
            connection.execute(
                "INSERT INTO events (user_id, event_id, channel, action, item_id, occurred_at, version) "
                "VALUES ('u', %s, 'web', %s, %s, %s, %s)",
                [uuid.uuid4(), action, item, START + timedelta(minutes=minutes), version],
            )
        connection.execute("UPDATE users SET version = 4")
        seen = {version: connection.execute(query, [version]).fetchone() for version in (0, 1, 2, 3, 4)}
        newest = connection.execute(
            "SELECT version, recent_items, purchased_items, views_7d FROM user_activity_at('u', 'infinity')"
        ).fetchone()
    assert seen == {
        0: (0, ["old"], [], 1),
        1: (1, ["a", "old"], [], 2),
        2: (2, ["a", "b", "old"], ["b"], 2),
        3: (3, ["a", "b", "old"], ["b"], 2),
        4: (4, ["c", "a", "b", "old"], ["b"], 3),
    }
    assert newest == seen[4]


def test_a_regrouping_is_noted_with_its_version(new_shop: NewShop) -> None:
    shop = new_shop()
    with psycopg.connect(shop.postgres_dsn) as connection:
        connection.execute("INSERT INTO users (user_id, version) VALUES ('u', 3)")
        connection.execute("UPDATE users SET version = 4")
        assert connection.execute("SELECT regrouped_version FROM users").fetchone() == (0,)
        connection.execute("UPDATE users SET version = 9, membership = membership + 1")
        connection.execute("UPDATE users SET version = 10")
        assert connection.execute("SELECT regrouped_version FROM users").fetchone() == (9,)
