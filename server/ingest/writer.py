"""One transaction for a batch of calls: identities, row locks, events, versions and outbox."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import psycopg
import structlog
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from server.arrays import number_array, text_array
from server.database import Pool
from server.domain import EventOutcome, IncomingEvent, Stored, Subject, Token
from server.ingest.personas import find_or_create, forgotten
from server.online.states import UserStates
from server.transactions import retried

_log = structlog.get_logger(__name__)

# Personas and their customers in one go, so in one order: locking in id order keeps two batches that share customers from
# deadlocking.
_LOCK = """
SELECT user_id, merged_into, version FROM users WHERE user_id = ANY(ARRAY(
    SELECT unnest(%(ids)s::text[]) UNION SELECT merged_into FROM users WHERE user_id = ANY(%(ids)s::text[]) AND merged_into IS NOT NULL
)) ORDER BY user_id FOR UPDATE
"""
_INSERT = """
INSERT INTO events
    (user_id, origin_id, version, event_id, channel, action, item_id, text, value, quantity, session_id, slate_id, occurred_at)
SELECT * FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[],
                     %s::double precision[], %s::double precision[], %s::text[], %s::text[], %s::timestamptz[])
ON CONFLICT DO NOTHING RETURNING user_id, event_id::text
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
    """What one call of a batch did: one outcome for each event, one token for each customer."""

    outcomes: tuple[EventOutcome, ...]
    tokens: tuple[Token, ...]


class EventWriter:
    """Writes batches of events. Everything a batch does to PostgreSQL is one transaction."""

    def __init__(self, pool: Pool, states: UserStates, *, new_user_id: Callable[[], str]) -> None:
        self._pool = pool
        self._states = states
        self._new_user_id = new_user_id
        self._caught_up: dict[str, int] = {}
        self._wake = asyncio.Event()

    async def write(self, calls: Sequence[Sequence[IncomingEvent]]) -> list[Written]:
        """Stores the events of several calls and counts them in their customers' versions, under the row locks of one transaction.

        Raises:
            psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure: lost every attempt to other transactions.
        """
        events = [event for call in calls for event in call]
        outcomes, versions = await retried(lambda: self._write(events))
        edges = [0]
        for call in calls:
            edges.append(edges[-1] + len(call))
        return [_written(outcomes[a:b], versions) for a, b in pairwise(edges)]

    async def _write(self, events: Sequence[IncomingEvent]) -> tuple[list[EventOutcome], dict[str, int]]:
        """Returns what became of each event, and the version at which every customer concerned stands now."""
        async with self._pool.connection() as connection, connection.transaction():
            owners = await self._owners(connection, {event.subject for event in events})
            fresh = await _insert(connection, events, owners)
            counts: dict[str, int] = {}
            for user_id, _ in fresh:
                counts[user_id] = counts.get(user_id, 0) + 1
            if counts:
                await connection.execute(_COUNT, [text_array(counts), number_array(counts.values())])
        touched = {owner.user_id: owner.version for owner in owners.values() if isinstance(owner, _Owner)}
        versions = {user_id: version - 1 + counts.get(user_id, 0) for user_id, version in touched.items()}
        return _outcomes(events, owners, set(fresh)), versions

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
        while missing:  # as a rule once; a merge may win in between: it leads to a survivor, whose row must be locked too
            rows = await (await connection.execute(_LOCK, {"ids": text_array(missing)})).fetchall()
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

    def caught_up(self, versions: Mapping[str, int]) -> None:
        """Notes that Redis holds these customers at these versions; their outbox rows are removed in the background."""
        self._caught_up.update(versions)
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
    owned = [(event, owner) for event in events if isinstance(owner := owners[event.subject], _Owner)]
    if not owned:
        return []
    columns = (
        text_array([owner.user_id for _, owner in owned]),
        text_array([owner.origin_id for _, owner in owned]),
        number_array([owner.version for _, owner in owned]),
        text_array([str(event.event_id) for event, _ in owned]),
        text_array([event.channel for event, _ in owned]),
        text_array([event.action for event, _ in owned]),
        text_array([event.item_id for event, _ in owned]),
        text_array([event.text for event, _ in owned]),
        number_array([event.value for event, _ in owned]),
        number_array([event.quantity for event, _ in owned]),
        text_array([event.session_id for event, _ in owned]),
        text_array([event.slate_id for event, _ in owned]),
        text_array([event.occurred_at.isoformat() for event, _ in owned]),
    )
    return list(await (await connection.execute(_INSERT, columns)).fetchall())


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


def _written(outcomes: Sequence[EventOutcome], versions: Mapping[str, int]) -> Written:
    users = dict.fromkeys(outcome.user_id for outcome in outcomes if outcome.user_id)
    return Written(tuple(outcomes), tuple(Token(user_id, versions[user_id]) for user_id in users))
