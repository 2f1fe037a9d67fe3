"""Identities: which customer stands behind an id of a channel, remembered until the customer is regrouped."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from server.database import Pool
from server.domain import Resolved, Subject, Token
from server.errors import InvalidRequestError, NotFoundError, UnavailableError, unknown_customer
from server.ingest.personas import find_or_create, refuse_forgotten
from server.online.states import MergedError, RegroupedError
from server.transactions import RestartError, retried

T = TypeVar("T")

_CACHE_SIZE = 100_000
# Each turn follows a change made while we looked; more than a few in one call means the stores disagree.
_TURNS = 12
_FIND_USER = """
SELECT r.user_id, r.version, r.membership, u.user_id FROM users u JOIN users r ON r.user_id = coalesce(u.merged_into, u.user_id)
WHERE u.user_id = %s
"""
_FIND_IDENTITY = """
SELECT r.user_id, r.version, r.membership, coalesce(i.home_id, i.user_id) FROM identities i
JOIN users u ON u.user_id = i.user_id JOIN users r ON r.user_id = coalesce(u.merged_into, u.user_id)
WHERE i.channel = %s AND i.channel_user_id = %s
"""
_RELATED = """
SELECT u.merged_into, u.version, coalesce(o.merged_into, o.user_id) = u.user_id OR coalesce(f.family = g.family, false)
FROM users u LEFT JOIN users o ON o.user_id = %(other)s
LEFT JOIN identity_families f ON f.user_id = u.user_id LEFT JOIN identity_families g ON g.user_id = o.user_id
WHERE u.user_id = %(user)s
"""


class Known(NamedTuple):
    """Who a subject is, as far as this replica knows. ``user_id`` is empty for an identity nobody has met.

    ``membership`` is the customer's when it was looked up; None for an explicit user id, which is whoever it names.
    ``persona_id`` is which of the customer's personas the subject is.
    """

    user_id: str
    membership: int | None = None
    persona_id: str = ""

    def checked(self, answer: T, membership: int) -> T:
        """Returns an answer made from the customer's state, unless it has been regrouped since this was looked up.

        Args:
            answer: what was made.
            membership: the customer's, in the state it was made from.

        Raises:
            RegroupedError: the identity may belong to another customer now.
        """
        if self.membership is not None and self.membership < membership:
            raise RegroupedError
        return answer


class Identities:
    """Resolves identities. Resolutions are cached; who reads a customer's state sees whether it was regrouped since."""

    def __init__(self, pool: Pool, *, new_user_id: Callable[[], str]) -> None:
        self._pool = pool
        self._new_user_id = new_user_id
        self._cache: OrderedDict[Subject, Known] = OrderedDict()

    async def customer_of(self, subject: Subject) -> Known:
        """Returns the customer behind a subject; an explicit user id is returned as it is."""
        if subject.user_id:
            return Known(subject.user_id, persona_id=subject.user_id)
        if (cached := self._cache.get(subject)) is not None:
            self._cache.move_to_end(subject)
            return cached
        known = await self.look_up(subject)
        if known.user_id:
            self._cache[subject] = known
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return known

    def clear(self) -> None:
        """Forgets all resolutions; the next calls resolve again."""
        self._cache.clear()

    async def look_up(self, subject: Subject) -> Known:
        """Asks PostgreSQL who an identity is."""
        async with self._pool.connection() as connection:
            found = await _find(connection, subject)
        return Known("", 0) if found is None else Known(found[0], found[2], found[3])

    async def following(self, subject: Subject, known: Known, act: Callable[[Known], Awaitable[T]]) -> T:
        """Runs ``act`` for a subject's customer; looks again when it turns out that they were merged, parted or forgotten.

        An identity is resolved again: its persona may have gone another way than the customer it was with.

        Raises:
            NotFoundError: the customer does not exist.
            UnavailableError: the customer keeps moving.
        """
        for turn in range(_TURNS):
            try:
                return await act(known)
            except MergedError as merged:
                if subject.user_id:
                    known = Known(merged.survivor, persona_id=subject.user_id)
                    continue
            except RegroupedError:
                pass
            except NotFoundError:
                if subject.user_id or turn:  # once: a forgotten customer's identity is unknown when looked up again
                    raise
            self._cache.pop(subject, None)
            known = await self.customer_of(subject)
        raise UnavailableError("the customer is being merged", reason="MERGE_IN_PROGRESS")

    async def minimum_version(self, user_id: str, token: Token | None) -> int:
        """Returns the version that an answer to the bearer of a token must reflect at least.

        A token of another persona that is, or ever was, one customer with this one asks for whatever grouped or parted them:
        for what PostgreSQL holds of this customer now.

        Raises:
            InvalidRequestError: the token belongs to another customer.
            MergedError: the customer is no longer one of their own.
        """
        if token is None:
            return 0
        if token.user_id == user_id:
            return token.version
        async with self._pool.connection() as connection:
            row = await (await connection.execute(_RELATED, {"user": user_id, "other": token.user_id})).fetchone()
        if row is not None and row[0] is not None:
            raise MergedError(row[0])
        if row is None or not row[2]:
            raise InvalidRequestError("consistency_token", "belongs to another customer", reason="TOKEN_OF_OTHER_USER")
        return int(row[1])

    async def resolve(self, subject: Subject, *, create: bool = False) -> Resolved:
        """Returns the customer behind a subject, creating one for an unknown identity if asked.

        Raises:
            NotFoundError: an explicit user id that does not exist.
            PreconditionError: the identity was forgotten and must not come back.
            ConflictError: concurrent changes kept winning.
        """
        async with self._pool.connection() as connection:
            found = await _find(connection, subject)
        if found is None and subject.user_id:
            raise unknown_customer()
        if found is None and not create:
            return Resolved("", 0, created=False)
        if found is None:
            return await retried(lambda: self._create(subject))
        return Resolved(found[0], found[1], created=False)

    async def _create(self, subject: Subject) -> Resolved:
        async with self._pool.connection() as connection, connection.transaction():
            personas, fresh = await find_or_create(connection, [subject], new_user_id=self._new_user_id)
            if subject not in personas:
                raise refuse_forgotten("identity")
            found = await _find(connection, subject)
            if found is None:  # forgotten between the two statements
                raise RestartError
        return Resolved(found[0], found[1], created=personas[subject] in fresh)


async def _find(connection: AsyncConnection[TupleRow], subject: Subject) -> tuple[str, int, int, str] | None:
    """Returns the customer's id, version and membership, and the subject's persona; a persona's survivor is never merged itself."""
    if subject.user_id:
        row = await (await connection.execute(_FIND_USER, [subject.user_id])).fetchone()
    else:
        row = await (await connection.execute(_FIND_IDENTITY, [subject.channel, subject.channel_user_id])).fetchone()
    return None if row is None else (row[0], row[1], row[2], row[3])
