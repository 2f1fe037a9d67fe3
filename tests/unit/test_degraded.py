"""Recommending while a store is away or too much is asked: never older than promised, never a silent difference."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import redis.exceptions

from server.domain import Answer, ItemFilter, RecommendQuery, Subject, Token
from server.errors import NotFoundError, OverloadedError, StaleStateError
from tests.unit.memory import FIRST, PROFILE, Replica, Shop

LATER = FIRST + timedelta(days=30)
AWAY = ("ONLINE_STORE_UNAVAILABLE",)


@pytest.fixture
def shop() -> Shop:
    shop = Shop()
    shop.views("u", "i001", "i002", "i003")
    return shop


async def ask(replica: Replica, user_id: str = "u", *, channel: str = "web", surface: str = "home", **more: Any) -> Answer:
    return await replica.recommender.recommend(RecommendQuery(Subject(user_id=user_id), channel, surface, 10, **more))


async def rank(replica: Replica, *, token: Token | None = None) -> Answer:
    items = [f"i{k:03d}" for k in range(20)]
    return await replica.recommender.rank(Subject(user_id="u"), channel="web", surface="home", item_ids=items, token=token)


def shown(answer: Answer) -> list[tuple[str, int, float, int | None]]:
    return [(item.item_id, item.position, item.score, item.card.price_micros) for item in answer.items]


def materialized(shop: Shop, *, online: bool = True) -> None:
    """A snapshot is taken and reaches Redis; the fleet does not move."""
    shop.truth.profiles[LATER] = PROFILE | {"price_mean": 55.0, "price_low": 50.0, "price_high": 60.0}
    if online:
        shop.online.materialized = LATER


async def test_materializing_between_two_computations_of_equal_versions_changes_no_bit(shop: Shop) -> None:
    replica = shop.replica(ttl_seconds=60)
    before, ranked = await ask(replica), await rank(replica)
    materialized(shop)
    shop.pass_time(61)
    after = await ask(replica)
    assert (shown(after), after.versions) == (shown(before), before.versions)
    assert after.slate_id != before.slate_id  # it was computed again
    assert shown(await rank(replica)) == shown(ranked)
    shop.point(index_version=2)
    shop.truth.epochs[2] = LATER
    other = shop.replica()
    moved = await ask(other)
    assert shown(moved) != shown(before)
    shop.online.materialized = FIRST  # an epoch ahead of Redis looks its own profile up as well
    shop.online.slates.clear()
    assert shown(await ask(other)) == shown(moved)


async def test_the_right_profile_at_hand_costs_no_question_to_postgres(shop: Shop) -> None:
    replica = shop.replica()
    await ask(replica)
    reads = shop.truth.reads
    await ask(replica, surface="cart")
    assert shop.truth.reads == reads
    materialized(shop)
    await ask(replica, surface="product")
    assert shop.truth.reads == reads + 1


async def test_who_came_after_the_snapshot_has_no_profile_and_needs_no_question(shop: Shop) -> None:
    first = FIRST - timedelta(days=365)  # before anything happened in this shop
    shop.truth.epochs[1] = first
    shop.truth.profiles = {FIRST: PROFILE}
    replica = shop.replica()
    await ask(replica)
    reads = shop.truth.reads
    without = await ask(replica, surface="cart")
    assert shop.truth.reads == reads
    merged = replace(shop.truth.customers["u"], version=9)  # some of what they did is out of sight: somebody has to look
    shop.truth.customers["u"] = shop.online.customers["u"] = merged
    assert [item.score for item in (await ask(replica, surface="cart")).items] == [item.score for item in without.items]
    assert shop.truth.reads == reads + 1


async def test_what_is_stale_is_so_as_of_the_slate_not_of_the_replicas_clock(shop: Shop) -> None:
    replica = shop.replica(ttl_seconds=10**9)
    shop.pass_time(86_400 * 500)
    fresh = await ask(replica)
    shop.pass_time(86_400 * 900)
    assert (fresh.stale, (await ask(replica)).stale) == (False, False)
    assert (await ask(replica, surface="cart")).stale
    assert (await rank(replica)).stale


async def test_without_redis_the_answer_is_the_same_and_says_so(shop: Shop) -> None:
    first, second = shop.replica(), shop.replica()
    before = await ask(first)
    shop.online.away = True
    for replica in (first, second):
        answer = await ask(replica, token=before.token)
        assert (shown(answer), answer.versions) == (shown(before), before.versions)
        assert (answer.stale, answer.degraded_reasons) == (False, AWAY)
    assert second.fleet.computations == 1
    await ask(second, channel="app")
    assert second.fleet.computations == 1  # its own memory of slates is as good while the versions are equal
    assert first.fleet.computations == 1
    assert first.registry.get_sample_value("concord_degraded_answers_total", {"reason": AWAY[0]}) == 1


async def test_without_redis_every_event_shows_and_versions_never_go_back(shop: Shop) -> None:
    replica, other = shop.replica(), shop.replica()
    await ask(replica)
    materialized(shop, online=False)  # PostgreSQL's newest profile is not the epoch's
    shop.online.away = True
    version = shop.views("u", "i030", seen=False)
    answers = [await ask(who, token=Token("u", version)) for who in (replica, other)]
    assert [answer.versions.user_version for answer in answers] == [4, 4]
    assert shown(answers[0]) == shown(answers[1])
    shop.online.away = False  # Redis is back as it was: behind
    after = await ask(replica)
    assert (after.versions.user_version, after.stale, after.degraded_reasons) == (4, False, ())
    assert shown(after) == shown(answers[0])
    assert shop.online.customers["u"].version == 4


async def test_without_redis_errors_are_those_of_postgres(shop: Shop) -> None:
    replica = shop.replica()
    shop.online.away = True
    with pytest.raises(StaleStateError):
        await ask(replica, token=Token("u", 9))
    with pytest.raises(NotFoundError):
        await ask(replica, "nobody")
    shop.truth.merged["v"] = "u"
    assert (await ask(replica, "v")).user_id == "u"
    stranger = Subject(channel="web", channel_user_id="new")
    nobody = shop.replica(known=[(stranger, "")])
    answer = await nobody.recommender.recommend(RecommendQuery(stranger, "web", "home", 5))
    assert (answer.user_id, answer.versions.user_version, answer.degraded_reasons) == ("", 0, AWAY)


async def test_ranking_and_similar_items_do_without_redis(shop: Shop) -> None:
    replica = shop.replica()
    before = await rank(replica)
    similar = await replica.recommender.similar("i005", channel="web", limit=5, filters=ItemFilter())
    shop.online.away = True
    version = shop.views("u", "i030", seen=False)
    after = await rank(replica, token=Token("u", version))
    assert (after.versions.user_version, after.stale, after.degraded_reasons) == (4, False, AWAY)
    assert {item.item_id for item in after.items} == {item.item_id for item in before.items}
    assert shown(await replica.recommender.similar("i005", channel="web", limit=5, filters=ItemFilter())) == shown(similar)
    shop.online.away = False
    assert (await rank(replica)).versions.user_version == 4


async def test_a_redis_that_takes_no_writes_costs_the_commit_not_the_answer(shop: Shop) -> None:
    replica = shop.replica()
    shop.online.full = True
    answer = await ask(replica)
    assert (answer.stale, answer.degraded_reasons) == (False, AWAY)
    shop.online.full = False
    assert shown(await ask(replica)) == shown(answer)
    assert len(shop.online.slates) == 1


async def test_without_postgres_reads_that_need_only_redis_go_on(shop: Shop) -> None:
    replica = shop.replica()
    before = await ask(replica)
    shop.truth.away = True
    assert (await ask(replica)).slate_id == before.slate_id
    computed = await ask(replica, surface="cart")
    assert (computed.stale, computed.degraded_reasons) == (False, ())
    assert (await rank(replica)).degraded_reasons == ()


async def test_without_postgres_newer_prices_are_not_answered_with_older_ones(shop: Shop) -> None:
    replica = shop.replica()
    await ask(replica)
    shop.truth.away = True
    shop.point(offer_version=7)
    with pytest.raises(psycopg.OperationalError):
        await ask(replica)


async def test_without_postgres_a_lagging_state_is_answered_with_the_last_slate_if_the_token_allows(shop: Shop) -> None:
    replica = shop.replica()
    before = await ask(replica)
    shop.truth.away = True
    shop.online.customers.clear()
    answer = await ask(replica, token=Token("u", 3))
    assert (answer.slate_id, answer.versions, answer.stale) == (before.slate_id, before.versions, True)
    assert answer.degraded_reasons == ("RECORD_STORE_UNAVAILABLE",)
    assert replica.journal.logged[-1][0].stale
    with pytest.raises(psycopg.OperationalError):
        await ask(replica, token=Token("u", 4))
    with pytest.raises(psycopg.OperationalError):
        await ask(replica, surface="cart")  # never answered there
    fresh = shop.replica()
    with pytest.raises(psycopg.OperationalError):
        await ask(fresh)  # its offers are not loaded: no price is no answer


async def test_redis_tells_a_fresh_replica_the_last_slate(shop: Shop) -> None:
    other = shop.replica()
    before = await ask(other)
    fresh = shop.replica()
    await ask(fresh, surface="cart")  # has the snapshot and the offers
    shop.truth.away = True
    shop.online.customers.clear()
    answer = await ask(fresh)
    assert (answer.slate_id, answer.stale) == (before.slate_id, True)


async def test_with_both_stores_away_the_last_slate_is_answered_and_flagged(shop: Shop) -> None:
    replica = shop.replica()
    before = await ask(replica)
    shop.truth.away = shop.online.away = True
    answer = await ask(replica, token=before.token, channel="app")
    assert (answer.slate_id, shown(answer), answer.versions) == (before.slate_id, shown(before), before.versions)
    assert (answer.stale, answer.degraded_reasons) == (True, ("ONLINE_STORE_UNAVAILABLE", "RECORD_STORE_UNAVAILABLE"))
    for more in ({"token": Token("u", 4)}, {"user_id": "v"}, {"surface": "cart"}):
        with pytest.raises(psycopg.OperationalError):
            await ask(replica, **more)
    with pytest.raises(psycopg.OperationalError):
        await rank(replica)


async def test_the_last_slate_goes_with_its_own_snapshot_or_not_at_all(shop: Shop) -> None:
    replica = shop.replica()
    before = await ask(replica)
    shop.point(model_version="m2", activation=2)
    await ask(replica, surface="cart")
    shop.truth.away = shop.online.away = True
    answer = await ask(replica)
    assert (answer.versions.model_version, shown(answer)) == ("m1", shown(before))
    del replica.fleet.loaded["m1", 1]
    with pytest.raises(psycopg.OperationalError):
        await ask(replica)


async def test_memory_of_slates_is_bounded(shop: Shop) -> None:
    replica = shop.replica(known_slates=2)
    for surface in ("home", "cart", "product"):
        await ask(replica, surface=surface)
    shop.truth.away = shop.online.away = True
    assert (await ask(replica, surface="product")).stale
    with pytest.raises(psycopg.OperationalError):
        await ask(replica, surface="home")


async def test_more_than_can_be_computed_gets_the_last_slate_or_is_refused(shop: Shop) -> None:
    for k in range(8):
        shop.views(f"v{k}", "i005")
    replica = shop.replica(compute_threads=1, compute_waiting=2)
    before = await ask(replica)
    version = shop.views("u", "i031")
    replica.fleet.seconds = 0.05
    others = [asyncio.create_task(ask(replica, f"v{k}")) for k in range(3)]
    await asyncio.sleep(0.02)
    answer = await ask(replica)
    assert (answer.slate_id, answer.stale, answer.degraded_reasons) == (before.slate_id, True, ("OVERLOADED",))
    with pytest.raises(OverloadedError) as refused:
        await ask(replica, token=Token("u", version))
    assert refused.value.reason == "COMPUTE_QUEUE_FULL"
    with pytest.raises(OverloadedError):
        await ask(replica, "v7")
    with pytest.raises(OverloadedError):
        await rank(replica)
    assert all(answer.items for answer in await asyncio.gather(*others))
    assert (await ask(replica)).versions.user_version == version


async def test_reading_around_redis_is_bounded(shop: Shop) -> None:
    for k in range(6):
        shop.views(f"v{k}", "i005")
    replica = shop.replica(degraded_reads=1, degraded_waiting=2)
    await ask(replica)
    shop.online.away = True
    outcomes = await asyncio.gather(*(ask(replica, f"v{k}") for k in range(6)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    assert len(refused) == 3
    assert {error.reason for error in refused} == {"DEGRADED_QUEUE_FULL"}
    busy = [asyncio.create_task(ask(replica, f"v{k}")) for k in range(3)]
    await asyncio.sleep(0)
    answer = await ask(replica)
    assert (answer.stale, answer.degraded_reasons) == (True, ("ONLINE_STORE_UNAVAILABLE", "OVERLOADED"))
    await asyncio.gather(*busy)


async def test_callers_who_leave_take_what_nobody_waits_for_along(shop: Shop) -> None:
    for k in range(4):
        shop.views(f"v{k}", "i005")
    replica = shop.replica(compute_threads=1)
    replica.fleet.seconds = 0.05
    calls = [asyncio.create_task(ask(replica, f"v{k}")) for k in range(4)]
    await asyncio.sleep(0.03)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    left = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
    assert len(left) == 1  # the one whose thread runs: it is paid for, so it is committed
    await asyncio.wait(left)
    assert (replica.fleet.computations, len(shop.online.slates)) == (1, 1)
    assert (await ask(replica, "v2")).items  # and its place in the queue is free
    assert replica.fleet.computations == 2


async def test_an_answer_from_a_redis_that_may_lag_is_flagged(shop: Shop) -> None:
    replica = shop.replica()
    shop.online.behind = True
    answer = await ask(replica)
    assert (answer.stale, answer.degraded_reasons) == (True, ("ONLINE_STORE_LAGGING",))
    assert (await rank(replica)).stale
    shop.online.behind = False
    assert not (await ask(replica)).stale


async def test_what_was_read_while_redis_lagged_is_flagged_although_it_has_caught_up_since(shop: Shop) -> None:
    replica = shop.replica()

    def caught_up() -> None:
        shop.online.behind = False

    shop.online.on_read = caught_up
    for act in (ask, rank):
        shop.online.behind = True
        answer = await act(replica)
        assert (answer.stale, answer.degraded_reasons) == (True, ("ONLINE_STORE_LAGGING",))
        assert not (await act(replica)).stale


async def test_a_redis_error_that_is_none_of_being_away_is_survived_too(shop: Shop) -> None:
    replica = shop.replica()

    def loading() -> None:
        raise redis.exceptions.ReadOnlyError("a replica")

    shop.online.on_read = loading
    assert (await ask(replica)).degraded_reasons == AWAY
