"""Values by the column: the bytes are those of one message per value, whatever the type."""

import math
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from features.columns import encode_column, encode_times, entity_keys
from features.layout import KINDS, LayoutError, encode_value, entity_key

ARROW = {
    "Int32": pa.int32(),
    "Int64": pa.int64(),
    "Float32": pa.float32(),
    "Float64": pa.float64(),
    "String": pa.string(),
    "Bool": pa.bool_(),
}
# Every length of a varint, both ends of every type, and texts whose length takes one, two and three bytes to say.
INTEGERS = sorted({sign * 2**power + off for sign in (1, -1) for power in range(63) for off in (-1, 0)} | {2**63 - 1, -(2**63)})
FLOATS = [0.0, -0.0, 1.5, -2.25, 5e-324, 1.7e308, math.inf, -math.inf]
SAMPLES: dict[str, list[Any]] = {
    "Int32": [value for value in INTEGERS if -(2**31) <= value < 2**31],
    "Int64": INTEGERS,
    "Float32": [float(np.float32(value)) for value in FLOATS if abs(value) < 1e38 or math.isinf(value)],
    "Float64": FLOATS,
    "String": ["", "a", "zoë", "一致" * 25, "x" * 127, "x" * 128, "ü" * 20_000],
    "Bool": [True, False],
}


def arrow_type(dtype: str) -> pa.DataType:
    element = dtype.removeprefix("Array(").removesuffix(")")
    return ARROW[dtype] if element == dtype else pa.list_(ARROW[element])


def values_of(dtype: str, count: int) -> list[Any]:
    """Returns values with a null every third or so; of lists some empty, some of one element and some of many."""
    rng = random.Random(f"{dtype}{count}")
    element = dtype.removeprefix("Array(").removesuffix(")")

    def one() -> Any:
        return rng.choice(SAMPLES[element]) if element == dtype else rng.choices(SAMPLES[element], k=rng.choice([0, 1, 3, 40]))

    return [None if rng.random() < 0.3 else one() for _ in range(count)]


@pytest.mark.parametrize(("dtype", "count"), [(dtype, count) for dtype in KINDS for count in (0, 1, 300)])
def test_a_column_has_the_bytes_of_its_values(dtype: str, count: int) -> None:
    values = values_of(dtype, count)
    column = pa.array(values, arrow_type(dtype))
    expected = [encode_value(dtype, value) for value in values]
    assert encode_column(dtype, column).to_pylist() == expected
    assert encode_column(dtype, column[count // 2 :]).to_pylist() == expected[count // 2 :]  # a view of part of another column
    assert encode_column(dtype, pa.array([None] * count, column.type)).to_pylist() == [b""] * count


@pytest.mark.parametrize("dtype", [dtype for dtype in KINDS if dtype in SAMPLES])
def test_every_sample_survives(dtype: str) -> None:
    samples = SAMPLES[dtype]
    assert encode_column(dtype, pa.array(samples, ARROW[dtype])).to_pylist() == [encode_value(dtype, value) for value in samples]


def test_what_is_no_number_is_no_value() -> None:
    """As Feast's own reading of a data frame has it; in a list it stays."""
    column = pa.array([math.nan, 1.0, None], pa.float64())
    assert encode_column("Float64", column).to_pylist() == [b"", encode_value("Float64", 1.0), b""]
    listed = encode_column("Array(Float64)", pa.array([[math.nan, 1.0]], pa.list_(pa.float64())))
    assert listed.to_pylist() == [encode_value("Array(Float64)", [math.nan, 1.0])]


def test_a_null_inside_a_list_is_what_feast_makes_of_it() -> None:
    for dtype, zero in (("Array(String)", ""), ("Array(Int64)", 0), ("Array(Float32)", math.nan), ("Array(Float64)", math.nan)):
        column = pa.array([[None], [None, None]], arrow_type(dtype))
        assert encode_column(dtype, column).to_pylist() == [encode_value(dtype, [zero]), encode_value(dtype, [zero, zero])]


def test_times_have_the_bytes_of_a_timestamp() -> None:
    start = datetime(2026, 3, 1, tzinfo=UTC)
    times = [
        start,
        start + timedelta(microseconds=1),
        start,
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC),
    ]

    def message(at: datetime) -> bytes:
        stamp = Timestamp()
        stamp.FromDatetime(at)
        return stamp.SerializeToString()

    for unit, of in (("us", times), ("s", [at.replace(microsecond=0) for at in times])):
        assert encode_times(pa.array(of, pa.timestamp(unit, "UTC"))).to_pylist() == [message(at) for at in of]
        naive = [at.replace(tzinfo=None) for at in of]
        assert encode_times(pa.array(naive, pa.timestamp(unit))).to_pylist() == [message(at) for at in of]


def test_keys_are_those_of_the_layout() -> None:
    names = ["a", "", "zoë", "一致", "x" * 300]
    assert entity_keys("user_id", pa.array(names), "shop").to_pylist() == [entity_key("user_id", name, "shop") for name in names]
    with pytest.raises(LayoutError, match="no user_id"):
        entity_keys("user_id", pa.array(["a", None]), "shop")
