"""The reader of online features: what it asks Redis for, and which values it picks from what comes back."""

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from features.activity import ACTIVITY_VIEW
from features.layout import FeatureValue, Status, ViewLayout, entity_key, hash_field
from features.registry import Registry
from server.domain import EntityKey
from server.errors import NotFoundError
from server.online.features import FeatureReader

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
PRESENT, MISSING, STALE = Status.PRESENT, Status.MISSING, Status.STALE


def layout(name: str, join_key: str, **schema: str) -> ViewLayout:
    fields = tuple(hash_field(f"{name}:{feature}") for feature in schema)
    return ViewLayout(name, join_key, tuple(schema), tuple(schema.values()), fields, f"_ts:{name}".encode(), timedelta(0))


SALES = layout("sales", "item_id", week="Int64", month="Int64", share="Float64", rank="Int64")
WORDS = layout("words", "item_id", title="String", tags="Array(String)", weights="Array(Float64)")
ACTIVITY = layout(ACTIVITY_VIEW, "user_id", recent_items="Array(String)", recent_action_codes="Array(Int64)", version="Int64")
SALES_VALUES = {"week": 1, "month": 300, "share": 0.5, "rank": 7}
WORDS_VALUES = {"title": "a", "tags": ["x"], "weights": [0.25]}


class Hashes:
    """Redis, as far as it is asked here: hashes keep their fields in the order they were written in."""

    def __init__(self) -> None:
        self.stored: dict[bytes, dict[bytes, bytes]] = {}
        self.asked: list[str] = []

    def write(self, join_key: str, value: str, fields: dict[bytes, bytes]) -> None:
        self.stored.setdefault(entity_key(join_key, value, "shop"), {}).update(fields)

    async def ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.asked += [name for name, *_ in commands]
        return [self._answer(*command) for command in commands]

    def _answer(self, name: str, key: bytes, *fields: bytes) -> list[bytes | None]:
        found = self.stored.get(key, {})
        if name == "HGETALL":
            return [part for pair in found.items() for part in pair]
        return [found.get(field) for field in fields]


def state(version: int, items: list[str] | None) -> dict[bytes, bytes]:
    return ACTIVITY.encode({"version": version, "recent_items": items, "recent_action_codes": [1] * len(items or ())}, NOW)


@pytest.fixture
def hashes() -> Hashes:
    return Hashes()


@pytest.fixture
def reader(hashes: Hashes) -> FeatureReader:
    async def no_minimum(_user_id: str, _token: object) -> int:
        return -1  # none at all will do

    states: Any = SimpleNamespace(certain=True, shown=SimpleNamespace(of=lambda _user_id: -1))
    return FeatureReader(
        SimpleNamespace(wire=hashes),  # type: ignore[arg-type]
        SimpleNamespace(call=nullcontext),  # type: ignore[arg-type]
        states,
        SimpleNamespace(minimum_version=no_minimum),  # type: ignore[arg-type]
        registry=Registry({view.name: view for view in (SALES, WORDS, ACTIVITY)}, frozenset(), {}, {}),
        read_registry=lambda: pytest.fail("nobody asked for it"),
        project="shop",
        now=lambda: NOW,
    )


def items(*names: str) -> list[EntityKey]:
    return [EntityKey(item_id=name) for name in names]


WHOLE = ["sales:share", "sales:week", "words:weights", "words:tags", "words:title"]
"""Most of what the registry knows of items, in an order of its own."""
FEW = ["sales:week", "words:title"]


async def test_most_fields_are_read_with_the_whole_hash_and_few_one_by_one(reader: FeatureReader, hashes: Hashes) -> None:
    await reader.read(service="", refs=WHOLE, entities=items("a", "b"))
    await reader.read(service="", refs=FEW[:1], entities=items("a"))
    assert hashes.asked == ["HGETALL", "HGETALL", "HMGET"]


async def test_values_are_found_whatever_else_a_hash_holds_and_in_whatever_order(reader: FeatureReader, hashes: Hashes) -> None:
    """Rows of neighbours differ: no hash, another view's fields before and between, one view alone, one value alone."""
    sales, words = SALES.encode(SALES_VALUES, NOW), WORDS.encode(WORDS_VALUES, NOW)
    hashes.write("item_id", "both", {**sales, **words})
    hashes.write("item_id", "turned", {b"_ts:gone": b"", **dict(reversed(words.items())), b"\x01\x02\x03\x04": b"\x20\x07", **sales})
    hashes.write("item_id", "words", words)
    hashes.write("item_id", "part", {SALES.timestamp_field: sales[SALES.timestamp_field], SALES.fields[0]: sales[SALES.fields[0]]})
    names = ["both", "both", "turned", "none", "words", "part", "both"]
    table = await reader.read(service="", refs=WHOLE, entities=items(*names))
    assert list(table.values) == WHOLE
    written = {f"{view.name}:{name}": value for view, of in ((SALES, SALES_VALUES), (WORDS, WORDS_VALUES)) for name, value in of.items()}
    holds = {"both": {*written}, "turned": {*written}, "none": set(), "words": {r for r in written if r[0] == "w"}, "part": {"sales:week"}}
    for ref, values in table.values.items():
        assert values == [written[ref] if ref in holds[name] else None for name in names]
    for view, ages in table.ages.items():
        written_at = [NOW if any(ref.startswith(view) for ref in holds[name]) else None for name in names]
        assert ages == ([PRESENT if at else MISSING for at in written_at], written_at)


async def test_both_ways_of_reading_give_the_same(reader: FeatureReader, hashes: Hashes) -> None:
    hashes.write("item_id", "a", WORDS.encode(WORDS_VALUES, NOW))
    hashes.write("item_id", "b", SALES.encode(SALES_VALUES, NOW))
    whole, few = [await reader.read(service="", refs=refs, entities=items("a", "b", "c")) for refs in (WHOLE, FEW)]
    assert hashes.asked == ["HGETALL"] * 3 + ["HMGET"] * 3
    assert few.values == {ref: whole.values[ref] for ref in FEW} == {"sales:week": [None, 1, None], "words:title": ["a", None, None]}
    assert few.ages == whole.ages


async def test_customers_and_items_of_one_call_keep_their_rows(reader: FeatureReader, hashes: Hashes) -> None:
    for number in (1, 2):
        hashes.write("user_id", f"u{number}", state(number, [f"u{number}"]))
        hashes.write("item_id", f"i{number}", SALES.encode({**SALES_VALUES, "week": 10 * number}, NOW))
    asked = [EntityKey(user_id="u1", item_id="i2"), EntityKey(user_id="u2", item_id="i1")]
    table = await reader.read(service="", refs=["sales:week", "user_activity:recent_items"], entities=asked)
    assert table.values == {"sales:week": [20, 10], "user_activity:recent_items": [["u1"], ["u2"]]}


async def test_a_customer_older_than_was_shown_is_seen_to_wherever_their_values_stand(reader: FeatureReader, hashes: Hashes) -> None:
    hashes.write("item_id", "i", SALES.encode(SALES_VALUES, NOW))
    hashes.write("user_id", "u", state(1, []))

    async def following(_subject: object, _known: object, _act: object) -> tuple[str, int]:
        hashes.write("user_id", "u", state(2, ["new"]))
        return "u", 2

    reader._states.shown.of = lambda _user_id: 2  # type: ignore[method-assign]
    reader._identities.following = following  # type: ignore[method-assign, assignment]
    table = await reader.read(service="", refs=["sales:week", "user_activity:recent_items"], entities=[EntityKey(user_id="u", item_id="i")])
    assert table.values == {"sales:week": [1], "user_activity:recent_items": [["new"]]}


async def test_a_state_of_an_earlier_form_is_seen_to_whatever_of_it_is_asked_for(reader: FeatureReader, hashes: Hashes) -> None:
    """Its version says nothing about its form; who asks for nothing of activity need not wait for a rebuild."""
    earlier = state(5, ["i"])
    del earlier[ACTIVITY.fields[ACTIVITY.features.index("recent_action_codes")]]
    hashes.write("user_id", "u", earlier)
    rebuilt: list[str] = []

    async def following(subject: Any, _known: object, _act: object) -> tuple[str, int]:
        rebuilt.append(subject.user_id)
        hashes.write("user_id", "u", state(5, ["i"]))
        return "u", 5

    async def at_least_the_first(_user_id: str, _token: object) -> int:
        return 0

    reader._identities.following = following  # type: ignore[method-assign, assignment]
    reader._identities.minimum_version = at_least_the_first  # type: ignore[method-assign, assignment]
    for ref, value in (("user_activity:version", 5), ("user_activity:recent_action_codes", [1])):
        hashes.stored.clear()
        hashes.write("user_id", "u", earlier)
        table = await reader.read(service="", refs=[ref], entities=[EntityKey(user_id="u")])
        assert table.values == {ref: [value]}
    assert rebuilt == ["u", "u"]


async def test_only_customers_values_are_doubted(reader: FeatureReader, hashes: Hashes) -> None:
    hashes.write("user_id", "u", state(1, None))
    hashes.write("item_id", "i", SALES.encode(SALES_VALUES, NOW))
    reader._states.certain = False  # type: ignore[misc]
    asked = [EntityKey(user_id="u", item_id="i"), EntityKey(user_id="v", item_id="i")]
    table = await reader.read(service="", refs=["user_activity:version", "sales:week"], entities=asked)
    assert {view: ages.statuses for view, ages in table.ages.items()} == {ACTIVITY_VIEW: [STALE, MISSING], "sales": [PRESENT, PRESENT]}


async def test_without_redis_rows_are_put_together_from_what_is_recorded(reader: FeatureReader, hashes: Hashes) -> None:
    """A customer with a list that is null, and one whom nobody knows."""
    late = NOW - timedelta(days=1)
    recorded = {"version": FeatureValue(3, STALE, late), "recent_items": FeatureValue(None, MISSING, late)}

    async def recorded_at_least(user_id: str, _minimum: int, *, now: datetime) -> dict[str, dict[str, FeatureValue]]:
        if user_id != "u":
            raise NotFoundError("no such customer", reason="SUBJECT_UNKNOWN", field="subject.user_id")
        return {ACTIVITY_VIEW: recorded}

    async def away(_commands: object) -> list[Any]:
        raise redis.exceptions.ConnectionError

    reader._states.recorded_at_least = recorded_at_least  # type: ignore[method-assign, assignment]
    hashes.ask = away  # type: ignore[method-assign]
    refs = ["user_activity:recent_items", "user_activity:version"]
    table = await reader.read(service="", refs=refs, entities=[EntityKey(user_id="nobody"), EntityKey(user_id="u")])
    assert list(table.values.items()) == [(refs[0], [None, None]), (refs[1], [None, 3])]
    assert table.ages == {ACTIVITY_VIEW: ([MISSING, STALE], [None, late])}
