"""Personas: the users that identities belong to, found, created, and kept from coming back once forgotten."""

from collections.abc import Callable, Collection, Sequence

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from server.domain import Subject
from server.errors import PreconditionError

Connection = AsyncConnection[TupleRow]

_FIND = """
SELECT i.channel, i.channel_user_id, coalesce(i.home_id, i.user_id) FROM identities i
JOIN unnest(%s::text[], %s::text[]) AS w (channel, channel_user_id) USING (channel, channel_user_id)
"""
# By the clock, not the start of the transaction: a persona made to be linked must be younger than the one it is linked to.
_CREATE_USERS = "INSERT INTO users (user_id, created_at) SELECT id, clock_timestamp() FROM unnest(%s::text[]) AS id"
_CREATE_IDENTITIES = """
INSERT INTO identities (channel, channel_user_id, user_id, home_id)
SELECT channel, channel_user_id, user_id, user_id FROM unnest(%s::text[], %s::text[], %s::text[]) AS n (channel, channel_user_id, user_id)
ON CONFLICT DO NOTHING
"""
_DROP_IDENTITIES = """
DELETE FROM identities i USING unnest(%s::text[], %s::text[]) AS w (channel, channel_user_id)
WHERE i.channel = w.channel AND i.channel_user_id = w.channel_user_id
"""
_DROP_UNNAMED = "DELETE FROM users u WHERE user_id = ANY(%s) AND NOT EXISTS (SELECT 1 FROM identities i WHERE i.user_id = u.user_id)"
_FORGOTTEN = """
SELECT w.position - 1 FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS w (kind, name, position)
JOIN tombstones t ON t.kind = w.kind AND t.digest = tombstone_digest(w.kind, w.name)
"""


def buried_as(subject: Subject) -> tuple[str, str]:
    """Returns kind and name under which a subject's tombstone is made; see ``tombstone_digest`` in the schema."""
    if subject.user_id:
        return "user", subject.user_id
    return "identity", f"{subject.channel}\x1f{subject.channel_user_id}"


async def forgotten(connection: Connection, subjects: Collection[Subject]) -> set[Subject]:
    """Returns those of the subjects that were forgotten."""
    asked = list(subjects)
    names = [buried_as(subject) for subject in asked]
    rows = await connection.execute(_FORGOTTEN, [[kind for kind, _ in names], [name for _, name in names]])
    return {asked[row[0]] for row in await rows.fetchall()}


def refuse_forgotten(field: str) -> PreconditionError:
    """The error of a call that would bring a forgotten customer back."""
    return PreconditionError(f"{field}: the customer was forgotten", reason="SUBJECT_FORGOTTEN", field=field)


async def find(connection: Connection, subjects: Collection[Subject]) -> dict[Subject, str]:
    """Returns the persona of each subject; identities nobody has met are left out, user ids are taken as they are."""
    named = [subject for subject in subjects if not subject.user_id]
    found = {subject: subject.user_id for subject in subjects if subject.user_id}
    if named:
        rows = await connection.execute(_FIND, _columns(named))
        found |= {Subject(channel=row[0], channel_user_id=row[1]): str(row[2]) for row in await rows.fetchall()}
    return found


async def find_or_create(
    connection: Connection, subjects: Collection[Subject], *, new_user_id: Callable[[], str]
) -> tuple[dict[Subject, str], set[str]]:
    """Returns the persona of each subject, and which of them this call created; forgotten identities are left out.

    Must run in a transaction. Identities are created in one order, so that two calls creating the same ones do not deadlock.
    """
    wanted = sorted(subjects, key=lambda subject: (subject.channel, subject.channel_user_id))
    fresh: set[str] = set()
    while True:
        found = await find(connection, wanted)
        new = [subject for subject in wanted if subject not in found]
        if not new:
            return found, fresh & set(found.values())
        ids = [new_user_id() for _ in new]
        fresh.update(ids)
        await connection.execute(_CREATE_USERS, [ids])
        created = await connection.execute(_CREATE_IDENTITIES, [*_columns(new), ids])
        # Looked at after the insert: one that had to wait for a deletion sees the tombstone that was committed with it.
        gone = await forgotten(connection, new)
        if gone:
            await connection.execute(_DROP_IDENTITIES, _columns(list(gone)))
        if gone or created.rowcount < len(new):  # or another replica was first with some: drop the users nobody points to
            await connection.execute(_DROP_UNNAMED, [ids])
        wanted = [subject for subject in wanted if subject not in gone]


def _columns(subjects: Sequence[Subject]) -> list[list[str]]:
    return [[subject.channel for subject in subjects], [subject.channel_user_id for subject in subjects]]
