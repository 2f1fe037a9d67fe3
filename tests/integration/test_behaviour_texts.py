"""What a state says of an event in words, and how it was rated: the SQL function and the code that reads it agree, whatever is written."""

import uuid
from datetime import timedelta

import psycopg
import pytest

from concord.v1 import common_pb2
from features.behaviour import ACTIONS, BEHAVIOUR_COLUMNS, Behaviour, behaviours_of
from features.catalogue import Item, upsert_items
from features.settings import Settings
from features.snapshots import take_snapshot
from tests.integration.fixtures import NewShop
from tests.integration.times import START
from training.dataset import newest_table
from training.events import read_events

ODD = {
    "nothing": None,
    "empty": "",
    "long": "soft " * 2_000,
    "control": "soft\tbut\x01small\r\n",
    "scripts": "柔软但有点小 soft но маленький",
    "right to left": "\u202eناعم لكن صغير\u202c",
    "emoji": "👩‍👧‍👦🙂" * 60,
    "html": "<b>soft</b><script>alert(1)</script>",
    "sql": "'; DROP TABLE events; -- 50 % {}",
    "a rating of its own": "5 of 5: not said by the shop",
}
RATINGS = {None: "", 1.0: "1 of 5", 5.0: "5 of 5", 4.5: "4.5 of 5", 3.3333333333: "3.3 of 5", 2.96: "3 of 5"}


def add(shop: Settings, user: str, rows: list[tuple[str, str | None, float | None]]) -> None:
    """Stores events (action, text, value), the first of them the newest."""
    with psycopg.connect(shop.postgres_dsn) as connection:
        connection.execute("INSERT INTO users (user_id, version) VALUES (%s, %s)", [user, len(rows)])
        for k, (action, text, value) in enumerate(rows):
            item = None if action in ("search", "message") else "pot"
            connection.execute(
                "INSERT INTO events (user_id, event_id, channel, action, item_id, text, value, occurred_at) "
                "VALUES (%s, %s, 'web', %s, %s, %s, %s, %s)",
                [user, uuid.uuid4(), action, item, text, value, START - timedelta(minutes=k)],
            )


def read(shop: Settings, user: str) -> tuple[Behaviour, ...]:
    columns = ", ".join(BEHAVIOUR_COLUMNS)
    with psycopg.connect(shop.postgres_dsn) as connection:
        row = connection.execute(f"SELECT {columns} FROM user_activity_at(%s, 'infinity')", [user]).fetchone()
    assert row is not None
    return behaviours_of(*row)


def test_every_action_has_the_number_of_the_protos_enum(shop: Settings) -> None:
    add(shop, "all", [(action, None, None) for action in ACTIONS])
    with psycopg.connect(shop.postgres_dsn) as connection:
        (codes,) = connection.execute("SELECT recent_action_codes FROM user_activity_at('all', 'infinity')").fetchone() or ((),)
    assert codes == [common_pb2.Action.Value(f"ACTION_{action.upper()}") for action in ACTIONS]
    assert [seen.action for seen in read(shop, "all")] == list(ACTIONS)
    add(shop, "odd", [("teleport", None, None)])
    assert [seen.action for seen in read(shop, "odd")] == ["unspecified"]


@pytest.mark.parametrize("action", ["rate", "review"])
def test_a_rating_comes_before_the_review(shop: Settings, action: str) -> None:
    rows = [(action, text, rating) for text in ODD.values() for rating in RATINGS][:50]
    add(shop, action, rows)
    for (_, text, rating), seen in zip(rows, read(shop, action), strict=True):
        parts = [part for part in (RATINGS[rating], text) if part]
        assert seen.text == ": ".join(parts)[:160]
        if rating is not None:
            assert seen.rating == float(RATINGS[rating].split()[0])
            assert seen.words == seen.text.removeprefix(RATINGS[rating]).removeprefix(": ")


@pytest.mark.parametrize("action", ["search", "message", "view"])
def test_other_texts_are_as_they_were(shop: Settings, action: str) -> None:
    add(shop, action, [(action, text, 4.0) for text in ODD.values()])
    seen = read(shop, action)
    assert [one.text for one in seen] == [(text or "")[:160] for text in ODD.values()]
    assert {one.rating for one in seen} == {None}
    assert [one.words for one in seen] == [one.text for one in seen]


def test_a_low_rating_is_no_interest_in_training_nor_in_the_profile(new_shop: NewShop) -> None:
    """Of three items that somebody rated the one rated 2 counts as if it had not been touched, and one without a rating as ever."""
    shop = new_shop()
    items = ("pot", "pan", "cup")
    with psycopg.connect(shop.postgres_dsn) as connection:
        upsert_items(connection, [Item(item, item, category=f"{item}s", listed_at=START) for item in items])
        connection.execute("INSERT INTO users (user_id, version) VALUES ('ann', 3)")
        for k, (item, action, value) in enumerate(zip(items, ("rate", "review", "review"), (2.9, 3.0, None), strict=True)):
            connection.execute(
                "INSERT INTO events (user_id, event_id, channel, action, item_id, value, occurred_at) "
                "VALUES ('ann', %s, 'web', %s, %s, %s, %s)",
                [uuid.uuid4(), action, item, value, START + timedelta(minutes=k)],
            )
        take_snapshot(connection, START + timedelta(days=1))
        table = newest_table(connection)
        log = read_events(connection, table)
        (categories,) = connection.execute("SELECT top_categories FROM user_profile WHERE user_id = 'ann'").fetchone() or ((),)
    assert [None if row < 0 else table.ids[row] for row in log.item] == [None, "pan", "cup"]
    assert sorted(categories) == ["cups", "pans"]
