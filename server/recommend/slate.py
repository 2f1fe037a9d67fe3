"""The slate: the ranked answer to (customer, surface, context) under its versions, as values and as the bytes in Redis."""

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntFlag
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.item_table import FloatArray, IntArray

_HEADER = struct.Struct("<BBHq")  # layout, flags, item count, as_of in microseconds
_LAYOUT = 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class SlateFlag(IntFlag):
    """What the reader should know of how a slate was made."""

    PROFILE_STALE = 1
    NEWCOMER = 2
    NO_MODEL = 4
    RECOMMENDED_INSTEAD = 8  # of a search that found nothing


class Place(NamedTuple):
    """Where a slate is shown: the surface and its context items, in order; or what was searched for (a normalized query)."""

    surface: str
    context_item_ids: tuple[str, ...] = ()
    query: str = ""

    def slot(self, model_version: str, index_version: int) -> str:
        """Returns the field of the customer's slates hash that holds the slate under these versions.

        Items are told apart as JSON tells strings apart: with a separator between them, an id that holds it would be two ids.
        """
        return f"{self.surface}|{self.digest}|{model_version}|{index_version}"

    @property
    def digest(self) -> str:
        """Stands for context items or query in the slot; empty without either. A query's is no other's: it begins with a q."""
        if self.query:
            return f"q{hashlib.sha256(self.query.encode()).hexdigest()[:16]}"
        return hashlib.sha256(json.dumps(self.context_item_ids).encode()).hexdigest()[:16] if self.context_item_ids else ""


@dataclass(frozen=True)
class Slate:
    """A ranked answer. Rows refer to the item table of its index_version.

    Attributes:
        slate_id: content-addressed: equal ids mean equal customer, place, versions, time, order and scores.
        user_version: what it was computed from.
        as_of: when the request that computed it was made (Redis's clock).
        expires_at: until when it stands.
        flags: see SlateFlag.
        rows: int32[k] item rows, best first; scores: float32[k]; sources: uint8[k] bit sets of Source.
    """

    slate_id: str
    user_version: int
    as_of: datetime
    expires_at: datetime
    flags: SlateFlag
    rows: IntArray
    scores: FloatArray
    sources: npt.NDArray[np.uint8]

    def order_id(self, slot: str) -> str:
        """Returns the name of its order and scores: equal for slates of a slot that show the same, whatever version and time."""
        return hashlib.sha256(b"\x1f".join((slot.encode(), self.rows.tobytes(), self.scores.tobytes()))).hexdigest()[:32]


def encode_payload(rows: IntArray, scores: FloatArray, sources: npt.NDArray[np.uint8], *, flags: SlateFlag, as_of: datetime) -> bytes:
    """Returns the bytes that are committed: 12 bytes of header and 9 bytes an item."""
    header = _HEADER.pack(_LAYOUT, int(flags), len(rows), _micros(as_of))
    return header + rows.astype("<i4").tobytes() + scores.astype("<f4").tobytes() + sources.tobytes()


def standing_of(payload: bytes, user_version: int, as_of: datetime, *, ttl_seconds: float) -> bytes:
    """Returns the bytes a payload would stand as in Redis, for a slate that cannot be committed there."""
    return b"%d:%d:%b" % (user_version, (_micros(as_of) // 1000) + int(ttl_seconds * 1000), payload)


def version_of(standing: bytes) -> int:
    """Returns the user_version of what Redis holds."""
    return int(standing.partition(b":")[0])


@lru_cache(maxsize=4_096)
def decode_slate(standing: bytes, user_id: str, slot: str) -> Slate | None:
    """Reads what Redis holds (``<user_version>:<expires ms>:<payload>``); None when it is not of a layout this release knows.

    Remembered: a slate is read once for every answer that shows it, and decoding takes 7 µs.
    """
    version, expires, payload = standing.split(b":", 2)
    if len(payload) < _HEADER.size or payload[0] != _LAYOUT:
        return None
    _, flags, count, as_of = _HEADER.unpack_from(payload)
    parts: Sequence[int] = [_HEADER.size, _HEADER.size + 4 * count, _HEADER.size + 8 * count]
    if len(payload) != parts[2] + count:
        return None
    digest = hashlib.sha256(b"\x1f".join((user_id.encode(), slot.encode(), version, payload)))
    return Slate(
        slate_id=digest.hexdigest()[:32],
        user_version=int(version),
        as_of=_EPOCH + timedelta(microseconds=as_of),
        expires_at=_EPOCH + timedelta(milliseconds=int(expires)),
        flags=SlateFlag(flags),
        rows=np.frombuffer(payload, "<i4", count, parts[0]),
        scores=np.frombuffer(payload, "<f4", count, parts[1]),
        sources=np.frombuffer(payload, np.uint8, count, parts[2]),
    )


def _micros(at: datetime) -> int:
    """Whole arithmetic: as floating point, times after 2100 lose their last microsecond."""
    return (at - _EPOCH) // timedelta(microseconds=1)
