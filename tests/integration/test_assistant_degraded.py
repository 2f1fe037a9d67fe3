"""Questions while a real Redis hangs or PostgreSQL refuses: answered alike, or refused, never invented."""

import asyncio

import grpc
import pytest

from concord import Concord, error_details, user
from concord.v1.articles_pb2 import Article
from concord.v1.assistant_pb2 import AnswerKind, AskResponse
from concord.v1.common_pb2 import Subject
from tests.integration.replicas import query
from tests.integration.test_degraded import Fleet, fleet, postgres_refusing, redis_pid, stopped

__all__ = ["fleet"]  # the fixture
EVENT = "00000000-0000-4000-8000-00000000a551"


async def test_without_redis_questions_are_answered_alike(fleet: Fleet) -> None:
    web, app = fleet.clients
    await web.upsert_articles(Article(article_id="returns", title="What is your return policy?", body="Within 30 days."))
    customer = user(fleet.customers[0])
    before = await web.ask(customer, "what is your return policy?", timeout=20.0)
    with stopped([redis_pid(fleet.settings)]):
        during = await app.ask(customer, "what is your return policy?", timeout=20.0)
        slate = await app.ask(customer, "recommend me something", timeout=20.0)
    assert (during.text, during.kind, during.confidence) == (before.text, AnswerKind.ANSWER_KIND_ARTICLE, before.confidence)
    assert during.versions.user_version > before.versions.user_version
    assert (slate.kind, len(slate.items)) == (AnswerKind.ANSWER_KIND_SUGGESTIONS, 5)


async def test_without_postgres_a_message_is_refused_and_its_retry_answered_once(fleet: Fleet) -> None:
    web, app = fleet.clients
    customer = user(fleet.customers[1])
    await web.ask(customer, "hello", timeout=20.0)
    with postgres_refusing(fleet.settings):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await web.ask(customer, "what did I buy?", event_id=EVENT)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_details(caught.value).reason
    async with asyncio.timeout(20):
        while (answer := await answered(app, customer)) is None:
            await asyncio.sleep(0.1)
    assert answer.kind == AnswerKind.ANSWER_KIND_ORDERS
    assert len(query(fleet.settings, "SELECT 1 FROM assistant_turns WHERE event_id = %s", EVENT)) == 1
    assert len(query(fleet.settings, "SELECT 1 FROM events WHERE event_id = %s", EVENT)) == 1


async def answered(client: Concord, customer: Subject) -> AskResponse | None:
    try:
        return await client.ask(customer, "what did I buy?", event_id=EVENT, timeout=5.0)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return None
