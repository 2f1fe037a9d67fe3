"""Feast's Redis layout: values that come back, statuses told apart, and views that cannot be stored refused."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import pytest
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.protos.feast.core.FeatureView_pb2 import FeatureView as FeatureViewProto
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import VALUE_TYPES_TO_FEAST_TYPES, Array, Bool, Float32, Float64, Int32, Int64, String, UnixTimestamp
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from features.activity import ACTIVITY_VIEW, PROFILE_VIEW, UserStateCodec, activity_of, profile_of
from features.layout import (
    LayoutError,
    Status,
    ViewLayout,
    column_decoder,
    decode_timestamp,
    decode_value,
    dtype_of,
    encode_timestamp,
    encode_value,
    entity_key,
    hash_field,
    layouts_of,
    view_layout,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TYPES: dict[str, Any] = {
    "Int32": st.integers(-(2**31), 2**31 - 1),
    "Int64": st.integers(-(2**63), 2**63 - 1),
    "Float32": st.floats(width=32, allow_nan=False),
    "Float64": st.floats(allow_nan=False),
    "String": st.text(st.characters(exclude_categories=("Cs",))),
    "Bool": st.booleans(),
}
TYPES |= {f"Array({name})": st.lists(TYPES[name]) for name in ("Int64", "Float32", "Float64", "String")}
VALUES = st.sampled_from(sorted(TYPES)).flatmap(lambda dtype: st.tuples(st.just(dtype), st.none() | TYPES[dtype]))


def view(name: str = "v", *, ttl: timedelta = timedelta(0), keys: int = 1, online: bool = True, **schema: Any) -> FeatureViewProto:
    """A view as Feast registers it."""
    entities = [Entity(name=f"e{k}", join_keys=[f"e{k}_id"], value_type=ValueType.STRING) for k in range(keys)]
    columns = [Field(name=f"e{k}_id", dtype=String) for k in range(keys)] + [Field(name=n, dtype=t) for n, t in schema.items()]
    source = FileSource(path="nowhere.parquet", timestamp_field="t")
    return FeatureView(name=name, entities=entities, schema=columns, source=source, ttl=ttl, online=online).to_proto()


def layout(ttl: timedelta = timedelta(0)) -> ViewLayout:
    return view_layout(view(ttl=ttl, count=Int64, names=Array(String)))


def read(stored: dict[bytes, bytes], of: ViewLayout, now: datetime = NOW) -> dict[str, tuple[Any, Status, datetime | None]]:
    return {n: (v.value, v.status, v.event_timestamp) for n, v in of.decode([stored.get(f) for f in of.hash_fields], now).items()}


@given(VALUES)
def test_every_value_comes_back(pair: tuple[str, Any]) -> None:
    dtype, value = pair
    assert decode_value(encode_value(dtype, value)) == value


@given(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
    st.sampled_from(["user_id", "item_id", "é"]),
    st.sampled_from(["concord", "店"]),
)
def test_an_entity_has_the_key_that_feast_gives_it(value: str, join_key: str, project: str) -> None:
    feasts = _redis_key(project, EntityKey(join_keys=[join_key], entity_values=[Value(string_val=value)]))
    assert entity_key(join_key, value, project) == feasts


@given(VALUES)
def test_a_value_reads_as_protobuf_reads_it(pair: tuple[str, Any]) -> None:
    data = encode_value(*pair)
    message = Value.FromString(data)
    kind = message.WhichOneof("val")
    value = None if kind is None else getattr(message, kind)
    assert repr(decode_value(data)) == repr(list(value.val) if hasattr(value, "val") else value)


@given(st.datetimes(timezones=st.just(UTC) | st.just(timezone(timedelta(hours=-5, minutes=-30)))))
def test_a_time_has_the_bytes_that_protobuf_gives_it(moment: datetime) -> None:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    assert encode_timestamp(moment) == stamp.SerializeToString()
    assert decode_timestamp(encode_timestamp(moment)) == moment


@given(
    st.sampled_from(sorted(TYPES)), st.sampled_from(sorted(TYPES)).flatmap(lambda dtype: st.tuples(st.just(dtype), st.lists(TYPES[dtype])))
)
def test_a_column_reads_as_its_values_do_one_by_one(declared: str, stored: tuple[str, list[Any]]) -> None:
    """Short forms are read without a message, whatever type the column was written with before."""
    column = [encode_value(stored[0], value) for value in stored[1]]
    assert repr(column_decoder(declared)(column)) == repr([decode_value(data) for data in column])


@given(st.lists(st.lists(st.integers(0, 140) | st.integers(-(2**63), 2**63 - 1), max_size=140)), st.binary(max_size=8))
def test_lists_of_small_numbers_read_as_protobuf_reads_them(values: list[list[int]], tail: bytes) -> None:
    """Around 127, where a number takes a second byte, and around 125 of them, where the length does; and packed in another way."""
    unpacked = Value.FromString(b"\x72\x04\x08\x05\x08\x07")  # each number under a tag of its own
    assert list(unpacked.int64_list_val.val) == [5, 7]
    stored = [encode_value("Array(Int64)", value) for value in values]
    stored += [b"\x72\x04\x08\x05\x08\x07", b"\x72\x00", encode_value("Int64", 5), encode_value("String", tail.hex())]
    assert column_decoder("Array(Int64)")(stored) == [decode_value(data) for data in stored]
    assert column_decoder("Array(Int64)")(stored)[: len(values)] == values


@given(st.sampled_from(sorted(TYPES)).flatmap(lambda dtype: st.tuples(st.just(dtype), st.lists(st.none() | TYPES[dtype]))))
def test_a_column_keeps_its_gaps(stored: tuple[str, list[Any]]) -> None:
    """One that is not there, or is there and null."""
    dtype, values = stored
    unset = [encode_value(dtype, value) for value in values]
    absent = [None if value is None else data for value, data in zip(values, unset, strict=True)]
    assert repr(column_decoder(dtype)(absent)) == repr(column_decoder(dtype)(unset)) == repr([decode_value(data) for data in unset])


@pytest.mark.parametrize("number", [0, 1, 127, 128, 1023, 1024, 2**14 - 1, 2**14, -1])
def test_whole_numbers_at_the_bounds_of_the_short_forms_come_back(number: int) -> None:
    assert encode_value("Int64", number) == Value(int64_val=number).SerializeToString()
    assert column_decoder("Int64")([encode_value("Int64", number)]) == [number]


@pytest.mark.parametrize("text", ["x" * length for length in (0, 1, 126, 127, 128, 129)] + ["é" * 63, "é" * 64])
def test_texts_at_the_bounds_of_the_short_form_come_back(text: str) -> None:
    assert column_decoder("String")([encode_value("String", text)]) == [text]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17])
def test_lists_of_doubles_at_the_bounds_of_the_short_form_come_back(count: int) -> None:
    numbers = [k / 7 for k in range(count)]
    assert column_decoder("Array(Float64)")([encode_value("Array(Float64)", numbers)]) == [numbers]


def test_a_list_that_was_read_belongs_to_its_reader() -> None:
    data = encode_value("Array(Float64)", [0.5])
    first, second = column_decoder("Array(Float64)")([data, data])
    first.append(1.0)
    assert second == column_decoder("Array(Float64)")([data])[0] == [0.5]


def test_entities_of_one_view_are_told_apart() -> None:
    """Never written, one value lacking, stale: each by its own fields."""
    hourly = layout(timedelta(hours=1))
    rows = [
        hourly.encode({"count": 5, "names": ["a"]}, NOW),
        {},
        hourly.encode({"count": None, "names": []}, NOW),
        hourly.encode({"count": 7, "names": ["b"]}, NOW - timedelta(hours=2)),
        {hash_field("v:count"): encode_value("Int64", 9)},
    ]
    (count, names), ages = hourly.columns([[row.get(name) for row in rows] for name in hourly.hash_fields], NOW)
    assert count == [5, None, None, 7, None]
    assert names == [["a"], None, [], ["b"], None]
    assert ages.statuses == [Status.PRESENT, Status.MISSING, Status.PRESENT, Status.STALE, Status.MISSING]
    assert ages.event_timestamps == [NOW, None, NOW, NOW - timedelta(hours=2), None]


def test_a_part_of_a_view_has_the_fields_of_the_whole() -> None:
    whole = layout()
    part = whole.only(["names"])
    assert (part.features, part.hash_fields) == (("names",), (_mmh3("v:names"), b"_ts:v"))
    stored = whole.encode({"count": 5, "names": ["a"]}, NOW)
    assert read(stored, part) == {"names": (["a"], Status.PRESENT, NOW)}


def test_zero_and_empty_are_values_and_none_is_not() -> None:
    """A count of 0 must not read as missing, nor an empty list."""
    assert decode_value(encode_value("Int64", 0)) == 0
    assert decode_value(encode_value("String", "")) == ""
    assert decode_value(encode_value("Bool", False)) is False
    assert decode_value(encode_value("Array(String)", [])) == []
    assert encode_value("Int64", None) == b""


def test_a_version_has_the_bytes_the_redis_script_reads() -> None:
    """WRITE_STATE compares versions inside the serialized Value: tag 0x20, then a varint."""
    assert encode_value("Int64", 0) == b"\x20\x00"
    assert encode_value("Int64", 300) == b"\x20\xac\x02"


def test_bytes_are_feasts_own() -> None:
    stored = layout().encode({"count": 5, "names": ["a", "b"]}, NOW)
    assert set(stored) == {b"_ts:v", hash_field("v:count"), hash_field("v:names")}
    assert Value.FromString(stored[hash_field("v:count")]).int64_val == 5
    assert list(Value.FromString(stored[hash_field("v:names")]).string_list_val.val) == ["a", "b"]


def test_present_missing_and_stale_are_told_apart() -> None:
    hourly = layout(timedelta(hours=1))
    stored = hourly.encode({"count": 5, "names": None}, NOW)
    assert read(stored, hourly) == {"count": (5, Status.PRESENT, NOW), "names": (None, Status.MISSING, NOW)}
    assert read(stored, hourly, NOW + timedelta(hours=1))["count"][1] is Status.PRESENT
    assert read(stored, hourly, NOW + timedelta(hours=1, microseconds=1)) == {
        "count": (5, Status.STALE, NOW),
        "names": (None, Status.MISSING, NOW),
    }
    assert read({}, hourly) == {"count": (None, Status.MISSING, None), "names": (None, Status.MISSING, None)}
    del stored[hash_field("v:count")]
    assert read(stored, hourly)["count"] == (None, Status.MISSING, NOW)


def test_without_a_time_to_live_nothing_grows_stale() -> None:
    stored = layout().encode({"count": 5, "names": []}, datetime(1999, 1, 1, tzinfo=UTC))
    assert read(stored, layout())["count"][1] is Status.PRESENT


def test_a_view_says_its_types_in_order() -> None:
    of = view_layout(view("all", a=Int32, b=Int64, c=Float32, d=Float64, e=String, f=Bool, g=Array(Int64), h=Array(Float32)))
    assert of.join_key == "e0_id"
    assert of.features == tuple("abcdefgh")
    assert of.dtypes == ("Int32", "Int64", "Float32", "Float64", "String", "Bool", "Array(Int64)", "Array(Float32)")
    assert of.hash_fields == (*of.fields, b"_ts:all")


def test_what_cannot_be_stored_is_refused_by_name() -> None:
    with pytest.raises(LayoutError, match="pairs: 2 join keys"):
        view_layout(view("pairs", keys=2, a=Int64))
    with pytest.raises(LayoutError, match="v:at: type UnixTimestamp"):
        view_layout(view(at=UnixTimestamp))


def loaded(*views: FeatureViewProto) -> dict[str, ViewLayout]:
    return layouts_of(views)


def colliding() -> tuple[str, str]:
    """Two features of two views of one entity that share a 32-bit field: by the birthday paradox some 2^16 names hold a pair."""
    seen: dict[bytes, str] = {}
    for number in range(10**6):
        other = seen.setdefault(hash_field(f"v{number % 2}:f{number}"), f"f{number}")
        if other != f"f{number}" and (int(other[1:]) - number) % 2:
            return (other, f"f{number}") if int(other[1:]) % 2 == 0 else (f"f{number}", other)
    raise AssertionError("no two names collide")


def test_two_features_that_share_a_field_are_refused() -> None:
    even, odd = colliding()
    with pytest.raises(LayoutError, match="share one hash field"):
        loaded(view("v0", **{even: Int64}), view("v1", **{odd: Int64}))
    assert set(loaded(view("v0", **{even: Int64}), view("v1", fine=Int64))) == {"v0", "v1"}
    assert set(loaded(view("v0", **{even: Int64}), view("v1", online=False, **{odd: Int64}))) == {"v0"}


def test_keys_of_customers_and_shops_differ() -> None:
    keys = {entity_key("user_id", user, project) for user in ("a", "b", "ab", "") for project in ("shop", "myshop")}
    assert len(keys) == 8
    assert entity_key("user_id", "a", "shop") != entity_key("item_id", "a", "shop")


def test_a_customers_state_comes_back_as_it_was_read() -> None:
    activity = view(
        ACTIVITY_VIEW,
        version=Int64,
        **dict.fromkeys(("recent_items", "recent_channels", "recent_texts", "purchased_items"), Array(String)),
        **dict.fromkeys(("recent_action_codes", "recent_times", "purchased_days"), Array(Int64)),
    )
    profile = view(PROFILE_VIEW, purchase_count=Int64, price_mean=Float64, price_low=Float64, price_high=Float64)
    codec = UserStateCodec(loaded(activity, profile), "shop")
    row: dict[str, Any] = {
        "user_id": "zoë",
        "user_version": 9,
        "merged_into": None,
        "membership": 2,
        "version": 9,
        "event_timestamp": NOW,
        "recent_items": ["a", ""],
        "recent_action_codes": [1, 3],
        "recent_channels": ["web", "app"],
        "recent_texts": ["", "red mug"],
        "recent_times": [2, 1],
        "purchased_items": ["a"],
        "purchased_days": [20_000],
        "profile": None,
        "profile_timestamp": None,
    }
    state = codec.state(row)
    assert (state.user_id, state.version, state.key) == ("zoë", 9, codec.key("zoë"))
    version, field, membership, merged_into, count, *rest = state.arguments
    cut = 2 * len(codec.activity.hash_fields)
    stored = dict(zip(rest[:cut:2], rest[1:cut:2], strict=True))
    assert (version, field, membership, merged_into, count) == (9, codec.version_field, 2, "", len(stored))
    assert rest[cut:] == [0, codec.profile.timestamp_field, *codec.profile.fields]  # no profile: what to drop when regrouped
    features = codec.decode([cast("Any", stored).get(f) for f in codec.hash_fields], NOW)
    seen = activity_of(features[ACTIVITY_VIEW])
    assert seen is not None
    assert (seen.version, seen.purchased_items, seen.purchased_days) == (9, ("a",), (20_000,))
    assert [(b.item_id, b.action, b.channel, b.occurred_at, b.text) for b in seen.behaviours] == [
        ("a", "view", "web", 2, ""),
        ("", "search", "app", 1, "red mug"),
    ]
    assert codec.activity_of(state, NOW) == seen
    assert str(profile_of(features[PROFILE_VIEW])) == "Profile(purchase_count=0.0, price_mean=nan, price_low=nan, price_high=nan)"
    assert activity_of(codec.decode([None] * len(codec.hash_fields), NOW)[ACTIVITY_VIEW]) is None
    bought = codec.state(
        row | {"profile": {"purchase_count": 2, "price_mean": 3.5, "price_low": None, "price_high": 4}, "profile_timestamp": NOW}
    )
    assert bought.arguments[5 + cut : 7 + cut] == (len(codec.profile.hash_fields), codec.profile.timestamp_field)
    marker = codec.state(row | {"merged_into": "anna"})
    assert codec.activity_of(marker, NOW) is None
    assert (marker.merged_into, marker.arguments[:6]) == ("anna", (9, codec.version_field, 2, "anna", 0, 0))


@given(st.text(max_size=20), st.text(st.characters(exclude_categories=("Cs",)), max_size=40), st.sampled_from(["shop", "my_shop"]))
def test_keys_and_fields_are_feasts_own(name: str, value: str, project: str) -> None:
    theirs = EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=value)])
    assert entity_key("user_id", value, project) == _redis_key(project, theirs)
    assert hash_field(name) == _mmh3(name)


@pytest.mark.parametrize("value_type", sorted(kind.value for kind in VALUE_TYPES_TO_FEAST_TYPES if kind.value))
def test_types_are_named_as_feast_names_them(value_type: int) -> None:
    theirs = str(VALUE_TYPES_TO_FEAST_TYPES[ValueType(value_type)])
    assert dtype_of(value_type) == (f"ValueType({value_type})" if theirs in {"PdfBytes", "ImageBytes"} else theirs)
