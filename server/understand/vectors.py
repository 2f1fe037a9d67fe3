"""Vectors of texts that no bundle carries: encoded once for the fleet, and kept in PostgreSQL by model and content hash."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import numpy as np
import structlog

from features.item_table import FloatArray
from server.database import Pool

_log = structlog.get_logger(__name__)
# Encoded before they are stored: whoever is stopped in between loses the work of these, some seconds.
_AT_ONCE = 200


class StoredVectors:
    """Whichever replica meets a text first encodes it; the bytes it stored are everybody's."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def of(self, model_version: str, texts: Mapping[str, str], encode: Callable[[str], FloatArray]) -> dict[str, FloatArray]:
        """Returns the vector of each text by its content hash.

        Args:
            model_version: of the model that encodes.
            texts: by content hash.
            encode: text to float32[d], run in a thread.
        """
        stored = await self._stored(model_version, sorted(texts))
        missing = iter([(key, text) for key, text in texts.items() if key not in stored])
        while chunk := list(islice(missing, _AT_ONCE)):
            _log.info("encoding texts the bundle does not carry", texts=len(chunk), model_version=model_version)
            encoded = await asyncio.to_thread(_encoded, chunk, encode)
            await self._store(model_version, encoded)
            # Read back: where two replicas encoded the same text, the first one's bytes are everybody's.
            stored |= await self._stored(model_version, sorted(encoded))
        return {key: np.frombuffer(stored[key], "<f4") for key in texts}

    async def _stored(self, model_version: str, hashes: Sequence[str]) -> dict[str, bytes]:
        query = "SELECT content_hash, vector FROM item_vectors WHERE model_version = %s AND content_hash = ANY(%s)"
        async with self._pool.connection() as connection:
            return dict(await (await connection.execute(query, [model_version, list(hashes)])).fetchall())

    async def _store(self, model_version: str, encoded: Mapping[str, FloatArray]) -> None:
        rows = [(model_version, key, vector.astype("<f4").tobytes()) for key, vector in sorted(encoded.items())]
        async with self._pool.connection() as connection, connection.cursor() as cursor:
            await cursor.executemany("INSERT INTO item_vectors VALUES (%s, %s, %s) ON CONFLICT DO NOTHING", rows)


def _encoded(chunk: Sequence[tuple[str, str]], encode: Callable[[str], FloatArray]) -> dict[str, FloatArray]:
    return {key: encode(text) for key, text in chunk}
