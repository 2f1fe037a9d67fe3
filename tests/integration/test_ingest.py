"""Group commits on a real PostgreSQL: what is stored of odd values, and an outbox that is cleared without standing in anybody's way."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta

from server.domain import IncomingEvent, Stored, Token
from tests.integration.replicas import Names, Pair, Replica, view, web

_STORED = """
SELECT event_id, channel, action, item_id, text, value, quantity, session_id, slate_id, occurred_at FROM events WHERE user_id = %s
ORDER BY event_id
"""
_OUTBOX = "SELECT version FROM online_outbox WHERE user_id = %s"


async def outbox_of(at: Replica, user_id: str) -> list[tuple[int]]:
    async with at.pool.connection() as connection:
        return await (await connection.execute(_OUTBOX, [user_id])).fetchall()


async def test_texts_that_arrays_could_take_for_something_else_are_stored_as_they_are(two: Pair, names: Names) -> None:
    odd = ["NULL", "null", '"', "\\", '\\"', "{a,b}", "a,b", " ", " left and right ", "{}", "}\n{", "一致", "'; --", "\t"]
    who, at = web(names("odd")), datetime(2026, 3, 1, 12, 30, 15, 123_456, tzinfo=UTC)
    events = [
        IncomingEvent(who, uuid.UUID(int=k), "web", "purchase", at + timedelta(microseconds=k), text, text, 0.1 + k, 1e300, text, text)
        for k, text in enumerate(odd)
    ]
    events.append(IncomingEvent(who, uuid.UUID(int=len(odd)), "web", "search", at))
    (written,) = await two[0].writer.write([events])
    assert {outcome.status for outcome in written.outcomes} == {Stored.STORED}
    async with two[0].pool.connection() as connection:
        rows = await (await connection.execute(_STORED, [written.tokens[0].user_id])).fetchall()
    assert rows == [
        (e.event_id, e.channel, e.action, e.item_id, e.text, e.value, e.quantity, e.session_id, e.slate_id, e.occurred_at) for e in events
    ]


async def test_a_token_names_the_version_that_was_committed_also_for_events_that_were_there_before(two: Pair, names: Names) -> None:
    ann, bob = two
    who = web(names("twice"))
    first, again = view(who, names("a")), view(who, names("b"))
    (one,) = await ann.writer.write([[first]])
    left, right = await bob.writer.write([[first, again, again], [first]])
    assert [outcome.status for outcome in left.outcomes] == [Stored.DUPLICATE, Stored.STORED, Stored.DUPLICATE]
    assert [outcome.status for outcome in right.outcomes] == [Stored.DUPLICATE]
    user_id = one.tokens[0].user_id
    assert (one.tokens, left.tokens, right.tokens) == ((Token(user_id, 1),), (Token(user_id, 2),), (Token(user_id, 2),))
    assert await ann.states.refresh([user_id, "nobody"]) == {user_id: 2}


async def test_a_customer_that_redis_holds_leaves_the_outbox_and_one_that_has_moved_on_stays(two: Pair, names: Names) -> None:
    ann, _ = two
    tokens = [(await ann.writer.write([[view(web(names(who)), names(who))]]))[0].tokens[0] for who in ("done", "moved")]
    (moved,) = await ann.writer.write([[view(web(names("moved")), names("more"))]])
    await ann.states.caught_up({token.user_id: token.version for token in tokens})
    assert await outbox_of(ann, tokens[0].user_id) == []
    assert await outbox_of(ann, tokens[1].user_id) == [(moved.tokens[0].version,)]


async def test_clearing_the_outbox_waits_for_nobody(two: Pair, names: Names) -> None:
    ann, bob = two
    held, free = [(await ann.writer.write([[view(web(names(who)), names(who))]]))[0].tokens[0] for who in ("held", "free")]
    async with bob.pool.connection() as connection, connection.transaction():
        await connection.execute("UPDATE online_outbox SET version = version WHERE user_id = %s", [held.user_id])
        async with asyncio.timeout(5):
            await ann.states.caught_up({held.user_id: held.version, free.user_id: free.version})
        assert await outbox_of(ann, free.user_id) == []
    assert await outbox_of(ann, held.user_id) == [(held.version,)]
    await ann.states.caught_up({held.user_id: held.version})
    assert await outbox_of(ann, held.user_id) == []
