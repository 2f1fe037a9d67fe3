"""An upgrade: what a release that kept actions as names has left in Redis is read right, from the first look on."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta

import psycopg
import pytest
import redis
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from cli.stack import Stack
from concord import Concord, user
from concord.v1 import common_pb2, features_pb2, features_pb2_grpc
from concord.v1.profile_pb2 import GetProfileResponse
from features.activity import ACTIVITY_VIEW, READ_STATE, UserStateCodec
from features.layout import ViewLayout, decode_value, entity_key, hash_field
from features.materialize import rebuild_users
from features.registry import load_registry
from features.schema import migrate
from features.store import apply_repository
from server import tokens
from server.domain import Token
from server.settings import ServerSettings
from tests.integration.serving import connected, served_directly
from tests.integration.times import START

USERS = ("ann", "new")
ACTIVE = "bob"  # who does something more
EVENTS = (
    ("view", "pot", None, None),
    ("purchase", "pot", None, 12.0),
    ("rate", "pot", None, 2.0),
    ("review", "pot", "soft but small", 4.5),
)
# The view as that release had it.
_TYPES = {"version": "Int64", "recent_items": "Array(String)", "recent_actions": "Array(String)", "recent_channels": "Array(String)"}
_TYPES |= {"recent_times": "Array(Int64)", "recent_texts": "Array(String)", "purchased_items": "Array(String)"}
_TYPES |= {"purchased_days": "Array(Int64)", **dict.fromkeys(("views_7d", "carts_7d", "purchases_28d", "searches_7d"), "Int64")}
EARLIER = ViewLayout(
    name=ACTIVITY_VIEW,
    join_key="user_id",
    features=tuple(_TYPES),
    dtypes=tuple(_TYPES.values()),
    fields=tuple(hash_field(f"{ACTIVITY_VIEW}:{name}") for name in _TYPES),
    timestamp_field=f"_ts:{ACTIVITY_VIEW}".encode(),
    ttl=timedelta(0),
)


@dataclass(frozen=True)
class Upgraded:
    """A shop whose database is new and whose Redis is as it was left, and the hashes that were left."""

    settings: ServerSettings
    left: dict[str, dict[bytes, bytes]]

    @property
    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.settings.redis_url)

    @property
    def codec(self) -> UserStateCodec:
        return UserStateCodec(load_registry(self.settings).layouts, self.settings.project)

    def leave(self) -> None:
        """Fills Redis as the earlier release left it, with a profile that was materialized later than the last that is at hand."""
        self.redis.flushdb()
        profile = self.codec.profile
        for name, fields in self.left.items():
            newer = profile.encode(dict.fromkeys(profile.features) | {"event_count": 77}, START + timedelta(days=9))
            self.redis.hset(entity_key("user_id", name, self.settings.project), mapping={**fields, **newer})  # type: ignore[arg-type]

    def due(self, name: str) -> dict[bytes, bytes]:
        """Returns the activity that Redis should hold."""
        with psycopg.connect(self.settings.postgres_dsn, row_factory=dict_row) as connection:
            row = connection.execute(READ_STATE, [[name]]).fetchone()
        assert row is not None
        return self.codec.activity.encode(row, row["event_timestamp"])

    def held(self, name: str) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = self.redis.hgetall(self.codec.key(name))
        return found

    def is_right(self, name: str) -> bool:
        """Redis holds the state of this release, nothing of the earlier one, and the newer profile."""
        held, due = self.held(name), self.due(name)
        profile = self.codec.profile
        count = decode_value(held[profile.fields[profile.features.index("event_count")]])
        whole = {field: held.get(field) for field in due} == due
        return whole and count == 77 and hash_field(f"{ACTIVITY_VIEW}:recent_actions") not in held


@pytest.fixture(scope="module")
def upgraded(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Upgraded:
    """A database of the migration before, filled and read as then; then migrated and applied as an operator does."""
    database = f"t_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(stack.postgres_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    dsn, url = make_conninfo(stack.postgres_dsn, dbname=database), f"{stack.redis_url.rpartition('/')[0]}/15"
    migrate(dsn, "0010")
    left = {}
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        for name in (*USERS, ACTIVE):
            events = EVENTS if name != "new" else ()
            connection.execute("INSERT INTO users (user_id, version) VALUES (%s, %s)", [name, len(events)])
            for k, (action, item, text, value) in enumerate(events):
                connection.execute(
                    "INSERT INTO events (user_id, event_id, channel, action, item_id, text, value, quantity, occurred_at, version) "
                    "VALUES (%s, %s, 'web', %s, %s, %s, %s, 1, %s, %s)",
                    [name, uuid.uuid4(), action, item, text, value, START + timedelta(minutes=k), k + 1],
                )
            row = connection.execute("SELECT * FROM user_activity_at(%s, 'infinity')", [name]).fetchone()
            assert row is not None
            left[name] = EARLIER.encode(row, row["event_timestamp"])
    migrate(dsn)
    folder = tmp_path_factory.mktemp("shop")
    settings = ServerSettings(
        postgres_dsn=dsn, redis_url=url, port=0, admin_port=-1, metrics_port=-1, data_dir=folder, models_url=f"file:{folder / 'models'}"
    )
    apply_repository(settings)
    return Upgraded(settings, left)


@pytest.fixture
async def address(upgraded: Upgraded) -> AsyncIterator[str]:
    upgraded.leave()
    async with served_directly(upgraded.settings) as at:
        yield at


def behaviours(name: str) -> list[tuple[str, str, str]]:
    """What is known of a customer, newest first: item, action and text."""
    if name == "new":
        return []
    return [
        ("pot", "ACTION_REVIEW", "4.5 of 5: soft but small"),
        ("pot", "ACTION_RATE", "2 of 5"),
        ("pot", "ACTION_PURCHASE", ""),
        ("pot", "ACTION_VIEW", ""),
    ]


def said(profile: GetProfileResponse) -> list[tuple[str, str, str]]:
    return [(one.item_id, common_pb2.Action.Name(one.action), one.text) for one in profile.recent_behaviours]


async def test_a_profile_asked_for_with_an_earlier_token_is_right(upgraded: Upgraded, address: str) -> None:
    async with Concord(address, channel="web") as client:
        for name in USERS:
            token = tokens.encode(Token(name, len(behaviours(name))))  # as the earlier release gave it out
            profile = await client.profile(user(name), consistency_token=token)
            assert said(profile) == behaviours(name)
            assert profile.user_version == len(behaviours(name))
            assert profile.features.event_count == 77
            assert upgraded.is_right(name)


async def test_a_recommendation_reads_the_new_form(upgraded: Upgraded, address: str) -> None:
    async with Concord(address, channel="app") as client:
        answer = await client.recommend(user("ann"), surface="home")
    assert answer.versions.user_version == 4
    assert upgraded.is_right("ann")


async def test_online_features_are_those_of_the_new_form(upgraded: Upgraded, address: str) -> None:
    refs = ["user_activity:version", "user_activity:recent_action_codes", "user_activity:recent_texts", "user_profile:event_count"]
    request = features_pb2.GetOnlineFeaturesRequest(
        features=features_pb2.FeatureList(feature_refs=refs), entities=[features_pb2.EntityRow(user_id=name) for name in USERS]
    )
    async with connected(address) as channel:
        answer = await features_pb2_grpc.FeatureServiceStub(channel).GetOnlineFeatures(request, timeout=10)
    ann, new = ([result.value for result in row.results] for row in answer.rows)
    assert (ann[0].int64_value, ann[3].int64_value) == (4, 77)
    assert list(ann[1].int64_list_value.values) == [9, 8, 6, 1]
    assert list(ann[2].string_list_value.values) == ["4.5 of 5: soft but small", "2 of 5", "", ""]
    assert (new[0].int64_value, list(new[1].string_list_value.values), new[3].int64_value) == (0, [], 77)
    assert all(upgraded.is_right(name) for name in USERS)


async def test_the_next_event_builds_on_what_was_there_and_shows_in_another_channel(upgraded: Upgraded, address: str) -> None:
    async with Concord(address, channel="web") as web, Concord(address, channel="app") as app:
        recorded = await web.record(web.event(user(ACTIVE), "search", text="a lid for it"))
        profile = await app.profile(user(ACTIVE), consistency_token=recorded.tokens[0].consistency_token)
    assert recorded.online
    assert profile.user_version == 5
    assert said(profile) == [("", "ACTION_SEARCH", "a lid for it"), *behaviours(ACTIVE)]
    assert upgraded.is_right(ACTIVE)


async def test_a_state_of_an_earlier_form_gives_way_only_where_it_is_no_newer_than_postgresql(upgraded: Upgraded) -> None:
    """Who is rebuilt twice, or found new already, keeps the newest: C3 holds through the upgrade."""
    upgraded.leave()
    assert not any(upgraded.is_right(name) for name in USERS)
    assert rebuild_users(upgraded.settings) == len(USERS) + 1  # concord materialize
    assert all(upgraded.is_right(name) for name in USERS)
    held = upgraded.held("ann")
    assert rebuild_users(upgraded.settings) == len(USERS) + 1
    assert upgraded.held("ann") == held


def test_the_earlier_release_reads_a_state_it_cannot_write(upgraded: Upgraded) -> None:
    """Its layout asks the function for a column that is gone: nothing of the earlier form is written after the migration."""
    with psycopg.connect(upgraded.settings.postgres_dsn, row_factory=dict_row) as connection:
        row = connection.execute("SELECT * FROM user_activity_at('ann', 'infinity')").fetchone()
    assert row is not None
    with pytest.raises(KeyError, match="recent_actions"):
        EARLIER.encode(row, row["event_timestamp"])
