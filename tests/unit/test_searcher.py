"""Searches through a recommender in memory: recorded beside the computation, paged, and answered when recording fails."""

import asyncio
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import psycopg
import pytest

from server.domain import (
    EventOutcome,
    IncomingEvent,
    ItemFilter,
    RecommendQuery,
    RecordOutcome,
    SearchOutcome,
    SearchQuery,
    Stored,
    Subject,
    Token,
)
from server.errors import ConflictError, InvalidRequestError, OverloadedError
from server.metrics import Metrics
from server.search import searcher
from server.search.searcher import Searcher
from tests.unit.memory import Replica, Shop

ID = UUID("5f0c7a52-6f0e-4d0b-9d0a-1c7a3a9f2b11")
PAGE = RecommendQuery(Subject(user_id="u1"), "web", "search", limit=4, search_text="title")


def query(text: str = "title", *, recorded: bool = True, **changes: Any) -> SearchQuery:
    page = replace(PAGE, search_text=text, **changes)
    event = IncomingEvent(page.subject, ID, page.channel, "search", datetime(2026, 3, 1, tzinfo=UTC), text=text)
    return SearchQuery(page, event if recorded else None)


@dataclass
class Recording:
    """Stores searches as events of the shop, or fails as told."""

    shop: Shop
    error: Exception | None = None
    status: Stored = Stored.STORED
    hang: bool = False
    events: list[IncomingEvent] = field(default_factory=list)

    async def record(self, events: "list[IncomingEvent]") -> RecordOutcome:
        if self.hang:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self.events += events
        user_id = events[0].subject.user_id or "new"
        if self.status is Stored.REJECTED:
            return RecordOutcome((EventOutcome(self.status),), (), online=True)
        # In PostgreSQL, not yet in Redis: so the answer beside it does not know of it.
        token = Token(user_id, self.shop.truth.add_search(user_id, events[0].text or ""))
        return RecordOutcome((EventOutcome(self.status, user_id),), (token,), online=False)


@dataclass
class Stage:
    shop: Shop
    replica: Replica
    recording: Recording
    searcher: Searcher

    def degraded(self, reason: str) -> float:
        return self.replica.registry.get_sample_value("concord_degraded_answers_total", {"reason": reason}) or 0.0


@pytest.fixture
def stage() -> Stage:
    shop = Shop()
    shop.views("u1", "i003", "i007")
    replica, recording = shop.replica(search_least_similarity=1.0), Recording(shop)
    metrics = replica.recommender._metrics
    return Stage(shop, replica, recording, Searcher(replica.recommender, cast("Any", recording), metrics, hide_out_of_stock=True))


async def test_the_answer_is_of_the_state_before_the_search_and_its_token_of_that_with_it(stage: Stage) -> None:
    found = await stage.searcher.search(query())
    assert (found.page.versions.user_version, found.recorded_version) == (2, 3)
    assert found.page.token == Token("u1", 3)
    assert found.event_id == ID
    assert found.outcome is SearchOutcome.MATCHED
    assert found.facets.total >= len(found.page.items) == 4
    assert stage.recording.events[0].text == "title"
    assert [(answer.slate_id, surface) for answer, _, surface in stage.replica.journal.logged] == [(found.page.slate_id, "search")]


async def test_the_committed_slate_answers_whoever_asks_the_same(stage: Stage) -> None:
    first = await stage.searcher.search(query(recorded=False))
    other = Searcher(
        stage.shop.replica(search_least_similarity=1.0).recommender, cast("Any", stage.recording), _metrics(), hide_out_of_stock=True
    )
    again = await other.search(query(recorded=False, channel="app"))
    assert again.page.slate_id == first.page.slate_id
    assert [(i.item_id, i.score) for i in again.page.items] == [(i.item_id, i.score) for i in first.page.items]
    assert (await stage.searcher.search(query("title i005", recorded=False))).page.slate_id != first.page.slate_id
    assert stage.replica.count("hit") == 0
    await stage.searcher.search(query(recorded=False, subject=Subject(user_id="u1")))
    assert stage.replica.count("hit") == 1


async def test_pages_go_on_over_the_searchs_own_event_and_end_where_another_order_begins(stage: Stage) -> None:
    first = await stage.searcher.search(query())
    token = first.page.next_page_token
    second = await stage.searcher.search(query(recorded=False, page_token=token, token=first.page.token))
    assert second.page.items[0].position == 4
    assert second.page.slate_id != first.page.slate_id  # of a newer version
    with pytest.raises(InvalidRequestError):
        await stage.searcher.search(query(recorded=False, page_token="nonsense"))
    with pytest.raises(ConflictError) as expired:
        await stage.searcher.search(query("title i005", recorded=False, page_token=token))
    assert expired.value.reason == "SLATE_EXPIRED"


@pytest.mark.parametrize("error", [psycopg.OperationalError("away"), OverloadedError("full", reason="INGEST_QUEUE_FULL")])
async def test_what_cannot_be_recorded_is_answered_and_says_so(stage: Stage, error: Exception) -> None:
    stage.recording.error = error
    found = await stage.searcher.search(query())
    assert found.page.degraded_reasons == ("SEARCH_NOT_RECORDED",)
    assert (found.event_id, found.recorded_version) == (None, 0)
    assert found.page.token == Token("u1", 2)
    assert len(found.page.items) == 4
    assert stage.degraded("SEARCH_NOT_RECORDED") == 1


async def test_a_store_that_hangs_holds_up_no_answer(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searcher, "_CONFIRM_SECONDS", 0.01)
    stage.recording.hang = True
    assert (await stage.searcher.search(query())).page.degraded_reasons == ("SEARCH_NOT_RECORDED",)


async def test_a_customer_who_was_forgotten_is_not_recorded(stage: Stage) -> None:
    stage.recording.status = Stored.REJECTED
    assert (await stage.searcher.search(query())).page.degraded_reasons == ("SEARCH_NOT_RECORDED",)


async def test_a_retried_search_is_covered_by_its_token_too(stage: Stage) -> None:
    stage.recording.status = Stored.DUPLICATE
    found = await stage.searcher.search(query())
    assert (found.page.degraded_reasons, found.page.token, found.event_id) == ((), Token("u1", 3), ID)


async def test_searching_makes_a_customer_of_somebody_nobody_has_met(stage: Stage) -> None:
    somebody = Subject(channel="web", channel_user_id="anna")
    unseen = await stage.searcher.search(query(recorded=False, subject=somebody))
    assert (unseen.page.user_id, unseen.page.token) == ("", None)
    found = await stage.searcher.search(query(subject=somebody))
    assert (found.page.user_id, found.page.token) == ("new", Token("new", 1))
    assert found.page.versions.user_version == 0
    assert [answer.user_id for answer, _, _ in stage.replica.journal.logged] == ["", ""]  # nobody was who it was computed for


async def test_what_is_found_and_cannot_be_shown_says_so_and_typos_too(stage: Stage) -> None:
    nothing = await stage.searcher.search(query(recorded=False, filters=ItemFilter(brands=frozenset({"none"}))))
    assert (nothing.outcome, nothing.page.items, nothing.facets.total) == (SearchOutcome.NOTHING_ELIGIBLE, (), 0)
    typo = await stage.searcher.search(query("tilte", recorded=False))
    assert (typo.outcome, typo.corrected_query) == (SearchOutcome.MATCHED, "title")


def _metrics() -> Metrics:
    from prometheus_client import CollectorRegistry

    return Metrics(CollectorRegistry())
