"""Feature snapshots in PostgreSQL: what customers and items were at one time, computed from the events up to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from psycopg import AsyncConnection, Connection
from psycopg.rows import TupleRow

from features.behaviour import ACTION_WEIGHT, LIKED_FROM

# The advisory lock that a materialization holds, shared: customers forgotten meanwhile are erased once more after it.
MATERIALIZING = (0x434F4E43, 1)


@dataclass(frozen=True)
class SnapshotReport:
    """Rows a snapshot wrote, and the time it describes."""

    as_of: datetime
    user_count: int
    item_count: int


_USER_PROFILE = """
INSERT INTO user_profile
WITH weights (action, weight) AS (SELECT * FROM unnest(%(actions)s::text[], %(weights)s::double precision[])),
e AS (
    SELECT e.user_id, e.channel, e.action, e.value, e.quantity, e.occurred_at, i.category, i.brand,
        CASE WHEN e.action IN ('rate', 'review') AND e.value < %(liked)s THEN 0 ELSE coalesce(w.weight, 0) END AS weight
    FROM events e LEFT JOIN items i USING (item_id) LEFT JOIN weights w USING (action)
    WHERE e.occurred_at <= %(as_of)s AND (%(users)s::text[] IS NULL OR e.user_id = ANY(%(users)s))
), base AS (
    SELECT user_id, count(*) AS event_count,
        count(*) FILTER (WHERE action = 'purchase') AS purchase_count,
        coalesce(sum(value) FILTER (WHERE action = 'purchase'), 0) - coalesce(sum(value) FILTER (WHERE action = 'return'), 0) AS spent,
        extract(epoch FROM %(as_of)s - max(occurred_at)) / 86400.0 AS since_event,
        extract(epoch FROM %(as_of)s - max(occurred_at) FILTER (WHERE action = 'purchase')) / 86400.0 AS since_purchase,
        avg(value / quantity) FILTER (WHERE action = 'purchase' AND quantity > 0) AS price_mean,
        percentile_cont(ARRAY[0.2, 0.8]) WITHIN GROUP (ORDER BY value / quantity)
            FILTER (WHERE action = 'purchase' AND quantity > 0 AND value IS NOT NULL) AS band
    FROM e GROUP BY user_id
), category_shares AS (SELECT user_id, 'category' AS kind, category AS name, sum(weight) AS mass FROM e WHERE category <> '' GROUP BY 1, 3),
brand_shares AS (SELECT user_id, 'brand' AS kind, brand AS name, sum(weight) AS mass FROM e WHERE brand <> '' GROUP BY 1, 3),
channel_shares AS (SELECT user_id, 'channel' AS kind, channel AS name, count(*)::double precision AS mass FROM e GROUP BY 1, 3),
ranked AS (
    SELECT user_id, kind, name, mass / sum(mass) OVER (PARTITION BY user_id, kind) AS share,
           row_number() OVER (PARTITION BY user_id, kind ORDER BY mass DESC, name) AS place
    FROM (TABLE category_shares UNION ALL TABLE brand_shares UNION ALL TABLE channel_shares) s WHERE mass > 0
), tops AS (
    SELECT user_id, kind, array_agg(name ORDER BY place) AS names, array_agg(share::double precision ORDER BY place) AS shares
    FROM ranked WHERE place <= 5 OR kind = 'channel' GROUP BY user_id, kind
)
SELECT b.user_id, %(as_of)s, b.event_count, b.purchase_count, b.spent, b.since_event, b.since_purchase,
       b.price_mean, b.band[1], b.band[2],
       coalesce(c.names, '{}'), coalesce(c.shares, '{}'), coalesce(r.names, '{}'), coalesce(r.shares, '{}'),
       coalesce(h.names, '{}'), coalesce(h.shares, '{}')
FROM base b
LEFT JOIN tops c ON c.user_id = b.user_id AND c.kind = 'category'
LEFT JOIN tops r ON r.user_id = b.user_id AND r.kind = 'brand'
LEFT JOIN tops h ON h.user_id = b.user_id AND h.kind = 'channel'
"""

_ITEM_POPULARITY = """
INSERT INTO item_popularity
SELECT i.item_id, %(as_of)s,
    count(*) FILTER (WHERE bought AND occurred_at > %(as_of)s - interval '7 days'),
    count(*) FILTER (WHERE bought AND occurred_at > %(as_of)s - interval '28 days'),
    count(*) FILTER (WHERE bought),
    count(*) FILTER (WHERE looked AND occurred_at > %(as_of)s - interval '7 days'),
    count(*) FILTER (WHERE looked AND occurred_at > %(as_of)s - interval '28 days'),
    count(DISTINCT user_id) FILTER (WHERE bought AND occurred_at > %(as_of)s - interval '28 days')
FROM items i LEFT JOIN (
    SELECT item_id, user_id, occurred_at, action = 'purchase' AS bought, action IN ('view', 'click') AS looked
    FROM events WHERE occurred_at <= %(as_of)s AND item_id IS NOT NULL
) e USING (item_id)
GROUP BY i.item_id
"""


# Of two snapshots being taken the second waits, in the transaction that decides whether its time is free.
_TURN = "SELECT pg_advisory_xact_lock(hashtext('concord feature snapshots'))"
_REFERRED = "SELECT 1 FROM index_epochs WHERE features_as_of = %s LIMIT 1"
_COUNTS = (
    "SELECT (SELECT count(*) FROM user_profile WHERE event_timestamp = %(as_of)s), "
    "(SELECT count(*) FROM item_popularity WHERE event_timestamp = %(as_of)s)"
)


def take_snapshot(connection: Connection[TupleRow], as_of: datetime) -> SnapshotReport:
    """Computes ``user_profile`` and ``item_popularity`` from the events up to and including ``as_of``.

    Repeating it replaces the snapshot, unless an index epoch ranks with it: what slates were computed from stays as it was.
    """
    connection.execute(_TURN)
    if connection.execute(_REFERRED, [as_of]).fetchone():
        counts = connection.execute(_COUNTS, {"as_of": as_of}).fetchone()
        assert counts is not None
        return SnapshotReport(as_of, counts[0], counts[1])
    for table in ("user_profile", "item_popularity"):
        connection.execute(f"DELETE FROM {table} WHERE event_timestamp = %s", [as_of])  # noqa: S608 - constant names
    users = connection.execute(_USER_PROFILE, _profile_parameters(as_of, None)).rowcount
    items = connection.execute(_ITEM_POPULARITY, {"as_of": as_of}).rowcount
    return SnapshotReport(as_of, users, items)


async def retake_profiles(connection: "AsyncConnection[TupleRow]", users: Sequence[str], as_of: datetime) -> None:
    """Computes the ``user_profile`` snapshot of one time again for some customers, from the events they have now."""
    await connection.execute("DELETE FROM user_profile WHERE event_timestamp = %s AND user_id = ANY(%s)", [as_of, list(users)])
    await connection.execute(_USER_PROFILE, _profile_parameters(as_of, list(users)))


def _profile_parameters(as_of: datetime, users: list[str] | None) -> dict[str, object]:
    """Returns the parameters of the profile query; no list of users means all."""
    weights = {"actions": list(ACTION_WEIGHT), "weights": list(ACTION_WEIGHT.values()), "liked": LIKED_FROM}
    return {"as_of": as_of, "users": users, **weights}


def snapshot_grid(connection: Connection[TupleRow], *, every_days: int = 7, until: datetime | None = None) -> list[datetime]:
    """Returns snapshot times from one step after the first event to the last one (or ``until``), ascending."""
    row = connection.execute("SELECT min(occurred_at), max(occurred_at) FROM events").fetchone()
    if row is None or row[0] is None:
        return []
    first, last, step = row[0], until or row[1], timedelta(days=every_days)
    return [first + step * k for k in range(1, int((last - first) / step) + 1)]


def newest_event_time(connection: Connection[TupleRow]) -> datetime | None:
    """Returns the time of the newest event, never later than now; None when there are no events."""
    row = connection.execute("SELECT least(max(occurred_at), now()) FROM events WHERE occurred_at <= now()").fetchone()
    return row[0] if row else None


def free_time(connection: Connection[TupleRow], as_of: datetime) -> datetime:
    """Returns ``as_of``, or the first microsecond after it that no index epoch refers to, and keeps other snapshots waiting."""
    connection.execute(_TURN)
    while connection.execute(_REFERRED, [as_of]).fetchone():
        as_of += timedelta(microseconds=1)
    return as_of
