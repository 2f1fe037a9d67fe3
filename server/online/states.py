"""Customers' online state: read from Redis, recomputed from PostgreSQL when Redis lacks it or lags."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg import AsyncConnection
from psycopg.rows import TupleRow, dict_row

from features.activity import CAUGHT_UP, READ_STATE, UserState, UserStateCodec, is_whole
from features.layout import FeatureValue, ViewLayout
from server.arrays import number_array, text_array
from server.database import ONLINE_AWAY, Pool
from server.errors import StaleStateError, UnavailableError, unknown_customer
from server.online.shown import Shown
from server.online.store import OnlineStore

_log = structlog.get_logger(__name__)

Features = dict[str, dict[str, FeatureValue]]

T = TypeVar("T")

# How long a call waits until it may show what PostgreSQL holds, so that a caller with the client's usual deadline of 1 s is still
# told something, and the pause between its looks. With a listener (see
# server/ingest/notices.py) Redis has caught up, or all replicas have found that they cannot reach it, in a small part of that.
_PATIENCE_SECONDS = 0.7
_PAUSE_SECONDS = 0.015
# Customers read and written together: every other call of the process waits while they are encoded.
_AT_ONCE = 100
# Connections that read a large group: while PostgreSQL reads one share, the other is encoded and sent to Redis.
_SHARES = 2

# Whether what the statement's snapshot holds of a customer may be shown: Redis holds it too (or has lost the customer), or no
# other replica answers from Redis. Parameters: the customer, this replica.
_SHARED = """
SELECT NOT EXISTS (SELECT FROM online_outbox WHERE user_id = %s)
    OR NOT EXISTS (SELECT FROM online_readers WHERE replica_id <> %s) AS shared
"""
_RECORDED = f"""
SELECT u.version, u.merged_into, u.membership, c.shared FROM users u CROSS JOIN ({_SHARED}) c WHERE u.user_id = %s
"""  # noqa: S608 - constant statements
_RECORDED_STATE = f"SELECT s.*, c.shared FROM ({READ_STATE}) s CROSS JOIN ({_SHARED}) c"  # noqa: S608 - constant statements
_PROFILE_AT = """
SELECT u.merged_into IS NOT NULL OR u.regrouped_version > %s AS regrouped, p.*
FROM users u LEFT JOIN user_profile p ON p.user_id = u.user_id AND p.event_timestamp = %s WHERE u.user_id = %s
"""


class MergedError(Exception):
    """The customer was merged into another one; ``survivor`` is that one."""

    def __init__(self, survivor: str) -> None:
        super().__init__(survivor)
        self.survivor = survivor


class RegroupedError(Exception):
    """Personas have joined or left the customer since an identity was resolved to it: resolve it again."""


class AheadOfOnlineError(UnavailableError):
    """PostgreSQL holds a version of the customer that Redis may lack, and another replica answers from Redis."""

    def __init__(self) -> None:
        super().__init__("the online store does not hold the customer's newest state yet", reason="ONLINE_STORE_LAGGING")


@dataclass(frozen=True)
class Recorded:
    """Where a customer stands in PostgreSQL; version and membership are 0 for the empty user id."""

    user_version: int
    membership: int = 0


class UserStates:
    """The one place that knows both stores of a customer's state.

    What is read from PostgreSQL to be shown (``recorded...``) must be no newer than what Redis shows in other replicas, so that
    nobody sees a version go back (C3). The one who may not show it yet wakes those who can write it to Redis, and tries again.

    Args:
        pool: connections to PostgreSQL.
        online: Redis.
        codec: encodes states.
        replica_id: this process among ``replicas``; empty for one that serves nobody.

    Attributes:
        shown: versions answered from PostgreSQL alone.
        missed: set when Redis lacks what somebody waits for.
    """

    def __init__(self, pool: Pool, online: OnlineStore, codec: UserStateCodec, *, replica_id: str = "") -> None:
        self.shown = Shown()
        self.missed = asyncio.Event()
        self._replica_id = replica_id
        self._pool = pool
        self._online = online
        self._codec = codec

    async def recompute(self, connection: AsyncConnection[TupleRow], user_ids: Sequence[str]) -> list[UserState]:
        """Reads the state of customers from PostgreSQL, a marker for merged personas; unknown ones are left out."""
        # Arrays of 50 as text take PostgreSQL 9 us more of each customer to write, and this process 10 us more to read.
        async with connection.cursor(row_factory=dict_row, binary=True) as cursor:
            await cursor.execute(READ_STATE, [text_array(user_ids)])
            rows: Sequence[Mapping[str, Any]] = await cursor.fetchall()
        return [self._codec.state(row) for row in rows]

    async def refresh(self, user_ids: Sequence[str]) -> dict[str, int]:
        """Recomputes customers and writes the results; returns the version of each. Unknown ones are left out.

        Raises:
            psycopg.Error, redis.exceptions.RedisError: a store is away; some of them may be written.
        """
        shares = min(_SHARES, max(1, len(user_ids) // _AT_ONCE))
        # Each comes to its end, whatever the others do.
        done = await asyncio.gather(*(self._refresh(user_ids[k::shares]) for k in range(shares)), return_exceptions=True)
        versions: dict[str, int] = {}
        for part in done:
            if isinstance(part, BaseException):
                raise part
            versions |= part
        return versions

    async def _refresh(self, user_ids: Sequence[str]) -> dict[str, int]:
        versions: dict[str, int] = {}
        async with self._pool.connection() as connection:
            for start in range(0, len(user_ids), _AT_ONCE):
                states = await self.recompute(connection, user_ids[start : start + _AT_ONCE])
                await self._online.write_users(states)
                versions |= {state.user_id: state.version for state in states}
        return versions

    async def rebuild(self, user_id: str) -> int:
        """Recomputes one customer and writes the result; returns the version PostgreSQL holds.

        Raises:
            NotFoundError: there is no such customer.
            MergedError: the customer was merged into another.
        """
        async with self._pool.connection() as connection:
            states = await self.recompute(connection, [user_id])
        if not states:
            raise unknown_customer()
        await self._online.write_users(states)
        if states[0].merged_into:
            raise MergedError(states[0].merged_into)
        return states[0].version

    async def publish(self, states: Sequence[UserState]) -> bool:
        """Writes committed states to Redis; says whether that worked. If not, the outbox still names them."""
        try:
            await self._online.write_users(states)
        except ONLINE_AWAY as error:
            _log.warning("online store missed a write; the outbox holds it", error=type(error).__name__, users=len(states))
            self.missed.set()
            return False
        try:
            await self.caught_up({state.user_id: state.version for state in states})
        except psycopg.Error as error:
            _log.warning("outbox not cleared; recovery will look again", error=type(error).__name__, users=len(states))
        return True

    async def caught_up(self, versions: Mapping[str, int]) -> None:
        """Removes the outbox rows of customers that Redis holds at these versions."""
        async with self._pool.connection() as connection:
            await connection.execute(CAUGHT_UP, [text_array(versions), number_array(versions.values())])

    async def recorded(self, user_id: str) -> Recorded:
        """Returns where a customer stands in PostgreSQL, which is never behind any token.

        Raises:
            NotFoundError, MergedError: as ``rebuild``.
            AheadOfOnlineError: it may not be shown yet; see ``patiently``.
        """
        if not user_id:
            return Recorded(0)
        async with self._pool.connection() as connection:
            row = await (await connection.execute(_RECORDED, [user_id, self._replica_id, user_id])).fetchone()
        if row is None:
            raise unknown_customer()
        self._require_shared(row[3])
        if row[1] is not None:
            raise MergedError(row[1])
        return Recorded(row[0], row[2])

    async def recorded_features(self, user_id: str, *, now: datetime) -> Features:
        """Recomputes all views of a customer in PostgreSQL, as they would stand in Redis, without touching Redis.

        Raises:
            NotFoundError, MergedError, AheadOfOnlineError: as ``recorded``.
        """
        while True:
            async with self._pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
                await cursor.execute(_RECORDED_STATE, [[user_id], user_id, self._replica_id])
                row = await cursor.fetchone()
            if row is not None and row["merged_into"] is None:
                self._require_shared(row["shared"])
                break
            await self.recorded(user_id)  # says why there is none; a customer created meanwhile is read again
        activity, profile = self._codec.activity, self._codec.profile
        absent = profile.decode([None] * len(profile.hash_fields), now)
        known = _as_online(profile, row["profile"], row["profile_timestamp"], now) if row["profile"] is not None else absent
        return {activity.name: _as_online(activity, row, row["event_timestamp"], now), profile.name: known}

    async def recorded_at_least(self, user_id: str, minimum: int, *, now: datetime) -> Features:
        """Recomputes all views of a customer, as ``recorded_features``, at ``minimum`` or a later version.

        Raises:
            StaleStateError: PostgreSQL itself does not hold that version.
            NotFoundError, MergedError, AheadOfOnlineError: as ``recorded``.
        """
        features = await self.recorded_features(user_id, now=now)
        version = features[self._codec.activity.name]["version"].value
        if version < minimum:
            raise ahead()
        self.shown.note(user_id, version)
        return features

    def _require_shared(self, shared: bool) -> None:
        if not shared:
            self.missed.set()
            raise AheadOfOnlineError

    async def profile_at(self, user_id: str, at: datetime, *, user_version: int, now: datetime) -> dict[str, FeatureValue]:
        """Reads a customer's profile in the snapshot taken for ``at`` from PostgreSQL; all MISSING when it has none.

        Raises:
            RegroupedError: the customer was regrouped after ``user_version``, and an unlink takes snapshots again: what is there
                now need not be what went with that version.
        """
        layout = self._codec.profile
        async with self._pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(_PROFILE_AT, [user_version, at, user_id])
            row = await cursor.fetchone()
        if row is not None and row["regrouped"]:
            raise RegroupedError
        if row is None or row["event_timestamp"] is None:
            return layout.decode([None] * len(layout.hash_fields), now)
        return _as_online(layout, row, at, now)

    async def features(self, user_id: str, *, now: datetime) -> Features:
        """Reads all views of a customer, rebuilding them when Redis has none, or none of this release's form.

        Raises:
            NotFoundError, MergedError: as ``rebuild``.
            UnavailableError: Redis loses what was just written.
        """
        for _ in range(3):
            features = await self._online.user_features(user_id, now)
            if is_whole(features[self._codec.activity.name]):
                return features
            await self.rebuild(user_id)
        raise UnavailableError("the online store does not keep what is written", reason="ONLINE_STORE_UNAVAILABLE")

    async def at_least(self, user_id: str, minimum: int, *, now: datetime) -> Features:
        """Reads all views of a customer at ``minimum`` or a later version, and none older than was ``shown``.

        Raises:
            StaleStateError: PostgreSQL itself does not hold that version.
            NotFoundError, MergedError, UnavailableError: as ``features``.
        """
        features = await self.features(user_id, now=now)
        if features[self._codec.activity.name]["version"].value < max(minimum, self.shown.of(user_id)):
            if await self.rebuild(user_id) < minimum:
                raise ahead()
            features = await self.features(user_id, now=now)
        return features

    @property
    def certain(self) -> bool:
        """True while Redis holds all that any replica has shown; see OnlineStore."""
        return self._online.certain

    async def newest(self, user_id: str, minimum: int, *, now: datetime) -> Features:
        """Reads all views of a customer at ``minimum`` or later, from PostgreSQL where Redis is away or not ``certain``.

        Raises:
            StaleStateError, NotFoundError, MergedError, UnavailableError: as ``at_least``.
            AheadOfOnlineError: what PostgreSQL holds could not be shown in time.
        """
        if self.certain:
            with contextlib.suppress(*ONLINE_AWAY):
                features = await self.at_least(user_id, minimum, now=now)
                if self.certain:
                    return features
        return await patiently(lambda: self.recorded_at_least(user_id, minimum, now=now))


async def patiently(act: Callable[[], Awaitable[T]]) -> T:
    """Runs ``act`` again while what PostgreSQL holds may not be shown yet, for 0.7 s at the most.

    Raises:
        AheadOfOnlineError: it still may not.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + _PATIENCE_SECONDS
    while True:
        try:
            return await act()
        except AheadOfOnlineError:
            if loop.time() >= until:
                raise
        await asyncio.sleep(_PAUSE_SECONDS)


def ahead() -> StaleStateError:
    """Returns the error for a token of a version that PostgreSQL does not hold.

    It is said at once, without waiting: tokens are handed out after the commit, and PostgreSQL is one primary, so nothing that
    could satisfy the token is under way. A client that meets a failover to a lagging standby tries again.
    """
    return StaleStateError("the state this token asks for is not there", reason="TOKEN_AHEAD", field="consistency_token")


def _as_online(layout: ViewLayout, values: Mapping[str, Any], at: datetime, now: datetime) -> dict[str, FeatureValue]:
    """Passes values through their online bytes, so that what PostgreSQL answers is what Redis would have answered."""
    encoded = layout.encode(values, at)
    return layout.decode([encoded.get(field) for field in layout.hash_fields], now)
