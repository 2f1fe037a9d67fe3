"""Importers without a database: mappings, source files, column rules, item merging and the account at the end."""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.importers import Mapping, MappingError, load_mapping, ready_mappings
from features.importers.columns import by_share, choice_column, hashed_ids, number_column, text_column, time_column
from features.importers.event_rows import event_rows
from features.importers.fields import ChoiceField, NumberField, TextField, TimeField
from features.importers.item_rows import ItemTable, build_items
from features.importers.items import item_frame
from features.importers.report import ImportAccountingError, Tally
from features.importers.sources import open_source
from features.settings import DEFAULT_CHANNELS

MINIMAL = """
dataset = "ours"
[events]
user_id = "customer"
channel = "channel"
action = "action"
occurred_at = "at"
item_id = "sku"
text = "words"
value = "amount"
quantity = "units"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def mapping(tmp_path: Path, text: str = MINIMAL) -> Mapping:
    return load_mapping(write(tmp_path / "mapping.toml", text))


def test_every_ready_mapping_loads() -> None:
    assert ready_mappings() == ("faq", "online_retail", "rees46", "sample_shop")
    for name in ready_mappings():
        assert load_mapping(name).dataset == name


def test_the_documented_mapping_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "importing.md").read_text("utf-8")
    documented = mapping(tmp_path, page.partition("```toml")[2].partition("```")[0])
    assert documented.items is not None
    assert documented.events is not None
    assert documented.events.reject[0].reason == "impossible price"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[events]", "colour = 1\n[events]"), "unknown key 'colour'"),
        (('sku"', 'sku"\nitems_id = "x"'), "unknown key 'events.items_id'"),
        (('"sku"', '{ column = "sku", colunm = "x" }'), "unknown key 'events.item_id.colunm'"),
        (('"sku"', '{ column = "sku", value = "x" }'), "events.item_id: needs exactly one of column, columns, value"),
        (('"at"', '{ column = "at", timezone = "Mars/Base" }'), "events.occurred_at.timezone: 'Mars/Base'"),
        (('user_id = "customer"', ""), "events: needs user_id or channel_user_id"),
        (('action = "action"', ""), "events.action: Field required"),
        (('"channel"', '{ column = "c", shares = { web = 0.5 } }'), "events.channel: shares must be at least 0 and add up to 1"),
        (('"channel"', '{ column = "c", map = { a = "web" }, shares = { web = 1 } }'), "takes only one of map, prefixes, shares"),
        (('dataset = "ours"', 'dataset = "ours"\ncsv = { encoding = "utf-99" }'), "csv.encoding: 'utf-99' is not a known encoding"),
        (("[events]", "[[events.reject]]\ncolumn = 'x'\nreason = 'y'\n[events.x]"), "needs exactly one of at_most, missing = true"),
        (("[events]", "[events"), "is not TOML"),
    ],
)
def test_a_bad_mapping_names_the_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(MappingError) as error:
        mapping(tmp_path, MINIMAL.replace(*change))
    assert message in str(error.value)


def test_an_unknown_mapping_lists_the_ready_ones() -> None:
    with pytest.raises(MappingError, match="neither a file nor one of faq, online_retail, rees46, sample_shop"):
        load_mapping("online_retial")


def read_all(path: Path, settings: Mapping, batch_rows: int = 2) -> tuple[list[dict[str, Any]], list[int], list[tuple[int, str]]]:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    malformed: list[tuple[int, str]] = []
    for batch in open_source(path, settings, batch_rows=batch_rows).batches:
        rows += batch.rows.to_pylist()
        lines += batch.lines.tolist()
        malformed += [(piece.line, piece.reason) for piece in batch.malformed]
    return rows, lines, malformed


def test_csv_lines_survive_newlines_in_values_and_broken_rows(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_bytes('\ufeffa,b\n1,"two\nlines"\n\n2\n3,"x"y\n4,ü\n'.encode() + b"5,\xff\n6,z\n")
    rows, lines, malformed = read_all(path, mapping(tmp_path))
    assert rows == [{"a": "1", "b": "two\nlines"}, {"a": "4", "b": "ü"}, {"a": "6", "b": "z"}]
    assert lines == [2, 7, 9]
    assert [line for line, _ in malformed] == [5, 6, 8]
    assert malformed[0][1] == "1 columns instead of 2"
    assert malformed[1][1].startswith("not CSV")
    assert malformed[2][1] == "not text in the file's encoding"


def test_csv_with_other_encoding_and_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_bytes("a;b\n£;1\n".encode("latin-1"))
    settings = mapping(tmp_path, MINIMAL.replace('dataset = "ours"', 'dataset = "ours"\ncsv = { encoding = "latin-1", delimiter = ";" }'))
    assert read_all(path, settings)[0] == [{"a": "£", "b": "1"}]


def test_json_lines_reject_what_is_no_object(tmp_path: Path) -> None:
    text = '{"a": 1, "b": {"c": [1]}}\n\nnot json\n[1]\n{"b": "\\ud800"}\n{"a": 2.5}\n'
    rows, lines, malformed = read_all(write(tmp_path / "x.jsonl", text), mapping(tmp_path))
    assert [row["a"] for row in rows] == ["1", "2.5"]
    assert rows[0]["b"] == '{"c": [1]}'
    assert lines == [1, 6]
    assert [line for line, _ in malformed] == [3, 4, 5]


def test_parquet_rejects_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    bad = pa.array([b"good", b"\xff", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": bad}), path)
    rows, lines, malformed = read_all(path, mapping(tmp_path), 10)
    assert (rows, lines, malformed) == ([{"a": "good"}, {"a": "fine"}], [1, 3], [(2, "not UTF-8")])


def test_a_missing_column_is_named_with_its_key(tmp_path: Path) -> None:
    settings = mapping(tmp_path)
    source = open_source(write(tmp_path / "x.csv", "customer,at\n"), settings, batch_rows=5)
    assert settings.events is not None
    with pytest.raises(MappingError, match=r"events.channel: the source has no column 'channel'; it has customer, at"):
        source.require(settings.events.columns(), "events")


@pytest.mark.parametrize("name", ["x.parquet", "x.dat"])
def test_a_file_of_another_format_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(MappingError, match=name):
        open_source(write(tmp_path / name, "hello"), mapping(tmp_path), batch_rows=5)


def test_text_is_trimmed_and_whole_numbers_lose_their_fraction() -> None:
    rows = pa.table(
        {"f": [17850.0, None, 1.5], "s": [" a ", "", "17850.0"], "i": [1, 2, 3], "d": pa.array(["x", "y", "x"]).dictionary_encode()}
    )
    assert text_column(rows, TextField(column="f")).to_pylist() == ["17850", None, "1.5"]
    assert text_column(rows, TextField(column="s")).to_pylist() == ["a", None, "17850.0"]
    assert text_column(rows, TextField(column="s", integer=True)).to_pylist() == ["a", None, "17850"]
    assert text_column(rows, TextField(columns=("s", "d"), replace={"a": "b"})).to_pylist() == ["b x", "y", "17850.0 x"]
    assert text_column(rows.slice(1, 1), TextField(columns=("s", "f"))).to_pylist() == [None]
    assert text_column(rows, TextField(column="absent")).to_pylist() == [None] * 3


def test_numbers_multiply_and_say_what_is_none() -> None:
    rows = pa.table({"n": ["6", "x", "", "inf", "-2"], "p": [2.55, 1.0, 1.0, 1.0, 3.0]})
    plain = number_column(rows, NumberField(column="n"))
    assert plain.values.to_pylist() == [6.0, None, None, None, -2.0]
    assert plain.invalid.tolist() == [False, True, False, True, False]
    assert number_column(rows, NumberField(column="n", multiply="p", absolute=True)).values.to_pylist() == [15.3, None, None, None, 6.0]


def test_times_of_every_kind_become_utc() -> None:
    half_past = datetime(2026, 7, 1, 12, 30, tzinfo=UTC)
    rows = pa.table(
        {
            "iso": ["2026-07-01T12:30:00Z", "2026-07-01T14:30:00+02:00", "soon"],
            "local": ["2026-07-01 14:30", "", "1950-01-01 00:00"],
            "us": ["7/1/2026 12:30", "13/13/2026 1:00", None],
            "epoch": [int(half_past.timestamp()), None, -5],
            "epoch_text": [str(int(half_past.timestamp() * 1000)), "", "x"],
            "naive": pa.array([half_past.replace(tzinfo=None), None, datetime(9999, 1, 1)], pa.timestamp("us")),  # noqa: DTZ001
        }
    )
    for spec, expected, invalid in [
        (TimeField(column="iso"), [half_past, half_past, None], [False, False, True]),
        (TimeField(column="local", timezone="Europe/Berlin"), [half_past, None, None], [False, False, True]),
        (TimeField(column="us", format="%m/%d/%Y %H:%M"), [half_past, None, None], [False, True, False]),
        (TimeField(column="epoch"), [half_past, None, None], [False, False, True]),
        (TimeField(column="epoch_text", unit="ms"), [half_past, None, None], [False, False, True]),
        (TimeField(column="naive"), [half_past, None, None], [False, False, True]),
    ]:
        column = time_column(rows, spec)
        assert column.values.to_pylist() == expected, spec
        assert column.invalid.tolist() == invalid, spec


def test_channel_shares_are_fixed_for_ever() -> None:
    shares = {"web": 0.4, "app": 0.2, "store": 0.4, "closed": 0.0}
    assert [by_share(key, shares) for key in ("536365", "536366", "C536379", "536367")] == ["app", "store", "web", "store"]
    counts = Counter(by_share(str(number), shares) for number in range(20_000))
    assert {name: round(count / 20_000, 2) for name, count in counts.items()} == {"web": 0.4, "app": 0.2, "store": 0.4}


def test_choices_by_map_prefix_and_default() -> None:
    rows = pa.table({"x": ["cart", "C12", None]})
    assert choice_column(rows, ChoiceField(column="x", map={"cart": "add_to_cart"})).to_pylist() == ["add_to_cart", None, None]
    assert choice_column(rows, ChoiceField(column="x", prefixes={"C": "return"}, default="purchase")).to_pylist() == [
        "purchase",
        "return",
        "purchase",
    ]
    assert choice_column(rows, ChoiceField(value="web")).to_pylist() == ["web"] * 3


def test_hashed_ids_are_version_5_uuids() -> None:
    ids = hashed_ids([pa.array(["a", None]), pa.array([1.0, 2.5])], "ours").to_pylist()
    namespace = uuid5(NAMESPACE_URL, "concord:import:ours")
    assert [UUID(value) for value in ids] == [uuid5(namespace, "a\x1f1"), uuid5(namespace, "\x1f2.5")]


GOOD_EVENT = {
    "customer": "ann",
    "channel": "web",
    "action": "purchase",
    "at": "2026-01-01T00:00:00Z",
    "sku": "cup",
    "words": None,
    "amount": "5",
    "units": "1",
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"customer": " "}, "customer missing"),
        ({"channel": "fax"}, "unknown channel"),
        ({"action": "sneeze"}, "unknown action"),
        ({"sku": None}, "item_id missing"),
        ({"action": "search", "sku": None}, "text missing"),
        ({"action": "search", "sku": None, "words": "a cup"}, None),
        ({"amount": "much"}, "value is not a number"),
        ({"amount": "-1"}, "value is below zero"),
        ({"units": "0"}, "quantity is not above zero"),
        ({"action": "rate", "amount": "6"}, "rating is outside 1 to 5"),
        ({"action": "view", "amount": "much", "units": "0"}, None),
        ({"at": "yesterday"}, "occurred_at is not a time from 1970 to 2199"),
        ({"at": None}, "occurred_at missing"),
        ({"sku": "x" * 257}, "item_id is longer than 256 characters"),
        ({"sku": "a\x00b"}, "NUL character in a text"),
    ],
)
def test_an_event_is_kept_or_rejected_for_a_reason(tmp_path: Path, change: dict[str, str | None], reason: str | None) -> None:
    spec = mapping(tmp_path).events
    assert spec is not None
    rows = pa.Table.from_pylist([GOOD_EVENT, {**GOOD_EVENT, **change}])
    events = event_rows(rows, np.array([1, 2]), spec, dataset="ours", channels=DEFAULT_CHANNELS)
    assert events.reasons.names() == [None, reason]
    assert len(events.table) == (2 if reason is None else 1)


def test_value_and_quantity_stay_only_with_actions_that_have_them(tmp_path: Path) -> None:
    spec = mapping(tmp_path).events
    assert spec is not None
    rows = pa.Table.from_pylist([{**GOOD_EVENT, "action": action} for action in ("purchase", "view", "rate")])
    table = event_rows(rows, np.arange(3), spec, dataset="ours", channels=DEFAULT_CHANNELS).table
    assert table["value"].to_pylist() == [5.0, None, 5.0]
    assert table["quantity"].to_pylist() == [1.0, None, None]


def test_the_generated_id_does_not_depend_on_the_channel_rule(tmp_path: Path) -> None:
    spec = mapping(tmp_path).events
    assert spec is not None
    rows = pa.Table.from_pylist([GOOD_EVENT, {**GOOD_EVENT, "channel": "app"}, {**GOOD_EVENT, "units": "2"}])
    first, second, third = event_rows(rows, np.arange(3), spec, dataset="ours", channels=DEFAULT_CHANNELS).table["event_id"].to_pylist()
    assert first == second != third


def test_items_merge_as_pandas_would_over_many_batches() -> None:
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(
        {
            "item_id": rng.integers(20, size=1000).astype(str),
            "title": rng.choice(["a", "b", "c"], size=1000),
            "price": rng.integers(1, 9, size=1000) / 4,
            "brand": rng.choice(["x", "y", None], size=1000),
            "listed_at": pd.to_datetime(rng.integers(1_700_000_000, 1_800_000_000, size=1000), unit="s", utc=True),
        }
    )
    table = ItemTable({"title": "most_frequent", "price": "median", "brand": "last", "listed_at": "minimum"})
    for start in range(0, 1000, 37):
        table.add(frame.iloc[start : start + 37])
    rows, grouped = table.rows(), frame.groupby("item_id")
    assert rows["price"].to_dict() == grouped["price"].median().to_dict()
    assert rows["brand"].to_dict() == grouped["brand"].last().to_dict()
    assert rows["listed_at"].to_dict() == grouped["listed_at"].min().to_dict()
    for item, titles in grouped["title"]:
        assert (titles == rows.loc[item, "title"]).sum() == titles.value_counts().max()


def test_an_item_row_is_kept_or_rejected_for_a_reason(tmp_path: Path) -> None:
    text = """
    dataset = "ours"
    [items]
    item_id = "id"
    title = "title"
    price = "price"
    stock = "stock"
    channels = "channels"
    attributes = "attributes"
    """
    good = {"id": "1", "title": "Cup", "price": "2.5", "stock": "3", "channels": "web| app", "attributes": '{"size": 3}'}
    bad = {
        "item_id missing": {"id": ""},
        "title missing": {"title": None},
        "price is not a number": {"price": "free"},
        "price is below zero": {"price": "-1"},
        "stock is not a whole number from zero on": {"stock": "1.5"},
        "unknown channel": {"channels": "web|fax"},
        "channels is not a list": {"channels": "[web"},
        "attributes is not a JSON object": {"attributes": "[]"},
    }
    spec = mapping(tmp_path, text).items
    assert spec is not None
    rows = pa.Table.from_pylist([good, *({**good, **change} for change in bad.values())])
    frame, reasons = item_frame(rows, spec, channels=DEFAULT_CHANNELS)
    assert reasons.names() == [None, *bad]
    table = ItemTable(dict.fromkeys(("title", "price", "stock", "channels", "attributes"), "last"))
    table.add(frame)
    (item,) = build_items(table.rows())
    assert (item.item_id, item.price_micros, item.stock, item.channels) == ("1", 2_500_000, 3, ("web", "app"))
    assert json.loads(json.dumps(item.attributes)) == {"size": "3"}


def test_an_account_that_does_not_add_up_is_an_error() -> None:
    tally = Tally("events", read=10, stored=7, repeated=1, already_stored=1)
    with pytest.raises(ImportAccountingError, match="read 10 rows but accounted for 9"):
        tally.report(1.0)
    tally.rejected["customer missing"] = 1
    report = tally.report(1.0)
    assert (report.duplicate, report.rejected_count) == (2, 1)
    assert ("  customer missing", "1") in report.table()
