"""The bytes of a slate: exact to the microsecond and the bit, refused when cut, told apart by everything they depend on."""

from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from server.recommend.slate import Place, Slate, SlateFlag, decode_slate, encode_payload

NONE = SlateFlag(0)
NOW = datetime(2026, 3, 1, 12, 30, 15, 123456, UTC)
# Any float32 at all, infinities and NaN payloads included: bits are bits.
_SCORES = st.lists(st.integers(0, 2**32 - 1), max_size=256).map(lambda bits: np.array(bits, np.uint32).view(np.float32))
_TIMES = st.datetimes(datetime(2000, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds the zone


def payload(rows: Any = (3, 1, 2), scores: Any = (0.5, 0.25, 0.0), *, flags: SlateFlag = NONE, as_of: datetime = NOW) -> bytes:
    sources = np.arange(len(rows), dtype=np.uint8)
    return encode_payload(np.array(rows, np.int32), np.array(scores, np.float32), sources, flags=flags, as_of=as_of)


def standing(content: bytes, *, version: int = 7, expires_ms: int = 1_800_000_000_123) -> bytes:
    return f"{version}:{expires_ms}:".encode() + content


def decoded(raw: bytes, user_id: str = "u", slot: str = "home||m1|1") -> Slate:
    slate = decode_slate(raw, user_id, slot)
    assert slate is not None
    return slate


@given(_SCORES, _TIMES, st.integers(0, 2**53), st.integers(0, 7).map(SlateFlag), st.integers(0, 4_000_000_000_000))
def test_every_slate_comes_back_bit_for_bit(scores: Any, as_of: datetime, version: int, flags: SlateFlag, expires: int) -> None:
    rows, sources = np.arange(len(scores), dtype=np.int32)[::-1], np.arange(len(scores)).astype(np.uint8)
    raw = standing(encode_payload(rows, scores, sources, flags=flags, as_of=as_of), version=version, expires_ms=expires)
    slate = decoded(raw)
    assert (slate.user_version, slate.as_of, slate.flags) == (version, as_of, flags)
    assert round(slate.expires_at.timestamp() * 1000) == expires
    assert (slate.rows.tolist(), slate.scores.tobytes(), slate.sources.tolist()) == (rows.tolist(), scores.tobytes(), sources.tolist())
    assert (slate.rows.dtype.str, slate.scores.dtype.str, slate.sources.dtype.str) == ("<i4", "<f4", "|u1")


def test_the_layout_is_fixed() -> None:
    """Written by one release, read by the next: 12 bytes of header, then 9 bytes an item, little-endian."""
    at = datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    written = payload((258,), (1.0,), flags=SlateFlag.NEWCOMER, as_of=at)
    assert written == bytes.fromhex("01 02 0100 40420f0000000000 02010000 0000803f 00")


def test_bytes_cut_or_grown_anywhere_are_no_slate() -> None:
    whole = payload()
    for length in range(len(whole)):
        assert decode_slate(standing(whole[:length]), "u", "slot") is None, length
    assert decode_slate(standing(whole + b"\0"), "u", "slot") is None
    assert decode_slate(standing(bytes([9]) + whole[1:]), "u", "slot") is None


def test_a_payload_may_hold_any_byte() -> None:
    """A colon inside it must not be taken for the end of the expiry."""
    rows = [int.from_bytes(b"::::", "little")] * 3
    assert decoded(standing(payload(rows))).rows.tolist() == rows


def test_equal_slates_have_equal_ids_and_others_others() -> None:
    first = decoded(standing(payload()))
    assert decoded(standing(payload())).slate_id == first.slate_id
    assert len(first.slate_id) == 32
    # When it expires is no part of what it says.
    assert decoded(standing(payload(), expires_ms=5)).slate_id == first.slate_id
    others = [
        decoded(standing(payload()), user_id="v"),
        decoded(standing(payload()), slot="cart||m1|1"),
        decoded(standing(payload(), version=8)),
        decoded(standing(payload((3, 2, 1)))),
        decoded(standing(payload(scores=(0.5, 0.25, 1e-38)))),
        decoded(standing(payload(flags=SlateFlag.PROFILE_STALE))),
        decoded(standing(payload(as_of=NOW.replace(microsecond=0)))),
    ]
    ids = [slate.slate_id for slate in (first, *others)]
    assert all(a != b for a, b in combinations(ids, 2))


def test_a_slot_names_the_place_and_the_versions() -> None:
    assert Place("home").slot("m1", 4) == "home||m1|4"
    assert Place("home").slot("", 0) == "home|||0"
    assert Place("product", ("a",)).slot("m1", 4).startswith("product|")
    assert len(Place("product", tuple("abcdefgh") * 9).slot("m1", 4)) < 60


@given(st.lists(st.lists(st.text(st.sampled_from('ab\x1f\0|", '), min_size=1, max_size=3), max_size=3).map(tuple), min_size=2, unique=True))
def test_no_item_id_can_pass_for_two(contexts: Any) -> None:
    contexts = [*contexts, ("a", "b"), ("a\x1fb",)]
    assert len({Place("product", context).slot("m1", 1) for context in contexts}) == len(set(contexts))
