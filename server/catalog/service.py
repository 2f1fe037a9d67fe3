"""The catalogue's writes and reads, and the publishing of index epochs while descriptions change."""

import asyncio
import builtins
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
import structlog
from psycopg import Connection
from psycopg.rows import TupleRow

from features.catalogue import Item, Relation, UpsertResult, publish_epoch, upsert_items, upsert_relations
from server.database import ONLINE_AWAY, Pool
from server.fleet import FleetWatch

_log = structlog.get_logger(__name__)
_COLUMNS = "item_id, title, text, category, brand, price_micros, currency, stock, channels, image_ref, attributes, listed_at"
_DUE = """
SELECT s.content_version > coalesce(e.content_version, 0) AND coalesce(e.published_at < now() - make_interval(secs => %s), true)
FROM fleet_state s LEFT JOIN index_epochs e USING (index_version)
"""


class Catalog:
    """Items as the shop's backends write and read them."""

    def __init__(self, pool: Pool, fleet: FleetWatch, *, connect: Callable[[], Connection[TupleRow]], epoch_seconds: float) -> None:
        self._pool = pool
        self._fleet = fleet
        self._connect = connect
        self._epoch_seconds = epoch_seconds

    @property
    def index_version(self) -> int:
        """The index epoch this replica answers with, 0 before the first."""
        return self._fleet.index_version

    @property
    def offer_version(self) -> int:
        """The newest offers this replica knows of."""
        return self._fleet.newest.offer_version

    async def upsert(self, items: Sequence[Item], relations: Sequence[Relation]) -> UpsertResult:
        """Stores items and relations; prices, stock and channels hold from the next answer on, descriptions from the next epoch.

        While Redis is away from here the change is stored all the same: answers made without Redis show it at once, and a
        replica that still reaches Redis within its ``refresh_seconds``.
        """
        result = await asyncio.to_thread(self._in_transaction, items, relations)
        try:
            await self._fleet.sync()
        except ONLINE_AWAY as error:
            _log.warning("the fleet's pointers wait for Redis", error=type(error).__name__)
        return result

    def _in_transaction(self, items: Sequence[Item], relations: Sequence[Relation]) -> UpsertResult:
        with self._connect() as connection:
            result = upsert_items(connection, items)
            if relations:
                upsert_relations(connection, relations)
            return result

    async def get(self, item_ids: Sequence[str]) -> list[Item]:
        """Returns the items that exist among ``item_ids``, in that order."""
        query = f"SELECT {_COLUMNS} FROM items WHERE item_id = ANY(%s) AND NOT removed"  # noqa: S608 - constant columns
        found = {item.item_id: item for item in await self._read(query, [list(item_ids)])}
        return [found[item_id] for item_id in dict.fromkeys(item_ids) if item_id in found]

    async def list(self, *, page_size: int, after: str, category: str) -> list[Item]:
        """Returns up to ``page_size`` items with ids above ``after``, in id order; an empty ``category`` means all."""
        query = (
            f"SELECT {_COLUMNS} FROM items WHERE NOT removed AND item_id > %s "  # noqa: S608 - constant columns
            "AND (%s = '' OR category = %s) ORDER BY item_id LIMIT %s"
        )
        return await self._read(query, [after, category, category, page_size])

    async def _read(self, query: str, parameters: Sequence[Any]) -> builtins.list[Item]:
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(query.encode(), parameters)).fetchall()
        return [_item(row) for row in rows]

    async def run(self) -> None:
        """Publishes an epoch whenever descriptions changed since the last, at most one per ``epoch_seconds``, until cancelled."""
        while True:
            try:
                if await asyncio.to_thread(_publish_if_due, self._connect, self._epoch_seconds):
                    self._fleet.look()
            except psycopg.Error as error:
                _log.warning("index epoch waits for PostgreSQL", error=type(error).__name__)
            await asyncio.sleep(self._epoch_seconds / 2)


def _publish_if_due(connect: Callable[[], Connection[TupleRow]], epoch_seconds: float) -> int | None:
    with connect() as connection:
        if not _due(connection, epoch_seconds):
            return None
        # Look again under the lock: of several replicas one publishes.
        connection.execute("SELECT 1 FROM fleet_state FOR UPDATE")
        if not _due(connection, epoch_seconds):
            return None
        connection.execute("SET LOCAL statement_timeout = 0")  # the first epoch of a large catalogue takes as long as it takes
        return publish_epoch(connection)


def _due(connection: Connection[TupleRow], epoch_seconds: float) -> bool:
    row = connection.execute(_DUE, [epoch_seconds]).fetchone()
    return bool(row and row[0])


def _item(row: TupleRow) -> Item:
    item_id, title, text, category, brand, price_micros, currency, stock, channels, image_ref, attributes, listed_at = row
    return Item(
        item_id,
        title,
        text,
        category,
        brand,
        price_micros,
        currency,
        stock,
        channels=tuple(channels),
        image_ref=image_ref,
        attributes={name: str(value) for name, value in attributes.items()},
        listed_at=listed_at,
    )
