"""Feast, both ways: what the server's code writes a Feast client reads, and what Feast materializes the server's code reads."""

import random
import subprocess
import sys
import warnings
from datetime import UTC, datetime, timedelta

import pandas as pd
import psycopg
import pytest
import redis
from alembic.script import ScriptDirectory
from feast import Project
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from cli.calls import bring_up_to_date
from cli.stack import Stack
from features.activity import READ_STATE, WRITE_STATE, UserStateCodec, activity_of
from features.bundle import FeatureContract, FeatureRef
from features.catalogue import Item, upsert_items
from features.layout import Status, entity_key
from features.materialize import materialize
from features.registry import Registry, is_applied, load_registry, unmet
from features.schema import current_revision, head_revision
from features.settings import Settings
from features.snapshots import snapshot_grid, take_snapshot
from features.store import REPOSITORY, contract_of, feature_store
from tests.integration.fixtures import NewShop, add_events
from tests.integration.times import START

USERS = ("ann", "bob", "zoë")
ITEMS = ("cup", "pan", "pot")


@pytest.fixture(scope="module", autouse=True)
def _data(shop: Settings) -> None:
    with psycopg.connect(shop.postgres_dsn) as connection:
        upsert_items(
            connection,
            [
                Item(item, f"the {item}", category="kitchen", brand="b", price_micros=12_000_000, currency="EUR", listed_at=START)
                for item in ITEMS
            ],
        )
    rows = []
    for k, user in enumerate(USERS):
        rows += [(user, "view", "web", ITEMS[k], 10), (user, "purchase", "store", ITEMS[k], 20), (user, "search", "app", None, 30)]
    add_events(shop.postgres_dsn, rows)


def _write_state(shop: Settings, user: str, codec: UserStateCodec) -> int:
    with psycopg.connect(shop.postgres_dsn, row_factory=dict_row) as connection:
        row = connection.execute(READ_STATE, [[user]]).fetchone()
    assert row is not None
    state = codec.state(row)
    return int(redis.Redis.from_url(shop.redis_url).register_script(WRITE_STATE)(keys=[state.key], args=list(state.arguments)))


def test_feast_reads_what_the_server_writes(shop: Settings) -> None:
    store = feature_store(shop)
    codec = UserStateCodec(load_registry(shop).layouts, shop.project)
    assert _write_state(shop, "zoë", codec) == 3
    refs = ["user_activity:version", "user_activity:recent_items", "user_activity:recent_times", "user_activity:purchased_items"]
    seen = store.get_online_features(features=refs, entity_rows=[{"user_id": "zoë"}]).to_dict()
    assert seen["version"] == [3]
    assert seen["recent_items"] == [["", "pot", "pot"]]
    assert seen["purchased_items"] == [["pot"]]
    newest = int((START + timedelta(minutes=30)).timestamp() * 1e6)
    assert seen["recent_times"][0][0] == newest


def test_server_reads_what_feast_materializes(shop: Settings) -> None:
    report = materialize(shop)
    assert report.snapshot.user_count == len(USERS)
    layouts = load_registry(shop).layouts
    client = redis.Redis.from_url(shop.redis_url)
    now = datetime.now(UTC)
    profile = layouts["user_profile"]
    seen = profile.decode(client.hmget(entity_key("user_id", "bob", shop.project), list(profile.hash_fields)), now)
    assert seen["purchase_count"].value == 1
    assert seen["price_mean"].value == pytest.approx(12.0)
    assert seen["channel_names"].value == ["app", "store", "web"]
    assert seen["top_categories"].value == ["kitchen"]
    popularity = layouts["item_popularity"]
    seen = popularity.decode(client.hmget(entity_key("item_id", "pan", shop.project), list(popularity.hash_fields)), now)
    assert seen["purchases_7d"].value == 1
    title = layouts["item_profile"]
    seen = title.decode(client.hmget(entity_key("item_id", "pan", shop.project), list(title.hash_fields)), now)
    assert seen["title"].value == "the pan"


def test_plain_feast_materialization_of_activity_equals_ours(shop: Settings) -> None:
    store = feature_store(shop)
    codec = UserStateCodec(load_registry(shop).layouts, shop.project)
    client = redis.Redis.from_url(shop.redis_url)
    client.flushdb()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.materialize(START - timedelta(days=1), START + timedelta(days=1), feature_views=["user_activity"])
    by_feast = {user: client.hgetall(codec.key(user)) for user in USERS}
    client.flushdb()
    for user in USERS:
        _write_state(shop, user, codec)
        ours = client.hgetall(codec.key(user))
        theirs = by_feast[user]
        assert {field: ours[field] for field in theirs} == theirs  # the very bytes
        assert theirs


def test_absent_stale_and_present_are_told_apart(shop: Settings) -> None:
    layouts = load_registry(shop).layouts
    profile = layouts["user_profile"]
    assert profile.decode([None] * len(profile.hash_fields), START)["price_mean"].status is Status.MISSING
    encoded = profile.encode(dict.fromkeys(profile.features) | {"event_count": 1}, START)
    replies = [encoded[field] for field in profile.hash_fields]
    assert profile.decode(replies, START + timedelta(days=1))["event_count"].status is Status.PRESENT
    assert profile.decode(replies, START + timedelta(days=366))["event_count"].status is Status.STALE
    assert profile.decode(replies, START + timedelta(days=1))["price_mean"].status is Status.MISSING


def test_newest_version_wins_in_every_interleaving(shop: Settings) -> None:
    codec = UserStateCodec(load_registry(shop).layouts, shop.project)
    client = redis.Redis.from_url(shop.redis_url)
    script = client.register_script(WRITE_STATE)
    with psycopg.connect(shop.postgres_dsn, row_factory=dict_row) as connection:
        row = connection.execute(READ_STATE, [["ann"]]).fetchone()
    assert row is not None
    states = [codec.state({**row, "version": version, "views_7d": version}) for version in (1, 2, 127, 128, 300, 70_000, 2**40)]
    rng = random.Random(5)
    for _ in range(200):
        client.delete(codec.key("ann"))
        order = rng.sample(states, len(states))
        for k, state in enumerate(order):
            current = script(keys=[state.key], args=list(state.arguments))
            assert current == max(earlier.version for earlier in order[: k + 1])
        seen = codec.decode(client.hmget(codec.key("ann"), list(codec.hash_fields)), START)
        activity = activity_of(seen["user_activity"])
        assert activity is not None
        assert activity.version == 2**40
        assert seen["user_activity"]["views_7d"].value == 2**40  # the whole state is of one version


def test_point_in_time_join_never_sees_the_future(new_shop) -> None:  # type: ignore[no-untyped-def]
    shop = new_shop()
    rng = random.Random(11)
    events = [(rng.choice(USERS), rng.choice(["view", "purchase"]), "web", rng.choice(ITEMS), rng.randrange(30 * 1440)) for _ in range(150)]
    add_events(shop.postgres_dsn, events)
    with psycopg.connect(shop.postgres_dsn) as connection:
        upsert_items(connection, [Item(item, item, listed_at=START) for item in ITEMS])
        grid = snapshot_grid(connection, every_days=7)
        for as_of in grid:
            take_snapshot(connection, as_of)
    labels = pd.DataFrame(
        [
            {"user_id": user, "event_timestamp": START + timedelta(minutes=minutes) - timedelta(microseconds=1)}
            for user, action, _, _, minutes in events
            if action == "purchase"
        ]
    )
    features = ["user_activity:version", "user_activity:recent_items", "user_activity:purchased_items", "user_profile:event_count"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        joined = feature_store(shop).get_historical_features(labels, features).to_df()
    joined["event_timestamp"] = pd.to_datetime(joined["event_timestamp"], utc=True)  # Feast hands them back without a zone
    assert len(joined) == len(labels)
    for row in joined.itertuples():
        past = sorted((m, i) for u, _, _, i, m in events if u == row.user_id and START + timedelta(minutes=m) <= row.event_timestamp)
        seen = [] if row.recent_items is None else [item for item in row.recent_items if item]
        assert sorted(seen) == sorted(item for _, item in past[-50:])
        snapshot = max((at for at in grid if at <= row.event_timestamp), default=None)
        expected = sum(1 for u, _, _, _, m in events if snapshot and u == row.user_id and START + timedelta(minutes=m) <= snapshot)
        assert (0 if pd.isna(row.event_count) else row.event_count) == expected


def test_plain_feast_apply_works_on_the_repository(shop: Settings) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "feast.cli.cli", "-c", str(REPOSITORY), "apply"], capture_output=True, text=True, env=_environment(shop)
    )
    assert done.returncode == 0, done.stderr
    assert "Applying changes for project shop" in done.stdout


def _environment(shop: Settings) -> dict[str, str]:
    import os

    return os.environ | shop.feast_environment()


def test_contract_names_what_the_registry_lacks(shop: Settings) -> None:
    store = feature_store(shop)
    contract = contract_of(store, "ranking_v1")
    assert unmet(contract, load_registry(shop)) == []
    wrong = FeatureContract(name="ranking_v1", features=(*contract.features, FeatureRef(ref="user_profile:shoe_size", dtype="Int64")))
    assert unmet(wrong, load_registry(shop)) == ["user_profile:shoe_size (Int64, offered: nothing)"]


def test_the_registry_read_from_its_tables_is_what_feast_says_of_it(shop: Settings) -> None:
    store, registry = feature_store(shop), load_registry(shop)
    services = store.list_feature_services()
    assert len(services) == 4
    assert registry.services == {service.name: contract_of(store, service.name) for service in services}
    views = [view for view in store.list_feature_views() if view.online]
    assert {name: (of.join_key, of.features, of.dtypes, of.ttl) for name, of in registry.layouts.items()} == {
        view.name: (view.join_keys[0], tuple(f.name for f in view.features), tuple(str(f.dtype) for f in view.features), view.ttl)
        for view in views
    }
    assert registry.on_demand == {view.name for view in store.list_on_demand_feature_views()} == {"price_fit"}


def test_a_server_applies_again_whatever_changed_in_the_registry_and_only_then(new_shop: NewShop) -> None:
    shop = new_shop()
    assert is_applied(load_registry(shop))
    feature_store(shop).delete_feature_service("pricing_v1")
    assert not is_applied(load_registry(shop))
    bring_up_to_date(shop)
    assert is_applied(load_registry(shop))
    assert "pricing_v1" in load_registry(shop).services
    feature_store(shop).registry.apply_project(Project(name=shop.project))  # as plain feast apply leaves it, without the tag
    assert not is_applied(load_registry(shop))


def test_a_database_that_feast_never_saw_has_an_empty_registry(shop: Settings, stack: Stack) -> None:
    empty = shop.model_copy(update={"postgres_dsn": make_conninfo(stack.postgres_dsn, dbname="postgres")})
    assert load_registry(empty) == Registry({}, frozenset(), {}, {})
    assert load_registry(shop.model_copy(update={"project": "another"})).layouts == {}
    assert current_revision(empty.postgres_dsn) is None
    assert current_revision(shop.postgres_dsn) == head_revision() == ScriptDirectory(str(REPOSITORY / "schema")).get_current_head()
