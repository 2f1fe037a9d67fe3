"""AssistantService and ArticleService at the edge: what is read, what is answered, what is refused by name."""

from typing import Any

import grpc
import pytest

from concord import Concord
from concord.v1 import articles_pb2, assistant_pb2
from concord.v1.articles_pb2 import Article
from concord.v1.common_pb2 import ChannelIdentity, Money, Subject
from features.articles import Article as Stored
from server.assistant.answer import Format
from server.domain import Subject as Asked
from tests.edge import Edge, refusal, serving
from tests.fakes import Fakes

EVENT = "00000000-0000-4000-8000-000000000001"


async def called(edge: Edge, service: str, method: str, request: Any, response: Any) -> Any:
    return response.FromString(await edge.raw(f"/concord.v1.{service}/{method}", request.SerializeToString(), timeout=10))


async def refused(edge: Edge, service: str, method: str, request: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.raw(f"/concord.v1.{service}/{method}", request.SerializeToString(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return refusal(caught.value).field, refusal(caught.value).reason


def question(**values: Any) -> assistant_pb2.AskRequest:
    subject = Subject(identity=ChannelIdentity(channel="app", channel_user_id="a"))
    return assistant_pb2.AskRequest(**({"subject": subject, "channel": "app", "text": "how much is it?", "event_id": EVENT} | values))


async def test_an_answer_carries_what_it_rests_on() -> None:
    async with serving() as edge:
        answer = await called(edge, "AssistantService", "Ask", question(), assistant_pb2.AskResponse)
        web = await called(edge, "AssistantService", "Ask", question(channel="web"), assistant_pb2.AskResponse)
        asked = edge.fakes.assistant.calls[0]
    assert (asked.subject, asked.channel, asked.text, str(asked.event_id), asked.how, asked.token) == (
        Asked(channel="app", channel_user_id="a"),
        "app",
        "how much is it?",
        EVENT,
        Format.PLAIN,
        None,
    )
    assert answer.kind == assistant_pb2.ANSWER_KIND_PRICE
    assert [(item.item_id, item.price, item.in_stock) for item in answer.items] == [
        ("i1", Money(currency_code="EUR", units=19, nanos=990_000_000), True),
        ("i2", Money(currency_code="EUR", units=5), False),
    ]
    assert [citation.WhichOneof("source") for citation in answer.citations] == ["item_id", "item_id", "order_line", "passage"]
    passage = answer.citations[3].passage
    assert (passage.article_id, passage.title, passage.url, passage.heading, passage.passage) == (
        "a1",
        "Returns",
        "https://shop.example/r",
        "How long",
        "30 days",
    )
    assert not answer.citations[2].order_line.HasField("quantity")
    assert (answer.article_version, answer.turn, answer.user_id, answer.event_id) == (9, 3, "u1", EVENT)
    assert answer.versions.user_version == 7
    assert [item.item_id for item in web.items] == ["i1"]  # the other is not sold there


@pytest.mark.parametrize(("how", "text"), [(0, "Title <i1> costs"), (1, "Title <i1> costs"), (2, "**Title \\<i1\\>** costs")])
async def test_the_format_shapes_the_words(how: int, text: str) -> None:
    async with serving() as edge:
        answer = await called(edge, "AssistantService", "Ask", question(format=how), assistant_pb2.AskResponse)
    assert answer.text.startswith(text)


async def test_a_message_without_an_id_gets_one() -> None:
    async with serving() as edge:
        answers = [await called(edge, "AssistantService", "Ask", question(event_id=""), assistant_pb2.AskResponse) for _ in range(2)]
    assert len({answer.event_id for answer in answers}) == 2


@pytest.mark.parametrize(
    ("values", "field", "reason"),
    [
        ({"text": ""}, "text", "INVALID_FIELD"),
        ({"text": "x" * 2_001}, "text", "TEXT_TOO_LONG"),
        ({"text": "a\0"}, "text", "INVALID_FIELD"),
        ({"channel": "moon"}, "channel", "CHANNEL_UNKNOWN"),
        ({"event_id": "7"}, "event_id", "EVENT_ID_INVALID"),
        ({"format": 9}, "format", "INVALID_FIELD"),
        ({"subject": Subject()}, "subject", "SUBJECT_REQUIRED"),
        ({"consistency_token": "x"}, "consistency_token", "INVALID_TOKEN"),
    ],
)
async def test_what_breaks_a_rule_is_named(values: dict[str, Any], field: str, reason: str) -> None:
    async with serving() as edge:
        assert await refused(edge, "AssistantService", "Ask", question(**values)) == (field, reason)


async def test_articles_are_stored_listed_page_by_page_and_deleted() -> None:
    async with serving() as edge, Concord(f"127.0.0.1:{edge.server.port}", channel="web", timeout=10) as concord:
        one = Article(article_id="a", title="A", body="x", url="https://shop.example/a", language="en", tags=["t"], channels=["web"])
        stored = await concord.upsert_articles(one, Article(article_id="b", title="B", body="y"))
        assert (stored.changed_count, stored.article_version) == (2, 4)
        first = await concord.articles(page_size=1)
        rest = await concord.articles(page_size=1, page_token=first.next_page_token)
        assert ([*first.articles, *rest.articles], rest.next_page_token) == ([one, Article(article_id="b", title="B", body="y")], "")
        deleted = await concord.delete_articles("b", "z", "b")
        assert (deleted.deleted_count, list(deleted.not_found_article_ids), deleted.article_version) == (1, ["z"], 5)
        assert edge.fakes.articles.calls[0][0] == Stored("a", "A", "x", "https://shop.example/a", "en", ("t",), ("web",))


@pytest.mark.parametrize(
    ("articles", "field"),
    [
        ([], "articles"),
        ([Article(article_id="a", title="A", body="x")] * 2, "articles[1]"),
        ([Article(title="A", body="x")], "articles[0].article_id"),
        ([Article(article_id="a", body="x")], "articles[0].title"),
        ([Article(article_id="a", title="A")], "articles[0].body"),
        ([Article(article_id="a", title="A", body="x" * 50_001)], "articles[0].body"),
        ([Article(article_id="a", title="A", body="x", url="javascript:alert(1)")], "articles[0].url"),
        ([Article(article_id="a", title="A", body="x", channels=["moon"])], "articles[0].channels[0]"),
        ([Article(article_id="a", title="A", body="x", tags=["t", "t"])], "articles[0].tags[1]"),
        ([Article(article_id="a", title="A", body="x", tags=[""])], "articles[0].tags[0]"),
        ([Article(article_id=f"a{k}", title="A", body="x") for k in range(201)], "articles"),
    ],
)
async def test_articles_that_break_a_rule_are_named(articles: list[Article], field: str) -> None:
    async with serving() as edge:
        found, _ = await refused(edge, "ArticleService", "UpsertArticles", articles_pb2.UpsertArticlesRequest(articles=articles))
    assert found == field


async def test_the_client_asks_carries_tokens_and_names_a_wrong_format() -> None:
    fakes = Fakes()
    async with serving(fakes) as edge, Concord(f"127.0.0.1:{edge.server.port}", channel="web", timeout=10) as concord:
        answer = await concord.ask("a", "hello", answer_format="voice", event_id=EVENT)
        await concord.ask("a", "and now?")
        with pytest.raises(ValueError, match="ANSWER_FORMAT_SONG"):
            await concord.ask("a", "x", answer_format="song")
    first, second = fakes.assistant.calls
    assert (first.how, first.token, str(first.event_id)) == (Format.VOICE, None, EVENT)
    assert (second.token.user_id, second.token.version) == (answer.user_id, 7)
