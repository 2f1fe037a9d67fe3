"""A customer as slates see them: activity at a version, and the profile of the very snapshot the index epoch ranks with."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from features.activity import ACTIVITY_VIEW, PROFILE_VIEW, activity_of, profile_of
from features.behaviour import Activity
from features.layout import FeatureValue, Status
from features.ranking import Profile
from server.online.states import Features, RegroupedError, UserStates
from server.recommend.slate import SlateFlag
from server.recommend.snapshot import Snapshot

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Customer:
    """What a slate is computed from besides the snapshot; ``flags`` say what is wrong with it."""

    activity: Activity
    profile: Profile
    flags: SlateFlag


NOBODY = Customer(Activity(0), Profile(), SlateFlag(0))


class Customers:
    """Reads customers so that equal (user_version, index_version, as_of) give equal values, whatever Redis holds just now.

    A materialization replaces the profile in Redis before, while or after the fleet moves to the epoch that goes with it. So
    the profile in Redis is used only where it is of the epoch's own snapshot; else PostgreSQL, which keeps all of them, is asked.
    """

    def __init__(self, states: UserStates) -> None:
        self._states = states

    async def online(self, user_id: str, snapshot: Snapshot, *, as_of: datetime) -> Customer:
        """Returns a customer from Redis; someone nobody has met has no features, which is not an error.

        Args:
            user_id: the customer, empty for someone nobody has met.
            snapshot: what the slate is computed with.
            as_of: the slate's time; what is stale is stale as of then, on whatever replica and whenever it is computed again.

        Raises:
            RegroupedError: personas joined or left the customer between two reads; Redis holds what followed, so look again.
        """
        if not user_id:
            return NOBODY
        try:
            return await self._customer(user_id, await self._states.features(user_id, now=as_of), snapshot, as_of)
        except RegroupedError:
            await self._states.rebuild(user_id)  # Redis may lag: otherwise the next look would find the same old state
            raise

    async def recorded(self, user_id: str, snapshot: Snapshot, *, as_of: datetime) -> Customer:
        """Returns a customer from PostgreSQL, equal to what ``online`` returns for the same user_version; errors as there."""
        if not user_id:
            return NOBODY
        return await self._customer(user_id, await self._states.recorded_features(user_id, now=as_of), snapshot, as_of)

    async def _customer(self, user_id: str, features: Features, snapshot: Snapshot, as_of: datetime) -> Customer:
        activity = activity_of(features[ACTIVITY_VIEW])
        assert activity is not None
        profile = await self._profile(user_id, activity, features[PROFILE_VIEW], snapshot=snapshot, as_of=as_of)
        if profile is None:
            return Customer(activity, Profile(), SlateFlag(0))
        stale = profile["purchase_count"].status is Status.STALE
        return Customer(activity, profile_of(profile), SlateFlag.PROFILE_STALE if stale else SlateFlag(0))

    async def _profile(
        self, user_id: str, activity: Activity, at_hand: Mapping[str, FeatureValue], *, snapshot: Snapshot, as_of: datetime
    ) -> Mapping[str, FeatureValue] | None:
        wanted = snapshot.table.features_as_of
        if wanted is None or _came_later(activity, wanted):
            return None
        if at_hand["purchase_count"].event_timestamp == wanted:
            return at_hand
        return await self._states.profile_at(user_id, wanted, user_version=activity.version, now=as_of)


def _came_later(activity: Activity, at: datetime) -> bool:
    """True when a snapshot taken for ``at`` cannot hold the customer: every event they ever had is at hand, and all are later.

    The version counts events and regroupings, so it equals the number of behaviours only where neither a merge nor the
    sequence's bound hides one. Spares newcomers, the usual case of a customer without a profile, the question to PostgreSQL.
    """
    if activity.version != len(activity.behaviours):
        return False
    return all(_EPOCH + timedelta(microseconds=behaviour.occurred_at) > at for behaviour in activity.behaviours)
