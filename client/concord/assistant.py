"""The client's calls for customer service: questions, and the articles they are answered from."""
# ruff: noqa: ASYNC109 - as in client.py: a call's timeout becomes its gRPC deadline.

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from concord.customers import Customer, TokenMemory, subject_of
from concord.v1.articles_pb2 import (
    Article,
    DeleteArticlesRequest,
    DeleteArticlesResponse,
    ListArticlesRequest,
    ListArticlesResponse,
    UpsertArticlesRequest,
    UpsertArticlesResponse,
)
from concord.v1.assistant_pb2 import AskRequest, AskResponse


class AssistantCalls:
    """Questions and articles; the client brings connection, tokens and retries."""

    _channel: str
    _memory: TokenMemory
    _new_event_id: Callable[[], UUID]
    _assistant: Any
    _articles: Any
    _read: Callable[..., Awaitable[Any]]
    _call: Callable[..., Awaitable[Any]]

    async def ask(
        self,
        customer: Customer,
        text: str,
        *,
        answer_format: str = "plain",
        event_id: str = "",
        consistency_token: str = "",
        timeout: float | None = None,
    ) -> AskResponse:
        """Records a message of ``customer`` and returns the answer, once however often the call is retried.

        Example:
            ```python
            answer = await concord.ask("anna", "How long do I have to return something?")
            print(answer.text, "ask a person" if answer.handed_over else "")
            ```

        Args:
            customer: who asks.
            text: the message, 1 to 2,000 characters.
            answer_format: ``plain``, ``rich`` (Markdown) or ``voice``.
            event_id: a UUID of the message, to ask again for the answer it got, here or in another channel; empty: a new one.
            consistency_token: one handed over by another backend; by default the newest this client knows is sent.
            timeout: seconds; with a generator, more than the time it may take.

        Raises:
            ValueError: there is no such format.
        """
        subject = subject_of(customer, self._channel)
        request = AskRequest(
            subject=subject,
            channel=self._channel,
            text=text,
            event_id=event_id or str(self._new_event_id()),
            format=f"ANSWER_FORMAT_{answer_format.upper()}",
            consistency_token=consistency_token or self._memory.token_for(subject),
        )
        answer: AskResponse = await self._read(self._assistant.Ask, request, timeout, given=bool(consistency_token))
        self._memory.learn(subject, answer.user_id, answer.versions.user_version, answer.consistency_token)
        return answer

    async def upsert_articles(self, *articles: Article, timeout: float | None = None) -> UpsertArticlesResponse:
        """Stores 1 to 200 articles of the shop; the next question is answered from them."""
        request = UpsertArticlesRequest(articles=articles)
        answer: UpsertArticlesResponse = await self._call(self._articles.UpsertArticles, request, timeout)
        return answer

    async def articles(
        self, *, page_size: int = 100, page_token: str = "", language: str = "", tag: str = "", timeout: float | None = None
    ) -> ListArticlesResponse:
        """Returns a page of the shop's articles, by ascending id."""
        request = ListArticlesRequest(page_size=page_size, page_token=page_token, language=language, tag=tag)
        answer: ListArticlesResponse = await self._call(self._articles.ListArticles, request, timeout)
        return answer

    async def delete_articles(self, *article_ids: str, timeout: float | None = None) -> DeleteArticlesResponse:
        """Deletes 1 to 500 articles by id."""
        request = DeleteArticlesRequest(article_ids=article_ids)
        answer: DeleteArticlesResponse = await self._call(self._articles.DeleteArticles, request, timeout)
        return answer
