"""Carries a planned regrouping out: users, identities, events, profiles and outbox, under the locks of all personas concerned."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from uuid import uuid4

from features.snapshots import retake_profiles
from server.ingest.grouping import Member, Regrouping
from server.ingest.personas import Connection

_CONTENT = "channel, action, item_id, text, value, quantity, session_id, slate_id, occurred_at, received_at"
_MOVED = "unnest(%(personas)s::text[], %(old)s::text[], %(new)s::text[]) AS m (persona, old_root, new_root)"

# Events of personas that move join the hidden copies of their new customer, hidden copies move along; then the best copy of
# each event id is made the visible one. What is hidden and what is seen so follows from the links alone.
_MOVE_EVENTS = (
    f"""
UPDATE events_shadowed s SET user_id = m.new_root FROM {_MOVED} WHERE s.user_id = m.old_root AND s.origin_id = m.persona
""",  # noqa: S608 - constant names
    f"""
WITH taken AS (
    DELETE FROM events e USING {_MOVED} WHERE e.user_id = m.old_root AND coalesce(e.origin_id, e.user_id) = m.persona
    RETURNING m.new_root, m.persona, e.*
)
INSERT INTO events_shadowed (user_id, origin_id, event_id, {_CONTENT}) SELECT new_root, persona, event_id, {_CONTENT} FROM taken
""",  # noqa: S608 - constant names
    f"""
WITH beaten AS (
    DELETE FROM events e USING events_shadowed s
    WHERE e.user_id = ANY(%(roots)s) AND s.user_id = e.user_id AND s.event_id = e.event_id
      AND (s.received_at, s.origin_id COLLATE "C") < (e.received_at, coalesce(e.origin_id, e.user_id) COLLATE "C")
    RETURNING e.*
)
INSERT INTO events_shadowed (user_id, origin_id, event_id, {_CONTENT})
SELECT user_id, coalesce(origin_id, user_id), event_id, {_CONTENT} FROM beaten
""",  # noqa: S608 - constant names
    f"""
WITH best AS (
    DELETE FROM events_shadowed s
    WHERE s.user_id = ANY(%(roots)s)
      AND NOT EXISTS (SELECT 1 FROM events e WHERE e.user_id = s.user_id AND e.event_id = s.event_id)
      AND NOT EXISTS (
          SELECT 1 FROM events_shadowed b WHERE b.user_id = s.user_id AND b.event_id = s.event_id
          AND (b.received_at, b.origin_id COLLATE "C") < (s.received_at, s.origin_id COLLATE "C")
      )
    RETURNING s.*
)
INSERT INTO events (user_id, origin_id, version, event_id, {_CONTENT})
SELECT b.user_id, nullif(b.origin_id, b.user_id), v.version, event_id, {_CONTENT}
FROM best b JOIN unnest(%(roots)s::text[], %(versions)s::bigint[]) AS v (user_id, version) USING (user_id)
""",  # noqa: S608 - constant names
)
# A judgement belongs to one persona's copy of an event, seen or hidden, so it goes where that persona goes.
_MOVE_SENTIMENTS = f"""
UPDATE event_sentiments s SET user_id = m.new_root FROM {_MOVED} WHERE s.user_id = m.old_root AND s.origin_id = m.persona
"""  # noqa: S608 - constant names
# Turns follow the persona that asked; copies of one event id may stand beside each other, see server/assistant/conversations.py.
_MOVE_TURNS = f"UPDATE assistant_turns t SET user_id = m.new_root FROM {_MOVED} WHERE t.user_id = m.old_root AND t.origin_id = m.persona"  # noqa: S608
_MOVE_PERSONAS = (
    f"""
UPDATE identities i SET home_id = m.persona, user_id = m.new_root FROM {_MOVED}
WHERE i.user_id = m.old_root AND coalesce(i.home_id, i.user_id) = m.persona
""",  # noqa: S608 - constant names
    f"UPDATE users u SET merged_into = nullif(m.new_root, u.user_id) FROM {_MOVED} WHERE u.user_id = m.persona",  # noqa: S608
)
_SET_VERSIONS = """
WITH moved AS (
    UPDATE users u SET version = v.version, membership = u.membership + 1
    FROM unnest(%s::text[], %s::bigint[]) AS v (user_id, version) WHERE u.user_id = v.user_id RETURNING u.user_id, u.version
)
INSERT INTO online_outbox (user_id, version) SELECT user_id, version FROM moved
ON CONFLICT (user_id) DO UPDATE SET version = greatest(online_outbox.version, excluded.version)
"""

_RELATED = "SELECT count(*) = 2 AND min(family::text) = max(family::text) FROM identity_families WHERE user_id = ANY(%s)"
_COUNT = "SELECT count(*) FROM events WHERE user_id = ANY(%s)"
# One at a time, and the last lock a link takes: two links that join three families must end with one.
_FAMILY_LOCK = "SELECT pg_advisory_xact_lock(hashtext('concord:families'))"
_FAMILIES = "SELECT user_id, family FROM identity_families WHERE user_id = ANY(%s)"
_JOIN_FAMILIES = "UPDATE identity_families SET family = %s WHERE family = ANY(%s)"
_ENTER_FAMILY = "INSERT INTO identity_families (user_id, family) SELECT id, %s FROM unnest(%s::text[]) AS id"

# Snapshots computed while other personas' events were among the customer's.
_MIXED_PROFILES = "SELECT DISTINCT event_timestamp FROM user_profile WHERE user_id = ANY(%s) AND computed_at >= %s"


async def apply(connection: Connection, plan: Regrouping, *, linked_since: datetime | None = None) -> None:
    """Makes the rows say what the plan says.

    Args:
        connection: in the transaction that holds the locks and has changed the links.
        plan: what changes.
        linked_since: when the first of the links that were removed was made; None when none was.
    """
    if plan.moves:
        affected = sorted({root for move in plan.moves.values() for root in move})
        parameters = {
            "personas": list(plan.moves),
            "old": [old for old, _ in plan.moves.values()],
            "new": [new for _, new in plan.moves.values()],
            "roots": affected,
            "versions": [plan.versions.get(root, 0) for root in affected],
        }
        for statement in (*_MOVE_EVENTS, _MOVE_SENTIMENTS, _MOVE_TURNS, *_MOVE_PERSONAS):
            await connection.execute(statement, parameters)
    await set_versions(connection, plan.versions)
    if plan.moves and linked_since is not None:
        await _part_profiles(connection, plan, linked_since)


async def set_versions(connection: Connection, versions: Mapping[str, int]) -> None:
    """Sets the versions of customers that were regrouped, counts that, and enqueues them for the online store."""
    if versions:
        await connection.execute(_SET_VERSIONS, [list(versions), list(versions.values())])


async def shared_events(connection: Connection, members: Collection[Member], pair: tuple[str, str]) -> int | None:
    """Returns how many events the members have, if the two personas were ever one customer, directly or through others."""
    row = await (await connection.execute(_RELATED, [list(pair)])).fetchone()
    if row is None or not row[0]:
        return None
    count = await (await connection.execute(_COUNT, [sorted({member.root for member in members})])).fetchone()
    return int(count[0]) if count else None


async def join_families(connection: Connection, personas: Sequence[str]) -> None:
    """Makes personas and all that were ever one customer with them one family; see ``identity_families`` in the schema."""
    if len(personas) < 2:
        return
    await connection.execute(_FAMILY_LOCK)
    rows = await (await connection.execute(_FAMILIES, [list(personas)])).fetchall()
    families = sorted({row[1] for row in rows}) or [uuid4()]
    if len(families) > 1:
        await connection.execute(_JOIN_FAMILIES, [families[0], families[1:]])
    if missing := set(personas) - {row[0] for row in rows}:
        await connection.execute(_ENTER_FAMILY, [families[0], sorted(missing)])


async def _part_profiles(connection: Connection, plan: Regrouping, linked_since: datetime) -> None:
    """Takes the profile snapshots again that were computed over the events of personas that have parted."""
    parted = sorted({root for move in plan.moves.values() for root in move} & set(plan.roots))
    olds = sorted({old for old, _ in plan.moves.values()})
    times = await (await connection.execute(_MIXED_PROFILES, [olds, linked_since])).fetchall()
    for (as_of,) in times:
        await retake_profiles(connection, parted, as_of)
