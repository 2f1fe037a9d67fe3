"""Materialization of batch views: the rows and the very bytes of Feast's own, and nothing of a customer who is gone."""

import asyncio
import contextlib
import io
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pyarrow as pa
import pytest
import redis
from feast import Entity, FeatureStore, FeatureView, Field, ValueType
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.types import Array, Bool, Float32, Float64, Int32, Int64, String

from features import batch_views
from features import materialize as materialization
from features.activity import FORGOTTEN_FIELD, MERGED_FIELD
from features.batch_views import materialize_view
from features.bulk_write import write_view
from features.layout import LayoutError, ViewLayout, entity_key, view_layout
from features.materialize import materialize
from features.settings import Settings
from features.store import feature_store
from tests.integration.fixtures import NewShop
from tests.integration.replicas import Names, app, query, replica
from tests.integration.times import START

DAY = timedelta(days=1)
SCHEMA: dict[str, tuple[str, Any]] = {
    "i4": ("integer", Int32),
    "i8": ("bigint", Int64),
    "f4": ("real", Float32),
    "f8": ("double precision", Float64),
    "s": ("text", String),
    "b": ("boolean", Bool),
    "i8s": ("bigint[]", Array(Int64)),
    "f4s": ("real[]", Array(Float32)),
    "f8s": ("double precision[]", Array(Float64)),
    "ss": ("text[]", Array(String)),
}
NOTHING = dict.fromkeys(SCHEMA)
ZERO = NOTHING | {"i4": 0, "i8": 0, "f4": 0.0, "f8": 0.0, "s": "", "b": False, "i8s": [], "f4s": [], "f8s": [], "ss": []}
FULL = NOTHING | {
    "i4": -1,
    "i8": 2**53,
    "f4": 1.5,
    "f8": float("inf"),
    "s": "zoë 一致 \r\n$3 {}",
    "b": True,
    "i8s": [-1, 0, 300, 2**63 - 1],
    "f4s": [0.1, -0.0],
    "f8s": [0.1, float("nan")],
    "ss": ["", "一致", "x" * 300],
}
NULLS_WITHIN = NOTHING | {"f8": float("nan"), "f8s": [None, 1.0], "ss": ["a", None]}
# (entity, event time in days after START, created in seconds after that, values)
Row = tuple[str, float, int, dict[str, Any]]
ROWS: list[Row] = [
    ("nothing", 1, 0, NOTHING),
    ("zero", 1, 0, ZERO),
    ("full", 1.000_000_1, 0, FULL),
    ("", 1, 0, FULL),
    ("zoë 一致", 1, 0, NULLS_WITHIN),
    ("newest", 1, 0, ZERO),
    ("newest", 2, 0, FULL),
    ("newest", 1.5, 9, ZERO),
    ("created", 2, 1, FULL),
    ("created", 2, 2, ZERO),
    ("created", 2, 0, FULL),
    ("first of the window", 0, 0, FULL),
    ("last of the window", 3, 0, FULL),
    ("before the window", -0.001, 0, FULL),
    ("after the window", 3.001, 0, FULL),
]
WINDOW = (START, START + 3 * DAY)


def fill(shop: Settings, rows: list[Row]) -> None:
    with psycopg.connect(shop.postgres_dsn) as connection:
        columns = ", ".join(f"{name} {kind}" for name, (kind, _) in SCHEMA.items())
        connection.execute(f"CREATE TABLE IF NOT EXISTS things (thing_id text, at timestamptz, made timestamptz, {columns})")
        connection.execute("TRUNCATE things")
        for thing, days, seconds, values in rows:
            at = START + days * DAY
            connection.execute(
                f"INSERT INTO things VALUES (%s, %s, %s{', %s' * len(SCHEMA)})",
                [thing, at, at + timedelta(seconds=seconds), *values.values()],
            )


@pytest.fixture(scope="module")
def things(shop: Settings) -> FeatureStore:
    """A store with a view of every type, beside the shop's own."""
    fill(shop, [])
    store = feature_store(shop)
    thing = Entity(name="thing", join_keys=["thing_id"], value_type=ValueType.STRING)
    source = PostgreSQLSource(name="things", table="things", timestamp_field="at", created_timestamp_column="made")
    schema = [Field(name=name, dtype=dtype) for name, (_, dtype) in SCHEMA.items()]
    with quiet():
        store.apply([thing, FeatureView(name="things", entities=[thing], schema=schema, source=source, ttl=timedelta(0))])
    return store


@pytest.fixture
def client(shop: Settings) -> Iterator[redis.Redis]:
    with contextlib.closing(redis.Redis.from_url(shop.redis_url)) as client:
        client.flushdb()
        yield client


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Feast and pandas warn of their own internals
        yield


def by_feast(store: FeatureStore, shop: Settings, start: datetime, end: datetime) -> None:
    with quiet():
        store.materialize(start, end, feature_views=["things"])


def by_us(store: FeatureStore, shop: Settings, start: datetime, end: datetime) -> None:
    materialize_view(shop, store, "things", start, end)


def everything(client: redis.Redis) -> dict[bytes, dict[bytes, bytes]]:
    return {key: client.hgetall(key) for key in client.scan_iter()}


def test_the_bytes_are_feasts_own(things: FeatureStore, shop: Settings, client: redis.Redis) -> None:
    fill(shop, ROWS)
    by_feast(things, shop, *WINDOW)
    theirs = everything(client)
    client.flushdb()
    assert materialize_view(shop, things, "things", *WINDOW) == len(theirs) == 9
    ours = everything(client)
    assert ours.keys() == theirs.keys()
    for key, fields in theirs.items():
        assert ours[key] == fields, key


def test_large_integers_keep_their_value_beside_nulls(things: FeatureStore, shop: Settings, client: redis.Redis) -> None:
    """Feast's own path goes through a data frame, where a column with nulls is one of doubles; this is the one difference."""
    fill(shop, [("large", 1, 0, NOTHING | {"i8": 2**63 - 1}), ("none", 1, 0, NOTHING)])
    by_us(things, shop, *WINDOW)
    layout = view_layout(things.get_feature_view("things").to_proto())
    replies = client.hmget(entity_key("thing_id", "large", shop.project), list(layout.hash_fields))
    assert layout.decode(replies, START)["i8"].value == 2**63 - 1


def test_a_feast_client_reads_it(things: FeatureStore, shop: Settings, client: redis.Redis) -> None:
    fill(shop, ROWS)
    by_us(things, shop, *WINDOW)
    names = ["full", "newest", "zero", "nothing", "before the window"]
    refs = [f"things:{name}" for name in SCHEMA]
    seen = things.get_online_features(refs, [{"thing_id": name} for name in names]).to_dict()
    for name, expected in FULL.items():
        assert seen[name][0] == pytest.approx(expected, nan_ok=True) if name in ("f4s", "f8s") else seen[name][0] == expected
    assert [seen[name][1:] for name in ("i4", "s", "ss")] == [
        [-1, 0, None, None],
        [FULL["s"], "", None, None],
        [FULL["ss"], [], None, None],
    ]


@pytest.mark.parametrize(("first", "second"), [(by_feast, by_us), (by_us, by_feast), (by_us, by_us)])
def test_the_newer_stays_whoever_writes(things: FeatureStore, shop: Settings, client: redis.Redis, first: Any, second: Any) -> None:
    """Equal times are not newer, and one before 1970 gives way to any, as in Feast."""
    everywhen, microsecond = (START - 40_000 * DAY, START + 40_000 * DAY), 1 / 86_400e6
    newer = [(1, 2), (1, 1 + microsecond), (0, 36_500), (-30_000, 1), (-30_000, -29_999), (-30_000, -30_001)]
    older = [(2, 1), (1.5, 1.5), (1 + microsecond, 1), (36_500, 0), (1, -30_000)]
    cases = {f"{stored} then {offered}": (stored, offered) for stored, offered in newer + older}
    fill(shop, [(name, stored, 0, ZERO) for name, (stored, _) in cases.items()])
    first(things, shop, *everywhen)
    before = everything(client)
    fill(shop, [(name, offered, 0, FULL) for name, (_, offered) in cases.items()])
    second(things, shop, *everywhen)
    after = everything(client)
    for name, case in cases.items():
        key = entity_key("thing_id", name, shop.project)
        assert (after[key] != before[key]) == (case in newer), name


def test_a_hash_expires_if_the_store_says_so(things: FeatureStore, shop: Settings, client: redis.Redis) -> None:
    fill(shop, ROWS[:1])
    key = entity_key("thing_id", "nothing", shop.project)
    by_us(things, shop, *WINDOW)
    assert client.ttl(key) == -1
    client.flushdb()
    config = things.config.model_copy()
    config.online_config = config.online_config | {"key_ttl_seconds": 77}
    config._online_store = None  # Feast keeps here what it made of the configuration
    by_us(FeatureStore(config=config), shop, *WINDOW)
    assert 70 <= client.ttl(key) <= 77


def test_nothing_is_written_to_who_is_gone(things: FeatureStore, shop: Settings, client: redis.Redis) -> None:
    fill(shop, [("forgotten", 1, 0, FULL), ("merged", 1, 0, FULL), ("there", 1, 0, FULL)])
    keys = {name: entity_key("thing_id", name, shop.project) for name in ("forgotten", "merged", "there")}
    client.hset(keys["forgotten"], FORGOTTEN_FIELD, "1")
    client.hset(keys["merged"], MERGED_FIELD, "there")
    assert materialize_view(shop, things, "things", *WINDOW) == 1
    assert {name: client.hlen(key) for name, key in keys.items()} == {"forgotten": 1, "merged": 1, "there": 1 + len(SCHEMA)}


def test_a_row_without_an_entity_is_refused(things: FeatureStore, shop: Settings, client: redis.Redis) -> None:
    fill(shop, [(None, 1, 0, FULL)])  # type: ignore[list-item]
    with pytest.raises(LayoutError, match="no thing_id"):
        by_us(things, shop, *WINDOW)


def test_a_full_redis_refuses_and_says_so(things: FeatureStore, shop: Settings, client: redis.Redis) -> None:
    fill(shop, ROWS)
    before = client.config_get("maxmemory")["maxmemory"]
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.ResponseError, match="OOM"):
            by_us(things, shop, *WINDOW)
    finally:
        client.config_set("maxmemory", before)
    assert everything(client) == {}
    by_us(things, shop, *WINDOW)
    assert len(everything(client)) == 9


def test_many_batches_are_written_whole(things: FeatureStore, shop: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_views, "_BATCH_BYTES", 20_000)
    fill(shop, [])
    with psycopg.connect(shop.postgres_dsn) as connection:
        connection.execute(
            "INSERT INTO things (thing_id, at, i8, s) SELECT 't' || n, %s, n, repeat('x', n %% 90) FROM generate_series(1, 3000) n", [START]
        )
    assert materialize_view(shop, things, "things", *WINDOW) == 3000
    layout = view_layout(things.get_feature_view("things").to_proto())
    for number in (1, 2, 1500, 2999, 3000):
        seen = layout.decode(client.hmget(entity_key("thing_id", f"t{number}", shop.project), list(layout.hash_fields)), START)
        assert (seen["i8"].value, seen["s"].value) == (number, "x" * (number % 90))
    assert client.dbsize() == 3000


def test_a_view_of_more_features_than_lua_passes_at_a_time(client: redis.Redis) -> None:
    names = tuple(f"feature_{number}" for number in range(260))
    fields = tuple(number.to_bytes(4, "big") for number in range(260))  # among them quotes, backslashes and line ends
    layout = ViewLayout("wide", "thing_id", names, ("Int64",) * 260, fields, b"_ts:wide", timedelta(0))
    columns = [pa.array(["it"]), pa.array([START], pa.timestamp("us", "UTC")), *(pa.array([number]) for number in range(260))]
    batch = pa.record_batch(columns, names=["thing_id", "at", *names])
    assert write_view(client, layout, [batch], project="wide") == 1
    stood = client.hmget(entity_key("thing_id", "it", "wide"), layout.hash_fields)
    assert [layout.decode(stood, START)[name].value for name in names] == list(range(260))


def test_of_two_at_once_the_newer_wins(things: FeatureStore, shop: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking and writing are one step: what lies between them in Feast's own store is where an older row beats a newer one."""
    monkeypatch.setattr(batch_views, "_BATCH_BYTES", 1000)
    fill(shop, [(f"t{number}", days, 0, values) for number in range(200) for days, values in ((1, ZERO), (2, FULL))])
    by_us(things, shop, START, START + 2 * DAY)
    expected = everything(client)
    with ThreadPoolExecutor(2) as two:
        for _ in range(5):
            client.flushdb()
            list(two.map(lambda days: by_us(things, shop, START, START + days * DAY), (1, 2)))
            assert everything(client) == expected


def test_the_registry_knows_what_was_materialized(things: FeatureStore, shop: Settings, client: redis.Redis) -> None:
    by_us(things, shop, *WINDOW)
    things.refresh_registry()
    assert things.get_feature_view("things").materialization_intervals[-1] == WINDOW


@pytest.mark.parametrize("marked", [True, False])
async def test_a_customer_forgotten_meanwhile_does_not_come_back(
    new_shop: NewShop, names: Names, monkeypatch: pytest.MonkeyPatch, *, marked: bool
) -> None:
    """Their row is read before they are forgotten and written after; once with the marker, once with it expired by then."""
    settings = new_shop()
    stream, loop = batch_views.stream, asyncio.get_running_loop()
    async with replica(settings) as one:
        phone = app(names("phone"))
        token = await one.record(phone, "a")
        key = one.online._codec.key(token.user_id)
        with contextlib.closing(redis.Redis.from_url(settings.redis_url)) as client:

            def slow(dsn: str, sql: str) -> Iterator[pa.RecordBatch]:
                read = list(stream(dsn, sql))
                if "user_profile" in sql:
                    assert token.user_id in str(read[0].column(0).to_pylist())
                    asyncio.run_coroutine_threadsafe(one.erasure.forget(phone), loop).result(30)
                    if not marked:
                        client.delete(key)
                yield from read

            monkeypatch.setattr(batch_views, "stream", slow)
            await asyncio.to_thread(materialize, settings)
            assert client.hexists(key, FORGOTTEN_FIELD) == marked
            assert (client.hlen(key) == 1) == marked  # unmarked, the late row has come back ...
            assert query(settings, "SELECT user_ids FROM erasures")  # ... but they are to be erased once more
            assert await one.erasure.finish() == 1
            assert client.hgetall(key) == {FORGOTTEN_FIELD.encode(): b"1"}
            assert query(settings, "SELECT user_id FROM user_profile") == []


async def test_a_rebuild_in_many_batches_leaves_nobody_out(new_shop: NewShop, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialization, "_USERS_PER_BATCH", 2)
    settings = new_shop()
    async with replica(settings) as one:
        people = [app(names(f"phone{number}")) for number in range(25)]
        tokens = [await one.record(phone, "a") for phone in people]
        await one.graph.link(people[0], people[1])
        with contextlib.closing(redis.Redis.from_url(settings.redis_url)) as client:
            expected = {one.online._codec.key(token.user_id): None for token in tokens}
            expected = {key: client.hgetall(key) for key in expected}
            merged = [key for key, fields in expected.items() if MERGED_FIELD.encode() in fields]
            client.flushdb()
            query(settings, "INSERT INTO online_outbox (user_id, version) SELECT user_id, version FROM users RETURNING 1")
            seen: list[tuple[str, int, int]] = []
            looked_at = await asyncio.to_thread(materialization.rebuild_users, settings, progress=lambda *step: seen.append(step))
            assert looked_at == 24
            assert seen[-1] == ("online user state", 24, 24)
            assert everything(client) == {key: fields for key, fields in expected.items() if key not in merged}
            assert len(query(settings, "SELECT user_id FROM online_outbox")) == len(merged) == 1
