"""The protocol between replicas in PostgreSQL: who is waited for, whose word counts, and when an epoch answers."""

import asyncio
import gc
import json
import uuid
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from prometheus_client import CollectorRegistry
from psycopg import Connection
from psycopg.rows import TupleRow

from features.catalogue import Item, publish_epoch, upsert_items
from features.models import (
    Activation,
    ActivationInProgressError,
    OnUnready,
    ReplicaUnreadyError,
    UnknownModelError,
    abandon,
    activate,
    attempt,
    claim,
    publish,
)
from features.replicas import list_replicas
from server.app import Rooms, open_rooms
from server.database import postgres_breaker, postgres_pool
from server.domain import RecommendQuery, Subject
from server.errors import UnavailableError
from server.membership import Membership, Report
from server.metrics import Metrics
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.unit.bundles import vary_bundle

OTHER = "10.0.0.9:50051"
# What must happen before an epoch stops waiting has most of this time: on a busy machine seconds pass between two steps.
EPOCH_WAIT, BEFORE_THAT = 6.0, 4.0


@pytest.fixture
def truth(new_shop: NewShop) -> Iterator[Connection[TupleRow]]:
    """An empty shop's PostgreSQL with three published models and one epoch."""
    settings = new_shop()
    with psycopg.connect(settings.postgres_dsn, autocommit=True) as connection:
        for version in ("m1", "m2", "m3"):
            connection.execute("INSERT INTO model_versions (model_version, uri, manifest) VALUES (%s, 'file:///none', '{}')", [version])
        connection.execute("UPDATE fleet_state SET answering_index = 4, index_version = 4")
        yield connection


def says(
    connection: Connection[TupleRow],
    name: str,
    *,
    ready: dict[str, list[int]] | None = None,
    failed: dict[str, str] | None = None,
    claimed: str = "",
    seconds_ago: float = 0.0,
) -> None:
    """A replica's report."""
    connection.execute(
        "INSERT INTO replicas VALUES (%s, %s, now(), clock_timestamp() - make_interval(secs => %s), 3, '', 0, 0, %s, %s, %s, 'c') "
        "ON CONFLICT (replica_id) DO UPDATE SET ready = excluded.ready, failed = excluded.failed, claim = excluded.claim, "
        "seen_at = excluded.seen_at",
        [name, f"{name}:1", seconds_ago, json.dumps(ready or {}), json.dumps(failed or {}), claimed],
    )


def active(connection: Connection[TupleRow]) -> str:
    row = connection.execute("SELECT model_version FROM fleet_state").fetchone()
    assert row
    return str(row[0])


def test_without_replicas_the_pointer_moves_at_once_and_staying_is_no_move(truth: Connection[TupleRow]) -> None:
    assert activate(truth, "m1") == Activation("m1", "", 1)
    assert activate(truth, "m1") == Activation("m1", "m1", 1)
    assert activate(truth, "m2") == Activation("m2", "m1", 2)
    with pytest.raises(UnknownModelError):
        activate(truth, "m9")
    assert activate(truth, "m1").activation == 3


def test_the_pointer_waits_for_every_live_replica_and_the_epoch_that_answers(truth: Connection[TupleRow]) -> None:
    claimed = claim(truth, "m1")
    says(truth, "a", ready={"m1": [4]}, claimed=claimed)
    says(truth, "b", ready={"m1": [3], "m2": [4]}, claimed=claimed)  # the model, but over an older epoch
    says(truth, "dead", seconds_ago=3.5)
    outcome = attempt(truth, "m1", claimed)
    assert not isinstance(outcome, Activation)
    assert [(one.address, one.reason) for one in outcome] == [("b:1", "")]
    assert active(truth) == ""
    says(truth, "b", ready={"m1": [3, 4]}, claimed=claimed)
    assert isinstance(attempt(truth, "m1", claimed), Activation)
    assert active(truth) == "m1"


def test_what_was_reported_before_the_claim_counts_neither_for_nor_against(truth: Connection[TupleRow]) -> None:
    says(truth, "a", ready={"m1": [4]}, claimed="an older one")
    says(truth, "b", failed={"m1": "BUNDLE_INVALID: then"}, claimed="an older one")
    claimed = claim(truth, "m1")
    outcome = attempt(truth, "m1", claimed)
    assert not isinstance(outcome, Activation)
    assert [(one.address, one.reason) for one in outcome] == [("a:1", ""), ("b:1", "")]


def test_fail_refuses_at_the_first_failure_and_wait_does_not(truth: Connection[TupleRow]) -> None:
    pauses = []

    def report(_: float) -> None:
        row = truth.execute("SELECT preparing_by FROM fleet_state").fetchone()
        assert row
        repaired = len(pauses) >= 2
        says(truth, "a", ready={"m1": [4]} if repaired else {}, failed={} if repaired else {"m1": "BUNDLE_INVALID: hm"}, claimed=row[0])
        pauses.append(repaired)

    says(truth, "a")
    with pytest.raises(ReplicaUnreadyError, match="replica a:1: BUNDLE_INVALID: hm"):
        activate(truth, "m1", sleep=report)
    assert (len(pauses), active(truth)) == (1, "")
    pauses.clear()
    assert activate(truth, "m1", on_unready=OnUnready.WAIT, sleep=report).model_version == "m1"
    assert pauses == [False, False, True]


def test_a_replica_that_does_not_answer_in_time_is_named(truth: Connection[TupleRow]) -> None:
    says(truth, "silent")
    with pytest.raises(ReplicaUnreadyError, match="silent:1: has not answered in time"):
        activate(truth, "m1", wait_seconds=0.2)
    assert active(truth) == ""
    assert truth.execute("SELECT preparing_model FROM fleet_state").fetchone() == ("",)


def test_one_preparation_at_a_time_until_its_claim_ends_or_runs_out(truth: Connection[TupleRow]) -> None:
    first = claim(truth, "m1")
    with pytest.raises(ActivationInProgressError):
        claim(truth, "m2")
    abandon(truth, first)
    second = claim(truth, "m2")
    abandon(truth, first)  # what has ended cannot end somebody else's
    with pytest.raises(ActivationInProgressError):
        claim(truth, "m3")
    truth.execute("UPDATE fleet_state SET preparing_until = clock_timestamp() - interval '1 second'")  # the preparer died
    third = claim(truth, "m3")
    with pytest.raises(ActivationInProgressError):
        attempt(truth, "m2", second)
    assert active(truth) == ""
    assert isinstance(attempt(truth, "m3", third), Activation)


# The same with real replicas ---------------------------------------------------------------------------------------


@dataclass
class Replica:
    settings: ServerSettings
    rooms: Rooms
    registry: CollectorRegistry

    def sql(self, query: str, *values: Any) -> Any:
        with psycopg.connect(self.settings.postgres_dsn) as connection:
            cursor = connection.execute(query.encode(), values)
            return cursor.fetchone() if cursor.description else None

    def pointed(self) -> tuple[str, int]:
        """Model and epoch in Redis: what every call follows."""
        client = redis.Redis.from_url(self.settings.redis_url)
        model, index = client.hmget(f"concord:{self.settings.project}:fleet", ["model", "index"])
        return model.decode(), int(index)

    async def activate(self, version: str) -> None:
        await self.rooms.services.models.activate(version, on_unready=OnUnready.FAIL, wait_seconds=10)

    def publish_epoch(self) -> int:
        with psycopg.connect(self.settings.postgres_dsn) as connection:
            upsert_items(connection, [Item(f"n{uuid.uuid4().hex}", "A new lamp", price_micros=10, currency="EUR")])
            return publish_epoch(connection)


@pytest.fixture(scope="module")
async def replica(live: ServerSettings, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Replica]:
    folder = tmp_path_factory.mktemp("activation")
    with psycopg.connect(live.postgres_dsn) as connection:
        for seed, version in enumerate(("x", "y", "z")):
            vary_bundle(bundle, folder / version, version, seed=seed)
            publish(connection, folder / version, live.models_base)
    # Epochs are published by the tests alone.
    settings = live.model_copy(update={"epoch_seconds": 3600.0, "refresh_seconds": 0.1, "epoch_wait_seconds": EPOCH_WAIT})
    registry = CollectorRegistry()
    async with open_rooms(settings, Metrics(registry)) as rooms:
        await rooms.fleet.join("127.0.0.1:1")
        yield Replica(settings, rooms, registry)


async def until(true: Any, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


def enter_other(replica: Replica) -> None:
    replica.sql(
        "INSERT INTO replicas VALUES ('other', %s, now(), clock_timestamp(), 600, '', 0, 0, '{}', '{}', '', %s)",
        OTHER,
        replica.sql("SELECT config FROM replicas WHERE address = '127.0.0.1:1'")[0],
    )


@pytest.fixture
def other(replica: Replica) -> Iterator[None]:
    """A replica that lives and builds nothing."""
    enter_other(replica)
    yield
    replica.sql("DELETE FROM replicas WHERE replica_id = 'other'")


async def test_only_the_model_that_answers_and_the_one_before_stay_in_memory(replica: Replica) -> None:
    fleet = replica.rooms.fleet
    sessions = []
    for version in ("x", "y", "z", "x"):
        await replica.activate(version)
        await until(lambda version=version: fleet.current.model_version == version)
        sessions.append((weakref.ref(fleet.current.model.encoder), weakref.ref(fleet.current)))
    await until(lambda: fleet.loaded == {"z", "x"})
    gc.collect()
    assert [tuple(ref() is None for ref in pair) for pair in sessions] == [(True, True), (True, True), (False, False), (False, False)]


async def test_an_activation_is_acknowledged_when_every_call_follows_it(replica: Replica) -> None:
    pointed = []
    for version in ("y", "z", "x"):
        await replica.activate(version)
        pointed.append(replica.pointed()[0])
    assert pointed == ["y", "z", "x"]


async def test_an_epoch_answers_once_every_replica_has_built_it(replica: Replica, other: None) -> None:
    before = replica.pointed()[1]
    published = replica.publish_epoch()
    ready = json.dumps({replica.pointed()[0]: [published]})
    await asyncio.sleep(0.7)
    assert replica.pointed()[1] == before  # built here, not there
    replica.sql("UPDATE replicas SET ready = %s WHERE replica_id = 'other'", ready)
    await until(lambda: replica.pointed()[1] == published, BEFORE_THAT)
    await until(lambda: replica.rooms.fleet.index_version == published)  # right after it has moved the pointer


async def test_a_slow_replica_holds_an_epoch_back_for_a_bounded_time(replica: Replica, other: None) -> None:
    published = replica.publish_epoch()
    await until(lambda: replica.pointed()[1] == published, 3 * EPOCH_WAIT)
    age = "SELECT extract(epoch FROM clock_timestamp() - published_at) FROM index_epochs WHERE index_version = %s"
    assert replica.sql(age, published)[0] >= EPOCH_WAIT


async def test_an_epoch_published_during_a_preparation_is_built_for_both_models(replica: Replica, other: None) -> None:
    activation = asyncio.create_task(replica.activate("y"))
    await until(lambda: "y" in replica.rooms.fleet.loaded)
    published = replica.publish_epoch()
    own = "SELECT ready FROM replicas WHERE address = '127.0.0.1:1'"
    both = {"y", replica.pointed()[0]}
    # Before the epoch moves without "other". They are built side by side, and each is reported as soon as it is there.
    await until(lambda: both <= {model for model, ready in replica.sql(own)[0].items() if published in ready}, BEFORE_THAT)
    assert not activation.done()
    replica.sql("DELETE FROM replicas WHERE replica_id = 'other'")
    await activation
    await until(lambda: replica.pointed() == ("y", published))


async def test_prices_do_not_wait_for_an_epoch(replica: Replica, other: None) -> None:
    replica.publish_epoch()
    result = await replica.rooms.services.catalog.upsert([Item("n-price", "A lamp", price_micros=5, currency="EUR")], [])
    seen = redis.Redis.from_url(replica.settings.redis_url).hget(f"concord:{replica.settings.project}:fleet", "offer")
    assert int(seen or 0) >= result.offer_version


async def test_a_cancelled_activation_leaves_nothing_in_the_way(replica: Replica, other: None) -> None:
    activation = asyncio.create_task(replica.activate("z"))
    await until(lambda: replica.sql("SELECT preparing_model FROM fleet_state")[0] == "z")
    activation.cancel()
    with pytest.raises(asyncio.CancelledError):
        await activation
    assert replica.sql("SELECT preparing_model FROM fleet_state") == ("",)


async def test_replicas_with_other_rules_are_told_apart(replica: Replica, other: None) -> None:
    replica.sql("UPDATE replicas SET config = 'something else' WHERE replica_id = 'other'")
    with psycopg.connect(replica.settings.postgres_dsn) as connection:
        assert len({one.config for one in list_replicas(connection)}) == 2
    await until(lambda: replica.registry.get_sample_value("concord_replicas") == 2)


async def test_a_replica_with_other_rules_answers_nobody_until_those_that_live_have_left(replica: Replica, other: None) -> None:
    replica.sql("UPDATE replicas SET config = 'something else' WHERE replica_id = 'other'")
    row = "SELECT waits_for, ready FROM replicas WHERE address = '127.0.0.1:2'"
    async with open_rooms(replica.settings, Metrics(CollectorRegistry())) as late:
        joining = asyncio.create_task(late.fleet.join("127.0.0.1:2"))
        active = replica.rooms.fleet.current.model_version
        await until(lambda: (replica.sql(row) or ("", {}))[1].get(active))  # it has loaded what it will answer with
        assert replica.sql(row)[0] == OTHER
        with pytest.raises(UnavailableError) as refused:
            await late.services.recommender.recommend(RecommendQuery(Subject(user_id="anybody"), "web", "home", 5))
        assert refused.value.reason == "REPLICA_NOT_JOINED"
        with psycopg.connect(replica.settings.postgres_dsn) as connection:
            listed = {one.address: (one.live, one.waits_for) for one in list_replicas(connection)}
        assert listed == {"127.0.0.1:1": (True, ""), "127.0.0.1:2": (False, OTHER), OTHER: (True, "")}
        assert replica.sql("SELECT count(*) FROM live_replicas") == (2,)  # activations and epochs do not wait for it
        assert not joining.done()
        replica.sql("DELETE FROM replicas WHERE replica_id = 'other'")
        await asyncio.wait_for(joining, BEFORE_THAT)
        assert replica.sql(row)[0] == ""
        assert replica.sql("SELECT count(*) FROM live_replicas") == (2,)
        assert replica.sql("SELECT onnx_provider FROM replicas WHERE address = '127.0.0.1:1'") == ("cpu",)
    assert replica.sql(row) is None


async def test_of_two_replicas_with_different_rules_that_start_at_once_one_joins(new_shop: NewShop) -> None:
    settings = new_shop()
    report = Report("", 0, 0, {}, {}, "", "", online_away=False)
    async with postgres_pool(settings, postgres_breaker(settings, lambda _: None)) as pool:
        for turn in range(10):
            pair = [
                Membership(pool, replica_id=f"{turn}-{config}", config=config, pause_seconds=0.5, epoch_wait_seconds=2) for config in "ab"
            ]
            waits = await asyncio.gather(*(member.join(f"{k}:1", report) for k, member in enumerate(pair)))
            assert sorted(waits) in (["", "0:1"], ["", "1:1"])
            for member in pair:
                await member.leave()


async def test_failures_are_counted(replica: Replica) -> None:
    before = replica.registry.get_sample_value("concord_model_load_failures_total") or 0
    replica.sql("INSERT INTO model_versions (model_version, uri, manifest) VALUES ('nowhere', 'file:///nowhere', '{}')")
    with pytest.raises(Exception, match="no bundle"):
        await replica.activate("nowhere")
    assert (replica.registry.get_sample_value("concord_model_load_failures_total") or 0) > before
