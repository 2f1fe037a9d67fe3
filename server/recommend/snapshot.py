"""A snapshot: one model over one index epoch, everything candidates and ranking need besides the customer."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import psycopg

from features.item_table import ItemTable, load_item_table
from features.retrieval import VectorArray, VectorIndex, indexed, stored_type
from features.signals import CollaborativeWeights, SignalConfig
from server.database import Pool
from server.errors import PreconditionError
from server.inference.model import LoadedModel
from server.understand.names import NO_NAMES, CatalogueNames
from server.understand.vectors import StoredVectors


@dataclass(frozen=True)
class Snapshot:
    """Immutable; equal (model_version, index_version) mean equal contents on every replica.

    Attributes:
        model: None while no model is active; then popularity alone orders items.
        table: the epoch's n items.
        vectors: unit item vectors, float32[n, d] or of a large catalogue float16[n, d] ([n, 0] without a model).
        collaborative: weights over the table's rows.
        index: of the vectors of a large catalogue.
        names: what the table's items, brands and categories are called.
    """

    model: LoadedModel | None
    table: ItemTable
    vectors: VectorArray
    collaborative: CollaborativeWeights
    index: VectorIndex | None = None
    names: CatalogueNames = NO_NAMES

    @property
    def model_version(self) -> str:
        """The model's version, empty when none is active."""
        return self.model.model_version if self.model else ""

    def require_model(self) -> LoadedModel:
        """Returns the model.

        Raises:
            PreconditionError: none is active.
        """
        if self.model is None:
            raise PreconditionError("no model is active; activate one first", reason="NO_ACTIVE_MODEL")
        return self.model

    @property
    def index_version(self) -> int:
        """The epoch."""
        return self.table.index_version

    @property
    def signals(self) -> SignalConfig:
        """Constants of the signals; defaults without a model."""
        return self.model.signals if self.model else SignalConfig()


class SnapshotBuilder:
    """Builds snapshots off the event loop. Vectors the bundle lacks are encoded once for the fleet and stored in PostgreSQL."""

    def __init__(self, pool: Pool, *, dsn: str) -> None:
        self._stored = StoredVectors(pool)
        self._dsn = dsn
        self._tables: dict[int, tuple[ItemTable, CatalogueNames]] = {}
        self._reading = asyncio.Lock()

    async def build(self, model: LoadedModel | None, index_version: int) -> Snapshot:
        """Returns the snapshot of ``model`` over an epoch."""
        table, names = await self._table(index_version)
        if model is None:
            return Snapshot(None, table, np.zeros((len(table), 0), np.float32), CollaborativeWeights.empty(len(table)), names=names)
        vectors, missing, collaborative = await asyncio.to_thread(_of_bundle, model, table)
        if missing:
            await self._fill_encoded(vectors, model, table, missing)
        return Snapshot(model, table, vectors, collaborative, await asyncio.to_thread(indexed, vectors), names)

    def keep(self, index_versions: Collection[int]) -> None:
        """Lets go of the tables of all other epochs."""
        self._tables = {version: read for version, read in self._tables.items() if version in index_versions}

    async def _table(self, index_version: int) -> tuple[ItemTable, CatalogueNames]:
        """Reads each epoch's table once: several models over one epoch share it."""
        async with self._reading:
            if index_version not in self._tables:
                self._tables[index_version] = await asyncio.to_thread(self._read_table, index_version)
            return self._tables[index_version]

    def _read_table(self, index_version: int) -> tuple[ItemTable, CatalogueNames]:
        with psycopg.connect(self._dsn, connect_timeout=3) as connection:
            table = load_item_table(connection, index_version)
        return table, CatalogueNames.of(table)

    async def _fill_encoded(self, vectors: VectorArray, model: LoadedModel, table: ItemTable, rows: Sequence[int]) -> None:
        texts = {table.content_hashes[row]: table.texts[row] for row in rows}
        encoded = await self._stored.of(model.model_version, texts, model.item_vector)
        for row in rows:
            vectors[row] = encoded[table.content_hashes[row]]


def _of_bundle(model: LoadedModel, table: ItemTable) -> tuple[VectorArray, list[int], CollaborativeWeights]:
    """Returns what the bundle knows of the table's items: vectors, the rows it has none for, and weights."""
    vectors = np.zeros((len(table), model.manifest.vector_size), stored_type(len(table)))
    missing = _fill_from_bundle(vectors, model, table)
    return vectors, missing, model.collaborative.remapped(model.item_rows, table)


def _fill_from_bundle(vectors: VectorArray, model: LoadedModel, table: ItemTable) -> list[int]:
    """Copies the bundle's vectors of items whose description has not changed; returns the rows left."""
    missing = []
    for row, item_id in enumerate(table.ids):
        known = model.item_rows.get(item_id)
        if known is None or model.item_hashes[known] != table.content_hashes[row]:
            missing.append(row)
        else:
            vectors[row] = model.item_vectors[known]
    return missing
