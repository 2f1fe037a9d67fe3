"""Events into PostgreSQL, a batch a transaction: staged by COPY, stored once, counted into the users' versions."""

from dataclasses import dataclass
from io import BytesIO

import psycopg
import pyarrow as pa
import pyarrow.csv
from psycopg import Connection
from psycopg.rows import TupleRow

from features.importers.event_rows import EVENT_COLUMNS

_ATTEMPTS = 5

_STAGE = """
CREATE TEMP TABLE staged_events (
    line bigint, user_id text, channel_user_id text, event_id uuid, channel text, action text, item_id text, text text,
    value double precision, quantity double precision, session_id text, slate_id text, occurred_at timestamptz,
    origin_id text
) ON COMMIT DELETE ROWS
"""

# Rows of customers that were forgotten: named by a user id, or by an identity, that has a tombstone.
_FORGOTTEN_USER = "EXISTS (SELECT 1 FROM tombstones t WHERE t.kind = 'user' AND t.digest = tombstone_digest('user', {user}))"
_FORGOTTEN_IDENTITY = """EXISTS (
    SELECT 1 FROM tombstones t
    WHERE t.kind = 'identity' AND t.digest = tombstone_digest('identity', {name}.channel || E'\\x1f' || {name}.channel_user_id)
)"""
_DROP_FORGOTTEN = (
    f"DELETE FROM staged_events s WHERE {_FORGOTTEN_USER.format(user='s.user_id')} OR {_FORGOTTEN_IDENTITY.format(name='s')} "  # noqa: S608
    "RETURNING line, user_id, channel, channel_user_id"
)
_ANY_FORGOTTEN = "SELECT EXISTS (SELECT 1 FROM tombstones)"
# What this transaction created before it saw the tombstone that another one was committing.
_DROP_RISEN = (
    f"""
DELETE FROM identities i USING unnest(%(channels)s::text[], %(names)s::text[]) AS w (channel, channel_user_id)
WHERE i.channel = w.channel AND i.channel_user_id = w.channel_user_id AND {_FORGOTTEN_IDENTITY.format(name="i")}
""",  # noqa: S608 - constant names
    f"DELETE FROM users u WHERE u.user_id = ANY(%(users)s) AND {_FORGOTTEN_USER.format(user='u.user_id')}",  # noqa: S608
)

# A customer known only by a channel's own id keeps the user that identity has; a new one gets an id made of it, so that two
# imports of the same file make the same user. Identities are read back after the insert: another writer may have been first.
_NEW_USERS = """
WITH named AS (
    SELECT coalesce(s.user_id, i.user_id, 'u-' || md5(s.channel || E'\\x1f' || s.channel_user_id)) AS user_id
    FROM staged_events s LEFT JOIN identities i USING (channel, channel_user_id)
)
INSERT INTO users (user_id) SELECT DISTINCT user_id FROM named ORDER BY user_id ON CONFLICT DO NOTHING
"""
_NEW_IDENTITIES = """
INSERT INTO identities (channel, channel_user_id, user_id)
SELECT DISTINCT ON (channel, channel_user_id) channel, channel_user_id,
       coalesce(user_id, 'u-' || md5(channel || E'\\x1f' || channel_user_id))
FROM staged_events ORDER BY channel, channel_user_id, line ON CONFLICT DO NOTHING
"""
_RESOLVE = """
UPDATE staged_events s SET user_id = coalesce(i.home_id, i.user_id) FROM identities i
WHERE s.user_id IS NULL AND i.channel = s.channel AND i.channel_user_id = s.channel_user_id
"""

# Until here a row has the persona that records it; from here on the customer it belongs to.
_KEEP_ORIGIN = "UPDATE staged_events SET origin_id = user_id"

# Locked in one order by every writer. NO KEY: new identities of these users need not wait.
_LOCK = """
SELECT count(*) FROM (
    SELECT 1 FROM users WHERE user_id IN (SELECT user_id FROM staged_events) ORDER BY user_id FOR NO KEY UPDATE
) locked
"""
_FOLLOW_MERGES = """
UPDATE staged_events s SET user_id = u.merged_into FROM users u WHERE u.user_id = s.user_id AND u.merged_into IS NOT NULL
"""

# A new identity of a merged persona is the survivor's; the locks keep it so until the commit.
_PLACE_IDENTITIES = """
UPDATE identities i SET user_id = s.user_id, home_id = s.origin_id FROM staged_events s
WHERE i.channel = s.channel AND i.channel_user_id = s.channel_user_id AND i.user_id = s.origin_id AND s.user_id <> s.origin_id
"""

# This import's own events carry its start as received_at: that tells a repeated row from one an earlier import stored.
_DROP_STORED = """
DELETE FROM staged_events s USING events e
WHERE e.user_id = s.user_id AND e.event_id = s.event_id RETURNING s.line, e.received_at = %s
"""
_DROP_REPEATED = """
DELETE FROM staged_events s USING (
    SELECT line, row_number() OVER (PARTITION BY user_id, event_id ORDER BY line) AS occurrence FROM staged_events
) o
WHERE o.line = s.line AND o.occurrence > 1 RETURNING s.line
"""
_STORE = """
INSERT INTO events (
    user_id, origin_id, version, event_id, channel, action, item_id, text, value, quantity, session_id, slate_id, occurred_at, received_at
)
SELECT s.user_id, nullif(s.origin_id, s.user_id), u.version + 1, s.event_id, s.channel, s.action, s.item_id, s.text, s.value, s.quantity,
       s.session_id, s.slate_id, s.occurred_at, %s
FROM staged_events s JOIN users u USING (user_id)
"""
_COUNT = """
WITH added AS (
    SELECT user_id, count(*) AS event_count FROM staged_events GROUP BY user_id
), moved AS (
    UPDATE users u SET version = u.version + added.event_count FROM added WHERE u.user_id = added.user_id
    RETURNING u.user_id, u.version
)
INSERT INTO online_outbox (user_id, version) SELECT user_id, version FROM moved ORDER BY user_id
ON CONFLICT (user_id) DO UPDATE SET version = greatest(online_outbox.version, excluded.version)
"""


@dataclass(frozen=True)
class StoredBatch:
    """What became of a batch: events stored, rows stored by an earlier import, lines that repeat an earlier row of this one.

    ``forgotten_lines`` are of customers that were forgotten.
    """

    stored: int
    already_stored: int
    repeated_lines: frozenset[int]
    forgotten_lines: frozenset[int]


class EventStore:
    """Stores batches of events over one connection."""

    def __init__(self, connection: Connection[TupleRow]) -> None:
        self._connection = connection
        # What an import has stored it knows by this time, so of two that begin at once one waits for a later one.
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('concord event imports'))")
        row = connection.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        self._received_at = row[0]
        connection.execute(_STAGE)
        connection.commit()

    def add(self, events: pa.Table) -> StoredBatch:
        """Stores events (columns ``EVENT_COLUMNS``) in one transaction, again when it lost a deadlock or a race for an id."""
        data = BytesIO()
        pa.csv.write_csv(events, data, pa.csv.WriteOptions(include_header=False))
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._connection.transaction():
                    return self._add(data.getbuffer())
            except (psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation, psycopg.errors.ForeignKeyViolation):
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def _add(self, data: memoryview) -> StoredBatch:
        execute = self._connection.execute
        into = f"COPY staged_events ({', '.join(EVENT_COLUMNS)}) FROM STDIN (FORMAT csv)"
        with self._connection.cursor() as cursor, cursor.copy(into) as copy:
            copy.write(data)
        execute("ANALYZE staged_events")
        forgotten = {row[0] for row in self._drop_forgotten()}
        for statement in (_NEW_USERS, _NEW_IDENTITIES, _RESOLVE, _KEEP_ORIGIN, _LOCK):
            execute(statement)
        if late := self._drop_forgotten():  # forgotten while this waited for the locks
            forgotten |= {row[0] for row in late}
            columns = dict(zip(("users", "channels", "names"), map(list, list(zip(*late, strict=True))[1:]), strict=True))
            for statement in _DROP_RISEN:
                execute(statement, columns)
        while execute(_FOLLOW_MERGES).rowcount:
            execute(_LOCK)
        execute(_PLACE_IDENTITIES)
        known = execute(_DROP_STORED, [self._received_at]).fetchall()
        repeated = {line for line, by_this_import in known if by_this_import}
        repeated.update(line for (line,) in execute(_DROP_REPEATED))
        stored = execute(_STORE, [self._received_at]).rowcount
        execute(_COUNT)
        return StoredBatch(stored, sum(not by_this_import for _, by_this_import in known), frozenset(repeated), frozenset(forgotten))

    def _drop_forgotten(self) -> list[TupleRow]:
        """Takes rows of forgotten customers out; digests are only made where there are tombstones.

        Returns:
            (line, user_id, channel, channel_user_id) of each.
        """
        row = self._connection.execute(_ANY_FORGOTTEN).fetchone()
        return self._connection.execute(_DROP_FORGOTTEN).fetchall() if row and row[0] else []
