"""One transaction for a batch of calls: identities, row locks, events, versions, outbox, and the state they add up to."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import psycopg
import structlog
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from features.activity import UserState
from server.database import Pool
from server.domain import EventOutcome, IncomingEvent, Stored, Subject, Token
from server.online.states import UserStates

_log = structlog.get_logger(__name__)

_FIND = """
SELECT i.channel, i.channel_user_id, i.user_id FROM identities i
JOIN unnest(%s::text[], %s::text[]) AS w (channel, channel_user_id) USING (channel, channel_user_id)
"""
_CREATE_USERS = "INSERT INTO users (user_id) SELECT * FROM unnest(%s::text[])"
_CREATE_IDENTITIES = """
INSERT INTO identities (channel, channel_user_id, user_id) SELECT * FROM unnest(%s::text[], %s::text[], %s::text[])
ON CONFLICT DO NOTHING RETURNING channel, channel_user_id
"""
# Locking in id order keeps two batches that share customers from deadlocking.
_LOCK = "SELECT user_id, merged_into FROM users WHERE user_id = ANY(%s) ORDER BY user_id FOR UPDATE"
_INSERT = """
INSERT INTO events (user_id, event_id, channel, action, item_id, text, value, quantity, session_id, slate_id, occurred_at)
SELECT * FROM unnest(%s::text[], %s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[], %s::double precision[],
                     %s::double precision[], %s::text[], %s::text[], %s::timestamptz[])
ON CONFLICT DO NOTHING RETURNING user_id, event_id
"""
_COUNT = """
WITH moved AS (
    UPDATE users u SET version = u.version + w.n FROM unnest(%s::text[], %s::bigint[]) AS w (user_id, n)
    WHERE u.user_id = w.user_id RETURNING u.user_id, u.version
)
INSERT INTO online_outbox (user_id, version) SELECT user_id, version FROM moved
ON CONFLICT (user_id) DO UPDATE SET version = greatest(online_outbox.version, excluded.version)
"""
_CAUGHT_UP = """
DELETE FROM online_outbox o USING unnest(%s::text[], %s::bigint[]) AS s (user_id, version)
WHERE o.user_id = s.user_id AND o.version <= s.version
"""
_UNKNOWN = EventOutcome(Stored.REJECTED, reason="SUBJECT_UNKNOWN", field="subject.user_id", message="no such customer")


@dataclass(frozen=True)
class Written:
    """What one call of a batch did; ``states`` are those of the whole batch."""

    outcomes: tuple[EventOutcome, ...]
    tokens: tuple[Token, ...]
    states: tuple[UserState, ...]


class EventWriter:
    """Writes batches of events. Everything a batch does to PostgreSQL is one transaction."""

    def __init__(self, pool: Pool, states: UserStates, *, new_user_id: Callable[[], str]) -> None:
        self._pool = pool
        self._states = states
        self._new_user_id = new_user_id
        self._caught_up: dict[str, int] = {}
        self._wake = asyncio.Event()

    async def write(self, calls: Sequence[Sequence[IncomingEvent]]) -> list[Written]:
        """Stores the events of several calls and recomputes their customers under the row locks of the same transaction."""
        events = [event for call in calls for event in call]
        async with self._pool.connection() as connection, connection.transaction():
            owners = await self._owners(connection, {event.subject for event in events})
            fresh = await _insert(connection, events, owners)
            counts: dict[str, int] = {}
            for user_id, _ in fresh:
                counts[user_id] = counts.get(user_id, 0) + 1
            if counts:
                await connection.execute(_COUNT, [list(counts), list(counts.values())])
            touched = sorted({owner for owner in owners.values() if owner})
            states = tuple(await self._states.recompute(connection, touched))
        versions = {state.user_id: state.version for state in states}
        edges = [0]
        for call in calls:
            edges.append(edges[-1] + len(call))
        outcomes = _outcomes(events, owners, set(fresh))
        return [_written(outcomes[a:b], versions, states) for a, b in pairwise(edges)]

    async def _owners(self, connection: AsyncConnection[TupleRow], subjects: set[Subject]) -> dict[Subject, str]:
        """Returns each subject's customer with its row locked, creating customers of new identities; "" for an unknown user id."""
        owners = {subject: subject.user_id for subject in subjects if subject.user_id}
        unnamed = sorted((s for s in subjects if not s.user_id), key=lambda s: (s.channel, s.channel_user_id))
        if unnamed:
            owners |= await self._identified(connection, unnamed)
        locked: dict[str, str] = {}
        missing = set(owners.values())
        while missing:  # a merged customer leads to its survivor, whose row must be locked too
            rows = await (await connection.execute(_LOCK, [sorted(missing)])).fetchall()
            locked |= {user_id: merged_into or "" for user_id, merged_into in rows}
            missing = {survivor for survivor in locked.values() if survivor and survivor not in locked}
        return {subject: (locked[owner] or owner) if owner in locked else "" for subject, owner in owners.items()}

    async def _identified(self, connection: AsyncConnection[TupleRow], subjects: Sequence[Subject]) -> dict[Subject, str]:
        while True:
            columns = [[s.channel for s in subjects], [s.channel_user_id for s in subjects]]
            rows = await (await connection.execute(_FIND, columns)).fetchall()
            found = {Subject(channel=row[0], channel_user_id=row[1]): str(row[2]) for row in rows}
            new = [subject for subject in subjects if subject not in found]
            if not new:
                return found
            ids = [self._new_user_id() for _ in new]
            await connection.execute(_CREATE_USERS, [ids])
            created = await connection.execute(_CREATE_IDENTITIES, [[s.channel for s in new], [s.channel_user_id for s in new], ids])
            if created.rowcount < len(new):  # another replica was first with some: drop the customers nobody points to
                await connection.execute(
                    "DELETE FROM users u WHERE user_id = ANY(%s) AND NOT EXISTS (SELECT 1 FROM identities i WHERE i.user_id = u.user_id)",
                    [ids],
                )

    def caught_up(self, states: Sequence[UserState]) -> None:
        """Notes that Redis holds these versions; their outbox rows are removed in the background."""
        self._caught_up.update((state.user_id, state.version) for state in states)
        self._wake.set()

    async def run(self) -> None:
        """Removes outbox rows of customers that have caught up, until cancelled; a failure only delays the removal."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(0.1)  # one DELETE for the commits of 100 ms, off the path of any call
            self._wake.clear()
            done, self._caught_up = self._caught_up, {}
            try:
                async with self._pool.connection() as connection:
                    await connection.execute(_CAUGHT_UP, [list(done), list(done.values())])
            except psycopg.Error as error:
                _log.warning("outbox not cleared; recovery will look again", error=type(error).__name__, users=len(done))


async def _insert(
    connection: AsyncConnection[TupleRow], events: Sequence[IncomingEvent], owners: dict[Subject, str]
) -> list[tuple[str, str]]:
    """Inserts events of known customers; returns (user_id, event_id) of those that were not there before."""
    rows = [
        (
            owners[e.subject],
            e.event_id,
            e.channel,
            e.action,
            e.item_id,
            e.text,
            e.value,
            e.quantity,
            e.session_id,
            e.slate_id,
            e.occurred_at,
        )
        for e in events
        if owners[e.subject]
    ]
    if not rows:
        return []
    cursor = await connection.execute(_INSERT, [list(column) for column in zip(*rows, strict=True)])
    return [(str(row[0]), str(row[1])) for row in await cursor.fetchall()]


def _outcomes(events: Sequence[IncomingEvent], owners: dict[Subject, str], fresh: set[tuple[str, str]]) -> list[EventOutcome]:
    outcomes = []
    for event in events:
        owner = owners[event.subject]
        key = (owner, str(event.event_id))
        if not owner:
            outcomes.append(_UNKNOWN)
        elif key in fresh:
            fresh.remove(key)  # a second event with the same id in the same batch is a duplicate of the first
            outcomes.append(EventOutcome(Stored.STORED, owner))
        else:
            outcomes.append(EventOutcome(Stored.DUPLICATE, owner))
    return outcomes


def _written(outcomes: Sequence[EventOutcome], versions: dict[str, int], states: tuple[UserState, ...]) -> Written:
    users = dict.fromkeys(outcome.user_id for outcome in outcomes if outcome.user_id)
    return Written(tuple(outcomes), tuple(Token(user_id, versions[user_id]) for user_id in users), states)
