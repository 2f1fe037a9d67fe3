"""Customers' online state: read from Redis, recomputed from PostgreSQL when Redis lacks it or lags."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, dict_row

from features.activity import READ_STATE, UserState, UserStateCodec
from features.layout import FeatureValue
from server.database import Pool
from server.errors import NotFoundError, StaleStateError, UnavailableError
from server.online.store import OnlineStore

Features = dict[str, dict[str, FeatureValue]]


class MergedError(Exception):
    """The customer was merged into another one; ``survivor`` is that one."""

    def __init__(self, survivor: str) -> None:
        super().__init__(survivor)
        self.survivor = survivor


class UserStates:
    """The one place that knows both stores of a customer's state."""

    def __init__(self, pool: Pool, online: OnlineStore, codec: UserStateCodec) -> None:
        self._pool = pool
        self._online = online
        self._codec = codec

    async def recompute(self, connection: AsyncConnection[TupleRow], user_ids: Sequence[str]) -> list[UserState]:
        """Reads the state of customers from PostgreSQL; merged or unknown ones are left out."""
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
                cursor = await connection.execute("SELECT merged_into FROM users WHERE user_id = %s", [user_id])
                row = await cursor.fetchone()
                if row is None or row[0] is None:
                    raise NotFoundError("no such customer", reason="SUBJECT_UNKNOWN", field="subject.user_id")
                raise MergedError(row[0])
        await self._online.write_users(states)
        return states[0].version

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
