"""The way of a search: its event is recorded while the slate is found as a recommendation's is, then facets and what it was about."""

import asyncio
from dataclasses import replace

import psycopg
import structlog

from features.candidates import Source
from server.domain import Answer, Facets, RecommendQuery, RecordOutcome, SearchAnswer, SearchOutcome, SearchQuery, Stored, Token
from server.errors import OverloadedError
from server.ingest.recorder import EventRecorder
from server.metrics import Metrics
from server.recommend.recommender import Looked, Recommender
from server.recommend.shelf import RankedItems, Shelf
from server.recommend.slate import SlateFlag
from server.search.facets import count_facets

_log = structlog.get_logger(__name__)
SEARCH_NOT_RECORDED = "SEARCH_NOT_RECORDED"  # a reason why an answer is degraded
# How long an answer that is ready waits for its event's commit, which takes some milliseconds: a store that hangs is away.
_CONFIRM_SECONDS = 0.5
_FACETS = "facets"  # the form of a page that is kept here


class Searcher:
    """Searches are slates, by the same code as recommendations: same answer everywhere, same tokens, same audit."""

    def __init__(self, recommender: Recommender, recorder: EventRecorder, metrics: Metrics, *, hide_out_of_stock: bool) -> None:
        self._recommender = recommender
        self._recorder = recorder
        self._metrics = metrics
        self._hide_out_of_stock = hide_out_of_stock

    async def search(self, query: SearchQuery) -> SearchAnswer:
        """Returns a page of what a customer's search finds; errors as Recommender.look.

        The event's commit and the computation take their time side by side. Where the computation fails the event may be stored all
        the same: searching again with its id counts once.
        """
        recording: asyncio.Task[RecordOutcome] | None = None

        def accepted() -> None:
            nonlocal recording
            if query.event is not None and recording is None:  # a customer who is merged meanwhile is looked for again
                recording = asyncio.create_task(self._recorder.record([query.event]))
                recording.add_done_callback(_looked_at)

        looked = await self._recommender.look(query.page, accepted=accepted)
        token = await self._recorded(recording) if recording is not None else None
        page = looked.answer
        if recording is not None:
            page = _with_event(page, token)
        facets = self._facets(looked, query.page)
        outcome = _outcome(looked, facets)
        self._metrics.searched(outcome.value)
        return SearchAnswer(
            page,
            outcome,
            corrected_query=looked.snapshot.table.lexical.corrected(query.page.search_text).text,
            facets=facets,
            event_id=query.event.event_id if query.event and token else None,
            recorded_version=token.version if token else 0,
        )

    async def _recorded(self, recording: "asyncio.Task[RecordOutcome]") -> Token | None:
        """Returns the token that covers the event, None (and counts that) when it is not known to be committed."""
        try:
            async with asyncio.timeout(_CONFIRM_SECONDS):
                recorded = await asyncio.shield(recording)
        except (TimeoutError, OverloadedError, psycopg.Error) as error:
            _log.warning("a search was answered but not recorded", error=type(error).__name__)
        else:
            if recorded.outcomes[0].status is not Stored.REJECTED:
                return recorded.tokens[0]
        self._metrics.degraded(SEARCH_NOT_RECORDED)
        return None

    def _facets(self, looked: Looked, query: RecommendQuery) -> Facets:
        forms = looked.answer.forms
        assert forms is not None  # a page of a slate is kept
        facets: Facets | None = forms.get(_FACETS)
        if facets is None:
            slate, table = looked.slate, looked.snapshot.table
            shelf = Shelf(query.channel, query.filters, self._hide_out_of_stock)
            facets = forms[_FACETS] = count_facets(RankedItems(table, slate.rows, slate.scores, slate.sources), looked.offers, shelf)
        return facets


def _with_event(page: Answer, token: Token | None) -> Answer:
    """Returns the page with a token that covers its search too, which may have made a customer of somebody nobody had met."""
    if token is None:
        return replace(page, degraded_reasons=(*page.degraded_reasons, SEARCH_NOT_RECORDED))
    if page.token is not None and page.token.user_id == token.user_id:
        token = max(page.token, token)  # the slate may be of a still newer state
    return replace(page, user_id=token.user_id, token=token)


def _outcome(looked: Looked, facets: Facets) -> SearchOutcome:
    slate = looked.slate
    if not facets.total:
        instead = SlateFlag.RECOMMENDED_INSTEAD in slate.flags
        return SearchOutcome.NOTHING_TO_SHOW if instead and not len(slate.rows) else SearchOutcome.NOTHING_ELIGIBLE
    if SlateFlag.RECOMMENDED_INSTEAD in slate.flags:
        return SearchOutcome.RECOMMENDED_INSTEAD
    by_words = (slate.sources & int(Source.LEXICAL)).any()
    return SearchOutcome.MATCHED if by_words else SearchOutcome.MEANING_ONLY


def _looked_at(recording: "asyncio.Task[RecordOutcome]") -> None:
    """A failure that nobody waits for any more is not reported as forgotten."""
    if not recording.cancelled():
        recording.exception()
