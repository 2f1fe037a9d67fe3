"""Conversations in PostgreSQL: what a customer asked before, in whatever channel, and each message answered once."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from server.assistant.answer import Answer, decode
from server.database import Pool
from server.domain import Versions
from server.errors import unknown_customer
from server.online.states import MergedError, RegroupedError
from server.transactions import retried

_COLUMNS = "turn, channel, question, answer, user_version, model_version, index_version, offer_version, article_version, asked_at"
_CUSTOMER = "SELECT merged_into, membership, version FROM users WHERE user_id = %s"
_ARTICLES = "SELECT article_version FROM fleet_state"
# Where two personas of a customer asked under one id before they were linked, the first one's answer stands.
_ANSWERED = f"""
SELECT {_COLUMNS} FROM assistant_turns WHERE user_id = %s AND event_id = %s ORDER BY asked_at, origin_id COLLATE "C" LIMIT 1
"""  # noqa: S608 - constant columns
_RECENT = f"""
SELECT {_COLUMNS} FROM assistant_turns WHERE user_id = %s AND asked_at > %s ORDER BY asked_at DESC, event_id DESC LIMIT %s
"""  # noqa: S608 - constant columns
_COUNT = "SELECT count(*) FROM assistant_turns WHERE user_id = %s"
# As of a version: an event that a later one brought is not seen, so that equal versions give equal answers.
_HISTORY = """
SELECT event_id::text, item_id, quantity, occurred_at, session_id FROM events
WHERE user_id = %s AND action = %s AND item_id IS NOT NULL AND coalesce(version, 0) <= %s
ORDER BY occurred_at DESC, event_id DESC LIMIT %s
"""
# The persona and its customer in one go, so in one order: as the writer of events locks them.
_LOCK = """
SELECT user_id, merged_into FROM users WHERE user_id = ANY(ARRAY[%(persona)s::text, %(user)s::text]) ORDER BY user_id FOR UPDATE
"""
_INSERT = f"""
INSERT INTO assistant_turns (user_id, event_id, origin_id, {_COLUMNS})
VALUES (%s, %s, %s, %s, %s, %s, %s::jsonb, %s, %s, %s, %s, %s, %s)
"""  # noqa: S608 - constant columns


@dataclass(frozen=True)
class Turn:
    """A message and its answer."""

    number: int
    channel: str
    question: str
    answer: Answer
    versions: Versions
    article_version: int
    asked_at: datetime


@dataclass(frozen=True)
class Talk:
    """A customer's conversation at one moment.

    Attributes:
        answered: the turn of the message asked about, where it has been answered.
        before: the turns before it, newest first.
        count: how many there have ever been.
        article_version: of that moment.
        membership: how often the customer had been regrouped.
        user_version: of that moment.
    """

    answered: Turn | None
    before: tuple[Turn, ...]
    count: int
    article_version: int
    membership: int
    user_version: int


@dataclass(frozen=True)
class Line:
    """A recorded purchase or return; ``session_id`` is what the shop calls the visit, or the order."""

    event_id: str
    item_id: str
    quantity: float | None
    occurred_at: datetime
    session_id: str


class Conversations:
    """Reads and writes turns. ``remembered`` and ``seconds`` say how many turns, and how old ones, a message may go on from."""

    def __init__(self, pool: Pool, *, remembered: int, seconds: float) -> None:
        self._pool = pool
        self._remembered = remembered
        self._age = timedelta(seconds=seconds)

    async def read(self, user_id: str, event_id: UUID, *, asked_at: datetime) -> Talk:
        """Returns a customer's conversation, all of one moment.

        Raises:
            NotFoundError, MergedError: the customer does not exist (any more).
        """
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            customer = await (await connection.execute(_CUSTOMER, [user_id])).fetchone()
            if customer is None:
                raise unknown_customer()
            if customer[0] is not None:
                raise MergedError(customer[0])
            answered = await (await connection.execute(_ANSWERED, [user_id, event_id])).fetchone()
            rows = await (await connection.execute(_RECENT, [user_id, asked_at - self._age, self._remembered])).fetchall()
            count = await (await connection.execute(_COUNT, [user_id])).fetchone()
            articles = await (await connection.execute(_ARTICLES)).fetchone()
        assert count is not None
        assert articles is not None
        return Talk(_turn(answered) if answered else None, tuple(map(_turn, rows)), count[0], articles[0], *customer[1:])

    async def history(self, user_id: str, action: str, *, user_version: int, limit: int) -> list[Line]:
        """Returns the customer's own purchases or returns as of a version, newest first."""
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(_HISTORY, [user_id, action, user_version, limit])).fetchall()
        return [Line(event_id, item_id, quantity, occurred_at, session or "") for event_id, item_id, quantity, occurred_at, session in rows]

    async def commit(self, user_id: str, persona_id: str, event_id: UUID, turn: Turn, *, seen: int) -> Turn | None:
        """Stores the answer of a message unless it has one; returns the one that stands.

        Args:
            user_id: the customer.
            persona_id: which of the customer's personas asked: the turn stays with it when they part.
            event_id: the message's.
            turn: what was answered.
            seen: how many turns the answer knew of. When there are others by now, nothing is stored and None returned: the answer
                may go on from what is no longer the last thing said.

        Raises:
            NotFoundError, RegroupedError: the customer is no longer who asked.
        """
        return await retried(lambda: self._commit(user_id, persona_id, event_id, turn, seen))

    async def _commit(self, user_id: str, persona_id: str, event_id: UUID, turn: Turn, seen: int) -> Turn | None:
        async with self._pool.connection() as connection, connection.transaction():
            await _hold(connection, persona_id, user_id)
            standing = await (await connection.execute(_ANSWERED, [user_id, event_id])).fetchone()
            if standing is not None:
                return _turn(standing)
            count = await (await connection.execute(_COUNT, [user_id])).fetchone()
            if count is None or count[0] != seen:
                return None
            values = (turn.number, turn.channel, turn.question, turn.answer.encode(), *turn.versions, turn.article_version, turn.asked_at)
            await connection.execute(_INSERT, [user_id, event_id, persona_id, *values])
        return turn


async def _hold(connection: AsyncConnection[TupleRow], persona_id: str, user_id: str) -> None:
    """Locks persona and customer: nobody is merged, parted or forgotten until the commit."""
    rows: Sequence[TupleRow] = await (await connection.execute(_LOCK, {"persona": persona_id, "user": user_id})).fetchall()
    found = {persona: merged_into or persona for persona, merged_into in rows}
    if persona_id not in found:
        raise unknown_customer()
    if found[persona_id] != user_id:
        raise RegroupedError


def _turn(row: TupleRow) -> Turn:
    number, channel, question, answer, *versions, article_version, asked_at = row
    return Turn(number, channel, question, decode(answer), Versions(*versions), article_version, asked_at)
