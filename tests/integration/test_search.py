"""Searches on real servers: one answer in every channel, an event that changes what follows, live prices, paging and replay."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import psycopg
import pytest
import redis

from cli.audit import run_audit
from concord import Concord, error_details, user
from concord.v1.common_pb2 import ChannelIdentity, Money, Subject
from concord.v1.recommendation_pb2 import (
    REASON_CODE_MATCHES_WORDS,
    REASON_CODE_SIMILAR_TO_RECENT,
    ItemFilter,
)
from concord.v1.search_pb2 import (
    SEARCH_OUTCOME_MATCHED,
    SEARCH_OUTCOME_NOTHING_ELIGIBLE,
    SEARCH_OUTCOME_NOTHING_TO_SHOW,
    SEARCH_OUTCOME_RECOMMENDED_INSTEAD,
    SUGGESTION_KIND_CATEGORY,
    SearchRequest,
    SearchResponse,
)
from concord.v1.search_pb2_grpc import SearchServiceStub
from features.catalogue import Item, upsert_items
from server.audit.run import Scope
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.integration.serving import connected, served

CHANNELS = ("web", "app", "messaging", "store")
# With the tiny random model nothing is near in meaning on purpose: what a word finds must not hang on it.
BY_WORDS = {"search_least_similarity": 1.0}


@dataclass
class Fleet:
    """Two replicas of one shop, a client per channel spread over them, and customers nobody has used yet."""

    settings: ServerSettings
    clients: dict[str, Concord]
    customers: list[str]
    address: str

    def __getitem__(self, channel: str) -> Concord:
        return self.clients[channel]

    def execute(self, query: str, *parameters: Any) -> list[Any]:
        with psycopg.connect(self.settings.postgres_dsn) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="module")
async def fleet(live: ServerSettings) -> AsyncIterator[Fleet]:
    settings = live.model_copy(update={"journal_seconds": 0.05} | BY_WORDS)
    with psycopg.connect(live.postgres_dsn) as connection:
        query = "SELECT user_id FROM users WHERE version > 20 ORDER BY user_id"
        customers = [row[0] for row in connection.execute(query)]
    async with served(settings) as first, served(settings) as second:
        clients = {
            channel: Concord(first if k % 2 else second, channel=channel, timeout=10.0, remembered_customers=1)
            for k, channel in enumerate(CHANNELS)
        }
        for client in clients.values():
            await client.__aenter__()
        yield Fleet(settings, clients, customers, first)
        for client in clients.values():
            await client.__aexit__()


def shown(answer: SearchResponse) -> list[tuple[Any, ...]]:
    """What must be equal to the byte: order, scores and prices."""
    return [(item.position, item.item_id, item.score, item.price.SerializeToString()) for item in answer.items]


async def everywhere(fleet: Fleet, customer: str, query: str, **arguments: Any) -> list[SearchResponse]:
    calls = (fleet[channel].search(user(customer), query, skip_recording=True, **arguments) for channel in CHANNELS)
    return list(await asyncio.gather(*calls))


def only_common(answers: Sequence[SearchResponse]) -> list[list[tuple[Any, ...]]]:
    common = set.intersection(*({item.item_id for item in answer.items} for answer in answers))
    return [[row for row in shown(answer) if row[1] in common] for answer in answers]


def word_of(fleet: Fleet) -> str:
    """A word that many titles have."""
    words = "SELECT w FROM items, regexp_split_to_table(lower(title), '[^a-z]+') w WHERE length(w) > 4"
    (row,) = fleet.execute(f"{words} GROUP BY w ORDER BY count(*) DESC, w LIMIT 1")
    return str(row[0])


async def test_all_channels_and_replicas_find_the_same(fleet: Fleet) -> None:
    word = word_of(fleet)
    for customer in fleet.customers[:5]:
        answers = await everywhere(fleet, customer, word, limit=100)
        first, *others = only_common(answers)
        assert len(first) >= 10
        assert all(other == first for other in others)
        assert len({answer.slate_id for answer in answers}) == 1
        assert len({answer.versions.SerializeToString() for answer in answers}) == 1
        assert {answer.outcome for answer in answers} == {SEARCH_OUTCOME_MATCHED}
        for item in answers[0].items:
            assert REASON_CODE_MATCHES_WORDS in item.reason_codes
    same = await fleet["web"].search(user(fleet.customers[0]), f"  {word.upper()}\n", skip_recording=True, limit=100)
    assert shown(same) == shown((await everywhere(fleet, fleet.customers[0], word, limit=100))[0])


async def test_a_search_in_one_channel_changes_recommendations_in_another(fleet: Fleet) -> None:
    customer, word = fleet.customers[6], word_of(fleet)
    before = await fleet["app"].recommend(user(customer), surface="home", limit=50)
    found = await fleet["web"].search(user(customer), word)
    assert before.versions.user_version <= found.versions.user_version <= found.recorded_version
    assert found.recorded_version == before.versions.user_version + 1
    after = await fleet["app"].recommend(user(customer), surface="home", limit=50, consistency_token=found.consistency_token)
    assert after.versions.user_version == found.recorded_version
    assert shown(after) != shown(before)
    profile = await fleet["store"].profile(user(customer), consistency_token=found.consistency_token)
    newest = profile.recent_behaviours[0]
    assert (newest.text, newest.channel) == (word, "web")


async def test_searching_again_and_anywhere_gives_the_same_order_though_each_search_is_an_event(fleet: Fleet) -> None:
    customer, word = fleet.customers[7], word_of(fleet)
    first = await fleet["web"].search(user(customer), word, limit=100)
    for channel in ("app", "store", "web"):
        again = await fleet[channel].search(user(customer), word, limit=100, consistency_token=first.consistency_token)
        assert again.versions.user_version > first.versions.user_version
        assert only_common([first, again])[0] == only_common([first, again])[1]


async def test_pages_go_on_where_the_first_ended_although_it_was_recorded(fleet: Fleet) -> None:
    customer, word = fleet.customers[8], word_of(fleet)
    web = fleet["web"]
    whole = shown(await web.search(user(customer), word, limit=100, skip_recording=True))
    page = await web.search(user(customer), word, limit=4)
    pages = shown(page)
    while page.next_page_token:
        last, page = page, await web.search(user(customer), word, limit=4, page_token=page.next_page_token)
        assert page.event_id == ""
        assert page.versions.user_version == last.versions.user_version or last.recorded_version == page.versions.user_version
        assert page.total_matches == last.total_matches
        pages += shown(page)
        if len(pages) >= len(whole):
            break
    assert pages == whole
    (row,) = fleet.execute("SELECT count(*) FROM events WHERE user_id = %s AND text = %s AND action = 'search'", customer, word)
    assert row[0] == 1


async def test_a_page_of_another_order_is_told_to_start_again(fleet: Fleet) -> None:
    customer, word = fleet.customers[9], word_of(fleet)
    page = await fleet["web"].search(user(customer), word, limit=2)
    found = await fleet["web"].search(user(customer), word, limit=20, skip_recording=True)
    events = [fleet["app"].event(user(customer), "purchase", item_id=item.item_id, value=5.0) for item in found.items[-4:]]
    token = (await fleet["app"].record(*events)).tokens[0].consistency_token
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fleet["web"].search(user(customer), word, limit=2, page_token=page.next_page_token, consistency_token=token)
    assert refused.value.code() is grpc.StatusCode.ABORTED
    assert error_details(refused.value).reason == "SLATE_EXPIRED"


async def test_a_retried_search_counts_once(fleet: Fleet) -> None:
    customer, event_id = fleet.customers[10], str(uuid.uuid4())
    async with connected(fleet.address) as channel:
        stub: Any = SearchServiceStub(channel)
        request = SearchRequest(subject=Subject(user_id=customer), channel="web", query="Counted Once", event_id=event_id)
        first, again = await stub.Search(request), await stub.Search(request)
    assert (first.event_id, again.event_id) == (event_id, event_id)
    assert again.recorded_version == first.recorded_version
    assert again.versions.user_version == first.recorded_version
    assert fleet.execute("SELECT count(*), min(text), min(channel) FROM events WHERE event_id = %s", event_id) == [
        (1, "Counted Once", "web")
    ]


async def test_somebody_nobody_has_met_becomes_a_customer_by_searching(fleet: Fleet) -> None:
    word, name = word_of(fleet), f"new-{uuid.uuid4().hex[:8]}"
    unseen = await fleet["app"].search(name, word, skip_recording=True)
    assert (unseen.user_id, unseen.consistency_token, unseen.recorded_version) == ("", "", 0)
    found = await fleet["app"].search(name, word)
    assert shown(found) == shown(unseen)  # without a past there is no taste
    assert not any(REASON_CODE_SIMILAR_TO_RECENT in item.reason_codes for item in found.items)
    assert found.user_id
    assert found.recorded_version >= 1
    profile = await fleet["app"].profile(name, consistency_token=found.consistency_token)
    assert profile.user_id == found.user_id
    assert profile.recent_behaviours[0].text == word


async def test_prices_are_live_and_facets_count_without_their_own_filter(fleet: Fleet) -> None:
    customer, word = user(fleet.customers[11]), word_of(fleet)
    whole = await fleet["web"].search(customer, word, limit=100, skip_recording=True)
    assert whole.total_matches >= len(whole.items) > 10
    assert sum(facet.item_count for facet in whole.categories) == whole.total_matches
    assert sum(facet.item_count for facet in whole.price_ranges) == whole.total_matches
    chosen = whole.categories[-1]
    only = ItemFilter(categories=[chosen.value])
    kept = await fleet["web"].search(customer, word, limit=100, skip_recording=True, item_filter=only)
    assert kept.total_matches == chosen.item_count == len(kept.items)
    assert kept.categories == whole.categories
    assert sum(facet.item_count for facet in kept.price_ranges) == chosen.item_count
    cheap = ItemFilter(min_price=whole.price_ranges[0].min_price, max_price=whole.price_ranges[0].max_price)
    bounded = await fleet["web"].search(customer, word, limit=100, skip_recording=True, item_filter=cheap)
    assert bounded.total_matches == whole.price_ranges[0].item_count
    assert bounded.price_ranges == whole.price_ranges
    item = whole.items[0]
    (row,) = fleet.execute("SELECT title, text, category, brand FROM items WHERE item_id = %s", item.item_id)
    with psycopg.connect(fleet.settings.postgres_dsn) as connection:
        upsert_items(connection, [Item(item.item_id, *row, price_micros=123_450_000, currency="USD")])
    async with asyncio.timeout(10):
        while True:
            now = await fleet["app"].search(customer, word, limit=1, skip_recording=True)
            if now.items[0].price == Money(currency_code="USD", units=123, nanos=450_000_000):
                break
    assert (now.items[0].item_id, now.items[0].score) == (item.item_id, item.score)


async def test_a_filter_that_lets_nothing_pass_says_so(fleet: Fleet) -> None:
    only = ItemFilter(brands=["no such brand"])
    answer = await fleet["web"].search(user(fleet.customers[11]), word_of(fleet), skip_recording=True, item_filter=only)
    assert (list(answer.items), answer.total_matches) == ([], 0)
    assert answer.outcome == SEARCH_OUTCOME_NOTHING_ELIGIBLE
    assert answer.brands  # what there is to choose instead


@pytest.mark.parametrize(
    "query", ["🎁🎉", "zzzqqq xxyyzz", "\u202eשלום\u202c", "' OR 1=1; DROP TABLE items; --", "<script>alert(1)</script>", "x" * 500]
)
async def test_whatever_is_typed_is_text_and_what_finds_nothing_is_answered_by_recommendations(fleet: Fleet, query: str) -> None:
    customer = user(fleet.customers[12])
    found = await fleet["web"].search(customer, query, limit=20, skip_recording=True)
    recommended = await fleet["web"].recommend(customer, surface="home", limit=20)
    if found.outcome == SEARCH_OUTCOME_MATCHED:
        assert query.startswith("'")  # "or", "table" or "items" may stand in a text
        return
    assert found.outcome == SEARCH_OUTCOME_RECOMMENDED_INSTEAD
    assert [(item.item_id, item.score) for item in found.items] == [(item.item_id, item.score) for item in recommended.items]


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"query": ""}, "INVALID_FIELD", "query"),
        ({"query": " \t\x01\n"}, "INVALID_FIELD", "query"),
        ({"query": "a\0b"}, "INVALID_FIELD", "query"),
        ({"query": "a" * 10_000}, "TEXT_TOO_LONG", "query"),
        ({"event_id": "not a uuid"}, "EVENT_ID_INVALID", "event_id"),
        ({"page_token": "nonsense"}, "INVALID_TOKEN", "page_token"),
        ({"channel": "fax"}, "CHANNEL_UNKNOWN", "channel"),
        ({"limit": 101}, "INVALID_FIELD", "limit"),
    ],
)
async def test_what_breaks_a_rule_is_refused_by_name(fleet: Fleet, change: dict[str, Any], reason: str, field: str) -> None:
    request = SearchRequest(subject=Subject(user_id=fleet.customers[12]), channel="web", query="mug")
    request.MergeFrom(SearchRequest(**change))
    for name in change:
        setattr(request, name, change[name])
    async with connected(fleet.address) as channel:
        stub: Any = SearchServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Search(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = error_details(refused.value)
    assert (details.reason, details.field) == (reason, field)


async def test_a_typo_is_read_as_what_was_meant(fleet: Fleet) -> None:
    customer, word = user(fleet.customers[13]), word_of(fleet)
    wrong = f"{word[:2]}{word[3]}{word[2]}{word[4:]}" if word[2] != word[3] else f"{word}{word[-1]}"
    right = await fleet["web"].search(customer, word, limit=50, skip_recording=True)
    found = await fleet["web"].search(customer, wrong, limit=50, skip_recording=True)
    assert found.corrected_query == word
    assert right.corrected_query == ""
    assert shown(found) == shown(right)


async def test_searches_are_logged_and_replayed_to_the_bit(fleet: Fleet) -> None:
    customer, word = fleet.customers[14], word_of(fleet)
    answers = [await fleet[channel].search(user(customer), word, limit=10) for channel in CHANNELS]
    page = await fleet["web"].search(user(customer), word, limit=5, skip_recording=True)
    answers.append(await fleet["web"].search(user(customer), word, limit=5, page_token=page.next_page_token))
    slates = [answer.slate_id for answer in answers]
    async with asyncio.timeout(10):
        while len({row[0] for row in fleet.execute("SELECT slate_id FROM exposures WHERE slate_id = ANY(%s)", slates)}) < len(set(slates)):
            await asyncio.sleep(0.05)
    assert fleet.execute("SELECT DISTINCT surface, query FROM exposures WHERE slate_id = ANY(%s)", slates) == [("search", word)]
    scope = Scope(datetime.now(UTC) - timedelta(hours=1), 2_000, "", 3, ("home",))
    report = await run_audit(fleet.settings, scope, servers=[], canary="", progress=lambda _s, _d, _t: None)
    assert report.violations == []
    assert report.replays["journal"]["equal"] >= len(answers)
    assert report.replays["redis"]["equal"] >= 1  # the committed slate, whose slot names no query, is found by the logged one


async def test_with_redis_empty_the_same_is_found(fleet: Fleet) -> None:
    customer, word = fleet.customers[15], word_of(fleet)
    before = await everywhere(fleet, customer, word, limit=50)
    redis.Redis.from_url(fleet.settings.redis_url).flushdb()
    after = await everywhere(fleet, customer, word, limit=50)
    assert [row[1:] for row in only_common(after)[0]] == [row[1:] for row in only_common(before)[0]]


async def test_completions_are_of_what_the_channel_sells(fleet: Fleet) -> None:
    word = word_of(fleet)
    found = await fleet["web"].suggest(word[:3], limit=20)
    assert word in [suggestion.text for suggestion in found.suggestions]
    empty = await fleet["app"].suggest("")
    assert empty.suggestions
    assert {suggestion.kind for suggestion in empty.suggestions} == {SUGGESTION_KIND_CATEGORY}
    assert not (await fleet["app"].suggest("qqqzzz")).suggestions


async def test_an_empty_shop_without_a_model_says_what_is_missing(new_shop: NewShop) -> None:
    settings = new_shop()
    async with served(settings) as address, Concord(address, channel="web", timeout=10.0) as web:
        nothing = await web.search("anna", "mug")
        assert nothing.outcome == SEARCH_OUTCOME_NOTHING_TO_SHOW
        assert list(nothing.degraded_reasons) == ["NO_ACTIVE_MODEL"]
        assert nothing.recorded_version >= 1
        assert not (await web.suggest("m")).suggestions
        with psycopg.connect(settings.postgres_dsn) as connection:
            items = [Item(f"sku{k}", f"Enamel mug {k}", category="Kitchen", price_micros=10**7, currency="EUR") for k in range(3)]
            upsert_items(connection, [*items, Item("sku9", "Linen towel", channels=("store",), price_micros=10**7, currency="EUR")])
        async with asyncio.timeout(20):
            while not (found := await web.search("anna", "enmael mug", skip_recording=True)).items:  # until the epoch is published
                await asyncio.sleep(0.1)
        assert found.outcome in {SEARCH_OUTCOME_MATCHED, SEARCH_OUTCOME_RECOMMENDED_INSTEAD}
        found = await web.search("anna", "enmael mug", skip_recording=True)
        assert (found.outcome, list(found.degraded_reasons)) == (SEARCH_OUTCOME_MATCHED, ["NO_ACTIVE_MODEL"])
        elsewhere = await web.search("anna", "towel", skip_recording=True)
        assert (elsewhere.outcome, list(elsewhere.items)) == (SEARCH_OUTCOME_NOTHING_ELIGIBLE, [])
        assert not (await web.suggest("lin")).suggestions
        assert [s.text for s in (await web.suggest("enam")).suggestions] == ["enamel", "enamel mug"]
        assert [s.text for s in (await web.suggest("enma")).suggestions] == ["enamel", "enamel mug"]


async def test_a_subject_named_by_an_identity_of_another_channel_is_the_same_customer(fleet: Fleet) -> None:
    (row,) = fleet.execute("SELECT channel, channel_user_id FROM identities WHERE user_id = %s LIMIT 1", fleet.customers[16])
    subject = Subject(identity=ChannelIdentity(channel=row[0], channel_user_id=row[1]))
    word = word_of(fleet)
    by_identity = await fleet["web"].search(subject, word, limit=20, skip_recording=True)
    assert by_identity.user_id == fleet.customers[16]
    assert by_identity.slate_id == (await fleet["app"].search(user(fleet.customers[16]), word, limit=20, skip_recording=True)).slate_id
