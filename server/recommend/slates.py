"""Finding the slate to answer with: the committed one, a new one, one computed apart from Redis, or the last one known."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import NamedTuple

from server.database import ONLINE_AWAY, RECORD_AWAY
from server.errors import OverloadedError
from server.fleet import FleetWatch
from server.metrics import Metrics
from server.online.states import AheadOfOnlineError, patiently
from server.online.store import OnlineStore
from server.recommend.ahead import Ahead
from server.recommend.clock import StageClock
from server.recommend.compute import Policy, Ranked
from server.recommend.computing import Computing, Flights, Gate
from server.recommend.customers import Customer, Customers
from server.recommend.known import KnownSlate, KnownSlates
from server.recommend.searching import compute_place
from server.recommend.slate import Place, Slate, SlateFlag, decode_slate, encode_payload, standing_of, version_of
from server.recommend.snapshot import Snapshot
from server.recommend.standing import TURNS, Stand, Standings, moving

# Why an answer is degraded, as callers see it.
ONLINE_STORE_UNAVAILABLE = "ONLINE_STORE_UNAVAILABLE"  # computed from PostgreSQL, not committed: as new as any other answer
ONLINE_STORE_LAGGING = "ONLINE_STORE_LAGGING"  # Redis is not (yet) known to hold everything that was shown
RECORD_STORE_UNAVAILABLE = "RECORD_STORE_UNAVAILABLE"  # PostgreSQL was needed and is away, or has not heard of us for long
OVERLOADED = "OVERLOADED"  # too many slates wait to be computed


class Found(NamedTuple):
    """A slate with the snapshot its rows refer to.

    Attributes:
        offer_version: prices must be at least as new; 0 takes those at hand.
        stale: the state may be older than what PostgreSQL holds.
        reasons: why the answer is degraded, empty when it is not.
        membership: how often the customer had been regrouped in the state at hand; 0 where that is not known.
    """

    user_id: str
    slate: Slate
    snapshot: Snapshot
    offer_version: int
    stale: bool = False
    reasons: tuple[str, ...] = ()
    membership: int = 0


class Met(NamedTuple):
    """A customer's features with where they and the fleet stand; ``stale`` and ``reasons`` as in Found."""

    stand: Stand
    customer: Customer
    stale: bool
    reasons: tuple[str, ...]


class Slates:
    """The first to compute a slate commits it for all; what cannot be committed is computed alike, and said to be degraded."""

    def __init__(
        self,
        standings: Standings,
        customers: Customers,
        *,
        online: OnlineStore,
        fleet: FleetWatch,
        metrics: Metrics,
        computing: Computing,
        ahead: Ahead,
        apart: Gate,
        known: KnownSlates,
        policy: Policy,
        ttl_seconds: float,
    ) -> None:
        self._standings = standings
        self._customers = customers
        self._online = online
        self._fleet = fleet
        self._metrics = metrics
        self._computing = computing
        self._ahead = ahead
        self._apart = apart
        self._known = known
        self._policy = policy
        self._ttl = ttl_seconds
        self._flights = Flights()

    async def find(self, user_id: str, place: Place, minimum: int, clock: StageClock) -> Found:
        """Returns the slate for the customer's newest version under the fleet's versions.

        Redis away: computed from PostgreSQL. PostgreSQL (too) away where it is needed, too much to compute, or a state that other
        replicas would not show: the last slate known here or in Redis, flagged stale, unless it is older than ``minimum``.

        Raises:
            StaleStateError: PostgreSQL does not hold ``minimum``.
            OverloadedError: too much to compute, and no slate is known.
            AheadOfOnlineError: what PostgreSQL holds may not be shown yet, and no slate is known.
            UnavailableError: the versions do not come to rest, or the snapshot cannot be loaded.
            NotFoundError, MergedError: the customer does not exist (any more).
            psycopg.Error: the stores are away, and no slate is known.
        """
        seen: list[Stand] = []
        reasons: tuple[str, ...] = ()
        try:
            try:
                return await self._together(user_id, place, minimum, clock, seen.append)
            except ONLINE_AWAY:
                reasons = (ONLINE_STORE_UNAVAILABLE,)
                return await patiently(lambda: self._by_itself(user_id, place, minimum, clock))
        except AheadOfOnlineError:
            found = self._last(user_id, place, minimum, seen, (*reasons, ONLINE_STORE_LAGGING))
            if found is None:
                raise
        except RECORD_AWAY:
            found = self._last(user_id, place, minimum, seen, (*reasons, RECORD_STORE_UNAVAILABLE))
            if found is None:
                raise
        except OverloadedError:
            found = self._last(user_id, place, minimum, seen, (*reasons, OVERLOADED))
            if found is None:
                raise
        return found

    async def meet(self, user_id: str, place: Place, minimum: int, clock: StageClock) -> Met:
        """Returns the customer's features and where everything stands, for answers that need no slate; errors as ``find``."""
        try:
            lagging = self._lagging
            stand = await self._standings.online(user_id, place, minimum, clock)
            with clock("features"):
                customer = await self._customers.online(user_id, stand.snapshot, as_of=stand.as_of)
            with clock("user_vector"):
                await self._ahead.asked(user_id)
            again = partial(self._standings.online, user_id, place, minimum, clock)
            membership = await _membership(stand, customer.activity.version, again)
            lagging = lagging or self._lagging
            return Met(stand._replace(membership=membership), customer, bool(lagging), lagging)
        except ONLINE_AWAY:
            return await patiently(lambda: self._met_apart(user_id, minimum, clock))

    async def _met_apart(self, user_id: str, minimum: int, clock: StageClock) -> Met:
        async with self._apart.passing():
            stand = await self._standings.recorded(user_id, minimum, clock)
            with clock("features"):
                customer = await self._customers.recorded(user_id, stand.snapshot, as_of=stand.as_of)
            again = partial(self._standings.recorded, user_id, minimum, clock)
            membership = await _membership(stand, customer.activity.version, again)
        self._standings.show(user_id, customer.activity.version)
        return Met(stand._replace(membership=membership), customer, stale=False, reasons=(ONLINE_STORE_UNAVAILABLE,))

    @property
    def _lagging(self) -> tuple[str, ...]:
        """Asked before a look too: what was read while Redis lagged is no newer when it has caught up since."""
        lagging = (ONLINE_STORE_LAGGING,) if self._online.behind else ()
        return (*lagging, RECORD_STORE_UNAVAILABLE) if self._online.unwatched else lagging

    async def _together(self, user_id: str, place: Place, minimum: int, clock: StageClock, seen: Callable[[Stand], None]) -> Found:
        """Returns the slate that stands in Redis for all replicas, committing one if none does."""
        for _ in range(TURNS):
            lagging = self._lagging
            stand = await self._standings.online(user_id, place, minimum, clock, seen=seen)
            snapshot, version = stand.snapshot, stand.user_version
            slot = place.slot(snapshot.model_version, snapshot.index_version)
            standing = stand.slate
            slate = decode_slate(standing, user_id, slot) if standing else None
            if slate is not None and slate.user_version == version and slate.expires_at > stand.as_of:
                self._metrics.slate_hit()
            else:
                self._metrics.slate_miss()
                compute = partial(self._compute_and_commit, user_id, place, stand, clock)
                standing = await self._flights.join((user_id, slot, version), compute)
                slate = decode_slate(standing, user_id, slot)
            if slate is not None and slate.user_version >= version and standing is not None:
                self._remember(user_id, place, snapshot, slate.user_version, standing)
                membership = await _membership(stand, slate.user_version, partial(self._standings.online, user_id, place, minimum, clock))
                lagging = lagging or self._lagging
                return Found(user_id, slate, snapshot, stand.offer_version, bool(lagging), lagging, membership)
        raise moving()

    async def _by_itself(self, user_id: str, place: Place, minimum: int, clock: StageClock) -> Found:
        """Returns the slate of PostgreSQL's state: its order, scores and prices are those any replica would compute."""
        async with self._apart.passing():
            stand = await self._standings.recorded(user_id, minimum, clock)
            snapshot = stand.snapshot
            slot = place.slot(snapshot.model_version, snapshot.index_version)
            known = self._known.get(user_id, place)
            if known is not None and known.of(stand.user_version, snapshot):
                standing = known.standing
            else:
                key = ("apart", user_id, slot, stand.user_version)
                standing = await self._flights.join(key, partial(self._compute_apart, user_id, place, stand, clock))
            slate = decode_slate(standing, user_id, slot)
            assert slate is not None
            membership = await _membership(stand, slate.user_version, partial(self._standings.recorded, user_id, minimum, clock))
        self._remember(user_id, place, snapshot, slate.user_version, standing)
        self._standings.show(user_id, slate.user_version)
        reasons = (ONLINE_STORE_UNAVAILABLE,)
        return Found(user_id, slate, snapshot, stand.offer_version, reasons=reasons, membership=membership)

    def _last(self, user_id: str, place: Place, minimum: int, seen: list[Stand], reasons: tuple[str, ...]) -> Found | None:
        """Returns the newest slate known whose snapshot is still loaded here, None when there is none as new as ``minimum``."""
        candidates = [known] if (known := self._known.get(user_id, place)) else []
        stand = seen[-1] if seen else None
        if stand is not None and stand.slate is not None:
            snapshot = stand.snapshot
            candidates.append(KnownSlate(version_of(stand.slate), snapshot.model_version, snapshot.index_version, stand.slate))
        for known in sorted(candidates, key=lambda known: -known.user_version):
            held = self._fleet.held(known.model_version, known.index_version)
            slate = decode_slate(known.standing, user_id, place.slot(known.model_version, known.index_version))
            if held is not None and slate is not None and slate.user_version >= minimum:
                return Found(user_id, slate, held, stand.offer_version if stand else 0, stale=True, reasons=reasons)
        return None

    async def _compute_and_commit(self, user_id: str, place: Place, stand: Stand, clock: StageClock, start: Callable[[], None]) -> bytes:
        with clock("features"):
            customer = await self._customers.online(user_id, stand.snapshot, as_of=stand.as_of)
        ranked = await self._computed(user_id, customer, place, stand.snapshot, clock, start)
        with clock("commit"):
            return await self._online.commit(
                user_id,
                place.slot(stand.snapshot.model_version, stand.snapshot.index_version),
                user_version=customer.activity.version,
                payload=_payload(ranked, customer, stand.as_of),
                ttl_seconds=self._ttl,
            )

    async def _compute_apart(self, user_id: str, place: Place, stand: Stand, clock: StageClock, start: Callable[[], None]) -> bytes:
        with clock("features"):
            customer = await self._customers.recorded(user_id, stand.snapshot, as_of=stand.as_of)
        ranked = await self._computed(user_id, customer, place, stand.snapshot, clock, start)
        return standing_of(_payload(ranked, customer, stand.as_of), customer.activity.version, stand.as_of, ttl_seconds=self._ttl)

    async def _computed(
        self, user_id: str, customer: Customer, place: Place, snapshot: Snapshot, clock: StageClock, start: Callable[[], None]
    ) -> Ranked:
        with clock("user_vector"):
            await self._ahead.asked(user_id)
        arguments = (snapshot, customer.activity, customer.profile, place, self._policy)
        ranked = await self._computing.run(compute_place, *arguments, starting=start)
        for stage, seconds in ranked.stages.items():
            clock.stages[stage] = clock.stages.get(stage, 0.0) + seconds
        return ranked

    def _remember(self, user_id: str, place: Place, snapshot: Snapshot, version: int, standing: bytes) -> None:
        self._known.put(user_id, place, KnownSlate(version, snapshot.model_version, snapshot.index_version, standing))


async def _membership(stand: Stand, user_version: int, look: Callable[[], Awaitable[Stand]]) -> int:
    """Returns how often the customer had been regrouped in the state of ``user_version``, or in a later one.

    Features are read after the stand, and may be newer: whether an identity is still that customer's the stand cannot say then.
    """
    return stand.membership if user_version <= stand.user_version else (await look()).membership


def _payload(ranked: Ranked, customer: Customer, as_of: datetime) -> bytes:
    flags: SlateFlag = ranked.flags | customer.flags
    return encode_payload(ranked.rows, ranked.scores, ranked.sources, flags=flags, as_of=as_of)
