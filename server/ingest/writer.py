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
from server.ingest.personas import find_or_create, forgotten
from server.online.states import UserStates
from server.transactions import retried

_log = structlog.get_logger(__name__)

_ROOTS = "SELECT DISTINCT coalesce(merged_into, user_id) FROM users WHERE user_id = ANY(%s)"
# Locking in id order keeps two batches that share customers from deadlocking.
_LOCK = "SELECT user_id, merged_into, version FROM users WHERE user_id = ANY(%s) ORDER BY user_id FOR UPDATE"
_INSERT = """
INSERT INTO events
    (user_id, origin_id, version, event_id, channel, action, item_id, text, value, quantity, session_id, slate_id, occurred_at)
SELECT * FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[],
                     %s::double precision[], %s::double precision[], %s::text[], %s::text[], %s::timestamptz[])
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
_UNKNOWN = EventOutcome(Stored.REJECTED, reason="SUBJECT_UNKNOWN", field="subject.user_id", message="no such customer")
_FORGOTTEN = EventOutcome(Stored.REJECTED, reason="SUBJECT_FORGOTTEN", field="subject", message="the customer was forgotten")


@dataclass(frozen=True)
class _Owner:
    """Where a subject's events go: the customer, the persona that records them if that is another, and the version they make."""

    user_id: str
    origin_id: str | None
    version: int


_Owners = dict[Subject, _Owner | EventOutcome]
"""A subject without an owner has the outcome of its events instead."""


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
        """Stores the events of several calls and recomputes their customers under the row locks of the same transaction.

        Raises:
            psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure: lost every attempt to other transactions.
        """
        events = [event for call in calls for event in call]
        outcomes, states = await retried(lambda: self._write(events))
        versions = {state.user_id: state.version for state in states}
        edges = [0]
        for call in calls:
            edges.append(edges[-1] + len(call))
        return [_written(outcomes[a:b], versions, states) for a, b in pairwise(edges)]

    async def _write(self, events: Sequence[IncomingEvent]) -> tuple[list[EventOutcome], tuple[UserState, ...]]:
        async with self._pool.connection() as connection, connection.transaction():
            owners = await self._owners(connection, {event.subject for event in events})
            fresh = await _insert(connection, events, owners)
            counts: dict[str, int] = {}
            for user_id, _ in fresh:
                counts[user_id] = counts.get(user_id, 0) + 1
            if counts:
                await connection.execute(_COUNT, [list(counts), list(counts.values())])
            touched = sorted({owner.user_id for owner in owners.values() if isinstance(owner, _Owner)})
            states = tuple(await self._states.recompute(connection, touched))
        return _outcomes(events, owners, set(fresh)), states

    async def _owners(self, connection: AsyncConnection[TupleRow], subjects: set[Subject]) -> _Owners:
        """Finds each subject's persona and customer, with both rows locked; creates customers of new identities.

        Who holds a persona's row holds its customer together: regrouping locks all personas concerned.
        """
        personas = {subject: subject.user_id for subject in subjects if subject.user_id}
        if named := subjects - personas.keys():
            found, _ = await find_or_create(connection, named, new_user_id=self._new_user_id)
            personas |= found
        locked: dict[str, tuple[str, int]] = {}
        missing = set(personas.values())
        roots = await (await connection.execute(_ROOTS, [sorted(missing)])).fetchall()
        missing |= {row[0] for row in roots}  # persona and customer in one go, so in one order; as a rule that is all
        while missing:  # a merge may have won in between: it leads to a survivor, whose row must be locked too
            rows = await (await connection.execute(_LOCK, [sorted(missing)])).fetchall()
            locked |= {user_id: (merged_into or user_id, version) for user_id, merged_into, version in rows}
            missing = {survivor for survivor, _ in locked.values()} - locked.keys()
        owners: _Owners = {}
        for subject, persona in personas.items():
            if persona in locked:
                root, _ = locked[persona]
                # Every event of the batch shows with the batch: no version in between is ever seen, so they may share one.
                owners[subject] = _Owner(root, None if root == persona else persona, locked[root][1] + 1)
        if unowned := subjects - owners.keys():
            gone = await forgotten(connection, unowned)
            owners |= {subject: _FORGOTTEN if subject in gone else _UNKNOWN for subject in unowned}
        return owners

    def caught_up(self, states: Sequence[UserState]) -> None:
        """Notes that Redis holds these versions; their outbox rows are removed in the background."""
        self._caught_up.update((state.user_id, state.version) for state in states)
        self._wake.set()

    def missed(self) -> None:
        """Notes that Redis missed a write: other replicas are asked to do it."""
        self._states.missed.set()

    async def run(self) -> None:
        """Removes outbox rows of customers that have caught up, until cancelled; a failure only delays the removal."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(0.1)  # one DELETE for the commits of 100 ms, off the path of any call
            self._wake.clear()
            done, self._caught_up = self._caught_up, {}
            try:
                await self._states.caught_up(done)
            except psycopg.Error as error:
                _log.warning("outbox not cleared; recovery will look again", error=type(error).__name__, users=len(done))


async def _insert(connection: AsyncConnection[TupleRow], events: Sequence[IncomingEvent], owners: _Owners) -> list[tuple[str, str]]:
    """Inserts events of known customers; returns (user_id, event_id) of those that were not there before."""
    rows = [
        (
            owner.user_id,
            owner.origin_id,
            owner.version,
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
        if isinstance(owner := owners[e.subject], _Owner)
    ]
    if not rows:
        return []
    cursor = await connection.execute(_INSERT, [list(column) for column in zip(*rows, strict=True)])
    return [(str(row[0]), str(row[1])) for row in await cursor.fetchall()]


def _outcomes(events: Sequence[IncomingEvent], owners: _Owners, fresh: set[tuple[str, str]]) -> list[EventOutcome]:
    outcomes = []
    for event in events:
        owner = owners[event.subject]
        if isinstance(owner, EventOutcome):
            outcomes.append(owner)
            continue
        key = (owner.user_id, str(event.event_id))
        if key in fresh:
            fresh.remove(key)  # a second event with the same id in the same batch is a duplicate of the first
            outcomes.append(EventOutcome(Stored.STORED, owner.user_id))
        else:
            outcomes.append(EventOutcome(Stored.DUPLICATE, owner.user_id))
    return outcomes


def _written(outcomes: Sequence[EventOutcome], versions: dict[str, int], states: tuple[UserState, ...]) -> Written:
    users = dict.fromkeys(outcome.user_id for outcome in outcomes if outcome.user_id)
    return Written(tuple(outcomes), tuple(Token(user_id, versions[user_id]) for user_id in users), states)
