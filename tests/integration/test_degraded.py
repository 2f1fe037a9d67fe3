"""Reads while a real Redis or PostgreSQL hangs, refuses or comes back, and slates that only their versions decide."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
import redis
from psycopg import sql

from cli.stack import embedded_redis
from concord import Concord, user
from concord.v1 import common_pb2, features_pb2, features_pb2_grpc, recommendation_pb2_grpc
from concord.v1.recommendation_pb2 import RecommendRequest, RecommendResponse
from features.activity import UserState, UserStateCodec
from features.materialize import materialize
from features.registry import load_registry
from features.snapshots import free_time, take_snapshot
from features.store import feature_store
from server.database import redis_breaker, redis_client
from server.online.store import OnlineStore
from server.settings import ServerSettings
from tests.integration.serving import served


@dataclass
class Fleet:
    """Two replicas over a Redis of their own, and clients that remember nothing between calls."""

    settings: ServerSettings
    addresses: tuple[str, str]
    clients: tuple[Concord, Concord]
    customers: list[str]

    async def ask(self, customer: str, *, replica: int = 0, **more: Any) -> RecommendResponse:
        return await self.clients[replica].recommend(user(customer), **{"surface": "home", "limit": 50, **more})


@asynccontextmanager
async def fleet_of(settings: ServerSettings) -> AsyncIterator[Fleet]:
    async with served(settings) as first, served(settings) as second:
        one = Concord(first, channel="web", timeout=3.0, remembered_customers=0)
        two = Concord(second, channel="app", timeout=3.0, remembered_customers=0)
        async with one, two:
            yield Fleet(settings, (first, second), (one, two), customers(settings))


@pytest.fixture
async def fleet(live: ServerSettings, tmp_path: Path) -> AsyncIterator[Fleet]:
    with embedded_redis(tmp_path) as url:
        async with fleet_of(live.model_copy(update={"redis_url": url, "postgres_timeout_seconds": 1.0})) as fleet:
            yield fleet


def customers(settings: ServerSettings) -> list[str]:
    with psycopg.connect(settings.postgres_dsn) as connection:
        return [row[0] for row in connection.execute("SELECT user_id FROM users WHERE version > 20 ORDER BY user_id")]


def shown(answer: RecommendResponse) -> list[tuple[Any, ...]]:
    return [(item.position, item.item_id, item.score, item.price.SerializeToString()) for item in answer.items]


def only_common(*answers: RecommendResponse) -> list[list[tuple[Any, ...]]]:
    """Channels may lack what they do not sell."""
    common = set.intersection(*({item.item_id for item in answer.items} for answer in answers))
    return [[row for row in shown(answer) if row[1] in common] for answer in answers]


async def features(fleet: Fleet, customer: str, name: str, token: str = "", *, item_id: str = "") -> tuple[int, int]:
    """Returns one online feature and its status, as the second replica reads it."""
    async with grpc.aio.insecure_channel(fleet.addresses[1]) as channel:
        request = features_pb2.GetOnlineFeaturesRequest(features=features_pb2.FeatureList(feature_refs=[name]))
        request.entities.add(user_id=customer, item_id=item_id, consistency_token=token)
        answer = await features_pb2_grpc.FeatureServiceStub(channel).GetOnlineFeatures(request, timeout=3.0)
    result = answer.rows[0].results[0]
    return result.value.int64_value, result.status


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def redis_pid(settings: ServerSettings) -> int:
    with closing(redis.Redis.from_url(settings.redis_url)) as client:
        return int(client.info("server")["process_id"])


@contextmanager
def postgres_refusing(settings: ServerSettings) -> Iterator[None]:
    """Ends the connections to this shop's database and refuses new ones; its neighbours notice nothing."""
    name = psycopg.conninfo.conninfo_to_dict(settings.postgres_dsn)["dbname"]
    admin = psycopg.conninfo.make_conninfo(settings.postgres_dsn, dbname="postgres")

    def allow(yes: bool) -> None:
        with psycopg.connect(admin, autocommit=True) as connection:
            command = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(sql.Identifier(str(name)), sql.Literal(yes))
            connection.execute(command)
            if not yes:
                connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])

    allow(False)
    try:
        yield
    finally:
        allow(True)


async def eventually(holds: Callable[[RecommendResponse], bool], ask: Callable[[], Any], *, seconds: float = 15.0) -> RecommendResponse:
    async with asyncio.timeout(seconds):
        while True:
            try:
                answer: RecommendResponse = await ask()
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)
                continue
            if holds(answer):
                return answer
            await asyncio.sleep(0.02)


async def test_a_hanging_redis_costs_its_timeout_a_few_times_and_no_promise(fleet: Fleet) -> None:
    some = fleet.customers[:6]
    before = {name: await fleet.ask(name) for name in some}
    with stopped([redis_pid(fleet.settings)]):
        for replica in (0, 1):  # at once, so that all of them together pay the timeout once
            started = time.monotonic()
            await asyncio.gather(*(fleet.ask(name, replica=replica) for name in some), return_exceptions=True)
            assert time.monotonic() - started < 2.5
        seconds = []
        for name in some:
            answers = []
            for replica in (0, 1):
                started = time.monotonic()
                answers.append(await fleet.ask(name, replica=replica))
                seconds.append(time.monotonic() - started)
            first, second, expected = only_common(*answers, before[name])
            assert first == second == expected
            for answer in answers:
                assert (answer.degraded, answer.stale, list(answer.degraded_reasons)) == (True, False, ["ONLINE_STORE_UNAVAILABLE"])
                assert answer.versions.SerializeToString() == before[name].versions.SerializeToString()
        assert sorted(seconds)[len(seconds) // 2] < fleet.settings.redis_timeout_seconds / 2
        started = time.monotonic()
        recorded = await fleet.clients[0].record(fleet.clients[0].event(user(some[0]), "view", item_id="seen-while-away"))
        assert time.monotonic() - started < fleet.settings.redis_timeout_seconds
        assert not recorded.online
        token = recorded.tokens[0]
        fresh = await fleet.ask(some[0], replica=1, consistency_token=token.consistency_token)
        assert fresh.versions.user_version == token.user_version == before[some[0]].versions.user_version + 1
        ranked = await fleet.clients[1].rank(user(some[0]), [item.item_id for item in fresh.items[:9]], surface="home")
        assert (ranked.versions.user_version, ranked.degraded, ranked.stale) == (token.user_version, True, False)
        version, held = await features(fleet, some[0], "user_activity:version", token.consistency_token)
        assert (version, held) == (token.user_version, common_pb2.FEATURE_STATUS_PRESENT)
        with pytest.raises(grpc.aio.AioRpcError) as refused:  # what only Redis keeps in its online form
            await features(fleet, some[0], "item_popularity:views_7d", item_id=fresh.items[0].item_id)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        profile = await fleet.clients[1].profile(user(some[0]))
        assert (profile.user_version, profile.recent_behaviours[0].item_id) == (token.user_version, "seen-while-away")
    # Redis goes on where it was stopped: with the older state. Nobody is shown it, whichever replica answers.
    versions = []
    async with asyncio.timeout(20):
        while True:
            answer = await fleet.ask(some[0], replica=len(versions) % 2)
            versions.append((answer.versions.user_version, answer.stale))
            if len(versions) > 60 and not answer.degraded:
                break
    assert {version for version, stale in versions if not stale} == {token.user_version}
    healed = [await eventually(lambda answer: not answer.degraded, lambda k=k: fleet.ask(some[0], replica=k)) for k in (0, 1)]
    assert healed[0].slate_id == healed[1].slate_id
    assert only_common(healed[0], fresh)[0] == only_common(healed[0], fresh)[1]


async def test_without_postgres_reads_go_on_and_what_cannot_be_kept_is_refused_fast(fleet: Fleet) -> None:
    known, other = fleet.customers[6], fleet.customers[7]
    before = await fleet.ask(known)
    await fleet.ask(other)
    with postgres_refusing(fleet.settings):
        assert (await fleet.ask(known)).slate_id == before.slate_id
        computed = await fleet.ask(other, surface="cart")
        assert (computed.degraded, computed.stale) == (False, False)
        with closing(redis.Redis.from_url(fleet.settings.redis_url)) as client:
            client.flushdb()  # and now what Redis held is gone as well
        answer = await eventually(lambda answer: answer.stale, lambda: fleet.ask(known))
        assert (answer.slate_id, shown(answer)) == (before.slate_id, shown(before))
        assert "RECORD_STORE_UNAVAILABLE" in answer.degraded_reasons
        seconds = []
        for _ in range(10):
            started = time.monotonic()
            token = before.consistency_token
            assert (await fleet.ask(known, consistency_token=token)).versions.user_version == before.versions.user_version
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await fleet.clients[0].recommend(user(fleet.customers[8]), surface="home", timeout=0.5)
            assert refused.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
            seconds.append(time.monotonic() - started)
        # Refused at once; most of the time is the client's own pause before it tries again.
        assert min(seconds) < 1.0
    after = await eventually(lambda answer: not answer.degraded, lambda: fleet.ask(known))
    assert shown(after) == shown(before)


async def test_with_both_away_the_last_answer_stands_flagged_and_a_newer_token_is_refused(fleet: Fleet) -> None:
    known = fleet.customers[9]
    before = await fleet.ask(known)
    pid = redis_pid(fleet.settings)
    with stopped([pid]):
        fresh = await fleet.clients[0].record(fleet.clients[0].event(user(known), "view", item_id="x"))
        with postgres_refusing(fleet.settings):
            answer = await eventually(lambda answer: answer.stale, lambda: fleet.ask(known))
            assert (answer.slate_id, shown(answer)) == (before.slate_id, shown(before))
            assert list(answer.degraded_reasons) == ["ONLINE_STORE_UNAVAILABLE", "RECORD_STORE_UNAVAILABLE"]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await fleet.ask(known, consistency_token=fresh.tokens[0].consistency_token)
            assert refused.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    after = await eventually(lambda answer: not answer.degraded, lambda: fleet.ask(known))
    assert after.versions.user_version == fresh.tokens[0].user_version


async def test_a_hanging_postgres_does_not_hold_up_what_redis_can_answer(fleet: Fleet) -> None:
    known, unknown = fleet.customers[10], fleet.customers[11]  # Redis is new: it holds only who was asked for
    before = await fleet.ask(known)
    name = psycopg.conninfo.conninfo_to_dict(fleet.settings.postgres_dsn)["dbname"]
    with psycopg.connect(fleet.settings.postgres_dsn) as connection:
        rows = connection.execute("SELECT pid FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()", [name]).fetchall()
        postmaster = connection.execute("SELECT pg_read_file('postmaster.pid')").fetchone()
    assert postmaster is not None
    with stopped([int(postmaster[0].split()[0]), *(row[0] for row in rows)]):
        started = time.monotonic()
        for _ in range(20):
            assert (await fleet.ask(known)).slate_id == before.slate_id
        assert time.monotonic() - started < 1.0
        codes = []
        async with grpc.aio.insecure_channel(fleet.addresses[0]) as channel:  # bare, because the client would try again
            stub = recommendation_pb2_grpc.RecommendationServiceStub(channel)
            for _ in range(12):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.Recommend(RecommendRequest(subject=user(unknown), channel="web", surface="home"), timeout=0.6)
                codes.append(refused.value.code())
        assert set(codes) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        assert codes[-1] is grpc.StatusCode.UNAVAILABLE  # the breaker is open: no need to wait for the deadline
    after = await eventually(lambda _: True, lambda: fleet.ask(unknown))
    assert after.items


async def test_a_materialization_between_two_computations_changes_no_bit_of_an_epochs_slates(live: ServerSettings, tmp_path: Path) -> None:
    with embedded_redis(tmp_path) as url:
        settings = live.model_copy(update={"redis_url": url, "slate_ttl_seconds": 0.2})
        materialize(settings)
        async with fleet_of(settings) as fleet:
            whom = fleet.customers[12]
            one = fleet.clients[0]
            first = await fleet.ask(whom)
            bought = [one.event(user(whom), "purchase", item_id=item.item_id, quantity=1, value=500.0) for item in first.items[:20]]
            version = (await one.record(*bought)).tokens[0].user_version
            before = await fleet.ask(whom)
            ranking = [item.item_id for item in before.items]
            ranked = await one.rank(user(whom), ranking, surface="home")
            store = feature_store(settings)
            with psycopg.connect(settings.postgres_dsn) as connection:
                as_of = free_time(connection, datetime.now(UTC))
                take_snapshot(connection, as_of)
            store.materialize(as_of, as_of, feature_views=["user_profile"])  # Redis has the new profile; no version has moved
            await asyncio.sleep(0.3)
            after = await fleet.ask(whom)
            assert after.versions.SerializeToString() == before.versions.SerializeToString()
            assert after.versions.user_version == version
            assert after.slate_id != before.slate_id
            assert shown(after) == shown(before)
            again = await one.rank(user(whom), ranking, surface="home")
            assert [(item.item_id, item.score) for item in again.items] == [(item.item_id, item.score) for item in ranked.items]
            materialize(settings)  # an epoch of its own: now the purchases count
            moved = await eventually(lambda answer: answer.versions.index_version > before.versions.index_version, lambda: fleet.ask(whom))
            assert [item.score for item in moved.items] != [item.score for item in before.items]


def test_no_two_materializations_share_a_time_and_a_snapshot_in_use_stays_as_it_is(live: ServerSettings) -> None:
    reports = [materialize(live) for _ in range(2)]
    assert reports[0].snapshot.as_of < reports[1].snapshot.as_of
    with psycopg.connect(live.postgres_dsn) as connection:
        query = "SELECT md5(string_agg(p::text, ',' ORDER BY user_id)) FROM user_profile p WHERE event_timestamp = %s"
        before = connection.execute(query, [reports[0].snapshot.as_of]).fetchone()
        connection.execute("UPDATE events SET value = value + 1 WHERE action = 'purchase'")
        again = take_snapshot(connection, reports[0].snapshot.as_of)
        assert again == reports[0].snapshot
        assert connection.execute(query, [reports[0].snapshot.as_of]).fetchone() == before
        connection.rollback()
        epochs = connection.execute("SELECT features_as_of FROM index_epochs ORDER BY index_version DESC LIMIT 2").fetchall()
    assert [row[0] for row in epochs] == [reports[1].snapshot.as_of, reports[0].snapshot.as_of]


async def test_a_redis_at_its_memory_limit_costs_the_commit_not_the_answer(fleet: Fleet) -> None:
    known = fleet.customers[13]
    before = await fleet.ask(known)
    with closing(redis.Redis.from_url(fleet.settings.redis_url)) as client:
        client.config_set("maxmemory", "1")
        recorded = await fleet.clients[0].record(fleet.clients[0].event(user(known), "view", item_id="x"))
        answers = [await fleet.ask(known, replica=k, consistency_token=recorded.tokens[0].consistency_token) for k in (0, 1)]
        assert {answer.versions.user_version for answer in answers} == {before.versions.user_version + 1}
        assert {(answer.degraded, answer.stale) for answer in answers} == {(True, False)}
        first, second = only_common(*answers)
        assert first == second
        assert (await fleet.ask(known, replica=1)).versions.user_version == recorded.tokens[0].user_version
        client.config_set("maxmemory", "0")
    after = await eventually(lambda answer: not answer.degraded, lambda: fleet.ask(known))
    assert shown(after) == shown(answers[0])


async def test_writes_that_redis_does_not_answer_give_their_connections_back(live: ServerSettings, tmp_path: Path) -> None:
    layouts = load_registry(live).layouts
    with embedded_redis(tmp_path) as url:
        settings = live.model_copy(update={"redis_url": url, "redis_timeout_seconds": 0.05, "breaker_failures": 1_000})
        client = redis_client(settings)
        breaker = redis_breaker(settings, client, lambda _: None)
        online = OnlineStore(client, UserStateCodec(layouts, settings.project), breaker)
        state = UserState("u", 1, b"u", (1, b"v", b"0", b"", 0, 0))
        with stopped([redis_pid(settings)]):
            for _ in range(3):
                outcomes = await asyncio.gather(*(online.write_users([state]) for _ in range(40)), return_exceptions=True)
                assert {type(outcome) for outcome in outcomes} == {redis.exceptions.TimeoutError}  # and not: no connection left
        await client.aclose()


def title_word(settings: ServerSettings) -> str:
    with psycopg.connect(settings.postgres_dsn) as connection:
        row = connection.execute("SELECT lower(substring(title from '[A-Za-z]{4,}')) FROM items ORDER BY item_id LIMIT 1").fetchone()
    assert row is not None
    return str(row[0])


async def test_without_redis_a_search_finds_the_same_and_is_recorded(fleet: Fleet) -> None:
    customer, word = fleet.customers[-1], title_word(fleet.settings)
    before = await fleet.clients[0].search(user(customer), word, limit=20, skip_recording=True)
    with stopped([redis_pid(fleet.settings)]):
        found = await fleet.clients[0].search(user(customer), word, limit=20)
        again = await fleet.clients[0].search(user(customer), word, limit=20, consistency_token=found.consistency_token)
    assert [(i.item_id, i.score) for i in found.items] == [(i.item_id, i.score) for i in before.items]
    assert [(i.item_id, i.score) for i in again.items] == [(i.item_id, i.score) for i in before.items]
    assert "ONLINE_STORE_UNAVAILABLE" in found.degraded_reasons
    assert found.recorded_version > before.versions.user_version
    assert again.recorded_version == found.recorded_version + 1


async def test_without_postgres_a_search_is_answered_and_says_that_it_was_not_recorded(fleet: Fleet) -> None:
    customer, word = fleet.customers[-2], title_word(fleet.settings)
    before = await fleet.clients[0].search(user(customer), word, limit=20, skip_recording=True)
    with postgres_refusing(fleet.settings):
        found = await fleet.clients[0].search(user(customer), word, limit=20, timeout=20)
        assert [(i.item_id, i.score) for i in found.items] == [(i.item_id, i.score) for i in before.items]
        assert "SEARCH_NOT_RECORDED" in found.degraded_reasons
        assert (found.event_id, found.recorded_version) == ("", 0)
        assert found.user_id == customer
