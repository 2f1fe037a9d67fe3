"""Customers' online state: read from Redis, recomputed from PostgreSQL when Redis lacks it or lags."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import psycopg
import redis.exceptions
import structlog
from psycopg import AsyncConnection
from psycopg.rows import TupleRow, dict_row

from features.activity import READ_STATE, UserState, UserStateCodec
from features.layout import FeatureValue
from server.database import Pool
from server.errors import NotFoundError, StaleStateError, UnavailableError
from server.online.store import OnlineStore

Features = dict[str, dict[str, FeatureValue]]

_log = structlog.get_logger(__name__)
_CAUGHT_UP = """
DELETE FROM online_outbox o USING unnest(%s::text[], %s::bigint[]) AS s (user_id, version)
WHERE o.user_id = s.user_id AND o.version <= s.version
"""


class MergedError(Exception):
    """The customer was merged into another one; ``survivor`` is that one."""

    def __init__(self, survivor: str) -> None:
        super().__init__(survivor)
        self.survivor = survivor


class RegroupedError(Exception):
    """Personas have joined or left the customer since an identity was resolved to it: resolve it again."""


class UserStates:
    """The one place that knows both stores of a customer's state."""

    def __init__(self, pool: Pool, online: OnlineStore, codec: UserStateCodec) -> None:
        self._pool = pool
        self._online = online
        self._codec = codec

    async def recompute(self, connection: AsyncConnection[TupleRow], user_ids: Sequence[str]) -> list[UserState]:
        """Reads the state of customers from PostgreSQL, a marker for merged personas; unknown ones are left out."""
        async with connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(READ_STATE, [list(user_ids)])
            rows: Sequence[Mapping[str, Any]] = await cursor.fetchall()
        return [self._codec.state(row) for row in rows]

    async def rebuild(self, user_id: str) -> int:
        """Recomputes one customer and writes the result; returns the version PostgreSQL holds.

        Raises:
            NotFoundError: there is no such customer.
            MergedError: the customer was merged into another.
        """
        async with self._pool.connection() as connection:
            states = await self.recompute(connection, [user_id])
        if not states:
            raise NotFoundError("no such customer", reason="SUBJECT_UNKNOWN", field="subject.user_id")
        await self._online.write_users(states)
        if states[0].merged_into:
            raise MergedError(states[0].merged_into)
        return states[0].version

    async def publish(self, states: Sequence[UserState]) -> bool:
        """Writes committed states to Redis; says whether that worked. If not, the outbox still names them."""
        try:
            await self._online.write_users(states)
        except redis.exceptions.RedisError as error:
            _log.warning("online store missed a write; the outbox holds it", error=type(error).__name__, users=len(states))
            return False
        try:
            await self.caught_up({state.user_id: state.version for state in states})
        except psycopg.Error as error:
            _log.warning("outbox not cleared; recovery will look again", error=type(error).__name__, users=len(states))
        return True

    async def caught_up(self, versions: Mapping[str, int]) -> None:
        """Removes the outbox rows of customers that Redis holds at these versions."""
        async with self._pool.connection() as connection:
            await connection.execute(_CAUGHT_UP, [list(versions), list(versions.values())])

    async def features(self, user_id: str, *, now: datetime) -> Features:
        """Reads all views of a customer, rebuilding them when Redis has none.

        Raises:
            NotFoundError, MergedError: as ``rebuild``.
            UnavailableError: Redis loses what was just written.
        """
        for _ in range(3):
            features = await self._online.user_features(user_id, now)
            if features[self._codec.activity.name]["version"].value is not None:
                return features
            await self.rebuild(user_id)
        raise UnavailableError("the online store does not keep what is written", reason="ONLINE_STORE_UNAVAILABLE")

    async def at_least(self, user_id: str, minimum: int, *, now: datetime) -> Features:
        """Reads all views of a customer at ``minimum`` or a later version.

        Raises:
            StaleStateError: PostgreSQL itself does not hold that version.
            NotFoundError, MergedError, UnavailableError: as ``features``.
        """
        features = await self.features(user_id, now=now)
        if features[self._codec.activity.name]["version"].value < minimum:
            if await self.rebuild(user_id) < minimum:
                raise StaleStateError("the state this token asks for is not there", reason="TOKEN_AHEAD", field="consistency_token")
            features = await self.features(user_id, now=now)
        return features
