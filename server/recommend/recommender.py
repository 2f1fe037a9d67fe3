"""The way of a recommendation: resolve, find the slate, join offers, answer; and the answers that need no slate."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from server.catalog.offers import Offers, OfferTable
from server.domain import Answer, ItemFilter, RecommendQuery, Subject, Token, Versions
from server.errors import ConflictError, NotFoundError
from server.ingest.identities import Identities, Known
from server.journal.exposures import Journal
from server.metrics import Metrics
from server.recommend.clock import StageClock
from server.recommend.compute import score_items, similar_items
from server.recommend.computing import Computing
from server.recommend.pages import Pages
from server.recommend.shelf import Cards, RankedItems, Shelf, page_token_refused, read_page_token
from server.recommend.slate import Place, Slate, SlateFlag
from server.recommend.slates import Found, Met, Slates
from server.recommend.snapshot import Snapshot
from server.recommend.standing import Standings

T = TypeVar("T")


class Looked(NamedTuple):
    """An answer with what it was made from."""

    answer: Answer
    slate: Slate
    snapshot: Snapshot
    offers: OfferTable


class Recommender:
    """Answers the same for a customer in every channel and replica: the first to compute a slate commits it for all."""

    def __init__(
        self,
        *,
        identities: Identities,
        slates: Slates,
        standings: Standings,
        computing: Computing,
        offers: Offers,
        journal: Journal,
        metrics: Metrics,
        hide_out_of_stock: bool,
        now: Callable[[], datetime],
    ) -> None:
        self._identities = identities
        self._slates = slates
        self._standings = standings
        self._computing = computing
        self._offers = offers
        self._journal = journal
        self._metrics = metrics
        self._hide_out_of_stock = hide_out_of_stock
        self._cards = Cards()
        self._pages = Pages(self._cards, hide_out_of_stock=hide_out_of_stock)
        self._now = now

    @property
    def slates(self) -> Slates:
        """Where its slates are found or computed."""
        return self._slates

    async def recommend(self, query: RecommendQuery) -> Answer:
        """Returns a page of the customer's slate for a surface; errors as ``look``."""
        return (await self.look(query)).answer

    async def look(self, query: RecommendQuery, *, accepted: Callable[[], None] = lambda: None) -> Looked:
        """Returns a page of the customer's slate for a surface or a search.

        Args:
            query: the page asked for.
            accepted: called when customer and token are known to be right, before the slate is looked for; once for each look.

        Raises:
            NotFoundError: the subject names a customer that does not exist.
            InvalidRequestError: the token belongs to another customer, or the page token is none of ours.
            ConflictError: the slate that the page token goes on from no longer stands.
            StaleStateError: the state the token asks for does not exist (yet).
            UnavailableError: the active model cannot be loaded here, or the stores disagree.
            OverloadedError: too many slates wait to be computed, and none is known to answer instead.
            psycopg.Error: the stores are away, and no slate is known; or prices as new as the offers' pointer cannot be had.
        """
        clock = StageClock()
        place = Place(query.surface, query.context_item_ids, query.search_text)

        async def find(known: Known) -> tuple[Known, Found]:
            minimum = await self._identities.minimum_version(known.user_id, query.token)
            accepted()
            found = await self._slates.find(known.user_id, place, minimum, clock)
            return known, known.checked(found, found.membership)

        known, found = await self._following_merges(query.subject, find, clock)
        slate, snapshot = found.slate, found.snapshot
        # A search's own event makes a newer version with the same order, and its pages go on in that.
        name = slate.order_id(place.slot(snapshot.model_version, snapshot.index_version)) if place.query else slate.slate_id
        start = self._start(query.page_token, slate, name)
        with clock("offers"):
            offers = await self._offers.at_least(found.offer_version)
        with clock("answer"):
            page = self._pages.of(slate, snapshot, offers, query, start=start, name=name)
        answer = Answer(
            user_id=found.user_id,
            items=page.items,
            versions=page.versions,
            slate_id=slate.slate_id,
            as_of=slate.as_of,
            token=Token(found.user_id, slate.user_version) if found.user_id else None,
            next_page_token=page.next_page_token,
            stale=found.stale or SlateFlag.PROFILE_STALE in slate.flags,
            degraded_reasons=found.reasons + (("NO_ACTIVE_MODEL",) if SlateFlag.NO_MODEL in slate.flags else ()),
            stages=clock.stages,
            forms=page.forms,
        )
        self._observe(answer)
        if query.log_exposure:
            self._journal.log(answer, query, persona_id=known.persona_id, answered_at=self._now())
        return Looked(answer, slate, snapshot, offers)

    async def rank(self, subject: Subject, *, channel: str, surface: str, item_ids: Sequence[str], token: Token | None) -> Answer:
        """Ranks given items for a customer; errors as ``recommend``, and PreconditionError while no model is active.

        Nothing is committed: equal versions give equal scores, and they are the scores a slate would give.
        """
        clock = StageClock()

        async def meet(known: Known) -> tuple[str, Met]:
            minimum = await self._identities.minimum_version(known.user_id, token)
            met = await self._slates.meet(known.user_id, Place(surface), minimum, clock)
            return known.user_id, known.checked(met, met.stand.membership)

        user_id, met = await self._following_merges(subject, meet, clock)
        snapshot, customer = met.stand.snapshot, met.customer
        snapshot.require_model()
        unique = list(dict.fromkeys(item_ids))
        rows = np.array([snapshot.table.rows[item] for item in unique if item in snapshot.table.rows], np.int32)
        with clock("ranking"):
            ranked = await self._computing.run(score_items, snapshot, customer.activity, customer.profile, rows)
        with clock("offers"):
            offers = await self._offers.at_least(met.stand.offer_version)
        shelf = Shelf(channel, ItemFilter(), False, self._cards)
        items, _ = shelf.page(RankedItems(snapshot.table, ranked.rows, ranked.scores, ranked.sources), offers, start=0, limit=len(unique))
        answer = Answer(
            user_id=user_id,
            items=tuple(items),
            versions=_versions(customer.activity.version, snapshot, offers),
            slate_id="",
            as_of=met.stand.as_of,
            token=Token(user_id, customer.activity.version) if user_id else None,
            stale=met.stale or SlateFlag.PROFILE_STALE in customer.flags,
            degraded_reasons=met.reasons,
            stages=clock.stages,
            unknown_item_ids=tuple(item for item in unique if item not in snapshot.table.rows),
        )
        self._observe(answer)
        return answer

    async def similar(self, item_id: str, *, channel: str, limit: int, filters: ItemFilter) -> Answer:
        """Returns items like one item: half the cosine of their vectors, half what customers of it went on to (scaled to 1).

        Raises:
            NotFoundError: the item is not in the index.
            PreconditionError: no model is active.
            OverloadedError: too many calls wait to be computed.
        """
        stand = await self._standings.of_nobody()
        snapshot = stand.snapshot
        row = snapshot.table.rows.get(item_id)
        if row is None:
            raise NotFoundError("no such item in the index", reason="ITEM_UNKNOWN", field="item_id")
        snapshot.require_model()
        offers = await self._offers.at_least(stand.offer_version)
        shelf = Shelf(channel, filters, self._hide_out_of_stock, self._cards)
        for exhaustive in (False, True):
            ranked = await self._computing.run(partial(similar_items, exhaustive=exhaustive), snapshot, row)
            found = RankedItems(snapshot.table, ranked.rows, ranked.scores, ranked.sources)
            items, _ = shelf.page(found, offers, start=0, limit=limit)
            if len(items) == limit or len(ranked.rows) == len(snapshot.table) - 1:
                break  # else too few of the nearest pass: a second pass over all items finds those further away
        return Answer("", tuple(items), _versions(0, snapshot, offers), "", self._now(), None)

    async def _following_merges(self, subject: Subject, act: Callable[[Known], Awaitable[T]], clock: StageClock) -> T:
        """Runs ``act`` for the subject's customer, and again for whoever that turns out to be."""
        with clock("identity"):
            known = await self._identities.customer_of(subject)
        return await self._identities.following(subject, known, act)

    def _start(self, token: str, slate: Slate, name: str) -> int:
        if not token:
            return 0
        named, position = read_page_token(token)
        if named != name:
            raise ConflictError("the slate has changed; start again without a page token", reason="SLATE_EXPIRED", field="page_token")
        if position >= len(slate.rows):
            raise page_token_refused()
        return position

    def _observe(self, answer: Answer) -> None:
        for stage, seconds in answer.stages.items():
            self._metrics.observe_stage(stage, seconds)
        for reason in answer.degraded_reasons:
            self._metrics.degraded(reason)
        self._metrics.answered(degraded=bool(answer.degraded_reasons), stale=answer.stale)


def _versions(user_version: int, snapshot: Snapshot, offers: OfferTable) -> Versions:
    return Versions(user_version, snapshot.model_version, snapshot.index_version, offers.offer_version)
