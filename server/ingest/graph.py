"""The identity graph: links between personas made and taken back, and every row that follows from them, in one transaction."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from features.activity import UserState
from server.database import Pool
from server.domain import Graph, Link, Linked, Persona, Subject, Token, Unlinked
from server.errors import ForbiddenError, InvalidRequestError, NotFoundError, PreconditionError
from server.ingest import regrouping
from server.ingest.grouping import Member, regroup, roots
from server.ingest.personas import Connection, find, find_or_create, forgotten, refuse_forgotten
from server.online.states import UserStates
from server.transactions import RestartError, retried

# Regrouping locks every persona of a customer and moves all their events. An id that hundreds share is no customer but a
# device at a counter, or an attack.
MOST_PERSONAS = 1_000
# Everybody who waits for the same personas makes one of them win; ten rounds see a burst of simultaneous merges through.
_ATTEMPTS = 10

_REACHED = """
WITH RECURSIVE reached (user_id) AS (
    SELECT unnest(%s::text[])
    UNION
    SELECT n.user_id FROM reached r CROSS JOIN LATERAL (
        SELECT right_id FROM identity_links WHERE left_id = r.user_id
        UNION ALL SELECT left_id FROM identity_links WHERE right_id = r.user_id
    ) n (user_id)
) SELECT user_id FROM reached
"""
# Locked in one order by everybody. Whoever holds all personas of a customer holds the links between them too: to add one,
# both of its ends must be locked.
_LOCK = """
SELECT user_id, created_at, version, coalesce(merged_into, user_id) FROM users WHERE user_id = ANY(%s)
ORDER BY user_id FOR UPDATE
"""
_LINKS = "SELECT left_id, right_id, linked_at FROM identity_links WHERE left_id = ANY(%s) ORDER BY left_id, right_id"
_ADD_LINK = "INSERT INTO identity_links (left_id, right_id, linked_at) VALUES (%s, %s, clock_timestamp())"
_DROP_LINK = "DELETE FROM identity_links WHERE left_id = %s AND right_id = %s"
_HOME_SHARED = "SELECT count(*) > 1 FROM identities WHERE user_id = %s AND coalesce(home_id, user_id) = %s"
_ADD_PERSONA = "INSERT INTO users (user_id, created_at) VALUES (%s, clock_timestamp())"
_MOVE_HOME = "UPDATE identities SET home_id = %s, user_id = %s WHERE channel = %s AND channel_user_id = %s"
_ROOT = "SELECT r.user_id, r.version FROM users u JOIN users r ON r.user_id = coalesce(u.merged_into, u.user_id) WHERE u.user_id = %s"
_PERSONAS = """
SELECT u.user_id, u.created_at,
       array(SELECT ARRAY[i.channel, i.channel_user_id] FROM identities i
             WHERE i.user_id = %(root)s AND coalesce(i.home_id, i.user_id) = u.user_id ORDER BY 1)
FROM users u WHERE u.user_id = %(root)s OR u.merged_into = %(root)s ORDER BY u.user_id <> %(root)s, u.created_at, u.user_id COLLATE "C"
"""


@dataclass(frozen=True)
class Group:
    """The personas that links connect, all locked, and those links."""

    members: Mapping[str, Member]
    links: Mapping[tuple[str, str], datetime]


class IdentityGraph:
    """Links and unlinks; what changed is in Redis before the answer, or named by the outbox when Redis is away."""

    def __init__(self, pool: Pool, states: UserStates, *, new_user_id: Callable[[], str]) -> None:
        self._pool = pool
        self._states = states
        self._new_user_id = new_user_id

    async def link(self, first: Subject, second: Subject, *, may_create: bool = True) -> Linked:
        """Makes two subjects one customer; linking what is linked already changes nothing.

        Args:
            first: created where nobody has met it.
            second: likewise, with ``may_create``.
            may_create: the caller may create ``second``: it is an identity of a channel of theirs.

        Raises:
            ForbiddenError: ``second`` would have to be created.
            NotFoundError: a subject is an explicit user id that does not exist.
            InvalidRequestError: both subjects are the same identity.
            PreconditionError: a subject was forgotten, or the customer would have too many personas.
            ConflictError: concurrent changes kept winning.
        """
        if first == second:
            raise InvalidRequestError("subject", "must differ from the identity")
        linked, states = await retried(lambda: self._link(first, second, may_create=may_create), attempts=_ATTEMPTS)
        await self._states.publish(states)
        return linked

    async def unlink(self, identity: Subject, subject: Subject | None) -> Unlinked:
        """Takes links back: the one to ``subject``, or without one all of the identity's persona.

        An identity that shares its persona with others gets one of its own instead, which has what happens from now on.
        Unlinking what is not linked changes nothing.

        Raises:
            NotFoundError: nobody has met the identity, or the subject.
            InvalidRequestError: both subjects are the same identity.
            ConflictError: concurrent changes kept winning.
        """
        if identity == subject:
            raise InvalidRequestError("subject", "must differ from the identity")
        unlinked, states = await retried(lambda: self._unlink(identity, subject), attempts=_ATTEMPTS)
        await self._states.publish(states)
        return unlinked

    async def read(self, subject: Subject) -> Graph:
        """Returns the personas, identities and links of a customer, all of one moment.

        Raises:
            NotFoundError: nobody has met the subject.
        """
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            persona = await _persona(connection, subject, "subject")
            row = await (await connection.execute(_ROOT, [persona])).fetchone()
            if row is None:
                raise _unknown("subject")
            personas = await (await connection.execute(_PERSONAS, {"root": row[0]})).fetchall()
            links = await (await connection.execute(_LINKS, [[persona[0] for persona in personas]])).fetchall()
        return Graph(
            Token(row[0], row[1]),
            tuple(Persona(user_id, at, tuple((channel, name) for channel, name in identities)) for user_id, at, identities in personas),
            tuple(Link(*link) for link in links),
        )

    async def _link(self, first: Subject, second: Subject, *, may_create: bool) -> tuple[Linked, Sequence[UserState]]:
        async with self._pool.connection() as connection, connection.transaction():
            if not may_create and second not in await find(connection, [second]):
                field, rule = "subject.identity.channel", "nobody has met this identity, and the caller may not create it for that channel"
                raise ForbiddenError(f"{field}: {rule}", reason="CHANNEL_FORBIDDEN", field=field)
            personas, fresh = await find_or_create(connection, [first, second], new_user_id=self._new_user_id)
            for subject, field in ((first, "identity"), (second, "subject")):
                if subject not in personas:
                    raise refuse_forgotten(field)
            group = await locked(connection, personas)
            for subject in (first, second):
                if personas[subject] not in group.members:
                    gone = await forgotten(connection, [subject])
                    raise refuse_forgotten("subject") if gone else _unknown("subject.user_id")
            if len(group.members) > MOST_PERSONAS:
                raise PreconditionError("subject: too many users would be one customer", reason="IDENTITY_GRAPH_FULL", field="subject")
            pair = _pair(personas[first], personas[second])
            links = set(group.links)
            if pair[0] != pair[1] and pair not in links:
                await connection.execute(_ADD_LINK, pair)
                links.add(pair)
            events = await regrouping.shared_events(connection, group.members.values(), pair)
            plan = regroup(group.members.values(), links, fresh=fresh, events=events)
            await regrouping.apply(connection, plan)
            await regrouping.join_families(connection, list(group.members))
            states = await self._states.recompute(connection, sorted(plan.versions))
            (root,) = plan.roots
            version = plan.versions.get(root, group.members[root].version)
        return Linked(Token(root, version), plan.merged), states

    async def _unlink(self, identity: Subject, subject: Subject | None) -> tuple[Unlinked, Sequence[UserState]]:
        async with self._pool.connection() as connection, connection.transaction():
            personas = {identity: await _persona(connection, identity, "identity")}
            if subject is not None:
                personas[subject] = await _persona(connection, subject, "subject")
            group = await locked(connection, personas)
            for persona in personas.values():
                if persona not in group.members:
                    raise _unknown("subject.user_id")
            home = personas[identity]
            other = None if subject is None else personas[subject]
            if other == home or (other is None and await _is_shared(connection, group.members[home])):
                return await self._give_persona(connection, identity, group.members[home])
            removed = {pair for pair in group.links if home in pair and (other is None or other in pair)}
            for pair in removed:
                await connection.execute(_DROP_LINK, pair)
            plan = regroup(group.members.values(), group.links.keys() - removed)
            await regrouping.apply(connection, plan, linked_since=min((group.links[pair] for pair in removed), default=None))
            states = await self._states.recompute(connection, sorted(plan.versions))
        after = roots(group.members.values(), group.links.keys() - removed)
        versions = {member.user_id: member.version for member in group.members.values()} | dict(plan.versions)
        separated = tuple(Token(root, versions[root]) for root in plan.roots if root in plan.versions and root != after[home])
        still_linked = other is not None and after[other] == after[home]
        return Unlinked(Token(after[home], versions[after[home]]), separated, len(removed), still_linked), states

    async def _give_persona(self, connection: Connection, identity: Subject, home: Member) -> tuple[Unlinked, Sequence[UserState]]:
        """Takes an identity out of a persona; nothing tells which of that persona's events were its own, so they stay."""
        persona = self._new_user_id()
        await connection.execute(_ADD_PERSONA, [persona])
        await connection.execute(_MOVE_HOME, [persona, persona, identity.channel, identity.channel_user_id])
        root = await (await connection.execute("SELECT version FROM users WHERE user_id = %s", [home.root])).fetchone()
        assert root is not None  # locked with the rest of the group
        version = root[0] + 1
        await regrouping.set_versions(connection, {home.root: version, persona: version})
        await regrouping.join_families(connection, [home.root, persona])
        states = await self._states.recompute(connection, sorted({home.root, persona}))
        return Unlinked(Token(persona, version), (Token(home.root, version),), 0, still_linked=False), states


async def locked(connection: Connection, personas: Mapping[Subject, str]) -> Group:
    """Locks every persona that links connect with the given ones; one that does not exist is not among the members.

    Raises:
        RestartError: links or homes changed while waiting for the locks.
    """
    seeds = sorted(set(personas.values()))
    reached = await _reached(connection, seeds)
    rows = await (await connection.execute(_LOCK, [sorted(reached)])).fetchall()
    if await _reached(connection, seeds) != reached or await find(connection, personas) != dict(personas):
        raise RestartError
    links = await (await connection.execute(_LINKS, [list(reached)])).fetchall()
    return Group({row[0]: Member(*row) for row in rows}, {(row[0], row[1]): row[2] for row in links})


async def _reached(connection: Connection, seeds: Collection[str]) -> set[str]:
    return {row[0] for row in await (await connection.execute(_REACHED, [list(seeds)])).fetchall()}


async def _persona(connection: Connection, subject: Subject, field: str) -> str:
    found = await find(connection, [subject])
    if subject not in found:
        raise _unknown(field)
    return found[subject]


async def _is_shared(connection: Connection, home: Member) -> bool:
    row = await (await connection.execute(_HOME_SHARED, [home.root, home.user_id])).fetchone()
    return bool(row and row[0])


def _pair(first: str, second: str) -> tuple[str, str]:
    return (first, second) if first < second else (second, first)


def _unknown(field: str) -> NotFoundError:
    return NotFoundError(f"{field}: no such customer", reason="SUBJECT_UNKNOWN", field=field)
