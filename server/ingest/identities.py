"""Identities: which customer stands behind an id of a channel, and the merging of two customers into one."""

from collections import OrderedDict
from collections.abc import Callable

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from server.database import Pool
from server.domain import Linked, Resolved, Subject, Token
from server.errors import InvalidRequestError, NotFoundError
from server.online.states import UserStates
from server.online.store import OnlineStore

_CACHE_SIZE = 100_000
_FIND = """
SELECT u.user_id, u.version, u.merged_into FROM identities i JOIN users u USING (user_id)
WHERE i.channel = %s AND i.channel_user_id = %s
"""
_ATTACH = "INSERT INTO identities (channel, channel_user_id, user_id) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
# The surviving customer is the older one, so that linking in either order ends the same.
_LOCK = "SELECT user_id, version FROM users WHERE user_id = ANY(%s) AND merged_into IS NULL ORDER BY user_id FOR UPDATE"
_OLDER = "SELECT user_id FROM users WHERE user_id = ANY(%s) ORDER BY created_at, user_id LIMIT 1"
_MERGE = (
    # An event both customers sent under one id is one event.
    "DELETE FROM events l USING events s WHERE l.user_id = %(loser)s AND s.user_id = %(survivor)s AND l.event_id = s.event_id",
    "UPDATE events SET user_id = %(survivor)s WHERE user_id = %(loser)s",
    "UPDATE exposures SET user_id = %(survivor)s WHERE user_id = %(loser)s",
    "UPDATE identities SET user_id = %(survivor)s WHERE user_id = %(loser)s",
    "DELETE FROM user_profile WHERE user_id = %(loser)s",
    # The sum (plus the merge itself) is above both versions: tokens of either side stay satisfiable and never go back.
    "UPDATE users SET version = version + 1 + (SELECT version FROM users WHERE user_id = %(loser)s) WHERE user_id = %(survivor)s",
    "UPDATE users SET merged_into = %(survivor)s WHERE merged_into = %(loser)s",
    # One version more, so that a replica still writing the loser's last state cannot strike this entry off the outbox.
    "UPDATE users SET merged_into = %(survivor)s, version = version + 1 WHERE user_id = %(loser)s",
    "INSERT INTO online_outbox SELECT user_id, version FROM users WHERE user_id IN (%(survivor)s, %(loser)s) "
    "ON CONFLICT (user_id) DO UPDATE SET version = excluded.version",
)


class Identities:
    """Resolves and links identities. Resolutions are cached; a merged customer is noticed by the absence of its state."""

    def __init__(self, pool: Pool, online: OnlineStore, states: UserStates, *, new_user_id: Callable[[], str]) -> None:
        self._pool = pool
        self._online = online
        self._states = states
        self._new_user_id = new_user_id
        self._cache: OrderedDict[tuple[str, str], str] = OrderedDict()

    async def user_of(self, subject: Subject) -> str:
        """Returns the customer's id, or "" for an identity nobody has met; an explicit user id is returned as it is."""
        if subject.user_id:
            return subject.user_id
        key = (subject.channel, subject.channel_user_id)
        if (cached := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            return cached
        async with self._pool.connection() as connection:
            row = await (await connection.execute(_FIND, key)).fetchone()
        if row is None:
            return ""
        self.remember(subject, row[2] or row[0])
        return row[2] or str(row[0])

    def remember(self, subject: Subject, user_id: str) -> None:
        """Caches a resolution (and replaces one that a merge made obsolete)."""
        if subject.user_id:
            return
        self._cache[subject.channel, subject.channel_user_id] = user_id
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)

    async def minimum_version(self, user_id: str, token: Token | None) -> int:
        """Returns the version that an answer to the bearer of a token must reflect at least.

        A token of a customer merged into this one asks for the merge itself: for what PostgreSQL holds of the survivor now.

        Raises:
            InvalidRequestError: the token belongs to another customer.
        """
        if token is None:
            return 0
        if token.user_id == user_id:
            return token.version
        owner = await self.resolve(Subject(user_id=token.user_id))
        if owner.user_id != user_id:
            raise InvalidRequestError("consistency_token", "belongs to another customer", reason="TOKEN_OF_OTHER_USER")
        return owner.user_version

    async def resolve(self, subject: Subject, *, create: bool = False) -> Resolved:
        """Returns the customer behind a subject, creating one for an unknown identity if asked.

        Raises:
            NotFoundError: an explicit user id that does not exist.
        """
        async with self._pool.connection() as connection:
            found = await self._find(connection, subject)
            if found is None and subject.user_id:
                raise NotFoundError("no such customer", reason="SUBJECT_UNKNOWN", field="subject.user_id")
            if found is None and not create:
                return Resolved("", 0, created=False)
            if found is None:
                return await self._create(connection, subject)
        self.remember(subject, found[0])
        return Resolved(*found, created=False)

    async def _find(self, connection: AsyncConnection[TupleRow], subject: Subject) -> tuple[str, int] | None:
        """Follows one merge; merging keeps chains flat."""
        if subject.user_id:
            query, parameters = "SELECT user_id, version, merged_into FROM users WHERE user_id = %s", [subject.user_id]
        else:
            query, parameters = _FIND, [subject.channel, subject.channel_user_id]
        row = await (await connection.execute(query, parameters)).fetchone()
        if row is not None and row[2] is not None:
            return await self._find(connection, Subject(user_id=row[2]))
        return None if row is None else (row[0], row[1])

    async def _create(self, connection: AsyncConnection[TupleRow], subject: Subject) -> Resolved:
        user_id = self._new_user_id()
        async with connection.transaction():
            await connection.execute("INSERT INTO users (user_id) VALUES (%s)", [user_id])
            inserted = await connection.execute(
                _ATTACH,
                [subject.channel, subject.channel_user_id, user_id],
            )
            if inserted.rowcount == 0:  # another replica created it in the meantime: its customer is the one
                await connection.execute("DELETE FROM users WHERE user_id = %s", [user_id])
        found = await self._find(connection, subject)
        assert found is not None
        self.remember(subject, found[0])
        return Resolved(*found, created=found[0] == user_id)

    async def link(self, first: Subject, second: Subject) -> Linked:
        """Makes two subjects one customer; linking what is linked already changes nothing.

        Raises:
            NotFoundError: a subject is an explicit user id that does not exist.
            InvalidRequestError: both subjects are the same identity.
        """
        if first == second:
            raise InvalidRequestError("subject", "must differ from the identity")
        await self._attach_unknown(first, second)
        merged: tuple[str, ...] | None = None
        while merged is None:
            merged = await self._merge(sorted({(await self.resolve(subject)).user_id for subject in (first, second)}))
        survivor = await self.resolve(first)
        for subject in (first, second):
            self.remember(subject, survivor.user_id)
        version = await self._states.rebuild(survivor.user_id)
        await self._online.forget_users(merged)
        return Linked(Token(survivor.user_id, version), merged)

    async def _attach_unknown(self, first: Subject, second: Subject) -> None:
        """An identity nobody has met joins the other one's customer as it is: it has no customer of its own to merge away."""
        known = {subject: (await self.resolve(subject)).user_id for subject in (first, second)}
        if all(known.values()):
            return
        owner = next(filter(None, known.values()), "") or (await self.resolve(first, create=True)).user_id
        async with self._pool.connection() as connection:
            for subject in (subject for subject, user_id in known.items() if not user_id):
                await connection.execute(_ATTACH, [subject.channel, subject.channel_user_id, owner])

    async def _merge(self, ids: list[str]) -> tuple[str, ...] | None:
        """Merges two customers in one transaction; returns those merged away, or None when another merge won the race."""
        if len(ids) == 1:
            return ()
        async with self._pool.connection() as connection, connection.transaction():
            locked = await (await connection.execute(_LOCK, [ids])).fetchall()
            if len(locked) < 2:
                return None
            older = await (await connection.execute(_OLDER, [ids])).fetchone()
            assert older is not None
            loser = next(user_id for user_id in ids if user_id != older[0])
            for statement in _MERGE:
                await connection.execute(statement, {"survivor": older[0], "loser": loser})
        return (loser,)
