"""Sentiment in the profile: counted from each event's time, in Feast's own bytes, moved and erased with the customer."""

import asyncio
import itertools
import random
import uuid
from datetime import UTC, datetime, timedelta
from statistics import fmean
from typing import Any

import pandas as pd
import psycopg
import pytest
import redis

from features.layout import entity_key
from features.materialize import materialize
from features.registry import load_registry
from features.settings import Settings
from features.snapshots import take_snapshot
from features.store import feature_store
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.integration.replicas import Names, Pair, app, query, replica, web
from tests.integration.sentiments import judge, opinion, write_event
from tests.integration.test_forget import traces
from tests.integration.times import START

DAY = timedelta(days=1)
FEATURES = ("sentiment_count", "sentiment_mean", "sentiment_last")


@pytest.fixture(scope="module")
def shop(new_shop: NewShop) -> ServerSettings:
    return new_shop()


@pytest.fixture
def user() -> str:
    return uuid.uuid4().hex


def snapshot(settings: Settings, as_of: datetime, user: str) -> tuple[Any, ...]:
    with psycopg.connect(settings.postgres_dsn) as connection:
        take_snapshot(connection, as_of)
    rows = query(settings, f"SELECT {', '.join(FEATURES)} FROM user_profile WHERE user_id = %s AND event_timestamp = %s", user, as_of)
    return tuple(rows[0].values())


def test_count_mean_and_last_of_ninety_days(shop: ServerSettings, user: str) -> None:
    for day, score in ((-91, -1.0), (-90, -0.9), (-89, 0.5), (-2, None), (-1, -0.25), (0, 0.75)):
        opinion(shop, user, START + day * DAY, score)
    write_event(shop, user, START - DAY / 2, "not judged yet")
    assert snapshot(shop, START, user) == (3, pytest.approx((0.5 - 0.25 + 0.75) / 3), 0.75)
    assert snapshot(shop, START + 200 * DAY, user) == (0, None, None)


def test_a_judgement_counts_from_its_events_time_whenever_it_was_made(shop: ServerSettings, user: str) -> None:
    """All are judged now, long after: no snapshot may know those of events that come after it."""
    rng = random.Random(3)
    scored = [(START + timedelta(hours=hour), rng.uniform(-1, 1)) for hour in rng.sample(range(1, 2_000), 40)]
    for at, score in scored:
        opinion(shop, user, at, score)
    for as_of in sorted(rng.sample([at for at, _ in scored], 8)):
        known = sorted((at, score) for at, score in scored if at <= as_of)
        before = snapshot(shop, as_of, user)
        assert before == (len(known), pytest.approx(fmean(score for _, score in known)), known[-1][1])
        later = opinion(shop, user, as_of + timedelta(microseconds=1), -1.0)
        assert snapshot(shop, as_of, user) == before
        with psycopg.connect(shop.postgres_dsn) as connection:
            connection.execute("DELETE FROM events WHERE event_id = %s", [later])


def test_feasts_point_in_time_join_gives_the_snapshot_before_the_label(shop: ServerSettings, user: str) -> None:
    opinion(shop, user, START, -1.0)
    opinion(shop, user, START + 5 * DAY, 1.0)
    for as_of in (START + DAY, START + 6 * DAY):
        snapshot(shop, as_of, user)
    times = [START + 2 * DAY, START + 5.5 * DAY, START + 7 * DAY]
    asked = pd.DataFrame({"user_id": [user] * 3, "event_timestamp": times})
    frame = feature_store(shop).get_historical_features(asked, [f"user_profile:{name}" for name in FEATURES]).to_df()
    rows = frame.sort_values("event_timestamp")[list(FEATURES)].to_numpy().tolist()
    assert rows == [[1, -1.0, -1.0], [1, -1.0, -1.0], [2, 0.0, 1.0]]


def test_the_online_bytes_are_those_of_feast(shop: ServerSettings, user: str) -> None:
    other = uuid.uuid4().hex
    for at, score in ((START, 0.125), (START + DAY, -0.6)):
        opinion(shop, user, at, score)
    write_event(shop, other, START, "", action="view")
    report = materialize(shop, as_of=START + 10 * DAY)
    client = redis.Redis.from_url(shop.redis_url)
    layout = load_registry(shop).layouts["user_profile"]
    fields = [layout.hash_fields[layout.features.index(name)] for name in FEATURES]
    keys = [entity_key("user_id", each, shop.project) for each in (user, other)]
    ours = [client.hmget(key, fields) for key in keys]
    feature_store(shop).materialize(report.snapshot.as_of, report.snapshot.as_of, feature_views=["user_profile"])
    assert [client.hmget(key, fields) for key in keys] == ours
    seen = layout.decode(client.hmget(keys[0], list(layout.hash_fields)), datetime.now(UTC))
    assert [seen[name].value for name in FEATURES] == [2, pytest.approx((0.125 - 0.6) / 2), -0.6]


@pytest.fixture(scope="module")
def settings(new_shop: NewShop) -> ServerSettings:
    return new_shop().model_copy(update={"postgres_pool_size": 10})


@pytest.fixture(scope="module")
async def two(settings: ServerSettings) -> Any:
    async with replica(settings) as first, replica(settings) as second:
        yield first, second


@pytest.fixture
def names(request: pytest.FixtureRequest) -> Names:
    return lambda name: f"{request.node.name}-{name}"


async def test_judgements_move_with_their_events(two: Pair, settings: ServerSettings, names: Names) -> None:
    """A persona's copies keep their own judgements through merges and unlinks, the hidden ones too."""
    phone, card = app(names("phone")), web(names("card"))
    tokens = [await two[0].record(phone, "a", "shared"), await two[1].record(card, "b", "shared")]
    users = [token.user_id for token in tokens]
    scores = itertools.count(1)
    for user_id in users:
        for row in query(settings, "SELECT event_id FROM events WHERE user_id = %s ORDER BY event_id", user_id):
            judge(settings, user_id, row["event_id"], next(scores) / 10)

    def stored() -> list[dict[str, Any]]:
        text = "SELECT user_id, origin_id, event_id, score FROM event_sentiments WHERE origin_id = ANY(%s) ORDER BY score"
        return query(settings, text, users)

    async def features(*subjects: str) -> list[tuple[Any, ...]]:
        as_of = datetime.now(UTC)
        return [await asyncio.to_thread(snapshot, settings, as_of, each) for each in subjects]

    with psycopg.connect(settings.postgres_dsn) as connection:  # of this month, not of the tests' year
        connection.execute("UPDATE events SET occurred_at = now() - interval '1 hour' WHERE user_id = ANY(%s)", [users])
    before, apart = stored(), await features(*users)
    await two[0].graph.link(phone, card)
    root = users[0]
    assert [(row["user_id"], row["score"]) for row in stored()] == [(root, row["score"]) for row in before]
    ((count, mean, _),) = await features(root)
    visible = query(settings, "SELECT event_id, coalesce(origin_id, user_id) AS origin FROM events WHERE user_id = %s", root)
    counted = [row["score"] for row in before if {"event_id": row["event_id"], "origin": row["origin_id"]} in visible]
    assert (count, mean) == (3, pytest.approx(fmean(counted)))
    await two[1].graph.unlink(card, phone)
    assert stored() == before
    assert await features(*users) == apart


async def test_nothing_is_left_of_a_forgotten_customers_judgements(two: Pair, settings: ServerSettings, names: Names) -> None:
    phone, card = app(names("phone")), web(names("card"))
    tokens = [await two[0].record(phone, "x"), await two[1].record(card, "y")]
    ids = [token.user_id for token in tokens]
    for user_id in ids:
        (row,) = query(settings, "SELECT event_id FROM events WHERE user_id = %s", user_id)
        judge(settings, user_id, row["event_id"], 0.5)
    await two[0].graph.link(phone, card)
    assert all(any(name.startswith("event_sentiments") for name in traces(settings, each)) for each in ids)
    receipt = await two[1].erasure.forget(card)
    assert receipt.counts["sentiments"] == 2
    assert [name for each in ids for name in traces(settings, each) if not name.startswith("b'")] == []  # Redis keeps the refusal a minute
