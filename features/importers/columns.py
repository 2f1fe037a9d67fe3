"""Source columns to typed columns, a batch at a time: text, numbers, times, choices and event ids."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from features.importers.fields import ChoiceField, NumberField, TextField, TimeField

_UUID = r"^[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}$"
_SEPARATOR = "\x1f"
_EARLIEST, _LATEST = pd.Timestamp("1970-01-01", tz="UTC"), pd.Timestamp("2200-01-01", tz="UTC")


@dataclass(frozen=True)
class Column:
    """A converted column.

    Attributes:
        values: one value a row, null where missing or invalid; shape ``[rows]``.
        invalid: rows that held something which is not such a value; shape ``[rows]``, bool.
    """

    values: pa.Array
    invalid: np.ndarray


def source_column(rows: pa.Table, name: str) -> pa.Array:
    """Returns a source column, all null where this batch lacks it (JSON lines)."""
    if name not in rows.column_names:
        return pa.nulls(len(rows))
    column = rows.column(name).combine_chunks()
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def as_text(column: pa.Array) -> pa.Array:
    """Returns a column as trimmed text, null where blank; whole numbers are written without a fraction."""
    if pa.types.is_floating(column.type):
        column = _float_text(column)
    elif pa.types.is_nested(column.type):
        column = pa.array([None if v is None else json.dumps(v, default=str, ensure_ascii=False) for v in column.to_pylist()], pa.string())
    elif not pa.types.is_string(column.type):
        column = pc.cast(column, pa.string())
    trimmed = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(trimmed, ""), None, trimmed)


def _float_text(column: pa.Array) -> pa.Array:
    """Writes floats as text: pandas turns integer ids with gaps into floats, so 17850.0 is 17850."""
    whole = pc.and_(pc.equal(pc.round(column), column), pc.less(pc.abs(column), 2**53))
    integers = pc.cast(pc.cast(pc.if_else(whole, column, 0), pa.int64()), pa.string())
    text = pc.if_else(whole, integers, pc.cast(column, pa.string()))
    return pc.if_else(pc.is_nan(column), None, text)


def text_column(rows: pa.Table, spec: TextField | None) -> pa.Array:
    """Returns the text ``spec`` describes, null where missing."""
    if spec is None:
        return pa.nulls(len(rows), pa.string())
    if spec.value is not None:
        return pa.array([spec.value] * len(rows), pa.string())
    names = [spec.column] if spec.column else list(spec.columns)
    text = as_text(source_column(rows, names[0]))
    for name in names[1:]:  # not null_handling="skip" at once: pyarrow 26 loses rows where every part is null
        more = as_text(source_column(rows, name))
        text = pc.coalesce(pc.binary_join_element_wise(text, more, spec.separator), text, more)
    if spec.integer:
        text = pc.replace_substring_regex(text, r"\.0+$", "")
    for old, new in spec.replace.items():
        text = pc.replace_substring(text, old, new)
    return as_text(text)


def number_column(rows: pa.Table, spec: NumberField | None) -> Column:
    """Returns the float64 numbers ``spec`` describes; NaN and infinities are invalid."""
    if spec is None or spec.column is None:
        value = None if spec is None else spec.value
        return Column(pa.array([value] * len(rows), pa.float64()), np.zeros(len(rows), bool))
    values, invalid = _numbers(rows, spec.column)
    if spec.multiply:
        factors, bad = _numbers(rows, spec.multiply)
        values, invalid = np.round(values * factors, 6), invalid | bad  # 6 × 2.55 is 15.3, in millionths as all money is
    values = np.abs(values) if spec.absolute else values
    invalid = invalid | np.isinf(values)
    return Column(pa.array(np.where(invalid, np.nan, values), pa.float64(), from_pandas=True), invalid)


def _numbers(rows: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values, NaN where missing or invalid; invalid)."""
    column = source_column(rows, name)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        given = pc.cast(column, pa.float64(), safe=False)
        values = given.to_numpy(zero_copy_only=False)
        return values, given.is_valid().to_numpy(zero_copy_only=False) & ~np.isfinite(values)
    text = as_text(column).to_pandas()
    values = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
    return values, text.notna().to_numpy() & ~np.isfinite(values)


def time_column(rows: pa.Table, spec: TimeField | None) -> Column:
    """Returns UTC times in microseconds; before 1970 or from 2200 on is invalid."""
    if spec is None:
        return Column(pa.nulls(len(rows), pa.timestamp("us", "UTC")), np.zeros(len(rows), bool))
    column = source_column(rows, spec.column)
    given = as_text(column).is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        times = pd.Series(column.to_pandas(date_as_object=False))
    elif spec.unit or pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        times = pd.to_datetime(pd.Series(_numbers(rows, spec.column)[0]), unit=spec.unit or "s", utc=True, errors="coerce")
    else:
        text = as_text(column).to_pandas()
        times = pd.to_datetime(text, format=spec.format or "ISO8601", errors="coerce", utc=_has_zone(text, spec))
    times = _in_utc(times, spec.timezone)
    inside = ((times >= _EARLIEST) & (times < _LATEST)).to_numpy()
    times = times.where(inside)
    return Column(pa.array(times.astype("datetime64[us, UTC]"), pa.timestamp("us", "UTC"), from_pandas=True), given & ~inside)


def _has_zone(text: pd.Series, spec: TimeField) -> bool:
    """Tells whether times written as text carry their own zone; one file writes all of them alike."""
    if spec.format:
        return "%z" in spec.format
    return bool(text.str.contains(r"(?:Z|z|[+-]\d{2}:?\d{2})$", na=False).any())


def _in_utc(times: pd.Series, zone: str) -> pd.Series:
    if times.dt.tz is not None:
        return times.dt.tz_convert("UTC")
    return times.dt.tz_localize(zone, ambiguous="NaT", nonexistent="NaT").dt.tz_convert("UTC")


def choice_column(rows: pa.Table, spec: ChoiceField) -> pa.Array:
    """Returns the name ``spec`` gives each row, null where it gives none."""
    if spec.column is None:
        return pa.array([spec.value] * len(rows), pa.string())
    encoded = as_text(source_column(rows, spec.column)).dictionary_encode()
    names = pa.array([_choose(key, spec) for key in encoded.dictionary.to_pylist()], pa.string())
    chosen = names.take(encoded.indices)
    return pc.fill_null(chosen, spec.default) if spec.default else chosen


def _choose(key: str, spec: ChoiceField) -> str | None:
    if spec.shares:
        return by_share(key, spec.shares)
    if spec.prefixes:
        return next((name for prefix, name in spec.prefixes.items() if key.startswith(prefix)), None)
    return spec.map.get(key) if spec.map else key


def by_share(key: str, shares: Mapping[str, float]) -> str:
    """Returns the name a key falls to, so that names get their share of all keys and a key always the same name.

    The first 8 bytes of the key's SHA-256, big-endian, over 2**64 are a point in [0, 1); the names' shares, in the order
    written, cut that interval.
    """
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    names = [name for name, share in shares.items() if share > 0]
    edges = accumulate(shares[name] for name in names[:-1])
    return next((name for name, edge in zip(names, edges, strict=False) if point < edge), names[-1])


def uuid_column(rows: pa.Table, name: str) -> Column:
    """Returns a column of UUIDs as lower-case text."""
    text = as_text(source_column(rows, name))
    fits = pc.match_substring_regex(text, _UUID)
    values = pc.utf8_lower(pc.if_else(fits, text, None))
    return Column(values, pc.fill_null(pc.invert(fits), False).to_numpy(zero_copy_only=False))


def hashed_ids(columns: Sequence[pa.Array], dataset: str) -> pa.Array:
    """Returns a version 5 UUID of each row's values: the same row of the same data set always gets the same id."""
    parts = [as_text(column) for column in columns]
    keys: list[str] = pc.binary_join_element_wise(*parts, _SEPARATOR, null_handling="replace", null_replacement="").to_pylist()
    namespace = uuid5(NAMESPACE_URL, f"concord:import:{dataset}").bytes
    return pa.array([_uuid5_hex(namespace, key) for key in keys], pa.string())


def _uuid5_hex(namespace: bytes, key: str) -> str:
    """Returns ``uuid5(namespace, key).hex`` without the object: four times as fast, and there are millions."""
    digits = hashlib.sha1(namespace + key.encode(), usedforsecurity=False).hexdigest()
    return f"{digits[:12]}5{digits[13:16]}{_VARIANT[digits[16]]}{digits[17:32]}"


_VARIANT: dict[str, Any] = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
