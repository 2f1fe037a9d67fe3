"""A customer's whole profile as any channel may show it: identities, recent behaviours, counters and slow features."""

from collections.abc import Callable
from datetime import datetime

from features.activity import ACTIVITY_VIEW, PROFILE_VIEW, activity_of
from server.database import Pool
from server.domain import CustomerProfile, Subject, Token
from server.errors import NotFoundError
from server.ingest.identities import Identities, Known
from server.online.states import Features, UserStates

_COUNTERS = ("views_7d", "carts_7d", "purchases_28d", "searches_7d")
_IDENTITIES = "SELECT channel, channel_user_id FROM identities WHERE user_id = %s ORDER BY channel, channel_user_id"


class Profiles:
    """Reads profiles from the online store, honouring consistency tokens."""

    def __init__(self, pool: Pool, identities: Identities, states: UserStates, *, now: Callable[[], datetime]) -> None:
        self._pool = pool
        self._identities = identities
        self._states = states
        self._now = now

    async def read(self, subject: Subject, *, token: Token | None) -> CustomerProfile:
        """Returns a customer's profile at the token's version or later.

        Raises:
            NotFoundError: nobody has met the subject.
            StaleStateError: the state the token asks for does not exist (yet).
            AheadOfOnlineError: Redis is away, and what PostgreSQL holds may not be shown yet.
        """
        resolved = await self._identities.resolve(subject)
        if not resolved.user_id:
            raise NotFoundError("no customer has this identity", reason="SUBJECT_UNKNOWN", field="subject.identity")

        async def act(known: Known) -> CustomerProfile:
            minimum = await self._identities.minimum_version(known.user_id, token)
            return await self._profile(known.user_id, await self._states.newest(known.user_id, minimum, now=self._now()))

        return await self._identities.following(subject, Known(resolved.user_id), act)

    async def _profile(self, user_id: str, features: Features) -> CustomerProfile:
        activity = activity_of(features[ACTIVITY_VIEW])
        assert activity is not None
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(_IDENTITIES, [user_id])).fetchall()
        return CustomerProfile(
            user_id=user_id,
            user_version=activity.version,
            identities=[(row[0], row[1]) for row in rows],
            activity=activity,
            counters={name: features[ACTIVITY_VIEW][name].value or 0 for name in _COUNTERS},
            profile=features[PROFILE_VIEW],
        )
