"""SearchService at the edge: what requests become, what answers say, and which scope each needs."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from concord.v1.common_pb2 import ChannelIdentity, Money, Subject
from concord.v1.recommendation_pb2 import (
    REASON_CODE_MATCHES_MEANING,
    REASON_CODE_MATCHES_WORDS,
    REASON_CODE_SIMILAR_TO_RECENT,
    ItemFilter,
)
from concord.v1.search_pb2 import (
    SEARCH_OUTCOME_MATCHED,
    SUGGESTION_KIND_BRAND,
    SUGGESTION_KIND_CATEGORY,
    SUGGESTION_KIND_PHRASE,
    SearchRequest,
    SuggestRequest,
)
from concord.v1.search_pb2_grpc import SearchServiceStub
from tests.edge import Edge, refusal, serving
from tests.fakes import NOW

ANNA = Subject(identity=ChannelIdentity(channel="web", channel_user_id="anna"))
EVENT_ID = "5f0c7a52-6f0e-4d0b-9d0a-1c7a3a9f2b11"


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with serving() as running:
        yield running


def request(**changes: Any) -> SearchRequest:
    return SearchRequest(**({"subject": ANNA, "channel": "app", "query": " Blue  MUG "} | changes))


def stub(edge: Edge) -> Any:
    return SearchServiceStub(edge.channel)


async def test_a_search_is_read_with_the_event_it_is_recorded_as(edge: Edge) -> None:
    wanted = ItemFilter(max_price=Money(currency_code="EUR", units=20))
    await stub(edge).Search(request(filter=wanted, session_id="s", event_id=EVENT_ID.upper()))
    (asked,) = edge.fakes.searcher.calls
    assert (asked.page.search_text, asked.page.surface, asked.page.channel, asked.page.limit) == ("blue mug", "search", "app", 10)
    assert asked.page.filters.max_price_micros == 20_000_000
    assert asked.page.log_exposure
    event = asked.event
    assert (event.action, event.text, event.channel, event.session_id) == ("search", " Blue  MUG ", "app", "s")
    assert (event.subject.channel_user_id, str(event.event_id), event.occurred_at) == ("anna", EVENT_ID, NOW)


async def test_later_pages_and_what_skips_it_are_no_events(edge: Edge) -> None:
    await stub(edge).Search(request(page_token="later"))
    await stub(edge).Search(request(skip_recording=True, skip_exposure_logging=True))
    later, skipped = edge.fakes.searcher.calls
    assert (later.event, skipped.event) == (None, None)
    assert not skipped.page.log_exposure


async def test_an_answer_says_all_there_is(edge: Edge) -> None:
    answer = await stub(edge).Search(request(event_id=EVENT_ID))
    assert (answer.outcome, answer.corrected_query, answer.total_matches) == (SEARCH_OUTCOME_MATCHED, "blue mug", 2)
    assert [(facet.value, facet.item_count) for facet in (*answer.categories, *answer.brands)] == [("Kitchen", 2), ("Acme", 2)]
    (prices,) = answer.price_ranges
    assert (prices.min_price.units, prices.max_price.units, prices.max_price.nanos, prices.item_count) == (10, 19, 999_999_000, 2)
    assert (answer.event_id, answer.recorded_version, answer.versions.user_version) == (EVENT_ID, 8, 7)
    assert (answer.slate_id, answer.next_page_token, answer.user_id, list(answer.degraded_reasons)) == (
        "s1",
        "next",
        "u1",
        ["NO_ACTIVE_MODEL"],
    )
    assert answer.consistency_token
    assert list(answer.items[0].reason_codes) == [REASON_CODE_MATCHES_WORDS, REASON_CODE_MATCHES_MEANING, REASON_CODE_SIMILAR_TO_RECENT]


async def test_suggestions_are_read_and_told(edge: Edge) -> None:
    answer = await stub(edge).Suggest(SuggestRequest(channel="web", prefix="bl"))
    assert [(one.text, one.kind) for one in answer.suggestions] == [
        ("blue mug", SUGGESTION_KIND_PHRASE),
        ("Mugs & Cups", SUGGESTION_KIND_CATEGORY),
        ("Mugo", SUGGESTION_KIND_BRAND),
    ]
    assert (answer.versions.index_version, answer.versions.user_version, answer.versions.model_version) == (3, 0, "")
    assert edge.fakes.suggester.calls == [("web", "bl", 8)]


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"query": ""}, "query", "INVALID_FIELD"),
        ({"query": " \n\x01\x7f\u00a0"}, "query", "INVALID_FIELD"),
        ({"query": "x" * 501}, "query", "TEXT_TOO_LONG"),
        ({"query": "x" * 10_000}, "query", "TEXT_TOO_LONG"),
        ({"query": "a\0"}, "query", "INVALID_FIELD"),
        ({"event_id": "x"}, "event_id", "EVENT_ID_INVALID"),
        ({"session_id": "s" * 129}, "session_id", "INVALID_FIELD"),
        ({"subject": Subject()}, "subject", "SUBJECT_REQUIRED"),
        ({"channel": "fax"}, "channel", "CHANNEL_UNKNOWN"),
        ({"limit": 101}, "limit", "INVALID_FIELD"),
        ({"consistency_token": "x"}, "consistency_token", "INVALID_TOKEN"),
        ({"filter": ItemFilter(brands=["b"] * 51)}, "filter.brands", "INVALID_FIELD"),
    ],
)
async def test_a_search_that_breaks_a_rule_is_refused_by_its_field(edge: Edge, changes: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub(edge).Search(request(**changes))
    refused = refusal(error.value)
    assert (refused.code, refused.field, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, field, reason)
    assert edge.fakes.searcher.calls == []


@pytest.mark.parametrize(
    "query", ["🎁", "x" * 500, "\u202eשלום", "<script>alert(1)</script>", "'; DROP TABLE items; --", "小米 blue كوب", "ﷺ" * 500]
)
async def test_whatever_has_a_character_is_a_query(edge: Edge, query: str) -> None:
    await stub(edge).Search(request(query=query))
    (asked,) = edge.fakes.searcher.calls
    assert asked.event.text == query
    assert asked.page.search_text


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"prefix": "x" * 101}, "prefix", "TEXT_TOO_LONG"),
        ({"prefix": "\0"}, "prefix", "INVALID_FIELD"),
        ({"limit": 21}, "limit", "INVALID_FIELD"),
        ({"channel": ""}, "channel", "CHANNEL_UNKNOWN"),
    ],
)
async def test_a_prefix_that_breaks_a_rule_is_refused_by_its_field(edge: Edge, changes: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub(edge).Suggest(SuggestRequest(**({"channel": "web"} | changes)))
    refused = refusal(error.value)
    assert (refused.field, refused.reason) == (field, reason)
