"""The promise of one customer, one answer: across channels, replicas, writes, price changes and the loss of Redis."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import psycopg
import pytest
import redis

from concord import Concord, error_details, user
from concord.v1.common_pb2 import Money
from concord.v1.recommendation_pb2 import ItemFilter, RecommendResponse
from features.catalogue import Item, upsert_items
from server.settings import ServerSettings
from tests.integration.serving import served

CHANNELS = ("web", "app", "mini_program", "messaging", "store")


@dataclass
class Fleet:
    """Two replicas of one shop, and a client per channel spread over them."""

    settings: ServerSettings
    clients: dict[str, Concord]
    customers: list[str]

    def __getitem__(self, channel: str) -> Concord:
        return self.clients[channel]


@pytest.fixture(scope="module")
async def fleet(live: ServerSettings) -> AsyncIterator[Fleet]:
    with psycopg.connect(live.postgres_dsn) as connection:
        query = "SELECT user_id FROM users WHERE version > 20 ORDER BY user_id"
        customers = [row[0] for row in connection.execute(query)]
    async with served(live) as first, served(live) as second:
        clients = {
            channel: Concord(first if k % 2 else second, channel=channel, timeout=10.0, remembered_customers=1)
            for k, channel in enumerate(CHANNELS)
        }
        for client in clients.values():
            await client.__aenter__()
        yield Fleet(live, clients, customers)
        for client in clients.values():
            await client.__aexit__()


def shown(answer: RecommendResponse) -> list[tuple[Any, ...]]:
    """What must be equal to the byte: order, scores and prices."""
    return [(item.position, item.item_id, item.score, item.price.SerializeToString()) for item in answer.items]


async def everywhere(fleet: Fleet, customer: str, *, surface: str = "home", **arguments: Any) -> list[RecommendResponse]:
    return await asyncio.gather(*(fleet[channel].recommend(user(customer), surface=surface, **arguments) for channel in CHANNELS))


def only_common(answers: Sequence[RecommendResponse]) -> list[list[tuple[Any, ...]]]:
    common = set.intersection(*({item.item_id for item in answer.items} for answer in answers))
    return [[row for row in shown(answer) if row[1] in common] for answer in answers]


async def test_all_channels_and_replicas_answer_the_same(fleet: Fleet) -> None:
    for customer in fleet.customers[:12]:
        answers = await everywhere(fleet, customer, surface="home", limit=100)
        first, *others = only_common(answers)
        assert len(first) >= 50
        assert all(other == first for other in others)
        assert len({answer.slate_id for answer in answers}) == 1
        assert len({answer.versions.SerializeToString() for answer in answers}) == 1


async def test_a_smaller_limit_is_a_prefix_and_filters_only_remove(fleet: Fleet) -> None:
    customer = fleet.customers[0]
    whole = await fleet["web"].recommend(user(customer), surface="home", limit=100)
    assert shown(await fleet["web"].recommend(user(customer), surface="home", limit=7)) == shown(whole)[:7]
    category = whole.items[3].category
    kept = await fleet["web"].recommend(user(customer), surface="home", limit=100, item_filter=ItemFilter(categories=[category]))
    expected = [row for row, item in zip(shown(whole), whole.items, strict=True) if item.category == category]
    assert expected
    assert shown(kept)[: len(expected)] == expected
    cheap = await fleet["web"].recommend(
        user(customer), surface="home", limit=100, item_filter=ItemFilter(max_price=Money(currency_code="USD", units=20))
    )
    assert all(item.price.units + item.price.nanos / 1e9 <= 20 for item in cheap.items)
    assert [row for row in shown(whole) if row in shown(cheap)] == [row for row in shown(cheap) if row in shown(whole)]


async def test_a_write_in_one_channel_shows_in_every_other(fleet: Fleet) -> None:
    customer = fleet.customers[1]
    before = await fleet["app"].recommend(user(customer), surface="home", limit=10)
    bought = before.items[0].item_id
    recorded = await fleet["store"].record(fleet["store"].event(user(customer), "purchase", item_id=bought, quantity=1, value=5.0))
    token = recorded.tokens[0].consistency_token
    for channel in CHANNELS:
        after = await fleet[channel].recommend(user(customer), surface="home", limit=100, consistency_token=token)
        assert after.versions.user_version == before.versions.user_version + 1
        assert bought not in [item.item_id for item in after.items]
        profile = await fleet[channel].profile(user(customer), consistency_token=token)
        assert profile.recent_behaviours[0].item_id == bought
        assert profile.recent_behaviours[0].channel == "store"


async def test_a_token_holds_even_when_the_online_store_lost_the_write(fleet: Fleet) -> None:
    customer = fleet.customers[2]
    client = redis.Redis.from_url(fleet.settings.redis_url)
    before = {key: client.dump(key) for key in client.keys(f"*{customer}*")}
    recorded = await fleet["web"].record(fleet["web"].event(user(customer), "view", item_id="nothing"))
    for key, value in before.items():  # Redis forgets: the older state is back
        if value is not None:
            client.restore(key, 0, value, replace=True)
    written = recorded.tokens[0]
    answer = await fleet["app"].recommend(user(customer), surface="home", consistency_token=written.consistency_token)
    assert answer.versions.user_version >= written.user_version


async def test_a_token_of_the_future_is_refused_not_ignored(fleet: Fleet) -> None:
    from server import tokens
    from server.domain import Token

    ahead = tokens.encode(Token(fleet.customers[3], 10**9))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fleet["web"].recommend(user(fleet.customers[3]), surface="home", consistency_token=ahead, timeout=1.0)
    # The client tries again while it may, so the deadline can come first; an answer never does.
    assert refused.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    foreign = tokens.encode(Token(fleet.customers[4], 1))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fleet["web"].recommend(user(fleet.customers[3]), surface="home", consistency_token=foreign)
    assert error_details(refused.value).reason == "TOKEN_OF_OTHER_USER"


async def test_a_retried_event_counts_once(fleet: Fleet) -> None:
    customer = fleet.customers[5]
    event = fleet["app"].event(user(customer), "view", item_id="KIT-1")
    first = await fleet["app"].record(event)
    again = await fleet["store"].record(event, event)
    assert [result.status for result in first.results] == [1]
    assert [result.status for result in again.results] == [2, 2]
    assert again.tokens[0].user_version == first.tokens[0].user_version


async def test_concurrent_writes_of_one_customer_all_count(fleet: Fleet) -> None:
    customer = fleet.customers[6]
    before = (await fleet["web"].profile(user(customer))).user_version
    await asyncio.gather(
        *(fleet[CHANNELS[k % 5]].record(fleet[CHANNELS[k % 5]].event(user(customer), "view", item_id=f"x{k}")) for k in range(60))
    )
    assert (await fleet["web"].profile(user(customer))).user_version == before + 60


async def test_prices_follow_at_once_and_never_split(fleet: Fleet) -> None:
    customer = fleet.customers[7]
    before = await fleet["web"].recommend(user(customer), surface="home", limit=5)
    item = before.items[0]
    with psycopg.connect(fleet.settings.postgres_dsn) as connection:
        row = connection.execute("SELECT title, text, category, brand FROM items WHERE item_id = %s", [item.item_id]).fetchone()
        assert row is not None
        changed = Item(item.item_id, *row, price_micros=1_230_000, currency="USD", stock=5)
        version = upsert_items(connection, [changed]).offer_version
    async with asyncio.timeout(5):
        while (await fleet["web"].recommend(user(customer), surface="home", limit=5)).versions.offer_version < version:
            await asyncio.sleep(0.02)
    answers = await everywhere(fleet, customer, limit=5)
    for answer in answers:
        assert answer.versions.offer_version == version
        assert answer.slate_id == before.slate_id  # prices hang on the offer version, not on the slate
        assert (answer.items[0].price.units, answer.items[0].price.nanos) == (1, 230_000_000)


async def test_a_new_picture_shows_at_once_and_everywhere(fleet: Fleet) -> None:
    customer = fleet.customers[7]
    item_id = (await fleet["web"].recommend(user(customer), surface="home", limit=1)).items[0].item_id
    await everywhere(fleet, customer, limit=1)  # every replica has its offers
    with psycopg.connect(fleet.settings.postgres_dsn) as connection:
        query = "SELECT title, text, category, brand, price_micros, currency, stock, channels FROM items WHERE item_id = %s"
        row = connection.execute(query, [item_id]).fetchone()
        assert row is not None
        changed = upsert_items(connection, [Item(item_id, *row[:7], channels=tuple(row[7]), image_ref="new.jpg")])
        again = upsert_items(connection, [Item(item_id, *row[:7], channels=tuple(row[7]), image_ref="new.jpg")])
    assert (changed.offer_changed_count, changed.redescribed_count, again.offer_changed_count) == (1, 0, 0)
    async with asyncio.timeout(5):
        while (await fleet["web"].recommend(user(customer), surface="home", limit=5)).versions.offer_version < changed.offer_version:
            await asyncio.sleep(0.02)
    answers = await everywhere(fleet, customer, limit=1)
    assert {(answer.items[0].item_id, answer.items[0].image_ref) for answer in answers} == {(item_id, "new.jpg")}


async def test_redis_wiped_is_rebuilt_to_the_same_answer(fleet: Fleet) -> None:
    customer = fleet.customers[8]
    before = await fleet["web"].recommend(user(customer), surface="home", limit=50)
    redis.Redis.from_url(fleet.settings.redis_url).flushdb()
    after = await everywhere(fleet, customer, limit=50)
    for answer in after:
        assert answer.versions == before.versions
    assert shown(after[0]) == shown(before)


async def test_pages_join_to_the_whole_and_expire_with_the_slate(fleet: Fleet) -> None:
    customer = user(fleet.customers[9])
    whole = await fleet["web"].recommend(customer, surface="home", limit=30)
    pages, token = [], ""
    for _ in range(3):
        page = await fleet["web"].recommend(customer, surface="home", limit=10, page_token=token)
        pages += shown(page)
        token = page.next_page_token
    assert pages == shown(whole)
    await fleet["app"].record(fleet["app"].event(customer, "view", item_id="x"))
    with pytest.raises(grpc.aio.AioRpcError) as expired:
        await fleet["web"].recommend(customer, surface="home", limit=10, page_token=token)
    assert expired.value.code() is grpc.StatusCode.ABORTED
    assert error_details(expired.value).reason == "SLATE_EXPIRED"


async def test_a_context_item_changes_the_slate_the_same_way_everywhere(fleet: Fleet) -> None:
    customer = fleet.customers[10]
    plain = await fleet["web"].recommend(user(customer), surface="product", limit=20)
    context = plain.items[15].item_id
    answers = await everywhere(fleet, customer, surface="product", context_item_ids=[context], limit=20)
    first, *others = only_common(answers)
    assert all(other == first for other in others)
    assert answers[0].slate_id != plain.slate_id


async def test_rank_items_gives_the_scores_of_the_slate(fleet: Fleet) -> None:
    customer = user(fleet.customers[11])
    slate = await fleet["web"].recommend(customer, surface="home", limit=20)
    ranked = await fleet["store"].rank(customer, [item.item_id for item in reversed(slate.items)] + ["no-such-item"], surface="home")
    assert list(ranked.unknown_item_ids) == ["no-such-item"]
    of_slate = {item.item_id: item.score for item in slate.items}
    shared = [item for item in ranked.items if item.item_id in of_slate]
    assert [item.score for item in shared] == sorted((of_slate[item.item_id] for item in shared), reverse=True)


async def test_exposures_reach_postgres(fleet: Fleet) -> None:
    customer = fleet.customers[0]
    answer = await fleet["messaging"].recommend(user(customer), surface="chat", limit=3)
    async with asyncio.timeout(5):
        while True:
            with psycopg.connect(fleet.settings.postgres_dsn) as connection:
                query = "SELECT item_ids, channel, model_version FROM exposures WHERE slate_id = %s"
                row = connection.execute(query, [answer.slate_id]).fetchone()
            if row:
                break
            await asyncio.sleep(0.05)
    assert row == ([item.item_id for item in answer.items], "messaging", answer.versions.model_version)
