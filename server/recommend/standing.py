"""Where a customer and the fleet stand: read from Redis in one round trip, or from PostgreSQL while Redis is away."""

from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from server.database import ONLINE_AWAY
from server.errors import UnavailableError
from server.fleet import FleetWatch
from server.online.states import UserStates, ahead
from server.online.store import OnlineStore
from server.recommend.clock import StageClock
from server.recommend.slate import Place
from server.recommend.snapshot import Snapshot

# Each turn follows a pointer or a version that moved while we looked; more than a few in one call means the stores disagree.
TURNS = 12


class Stand(NamedTuple):
    """What an answer is made from.

    Attributes:
        user_version: of the customer, 0 for someone nobody has met.
        snapshot: the one the fleet's pointers name.
        offer_version: the offers' pointer: prices must be at least as new.
        slate: what stands committed in the slot, of whatever user_version; None from PostgreSQL.
        as_of: the time of the look, by Redis's clock; by this replica's from PostgreSQL.
        membership: how often the customer had been regrouped in that state.
    """

    user_version: int
    snapshot: Snapshot
    offer_version: int
    slate: bytes | None
    as_of: datetime
    membership: int


class Standings:
    """Looks until the snapshot in hand is the one the pointers name and the customer's state is new enough."""

    def __init__(self, states: UserStates, online: OnlineStore, fleet: FleetWatch, *, now: Callable[[], datetime]) -> None:
        self._states = states
        self._online = online
        self._fleet = fleet
        self._now = now

    async def online(
        self, user_id: str, place: Place, minimum: int, clock: StageClock, *, seen: Callable[[Stand], None] = lambda _: None
    ) -> Stand:
        """Reads Redis, rebuilding there what it lacks or what is older than ``minimum``.

        Args:
            user_id: the customer, empty for someone nobody has met.
            place: whose slot to read.
            minimum: version the state must have at least.
            clock: is told the time of each stage.
            seen: called with what was found before it was judged, so that a failure later on has something left to answer.

        Raises:
            StaleStateError: PostgreSQL itself does not hold that version.
            NotFoundError, MergedError: the customer does not exist (any more).
            UnavailableError: the versions do not come to rest, or the snapshot cannot be loaded.
        """
        shown = self._states.shown.of(user_id)
        snapshot = self._fleet.current
        for _ in range(TURNS):
            with clock("online_read"):
                slot = place.slot(snapshot.model_version, snapshot.index_version) if snapshot else ""
                standing = await self._online.read(user_id, slot)
                fleet = standing.fleet or await self._fleet.sync()
            if snapshot is None or (snapshot.model_version, snapshot.index_version) != (fleet.model_version, fleet.index_version):
                with clock("snapshot"):
                    snapshot = await self._fleet.ensure(fleet)
                continue
            stand = Stand(standing.user_version or 0, snapshot, fleet.offer_version, standing.slate, standing.now, standing.membership)
            seen(stand)
            if user_id and (standing.user_version is None or standing.user_version < max(minimum, shown)):
                with clock("rebuild"):
                    if await self._states.rebuild(user_id) < minimum:
                        raise ahead()
                continue
            return stand
        raise moving()

    async def recorded(self, user_id: str, minimum: int, clock: StageClock) -> Stand:
        """Reads PostgreSQL only; errors as ``online``."""
        with clock("recorded_read"):
            fleet = await self._fleet.pointers()
            recorded = await self._states.recorded(user_id)
            if recorded.user_version < minimum:
                raise ahead()
        with clock("snapshot"):
            snapshot = await self._fleet.ensure(fleet)
        return Stand(recorded.user_version, snapshot, fleet.offer_version, None, self._now(), recorded.membership)

    async def of_nobody(self) -> Stand:
        """Returns where the fleet stands, for answers about no customer: by Redis, or by PostgreSQL while Redis is away.

        Raises:
            UnavailableError: the versions do not come to rest, or the snapshot cannot be loaded.
        """
        try:
            return await self.online("", Place("nobody"), 0, StageClock())
        except ONLINE_AWAY:
            return await self.recorded("", 0, StageClock())

    def show(self, user_id: str, version: int) -> None:
        """Notes that a version PostgreSQL holds was answered, which Redis may not hold yet."""
        self._states.shown.note(user_id, version)


def moving() -> UnavailableError:
    """Returns the error for versions that do not come to rest within one call."""
    return UnavailableError("the versions keep moving", reason="VERSIONS_MOVING")
