"""SearchService: finding items by words."""

from typing import Any

from concord.v1 import search_pb2, search_pb2_grpc
from features.completions import CompletionKind
from server.domain import Answer, Facets, PriceRange, SearchAnswer, SearchOutcome
from server.rpc.event_validation import EventValidator
from server.rpc.interceptor import Context
from server.rpc.ports import Searcher, Suggester
from server.rpc.recommendation import ItemMessages, say_how
from server.rpc.translate import money_of, timestamp_of, token_text, versions_message

_MESSAGE = "found"  # the form of a page that is kept here
_OUTCOMES = {
    SearchOutcome.MATCHED: search_pb2.SEARCH_OUTCOME_MATCHED,
    SearchOutcome.MEANING_ONLY: search_pb2.SEARCH_OUTCOME_MEANING_ONLY,
    SearchOutcome.RECOMMENDED_INSTEAD: search_pb2.SEARCH_OUTCOME_RECOMMENDED_INSTEAD,
    SearchOutcome.NOTHING_ELIGIBLE: search_pb2.SEARCH_OUTCOME_NOTHING_ELIGIBLE,
    SearchOutcome.NOTHING_TO_SHOW: search_pb2.SEARCH_OUTCOME_NOTHING_TO_SHOW,
}
_KINDS = {
    CompletionKind.PHRASE: search_pb2.SUGGESTION_KIND_PHRASE,
    CompletionKind.CATEGORY: search_pb2.SUGGESTION_KIND_CATEGORY,
    CompletionKind.BRAND: search_pb2.SUGGESTION_KIND_BRAND,
}


class SearchServicer(search_pb2_grpc.SearchServiceServicer):
    """Searches and completes."""

    def __init__(self, searcher: Searcher, suggester: Suggester, events: EventValidator) -> None:
        self._searcher = searcher
        self._suggester = suggester
        self._events = events
        self._messages = ItemMessages()

    async def Search(self, request: search_pb2.SearchRequest, _context: Context) -> search_pb2.SearchResponse:
        """Returns a page of what a query finds."""
        answer = await self._searcher.search(self._events.search(request))
        page = answer.page
        response = search_pb2.SearchResponse()
        response.CopyFrom(self._page(answer))
        response.user_id = page.user_id
        response.consistency_token = token_text(page.token)
        response.event_id = str(answer.event_id) if answer.event_id else ""
        response.recorded_version = answer.recorded_version
        say_how(response, page)
        return response

    def _page(self, answer: SearchAnswer) -> search_pb2.SearchResponse:
        """Returns what all have in common who are shown this page."""
        forms = answer.page.forms
        known: search_pb2.SearchResponse | None = None if forms is None else forms.get(_MESSAGE)
        if known is None:
            known = self._made(answer.page, answer)
            if forms is not None:
                forms[_MESSAGE] = known
        return known

    def _made(self, page: Answer, answer: SearchAnswer) -> search_pb2.SearchResponse:
        response = search_pb2.SearchResponse(
            outcome=_OUTCOMES[answer.outcome],
            corrected_query=answer.corrected_query,
            versions=versions_message(page.versions),
            slate_id=page.slate_id,
            as_of=timestamp_of(page.as_of),
            next_page_token=page.next_page_token,
            **_counted(answer.facets),
        )
        for item in page.items:
            self._messages.add(response.items, item)
        return response

    async def Suggest(self, request: search_pb2.SuggestRequest, _context: Context) -> search_pb2.SuggestResponse:
        """Returns how a prefix may go on."""
        found = await self._suggester.suggest(self._events.validator.suggest(request))
        return search_pb2.SuggestResponse(
            suggestions=[search_pb2.Suggestion(text=one.text, kind=_KINDS[one.kind]) for one in found.completions],
            versions=versions_message(found.versions),
        )


def _counted(facets: Facets) -> dict[str, Any]:
    return {
        "total_matches": facets.total,
        "categories": [search_pb2.FacetValue(value=value, item_count=count) for value, count in facets.categories],
        "brands": [search_pb2.FacetValue(value=value, item_count=count) for value, count in facets.brands],
        "price_ranges": [_range(prices) for prices in facets.price_ranges],
    }


def _range(prices: PriceRange) -> search_pb2.PriceRange:
    return search_pb2.PriceRange(
        min_price=money_of(prices.least_micros, prices.currency),
        max_price=money_of(prices.most_micros, prices.currency),
        item_count=prices.item_count,
    )
