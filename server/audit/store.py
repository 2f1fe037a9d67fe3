"""What an audit reads of PostgreSQL: exposures, histories of customers and offers, epochs, models; and where it keeps its result."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import DictRow

from server.audit.report import Answered, AuditReport
from server.online.store import Fleet

# Of each channel the newest in turn, so that a busy channel does not crowd out a quiet one; looked for among the newest of all, so
# that the log's size does not matter.
_EXPOSURES = """
SELECT * FROM (
    SELECT *, row_number() OVER (PARTITION BY channel ORDER BY answered_at DESC, exposure_id) AS place FROM (
        SELECT * FROM exposures WHERE answered_at >= %(since)s AND (%(channel)s = '' OR channel = %(channel)s)
        ORDER BY answered_at DESC LIMIT %(last)s * 20
    ) newest
) e ORDER BY place, channel LIMIT %(last)s
"""
_CUSTOMERS = "SELECT user_id, version, merged_into, regrouped_version FROM users WHERE user_id = ANY(%s)"
_ACTIVITIES = """
SELECT w.user_id, a.* FROM unnest(%s::text[], %s::bigint[]) AS w (user_id, wanted)
CROSS JOIN LATERAL user_activity_at(w.user_id, 'infinity', w.wanted) a
"""
_OFFERS = """
SELECT w.place, h.offer_version, h.price_micros, h.currency, h.stock, h.channels, h.removed
FROM unnest(%s::text[], %s::bigint[]) WITH ORDINALITY AS w (item_id, offer_version, place)
JOIN LATERAL (
    SELECT * FROM offer_history h WHERE h.item_id = w.item_id AND h.offer_version <= w.offer_version
    ORDER BY h.offer_version DESC LIMIT 1
) h ON true
"""
_HISTORY = """
SELECT item_id, offer_version, price_micros, currency, stock, channels, removed FROM offer_history
WHERE item_id = ANY(%s) ORDER BY offer_version DESC
"""
_UNVERSIONED = """
SELECT i.item_id, i.offer_version, i.price_micros, i.currency, i.stock, i.channels, i.removed, to_jsonb(h.*) AS versioned
FROM items i JOIN LATERAL (
    SELECT * FROM offer_history h WHERE h.item_id = i.item_id ORDER BY h.offer_version DESC LIMIT 1
) h ON true
WHERE (i.price_micros, i.currency, i.stock, i.channels, i.removed, i.offer_version)
      IS DISTINCT FROM (h.price_micros, h.currency, h.stock, h.channels, h.removed, h.offer_version)
ORDER BY i.item_id
"""
# The oldest event that was stored before the answer and is in a later version than the answer's. Events that a merge brought
# are older than their version, so answers of before it cannot be judged.
_STALENESS = """
SELECT coalesce(extract(epoch FROM x.answered_at - (
    SELECT min(e.received_at) FROM events e
    WHERE e.user_id = x.user_id AND e.version > x.user_version AND e.received_at < x.answered_at
)), 0)::double precision AS seconds
FROM unnest(%s::text[], %s::bigint[], %s::timestamptz[]) AS x (user_id, user_version, answered_at)
JOIN users u USING (user_id) WHERE u.merged_into IS NULL AND x.user_version >= u.regrouped_version
"""
_OUTBOX = """
SELECT count(*) AS size, coalesce(extract(epoch FROM now() - min(enqueued_at)), 0)::double precision AS seconds FROM online_outbox
"""
# Those asked about last have the most to lose; where there are too few, those who did the most.
_ASKED = """
SELECT u.user_id FROM (
    SELECT user_id, max(answered_at) AS at FROM (
        SELECT user_id, answered_at FROM exposures WHERE user_id <> '' ORDER BY answered_at DESC LIMIT 10000
    ) newest GROUP BY user_id
) asked JOIN users u USING (user_id) WHERE u.merged_into IS NULL ORDER BY asked.at DESC, u.user_id LIMIT %s
"""
_BUSIEST = "SELECT user_id FROM users WHERE merged_into IS NULL ORDER BY version DESC, user_id LIMIT %s"


@dataclass(frozen=True)
class Offer:
    """What an item's offer was from ``offer_version`` on."""

    offer_version: int
    price_micros: int | None
    currency: str
    stock: int | None
    channels: tuple[str, ...]
    removed: bool

    @property
    def in_stock(self) -> bool:
        """True when stock is not tracked or above zero."""
        return self.stock is None or self.stock > 0

    def sold_in(self, channel: str) -> bool:
        """True when the item could be had in ``channel``."""
        return not self.removed and self.price_micros is not None and (not self.channels or channel in self.channels)


@dataclass(frozen=True)
class Customer:
    """A customer as PostgreSQL has it now.

    Attributes:
        merged_into: empty unless merged away.
        regrouped_version: of the newest merge or unlink; events moved then, so what was before cannot always be computed again.
    """

    version: int
    merged_into: str
    regrouped_version: int


@dataclass(frozen=True)
class Replica:
    """A server process that lives: where it answers, and the fingerprint of the rules it makes slates by."""

    address: str
    config: str


class AuditStore:
    """Reads over one autocommit connection whose rows are mappings; writes nothing but ``save``."""

    def __init__(self, connection: AsyncConnection[DictRow]) -> None:
        self._connection = connection

    async def exposures(self, *, since: datetime, channel: str, last: int) -> list[Answered]:
        """Returns up to ``last`` logged answers since a time, the newest of each channel in turn; an empty channel means all."""
        return [_answered(row) for row in await self._all(_EXPOSURES, {"since": since, "channel": channel, "last": last})]

    async def customers(self, user_ids: Iterable[str]) -> dict[str, Customer]:
        """Returns the customers that exist."""
        rows = await self._all(_CUSTOMERS, [sorted(set(user_ids))])
        return {row["user_id"]: Customer(row["version"], row["merged_into"] or "", row["regrouped_version"]) for row in rows}

    async def activities(self, wanted: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Mapping[str, Any]]:
        """Returns the ``user_activity`` row of customers at given versions; unknown customers are left out."""
        pairs = sorted(set(wanted))
        rows = await self._all(_ACTIVITIES, [[user for user, _ in pairs], [version for _, version in pairs]])
        return {(row["user_id"], row["version"]): row for row in rows}

    async def profiles(self, user_id: str) -> list[Mapping[str, Any]]:
        """Returns all profile snapshots of a customer, newest first."""
        return list(await self._all("SELECT * FROM user_profile WHERE user_id = %s ORDER BY event_timestamp DESC", [user_id]))

    async def epochs(self) -> dict[int, datetime | None]:
        """Returns the feature snapshot time of every index epoch."""
        rows = await self._all("SELECT index_version, features_as_of FROM index_epochs ORDER BY index_version")
        return {row["index_version"]: row["features_as_of"] for row in rows}

    async def models(self) -> dict[str, datetime | None]:
        """Returns the published models, newest first, and when each was last activated."""
        rows = await self._all("SELECT model_version, activated_at FROM model_versions ORDER BY published_at DESC, model_version")
        return {row["model_version"]: row["activated_at"] for row in rows}

    async def fleet(self) -> Fleet:
        """Returns the fleet's versions as PostgreSQL has them."""
        (row,) = await self._all("SELECT model_version, activation, answering_index AS index_version, offer_version FROM fleet_state")
        return Fleet(**row)

    async def offers(self, wanted: Sequence[tuple[str, int]]) -> list[Offer | None]:
        """Returns the offer of each (item, offer_version), None where the history does not reach back that far."""
        found: list[Offer | None] = [None] * len(wanted)
        for row in await self._all(_OFFERS, [[item for item, _ in wanted], [version for _, version in wanted]]):
            found[row["place"] - 1] = _offer(row)
        return found

    async def offer_history(self, item_ids: Iterable[str]) -> dict[str, list[Offer]]:
        """Returns every offer items ever had, newest first."""
        history: dict[str, list[Offer]] = {}
        for row in await self._all(_HISTORY, [sorted(set(item_ids))]):
            history.setdefault(row["item_id"], []).append(_offer(row))
        return history

    async def unversioned_offers(self) -> list[tuple[str, Offer, Offer]]:
        """Returns items whose row is not what the newest version of their offer says: (item, row, newest version)."""
        return [(row["item_id"], _offer(row), _offer(row["versioned"])) for row in await self._all(_UNVERSIONED)]

    async def staleness(self, answers: Sequence[Answered]) -> list[float]:
        """Returns for each answer that can be judged the age in seconds of the oldest event it lacked, 0 where it lacked none."""
        columns = [[a.user_id for a in answers], [a.user_version for a in answers], [a.answered_at for a in answers]]
        return [max(row["seconds"], 0.0) for row in await self._all(_STALENESS, columns)]

    async def replicas(self) -> list[Replica]:
        """Returns the replicas that live, by address."""
        return [Replica(**row) for row in await self._all("SELECT address, config FROM live_replicas ORDER BY address")]

    async def outbox(self) -> tuple[int, float]:
        """Returns how many customers wait to be written online, and the age of the oldest in seconds."""
        (row,) = await self._all(_OUTBOX)
        return row["size"], row["seconds"]

    async def sample(self, count: int) -> list[str]:
        """Returns up to ``count`` customers, those asked about last first."""
        rows = [row for query in (_ASKED, _BUSIEST) for row in await self._all(query, [count])]
        return list(dict.fromkeys(row["user_id"] for row in rows))[:count]

    async def save(self, report: AuditReport) -> None:
        """Keeps a finished report in ``audit_results``, without customers' names: forgetting one must leave no trace here."""
        await self._connection.execute(
            "INSERT INTO audit_results (run_id, ran_at, result) VALUES (%s, %s, %s)",
            [report.run_id, report.ran_at, json.dumps(report.as_dict(names=False))],
        )

    async def _all(self, query: str, parameters: Any = None) -> list[DictRow]:
        return await (await self._connection.execute(query.encode(), parameters)).fetchall()


def _offer(row: Mapping[str, Any]) -> Offer:
    return Offer(row["offer_version"], row["price_micros"], row["currency"], row["stock"], tuple(row["channels"]), row["removed"])


_SCALARS: tuple[str, ...] = (
    "user_id",
    "slate_id",
    "channel",
    "surface",
    "user_version",
    "model_version",
    "index_version",
    "offer_version",
    "as_of",
)
_SCALARS += ("query", "page_start", "page_limit", "filtered", "stale", "answered_at")
_ARRAYS = ("context_item_ids", "item_ids", "positions", "scores", "prices_micros", "currencies", "in_stock", "degraded_reasons")


def _answered(row: Mapping[str, Any]) -> Answered:
    values: dict[str, Any] = {name: row[name] for name in _SCALARS} | {name: tuple(row[name]) for name in _ARRAYS}
    return Answered(source="journal", **values)
