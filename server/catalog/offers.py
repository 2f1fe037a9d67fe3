"""Offers: price, stock and channels of every item, joined at answer time and never part of a slate."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

from psycopg.rows import TupleRow

from server.database import Pool


@dataclass(frozen=True)
class Offer:
    """What an item costs and where it can be had now; ``price_micros`` None means not for sale."""

    price_micros: int | None
    currency: str
    stock: int | None
    channels: frozenset[str]
    image_ref: str

    @property
    def in_stock(self) -> bool:
        """True when stock is not tracked or above zero."""
        return self.stock is None or self.stock > 0

    def sold_in(self, channel: str) -> bool:
        """True when the item has a price and is sold in ``channel``."""
        return self.price_micros is not None and (not self.channels or channel in self.channels)


@dataclass(frozen=True)
class OfferTable:
    """All offers at one offer_version: equal versions mean equal prices on every replica."""

    offer_version: int
    offers: Mapping[str, Offer]


# One statement, so one snapshot: the version read with the rows is exactly the version they add up to.
_CHANGES = """
SELECT s.offer_version, i.item_id, i.price_micros, i.currency, i.stock, i.channels, i.image_ref, i.removed
FROM fleet_state s LEFT JOIN items i ON i.offer_version > %s
"""


class Offers:
    """The replica's copy of all offers, brought up to date when an answer needs a newer version."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._table = OfferTable(-1, {})
        self._lock = asyncio.Lock()

    async def at_least(self, offer_version: int) -> OfferTable:
        """Returns the offers at ``offer_version`` or later, first applying the changes this replica has missed.

        Raises:
            psycopg.Error: PostgreSQL cannot say what changed; older prices are no answer.
        """
        if self._table.offer_version < offer_version:
            async with self._lock:
                if self._table.offer_version < offer_version:
                    await self._apply()
        return self._table

    async def _apply(self) -> None:
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(_CHANGES, [self._table.offer_version])).fetchall()
        offers = dict(self._table.offers)
        for row in rows:
            if row[1] is not None:
                offers[row[1]] = _offer(row)
        # A new table, not an altered one: an answer under way keeps the prices of one version.
        self._table = replace(self._table, offer_version=int(rows[0][0]), offers=offers)


def _offer(row: TupleRow) -> Offer:
    return Offer(None if row[7] else row[2], row[3], row[4], frozenset(row[5]), row[6])
