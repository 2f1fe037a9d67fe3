"""The client's calls that find items by words."""
# ruff: noqa: ASYNC109 - as in client.py: a call's timeout becomes its gRPC deadline.

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from concord.customers import Customer, TokenMemory, subject_of
from concord.v1.recommendation_pb2 import ItemFilter
from concord.v1.search_pb2 import SearchRequest, SearchResponse, SuggestRequest, SuggestResponse


class SearchCalls:
    """Searches and completions; the client brings connection, tokens and retries."""

    _channel: str
    _memory: TokenMemory
    _new_event_id: Callable[[], UUID]
    _search: Any
    _read: Callable[..., Awaitable[Any]]
    _call: Callable[..., Awaitable[Any]]

    async def search(
        self,
        customer: Customer,
        query: str,
        *,
        limit: int = 10,
        page_token: str = "",
        item_filter: ItemFilter | None = None,
        session_id: str = "",
        consistency_token: str = "",
        skip_recording: bool = False,
        skip_exposure_logging: bool = False,
        timeout: float | None = None,
    ) -> SearchResponse:
        """Returns what ``query`` finds for ``customer``, and records the search, once however often the call is retried.

        What was asked for next, on any channel whose backend has the answer's token, reflects the search; this client sends it on.
        """
        subject = subject_of(customer, self._channel)
        request = SearchRequest(
            subject=subject,
            channel=self._channel,
            query=query,
            limit=limit,
            page_token=page_token,
            filter=item_filter,
            consistency_token=consistency_token or self._memory.token_for(subject),
            event_id="" if skip_recording or page_token else str(self._new_event_id()),
            session_id=session_id,
            skip_recording=skip_recording,
            skip_exposure_logging=skip_exposure_logging,
        )
        answer: SearchResponse = await self._read(self._search.Search, request, timeout, given=bool(consistency_token))
        version = max(answer.recorded_version, answer.versions.user_version)
        self._memory.learn(subject, answer.user_id, version, answer.consistency_token)
        return answer

    async def suggest(self, prefix: str, *, limit: int = 8, timeout: float | None = None) -> SuggestResponse:
        """Returns how ``prefix`` may go on, among what this channel sells."""
        request = SuggestRequest(channel=self._channel, prefix=prefix, limit=limit)
        answer: SuggestResponse = await self._call(self._search.Suggest, request, timeout)
        return answer
