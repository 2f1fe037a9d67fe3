"""Feast's serialized values by the column: Arrow arrays in, arrays of exactly the bytes that Feast writes out.

A message per value costs more than everything else a materialization does (1 to 2 µs each, a million customers have 21 million);
a column is a handful of calls that run outside Python. Source: Feast, protos/feast/types/Value.proto, and how its
``type_map`` reads a data frame: NaN is no value, and a null inside a list is NaN among floats, else its type's zero.
"""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp

from features.layout import KINDS, LayoutError, entity_key

_MICROS = 1_000_000
# The wire types of the protobuf encoding; the list messages hold their elements in field 1 ("val"), numbers packed.
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_WIRE = {"int32_val": _VARINT, "int64_val": _VARINT, "bool_val": _VARINT, "double_val": _EIGHT_BYTES, "float_val": _FOUR_BYTES}
_ELEMENTS = b"\x0a"


def joined(*pieces: pa.Array | bytes) -> pa.Array:
    """Returns the pieces one after the other, row by row; a null piece makes the row null."""
    return pc.binary_join_element_wise(*(pa.scalar(piece) if isinstance(piece, bytes) else piece for piece in pieces), b"")


def binaries(sizes: np.ndarray, data: np.ndarray) -> pa.Array:
    """Returns (n,) binaries of ``sizes`` bytes each, cut from the bytes in ``data``."""
    offsets = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    return _cut(offsets, pa.py_buffer(np.ascontiguousarray(data)))


def encode_column(dtype: str, column: pa.Array) -> pa.Array:
    """Serializes a column as ``feast.types.Value`` messages; a null, or NaN outside a list, becomes an unset Value of no bytes.

    Args:
        dtype: the feature's Feast type as text; ``column`` has its Arrow type.
        column: (n,) values.

    Returns:
        (n,) binaries without nulls.
    """
    field, is_list = KINDS[dtype]
    if pa.types.is_floating(column.type) and pc.any(unset := pc.is_nan(column)).as_py():
        column = pc.if_else(unset, pa.scalar(None, column.type), column)
    content = _list(column) if is_list else _scalar(column)
    wire = _WIRE.get(field, _LENGTH)
    tag = _varint(Value.DESCRIPTOR.fields_by_name[field].number << 3 | wire)
    encoded = _sized(tag, content) if wire == _LENGTH else joined(tag, content)
    return pc.if_else(column.is_valid(), encoded, b"") if column.null_count else encoded


def encode_times(column: pa.Array) -> pa.Array:
    """Serializes (n,) event times as Timestamp messages; a time without a zone is UTC, as for Feast."""
    distinct = column.cast(pa.timestamp("us", column.type.tz)).dictionary_encode()  # a snapshot has one
    micros = distinct.dictionary.cast(pa.int64()).to_pylist()
    messages = [Timestamp(seconds=at // _MICROS, nanos=at % _MICROS * 1000).SerializeToString() for at in micros]
    return pa.array(messages, pa.binary()).take(distinct.indices)


def entity_keys(join_key: str, column: pa.Array, project: str) -> pa.Array:
    """Returns the Redis keys of (n,) entities: what ``entity_key`` gives each of them.

    Raises:
        LayoutError: an entity has no name.
    """
    if column.null_count:
        raise LayoutError(f"a row has no {join_key}")
    names = column.cast(pa.binary())
    sizes = pc.binary_length(names).to_numpy().astype("<u4")
    end = project.encode()
    start = entity_key(join_key, "", project).removesuffix(end)[:-4]  # up to the length of the name
    return joined(start, _fixed(sizes), names, end)


def _scalar(column: pa.Array) -> pa.Array:
    """Returns the bytes of each value, without its tag and length; those of a null are arbitrary."""
    if pa.types.is_string(column.type):
        return column.fill_null("").cast(pa.binary())
    if pa.types.is_boolean(column.type):
        return _fixed(column.fill_null(False).cast(pa.uint8()).to_numpy())
    numbers = column.fill_null(0).to_numpy()
    if pa.types.is_floating(column.type):
        return _fixed(numbers.astype(numbers.dtype.newbyteorder("<"), copy=False))
    return _varints(numbers)


def _list(column: pa.Array) -> pa.Array:
    """Returns the bytes of each list message, without its tag and length; those of a null are arbitrary."""
    flat = column.flatten()
    if pa.types.is_floating(flat.type):
        flat = flat.fill_null(math.nan)
    encoded = _scalar(flat)
    if pa.types.is_string(flat.type):
        encoded = _sized(_ELEMENTS, encoded)
    # Elements lie one after the other, so a list is the bytes between its first and the next list's first.
    ends = np.cumsum(pc.list_value_length(column).fill_null(0).to_numpy())
    lists = _cut(_offsets(encoded)[np.concatenate(([0], ends))], encoded.buffers()[2])
    if pa.types.is_string(flat.type):
        return lists
    framed = _sized(_ELEMENTS, lists)
    empty = pc.equal(pc.binary_length(lists), 0)
    return pc.if_else(empty, b"", framed) if pc.any(empty).as_py() else framed


def common_size(column: pa.Array) -> int | None:
    """Returns the size that all binaries have, None where they differ or there are none; that of numbers, or lists of as many, is one."""
    least, most = pc.min_max(pc.binary_length(column)).values()
    return least.as_py() if least == most else None


def _sized(tag: bytes, column: pa.Array) -> pa.Array:
    """Returns each binary with ``tag`` and its size as a varint before it."""
    size = common_size(column)
    if size is not None:
        return joined(tag + _varint(size), column)
    return joined(tag, _varints(pc.binary_length(column).to_numpy()), column)


def _varint(number: int) -> bytes:
    encoded: bytes = _varints(np.array([number]))[0].as_py()
    return encoded


def _varints(numbers: np.ndarray) -> pa.Array:
    """Returns (n,) integers as varints: seven bits a byte, lowest first, negative ones as 64-bit two's complement."""
    unsigned = numbers.astype(np.int64).view(np.uint64)
    width = max(1, -(-int(unsigned.max(initial=0)).bit_length() // 7))
    groups = unsigned[:, None] >> np.arange(0, 7 * width, 7, dtype=np.uint64)
    sizes = np.maximum((groups != 0).sum(axis=1), 1)
    places = np.arange(width)
    octets = (groups & np.uint64(0x7F)).astype(np.uint8) | ((places < sizes[:, None] - 1).astype(np.uint8) << 7)
    return binaries(sizes, octets[places < sizes[:, None]])


def _fixed(numbers: np.ndarray) -> pa.Array:
    """Returns (n,) numbers as the bytes they lie in memory as."""
    return binaries(np.full(len(numbers), numbers.dtype.itemsize), numbers)


def _offsets(column: pa.Array) -> np.ndarray:
    """Returns where each binary of ``column`` begins, and where the last ends."""
    if not len(column):
        return np.zeros(1, np.int32)
    return np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]


def _cut(offsets: np.ndarray, data: pa.Buffer) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, pa.py_buffer(np.ascontiguousarray(offsets, np.int32)), data])
