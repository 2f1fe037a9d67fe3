"""The way of a recommendation: resolve, read the committed slate, compute and commit it where none stands, join offers, answer."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from time import perf_counter
from typing import Any

import numpy as np

from features.activity import ACTIVITY_VIEW, PROFILE_VIEW, activity_of, profile_of
from features.behaviour import Activity
from features.candidates import Source
from features.layout import Status
from features.ranking import Profile
from server.catalog.offers import Offers, OfferTable
from server.domain import Answer, ItemFilter, RecommendQuery, Subject, Token, Versions
from server.errors import ConflictError, NotFoundError, PreconditionError, StaleStateError, UnavailableError
from server.fleet import FleetWatch
from server.ingest.identities import Identities
from server.journal.exposures import Journal
from server.metrics import Metrics
from server.online.states import MergedError, UserStates
from server.online.store import Fleet, OnlineStore
from server.recommend.compute import Policy, compute_slate, score_items
from server.recommend.shelf import RankedItems, Shelf, page_token, read_page_token
from server.recommend.slate import Place, Slate, SlateFlag, decode_slate, encode_payload
from server.recommend.snapshot import Snapshot

# Each turn follows a pointer or a version that moved while we looked; more than a few in one call means the stores disagree.
_TURNS = 12


@dataclass
class _Clock:
    """Seconds spent in each stage of one call."""

    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        started = perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + perf_counter() - started


@dataclass(frozen=True)
class _Found:
    """A standing slate with the snapshot its rows refer to and the offers' version seen with it."""

    user_id: str
    slate: Slate
    snapshot: Snapshot
    offer_version: int


class Recommender:
    """Answers the same for a customer in every channel and replica: the first to compute a slate commits it for all."""

    def __init__(
        self,
        *,
        identities: Identities,
        states: UserStates,
        online: OnlineStore,
        fleet: FleetWatch,
        offers: Offers,
        journal: Journal,
        metrics: Metrics,
        policy: Policy,
        slate_ttl_seconds: float,
        hide_out_of_stock: bool,
        now: Callable[[], datetime],
    ) -> None:
        self._identities = identities
        self._states = states
        self._online = online
        self._fleet = fleet
        self._offers = offers
        self._journal = journal
        self._metrics = metrics
        self._policy = policy
        self._slate_ttl = slate_ttl_seconds
        self._hide_out_of_stock = hide_out_of_stock
        self._now = now
        self._computing: dict[tuple[str, str, int], asyncio.Task[bytes]] = {}

    async def recommend(self, query: RecommendQuery) -> Answer:
        """Returns a page of the customer's slate for a surface.

        Raises:
            NotFoundError: the subject names a customer that does not exist.
            InvalidRequestError: the token belongs to another customer, or the page token is none of ours.
            ConflictError: the slate that the page token goes on from no longer stands.
            StaleStateError: the state the token asks for does not exist (yet).
            UnavailableError: the active model cannot be loaded here, or the stores disagree.
        """
        clock = _Clock()
        place = Place(query.surface, query.context_item_ids)
        found = await self._following_merges(query.subject, lambda user: self._slate(user, place, query.token, clock), clock)
        slate, snapshot = found.slate, found.snapshot
        start = self._start(query.page_token, slate)
        with clock("offers"):
            offers = await self._offers.at_least(found.offer_version)
        with clock("answer"):
            ranked = RankedItems(snapshot.table, slate.rows, slate.scores, slate.sources, SlateFlag.NEWCOMER in slate.flags)
            shelf = Shelf(query.channel, query.filters, self._hide_out_of_stock)
            items, rest = shelf.page(ranked, offers, start=start, limit=query.limit)
        answer = Answer(
            user_id=found.user_id,
            items=tuple(items),
            versions=_versions(slate.user_version, snapshot, offers),
            slate_id=slate.slate_id,
            as_of=slate.as_of,
            token=Token(found.user_id, slate.user_version) if found.user_id else None,
            next_page_token="" if rest is None else page_token(slate.slate_id, rest),
            stale=SlateFlag.PROFILE_STALE in slate.flags,
            degraded_reasons=("NO_ACTIVE_MODEL",) if SlateFlag.NO_MODEL in slate.flags else (),
            stages=clock.stages,
        )
        self._observe(clock)
        if query.log_exposure:
            self._journal.log(answer, query, answered_at=self._now())
        return answer

    async def rank(self, subject: Subject, *, channel: str, surface: str, item_ids: Sequence[str], token: Token | None) -> Answer:
        """Ranks given items for a customer; errors as ``recommend``, and PreconditionError while no model is active.

        Nothing is committed: equal versions give equal scores, and they are the scores a slate would give.
        """
        clock = _Clock()
        place = Place(surface)

        async def scored(user_id: str) -> tuple[str, Activity, Profile, Snapshot, Fleet]:
            snapshot, fleet, _ = await self._standing(user_id, place, token, clock)
            with clock("features"):
                activity, profile, _ = await self._customer(user_id)
            return user_id, activity, profile, snapshot, fleet

        user_id, activity, profile, snapshot, fleet = await self._following_merges(subject, scored, clock)
        _require_model(snapshot)
        unique = list(dict.fromkeys(item_ids))
        rows = np.array([snapshot.table.rows[item] for item in unique if item in snapshot.table.rows], np.int32)
        with clock("ranking"):
            ranked = await asyncio.to_thread(score_items, snapshot, activity, profile, rows)
        with clock("offers"):
            offers = await self._offers.at_least(fleet.offer_version)
        shelf = Shelf(channel, ItemFilter(), hide_out_of_stock=False)
        items, _ = shelf.page(RankedItems(snapshot.table, ranked.rows, ranked.scores, ranked.sources), offers, start=0, limit=len(unique))
        self._observe(clock)
        return Answer(
            user_id=user_id,
            items=tuple(items),
            versions=_versions(activity.version, snapshot, offers),
            slate_id="",
            as_of=self._now(),
            token=Token(user_id, activity.version) if user_id else None,
            stages=clock.stages,
            unknown_item_ids=tuple(item for item in unique if item not in snapshot.table.rows),
        )

    async def similar(self, item_id: str, *, channel: str, limit: int, filters: ItemFilter) -> Answer:
        """Returns items like one item: half the cosine of their vectors, half what customers of it went on to (scaled to 1).

        Raises:
            NotFoundError: the item is not in the index.
            PreconditionError: no model is active.
        """
        snapshot, fleet, _ = await self._standing("", Place("similar"), None, _Clock())
        row = snapshot.table.rows.get(item_id)
        if row is None:
            raise NotFoundError("no such item in the index", reason="ITEM_UNKNOWN", field="item_id")
        _require_model(snapshot)
        cosine = np.einsum("nd,d->n", snapshot.vectors, snapshot.vectors[row])
        together = snapshot.collaborative.scores(np.array([row], np.int32), np.ones(1, np.float32))
        scores = (0.5 * cosine + 0.5 * np.maximum(together, 0) / max(float(together.max(initial=0.0)), 1e-9)).astype(np.float32)
        scores[row] = -np.inf
        order = np.lexsort((np.arange(len(scores)), -scores))[:-1].astype(np.int32)
        sources = np.where(together[order] > 0, int(Source.VECTOR | Source.COLLABORATIVE), int(Source.VECTOR)).astype(np.uint8)
        offers = await self._offers.at_least(fleet.offer_version)
        ranked = RankedItems(snapshot.table, order, scores[order], sources)
        items, _ = Shelf(channel, filters, self._hide_out_of_stock).page(ranked, offers, start=0, limit=limit)
        return Answer("", tuple(items), _versions(0, snapshot, offers), "", self._now(), None)

    async def _following_merges(self, subject: Subject, act: Callable[[str], Any], clock: _Clock) -> Any:
        """Runs ``act`` for the subject's customer, and for the survivor when the customer turns out to have been merged."""
        with clock("identity"):
            user_id = await self._identities.user_of(subject)
        for _ in range(_TURNS):
            try:
                return await act(user_id)
            except MergedError as merged:
                user_id = merged.survivor
                self._identities.remember(subject, user_id)
        raise UnavailableError("the customer is being merged", reason="MERGE_IN_PROGRESS")

    async def _slate(self, user_id: str, place: Place, token: Token | None, clock: _Clock) -> _Found:
        """Returns the slate that stands for the customer's newest version under the fleet's versions, committing one if none does."""
        for _ in range(_TURNS):
            snapshot, fleet, standing = await self._standing(user_id, place, token, clock)
            slot = place.slot(snapshot.model_version, snapshot.index_version)
            version = standing.user_version or 0
            slate = decode_slate(standing.slate, user_id, slot) if standing.slate else None
            if slate is not None and slate.user_version == version and slate.expires_at > standing.now:
                self._metrics.slate_hit()
                return _Found(user_id, slate, snapshot, fleet.offer_version)
            self._metrics.slate_miss()
            committed = await self._computed(user_id, place, snapshot, version=version, as_of=standing.now, clock=clock)
            slate = decode_slate(committed, user_id, slot)
            if slate is not None and slate.user_version >= version:
                return _Found(user_id, slate, snapshot, fleet.offer_version)
        raise UnavailableError("the versions keep moving", reason="VERSIONS_MOVING")

    async def _standing(self, user_id: str, place: Place, token: Token | None, clock: _Clock) -> tuple[Snapshot, Fleet, Any]:
        """Reads until the snapshot in hand is the one the pointers name and the customer's state satisfies the token."""
        minimum = await self._identities.minimum_version(user_id, token)
        snapshot = self._fleet.current
        for _ in range(_TURNS):
            with clock("online_read"):
                slot = place.slot(snapshot.model_version, snapshot.index_version) if snapshot else ""
                standing = await self._online.read(user_id, slot)
                fleet = standing.fleet or await self._fleet.sync()
            if snapshot is None or (snapshot.model_version, snapshot.index_version) != (fleet.model_version, fleet.index_version):
                with clock("snapshot"):
                    snapshot = await self._fleet.ensure(fleet)
                continue
            if user_id and (standing.user_version is None or standing.user_version < minimum):
                with clock("rebuild"):
                    version = await self._states.rebuild(user_id)
                if version < minimum:
                    # PostgreSQL is the truth: what it does not hold, no waiting brings (but a replica behind it may catch up).
                    raise StaleStateError("the state this token asks for is not there", reason="TOKEN_AHEAD", field="consistency_token")
                continue
            return snapshot, fleet, standing
        raise UnavailableError("the versions keep moving", reason="VERSIONS_MOVING")

    async def _computed(self, user_id: str, place: Place, snapshot: Snapshot, *, version: int, as_of: datetime, clock: _Clock) -> bytes:
        """Computes and commits a slate once, however many calls of this process wait for it."""
        key = (user_id, place.slot(snapshot.model_version, snapshot.index_version), version)
        task = self._computing.get(key)
        if task is None:
            task = asyncio.create_task(self._compute(user_id, place, snapshot, as_of, clock))
            self._computing[key] = task
            task.add_done_callback(lambda _: self._computing.pop(key, None))
        return await asyncio.shield(task)

    async def _compute(self, user_id: str, place: Place, snapshot: Snapshot, as_of: datetime, clock: _Clock) -> bytes:
        with clock("features"):
            activity, profile, flags = await self._customer(user_id)
        # Context items are part of the sequence, as if just viewed; the channel is not: it must not change the answer.
        seen = activity.with_context(place.context_item_ids, "")
        ranked = await asyncio.to_thread(compute_slate, snapshot, seen, profile, self._policy)
        clock.stages.update(ranked.stages)
        payload = encode_payload(ranked.rows, ranked.scores, ranked.sources, flags=ranked.flags | flags, as_of=as_of)
        with clock("commit"):
            return await self._online.commit(
                user_id,
                place.slot(snapshot.model_version, snapshot.index_version),
                user_version=activity.version,
                payload=payload,
                ttl_seconds=self._slate_ttl,
            )

    async def _customer(self, user_id: str) -> tuple[Activity, Profile, SlateFlag]:
        """Reads a customer's features; someone nobody has met has none, which is not an error."""
        if not user_id:
            return Activity(0), Profile(), SlateFlag(0)
        features = await self._states.features(user_id, now=self._now())
        activity = activity_of(features[ACTIVITY_VIEW])
        assert activity is not None
        stale = features[PROFILE_VIEW]["purchase_count"].status is Status.STALE
        return activity, profile_of(features[PROFILE_VIEW]), SlateFlag.PROFILE_STALE if stale else SlateFlag(0)

    def _start(self, token: str, slate: Slate) -> int:
        if not token:
            return 0
        slate_id, position = read_page_token(token)
        if slate_id != slate.slate_id:
            raise ConflictError("the slate has changed; start again without a page token", reason="SLATE_EXPIRED", field="page_token")
        return position

    def _observe(self, clock: _Clock) -> None:
        for stage, seconds in clock.stages.items():
            self._metrics.observe_stage(stage, seconds)


def _require_model(snapshot: Snapshot) -> None:
    if snapshot.model is None:
        raise PreconditionError("no model is active; activate one first", reason="NO_ACTIVE_MODEL")


def _versions(user_version: int, snapshot: Snapshot, offers: OfferTable) -> Versions:
    return Versions(user_version, snapshot.model_version, snapshot.index_version, offers.offer_version)
