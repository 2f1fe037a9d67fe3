"""Forgetting a customer: every row and key that names them goes, tombstones keep them away, and a receipt names nobody."""

import json
from collections.abc import Sequence
from uuid import uuid4

import redis.exceptions
import structlog

from features.snapshots import MATERIALIZING
from server.database import Pool
from server.domain import Receipt, Subject
from server.errors import NotFoundError
from server.ingest.graph import locked
from server.ingest.personas import Connection, buried_as, find
from server.online.store import OnlineStore
from server.transactions import retried

_log = structlog.get_logger(__name__)
_ATTEMPTS = 10
_BATCH = 100

_IDENTITIES = "SELECT channel, channel_user_id FROM identities WHERE user_id = ANY(%s)"
# In an order that the references between the tables allow; all rows are those of the personas given.
_DELETIONS = {
    "events": "DELETE FROM events WHERE user_id = ANY(%s)",
    "shadowed_events": "DELETE FROM events_shadowed WHERE user_id = ANY(%s)",
    "sentiments": "DELETE FROM event_sentiments WHERE user_id = ANY(%s)",
    # Those too that a persona was shown while it was part of a customer it has left since.
    "exposures": "DELETE FROM exposures e USING (SELECT %s::text[] AS ids) w WHERE e.user_id = ANY(w.ids) OR e.origin_id = ANY(w.ids)",
    "turns": "DELETE FROM assistant_turns WHERE user_id = ANY(%s)",
    "profiles": "DELETE FROM user_profile WHERE user_id = ANY(%s)",
    "outbox": "DELETE FROM online_outbox WHERE user_id = ANY(%s)",
    "links": "DELETE FROM identity_links WHERE left_id = ANY(%s)",
    "identities": "DELETE FROM identities WHERE user_id = ANY(%s)",
    "users": "DELETE FROM users WHERE user_id = ANY(%s)",
}
_RECEIPT = "INSERT INTO receipts (receipt_id, counts) VALUES (%s, %s)"
_TOMBSTONES = """
INSERT INTO tombstones (kind, digest, receipt_id)
SELECT w.kind, tombstone_digest(w.kind, w.name), %s FROM unnest(%s::text[], %s::text[]) AS w (kind, name)
"""
_ENQUEUE = "INSERT INTO erasures (receipt_id, user_ids) VALUES (%s, %s)"
_FIND_RECEIPT = """
SELECT r.receipt_id, r.forgotten_at, r.counts, NOT EXISTS (SELECT 1 FROM erasures e WHERE e.receipt_id = r.receipt_id)
FROM tombstones t JOIN receipts r USING (receipt_id)
WHERE t.kind = %(kind)s AND t.digest = tombstone_digest(%(kind)s, %(name)s)
"""
_PENDING = "SELECT receipt_id, user_ids FROM erasures ORDER BY receipt_id LIMIT %s FOR UPDATE SKIP LOCKED"
# A materialization that began before the deletion may still write what it has read: its turn is erased after it.
_MATERIALIZES = """
SELECT EXISTS (
    SELECT 1 FROM pg_locks l JOIN pg_database d ON d.oid = l.database
    WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.classid = %s AND l.objid = %s AND l.granted
)
"""


class Erasure:
    """Forgets customers. PostgreSQL decides, in one transaction; Redis follows, now or when it can be reached again."""

    def __init__(self, pool: Pool, online: OnlineStore) -> None:
        self._pool = pool
        self._online = online

    async def forget(self, subject: Subject) -> Receipt:
        """Erases the subject's whole customer, all personas of it; once more, it returns the receipt of the first time.

        Raises:
            NotFoundError: nobody has met the subject.
            ConflictError: concurrent changes kept winning.
        """
        if not await retried(lambda: self._delete(subject), attempts=_ATTEMPTS):
            return await self._receipt(subject)
        try:
            await self.finish()
        except redis.exceptions.RedisError as error:
            _log.warning("online state of a forgotten customer waits for Redis", error=type(error).__name__)
        return await self._receipt(subject)

    async def finish(self) -> int:
        """Erases the online state of customers that were forgotten; returns how many are done with."""
        async with self._pool.connection() as connection, connection.transaction():
            rows = await (await connection.execute(_PENDING, [_BATCH])).fetchall()
            if not rows:
                return 0
            materializes = await (await connection.execute(_MATERIALIZES, MATERIALIZING)).fetchone()
            users = [user_id for _, user_ids in rows for user_id in user_ids]
            await self._online.erase_users(users)
            await connection.execute(_DELETIONS["profiles"], [users])
            if materializes is None or materializes[0]:
                return 0
            await connection.execute("DELETE FROM erasures WHERE receipt_id = ANY(%s)", [[row[0] for row in rows]])
        return len(rows)

    async def _delete(self, subject: Subject) -> bool:
        """Deletes the customer's rows and buries their names; False when there is no such customer."""
        async with self._pool.connection() as connection, connection.transaction():
            personas = await find(connection, [subject])
            if not personas:
                return False
            group = await locked(connection, personas)
            if not group.members:
                return False
            users = sorted(group.members)
            identities = await (await connection.execute(_IDENTITIES, [users])).fetchall()
            counts = {kind: (await connection.execute(deletion, [users])).rowcount for kind, deletion in _DELETIONS.items()}
            names = [buried_as(Subject(user_id=user_id)) for user_id in users]
            names += [buried_as(Subject(channel=channel, channel_user_id=name)) for channel, name in identities]
            await _bury(connection, names, users, counts)
        return True

    async def _receipt(self, subject: Subject) -> Receipt:
        kind, name = buried_as(subject)
        async with self._pool.connection() as connection:
            row = await (await connection.execute(_FIND_RECEIPT, {"kind": kind, "name": name})).fetchone()
        if row is None:
            raise NotFoundError("subject: no such customer", reason="SUBJECT_UNKNOWN", field="subject")
        return Receipt(str(row[0]), row[1], row[2], row[3])


async def _bury(connection: Connection, names: Sequence[tuple[str, str]], users: Sequence[str], counts: dict[str, int]) -> None:
    receipt_id = uuid4()
    await connection.execute(_RECEIPT, [receipt_id, json.dumps(counts)])
    await connection.execute(_TOMBSTONES, [receipt_id, [kind for kind, _ in names], [name for _, name in names]])
    await connection.execute(_ENQUEUE, [receipt_id, list(users)])
