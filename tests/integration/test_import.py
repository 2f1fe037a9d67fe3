"""Imports into a real PostgreSQL: all formats, idempotence, versions, rejects, and the real data sets."""

import csv
import json
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cli.stack import Stack
from features.importers import (
    ImportReport,
    Mapping,
    MappingError,
    import_events,
    import_folder,
    import_identities,
    import_items,
    load_mapping,
)
from features.sample_shop import generate, write
from features.schema import migrate

MAPPING = """
dataset = "ours"
[items]
item_id = "sku"
title = { column = "title", pick = "most_frequent" }
price = { column = "price", pick = "median" }
currency = { value = "EUR" }
listed_at = { column = "at", pick = "minimum" }
[events]
user_id = "customer"
channel = "channel"
action = { column = "kind", map = { look = "view", buy = "purchase" } }
item_id = "sku"
quantity = "units"
value = { column = "units", multiply = "price" }
occurred_at = "at"
"""
ROWS: list[dict[str, Any]] = [
    {
        "customer": "ann",
        "channel": "web",
        "kind": "look",
        "sku": "cup",
        "title": "Cup",
        "price": 2.5,
        "units": 1,
        "at": "2026-01-01T10:00:00Z",
    },
    {
        "customer": "ann",
        "channel": "web",
        "kind": "buy",
        "sku": "cup",
        "title": "Cup",
        "price": 2.5,
        "units": 2,
        "at": "2026-01-01T10:01:00Z",
    },
    {
        "customer": "ann",
        "channel": "web",
        "kind": "buy",
        "sku": "cup",
        "title": "Cup",
        "price": 2.5,
        "units": 2,
        "at": "2026-01-01T10:01:00Z",
    },
    {
        "customer": "bob",
        "channel": "app",
        "kind": "buy",
        "sku": "pan",
        "title": "Pan",
        "price": 9.0,
        "units": 1,
        "at": "2026-01-02T10:00:00Z",
    },
    {
        "customer": None,
        "channel": "app",
        "kind": "buy",
        "sku": "pan",
        "title": "PAN",
        "price": 9.5,
        "units": 1,
        "at": "2026-01-02T11:00:00Z",
    },
    {
        "customer": "bob",
        "channel": "fax",
        "kind": "buy",
        "sku": "pan",
        "title": "Pan",
        "price": 8.0,
        "units": 1,
        "at": "2026-01-02T12:00:00Z",
    },
    {
        "customer": "ann",
        "channel": "app",
        "kind": "look",
        "sku": "pan",
        "title": None,
        "price": 9.0,
        "units": 1,
        "at": "2026-01-03T10:00:00Z",
    },
]


@pytest.fixture
def database_dsn(stack: Stack) -> Iterator[str]:
    """A migrated database of its own for each test."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(stack.postgres_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    dsn = make_conninfo(stack.postgres_dsn, dbname=name)
    migrate(dsn)
    yield dsn
    with psycopg.connect(stack.postgres_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def ours(tmp_path: Path) -> Mapping:
    path = tmp_path / "ours.toml"
    path.write_text(MAPPING)
    return load_mapping(path)


def query(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(statement).fetchall()


def write_rows(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def rejects_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_versions_count_events(dsn: str) -> None:
    wrong = query(
        dsn,
        """SELECT u.user_id, u.version, count(e.event_id), o.version
        FROM users u LEFT JOIN events e USING (user_id) LEFT JOIN online_outbox o USING (user_id)
        GROUP BY u.user_id, u.version, o.version
        HAVING u.version <> count(e.event_id) OR coalesce(o.version, 0) <> u.version""",
    )
    assert wrong == []


def assert_adds_up(report: ImportReport, rejects: Path) -> None:
    """Every row read is stored, a duplicate or rejected, and the rejects file has a line for each that is not in the database."""
    assert report.read == report.stored + report.duplicate + report.rejected_count
    reasons = Counter(line["reason"] for line in rejects_in(rejects))
    repeated = reasons.pop("repeats an earlier row", 0)
    assert dict(reasons) == dict(report.rejected)
    assert repeated == (report.repeated if report.what == "events" else 0)


def test_a_customer_who_waits_for_redis_waits_since_the_first_import(database_dsn: str, ours: Mapping, tmp_path: Path) -> None:
    """The age of the outbox says how far Redis lags: who is imported all the time must not look young."""
    waiting = "SELECT user_id, version, enqueued_at FROM online_outbox ORDER BY user_id"
    import_events(database_dsn, write_rows(tmp_path, ".jsonl", ROWS), ours, rejects=tmp_path / "rejects.jsonl")
    first = query(database_dsn, waiting)
    later = [row | {"at": "2026-01-09T10:00:00Z"} for row in ROWS]
    import_events(database_dsn, write_rows(tmp_path, ".jsonl", later), ours, rejects=tmp_path / "rejects.jsonl")
    second = query(database_dsn, waiting)
    assert [(user, since) for user, _, since in second] == [(user, since) for user, _, since in first]
    assert all(new > old for (_, old, _), (_, new, _) in zip(first, second, strict=True))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("batch_rows", [2, 1000])
def test_events_of_every_format(database_dsn: str, ours: Mapping, tmp_path: Path, suffix: str, batch_rows: int) -> None:
    source, rejects, seen = write_rows(tmp_path, suffix, ROWS), tmp_path / "rejects.jsonl", []
    report = import_events(database_dsn, source, ours, rejects=rejects, batch_rows=batch_rows, progress=lambda *step: seen.append(step))
    assert (report.read, report.stored, report.repeated, report.already_stored) == (7, 4, 1, 0)
    assert report.rejected == {"customer missing": 1, "unknown channel": 1}
    assert report.details == {"purchase": 5, "view": 2}
    assert seen[-1] == ("events", seen[-1][2], seen[-1][2])
    header = suffix == ".csv"
    assert [line["line"] for line in rejects_in(rejects)] == [3 + header, 5 + header, 6 + header]
    assert rejects_in(rejects)[2]["row"]["channel"] == "fax"
    assert query(
        database_dsn, "SELECT user_id, channel, action, item_id, value, quantity, occurred_at FROM events ORDER BY occurred_at"
    ) == [
        ("ann", "web", "view", "cup", None, None, datetime(2026, 1, 1, 10, 0, tzinfo=UTC)),
        ("ann", "web", "purchase", "cup", 5.0, 2.0, datetime(2026, 1, 1, 10, 1, tzinfo=UTC)),
        ("bob", "app", "purchase", "pan", 9.0, 1.0, datetime(2026, 1, 2, 10, 0, tzinfo=UTC)),
        ("ann", "app", "view", "pan", None, None, datetime(2026, 1, 3, 10, 0, tzinfo=UTC)),
    ]
    assert query(database_dsn, "SELECT channel, channel_user_id, user_id FROM identities ORDER BY 1, 2") == [
        ("app", "ann", "ann"),
        ("app", "bob", "bob"),
        ("web", "ann", "ann"),
    ]
    assert query(database_dsn, "SELECT user_id, version FROM users ORDER BY 1") == [("ann", 3), ("bob", 1)]
    assert_versions_count_events(database_dsn)

    again = import_events(database_dsn, source, ours, rejects=rejects, batch_rows=batch_rows)
    assert (again.read, again.stored, again.already_stored) == (7, 0, 5)
    assert_versions_count_events(database_dsn)


def test_the_same_rows_in_another_format_are_the_same_events(database_dsn: str, ours: Mapping, tmp_path: Path) -> None:
    first = import_events(database_dsn, write_rows(tmp_path, ".parquet", ROWS), ours, rejects=tmp_path / "r")
    others = [
        import_events(database_dsn, write_rows(tmp_path, suffix, ROWS), ours, rejects=tmp_path / "r") for suffix in (".csv", ".jsonl")
    ]
    assert first.stored == 4
    assert [other.stored for other in others] == [0, 0]


def test_a_broken_file_stores_its_good_rows(database_dsn: str, ours: Mapping, tmp_path: Path) -> None:
    source, rejects = write_rows(tmp_path, ".jsonl", ROWS), tmp_path / "rejects.jsonl"
    source.write_text(source.read_text().replace('{"customer": "bob", "channel": "app"', "{broken"))
    report = import_events(database_dsn, source, ours, rejects=rejects)
    assert (report.read, report.stored) == (7, 3)
    assert_adds_up(report, rejects)
    assert rejects_in(rejects)[0] == {
        "line": 4,
        "reason": "not JSON: JSONDecodeError",
        "row": source.read_text().splitlines(keepends=True)[3],
    }


def test_two_imports_at_once_store_every_event_once(database_dsn: str, ours: Mapping, tmp_path: Path) -> None:
    rows = [{**ROWS[1], "customer": f"c{n % 7}", "units": 1 + n} for n in range(400)]
    sources = [write_rows(tmp_path, ".parquet", rows), write_rows(tmp_path, ".csv", rows[::-1])]
    reports: list[ImportReport] = []

    def run(source: Path) -> None:
        reports.append(import_events(database_dsn, source, ours, rejects=tmp_path / f"{source.suffix}.rejects", batch_rows=50))

    threads = [threading.Thread(target=run, args=[source]) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(report.stored for report in reports) == 400
    assert sum(report.already_stored for report in reports) == 400
    assert_versions_count_events(database_dsn)


def test_events_of_a_merged_customer_go_to_the_one_that_remains(database_dsn: str, ours: Mapping, tmp_path: Path) -> None:
    with psycopg.connect(database_dsn) as connection:
        connection.execute("INSERT INTO users (user_id) VALUES ('anna')")
        connection.execute("INSERT INTO users (user_id, merged_into) VALUES ('ann', 'anna')")
    import_events(database_dsn, write_rows(tmp_path, ".csv", ROWS), ours, rejects=tmp_path / "r")
    assert query(database_dsn, "SELECT user_id, version FROM users ORDER BY 1") == [("ann", 0), ("anna", 3), ("bob", 1)]
    assert_versions_count_events(database_dsn)


def test_customers_known_only_to_a_channel(database_dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "mapping.toml"
    path.write_text(MAPPING.replace('user_id = "customer"', 'channel_user_id = "customer"'))
    mapping, source = load_mapping(path), write_rows(tmp_path, ".csv", ROWS)
    with psycopg.connect(database_dsn) as connection:
        connection.execute("INSERT INTO users (user_id) VALUES ('known')")
        connection.execute("INSERT INTO identities (channel, channel_user_id, user_id) VALUES ('web', 'ann', 'known')")
    assert import_events(database_dsn, source, mapping, rejects=tmp_path / "r").stored == 4
    assert import_events(database_dsn, source, mapping, rejects=tmp_path / "r").stored == 0
    users = dict(query(database_dsn, "SELECT channel || '/' || channel_user_id, user_id FROM identities"))
    assert users["web/ann"] == "known"
    assert len(set(users.values())) == len(users) == 3
    assert dict(query(database_dsn, "SELECT user_id, count(*) FROM events GROUP BY 1")) == {
        "known": 2,
        users["app/ann"]: 1,
        users["app/bob"]: 1,
    }
    assert_versions_count_events(database_dsn)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_items_of_every_format(database_dsn: str, ours: Mapping, tmp_path: Path, suffix: str) -> None:
    rejects = tmp_path / "rejects.jsonl"
    report = import_items(database_dsn, write_rows(tmp_path, suffix, ROWS), ours, rejects=rejects, batch_rows=2)
    assert (report.read, report.stored, report.repeated, report.rejected) == (7, 2, 4, {"title missing": 1})
    assert_adds_up(report, rejects)
    assert query(database_dsn, "SELECT item_id, title, price_micros, currency, listed_at FROM items ORDER BY 1") == [
        ("cup", "Cup", 2_500_000, "EUR", datetime(2026, 1, 1, 10, 0, tzinfo=UTC)),
        ("pan", "Pan", 9_000_000, "EUR", datetime(2026, 1, 2, 10, 0, tzinfo=UTC)),
    ]
    versions = "SELECT content_version, offer_version FROM fleet_state"
    before = query(database_dsn, versions)
    import_items(database_dsn, write_rows(tmp_path, suffix, ROWS), ours, rejects=rejects)
    assert query(database_dsn, versions) == before


def test_a_mapping_that_does_not_fit_stores_nothing(database_dsn: str, ours: Mapping, tmp_path: Path) -> None:
    source = write_rows(tmp_path, ".csv", [{"customer": "ann"}])
    with pytest.raises(MappingError, match=r"events.channel: the source has no column 'channel'"):
        import_events(database_dsn, source, ours, rejects=tmp_path / "r")
    with pytest.raises(MappingError, match=r"no \[identities\] section"):
        import_identities(database_dsn, source, ours, rejects=tmp_path / "r")
    with pytest.raises(MappingError, match="social, store, web is not registered; registered: fax"):
        import_events(database_dsn, source, load_mapping("online_retail"), rejects=tmp_path / "r", channels=("fax", "app", "mini_program"))
    assert query(database_dsn, "SELECT count(*) FROM users") == [(0,)]


def test_an_identity_is_never_moved_by_an_import(database_dsn: str, tmp_path: Path) -> None:
    rows = [
        {"channel": "web", "channel_user_id": "v1", "user_id": "ann"},
        {"channel": "web", "channel_user_id": "v1", "user_id": "bob"},
        {"channel": "web", "channel_user_id": "v1", "user_id": "ann"},
        {"channel": "app", "channel_user_id": "v1", "user_id": "bob"},
    ]
    source, rejects = write_rows(tmp_path, ".jsonl", rows), tmp_path / "rejects.jsonl"
    report = import_identities(database_dsn, source, load_mapping("sample_shop"), rejects=rejects)
    assert (report.stored, report.repeated, report.rejected) == (2, 1, {"identity belongs to another customer": 1})
    assert_adds_up(report, rejects)
    assert dict(query(database_dsn, "SELECT channel, user_id FROM identities")) == {"web": "ann", "app": "bob"}


def test_the_sample_shop_is_imported_as_generated(database_dsn: str, tmp_path: Path) -> None:
    shop = generate(3, end=datetime(2026, 3, 1, tzinfo=UTC), users=60, language="zh")
    mapping = load_mapping(write(shop, tmp_path / "shop"))
    reports = import_folder(database_dsn, tmp_path / "shop", mapping, rejects=tmp_path / "rejects")
    assert {name: report.stored for name, report in reports.items()} == {
        "items": len(shop.items),
        "relations": len(shop.relations),
        "identities": len(shop.identities),
        "events": len(shop.events),
    }
    assert all(report.rejected_count == 0 for report in reports.values())
    item, event = shop.items[5], shop.events[7]
    assert query(
        database_dsn,
        f"SELECT title, text, category, brand, price_micros, currency, stock, channels, attributes, listed_at FROM items "
        f"WHERE item_id = '{item.item_id}'",
    ) == [
        (
            item.title,
            item.text,
            item.category,
            item.brand,
            item.price_micros,
            item.currency,
            item.stock,
            list(item.channels),
            dict(item.attributes),
            item.listed_at,
        )
    ]
    assert query(
        database_dsn,
        f"SELECT user_id, channel, action, item_id, text, value, quantity, session_id, occurred_at FROM events "
        f"WHERE event_id = '{event.event_id}'",
    ) == [
        (
            event.user_id,
            event.channel,
            event.action,
            event.item_id,
            event.text,
            event.value,
            event.quantity,
            event.session_id,
            event.occurred_at,
        )
    ]
    assert_versions_count_events(database_dsn)
    again = import_folder(database_dsn, tmp_path / "shop", mapping, rejects=tmp_path / "rejects")
    assert again["events"].stored == again["identities"].stored == 0


@pytest.mark.data
def test_online_retail(database_dsn: str, data_folder: Path, tmp_path: Path) -> None:
    source, rejects, mapping = data_folder / "online_retail.parquet", tmp_path / "rejects.jsonl", load_mapping("online_retail")
    items = import_items(database_dsn, source, mapping, rejects=tmp_path / "items.jsonl")
    report = import_events(database_dsn, source, mapping, rejects=rejects)
    assert items.seconds + report.seconds < 60
    assert (items.read, items.stored) == (541_909, 3_938)
    assert items.rejected == {"title missing": 1_454, "impossible price": 1_063}
    assert (report.read, report.stored, report.repeated, report.already_stored) == (541_909, 401_564, 5_225, 0)
    assert report.details == {"purchase": 532_621, "return": 9_288}
    assert report.rejected == {"customer missing": 135_080, "impossible price": 40}
    assert_adds_up(report, rejects)
    assert query(database_dsn, "SELECT title, price_micros, currency, category FROM items WHERE item_id = '85123A'") == [
        ("WHITE HANGING HEART T-LIGHT HOLDER", 2_950_000, "GBP", "")
    ]
    assert query(database_dsn, "SELECT count(*), min(value) > 0, min(quantity) > 0 FROM events WHERE action = 'return'") == [
        (8_872, True, True)
    ]
    shares = dict(query(database_dsn, "SELECT channel, count(DISTINCT session_id)::float8 / 22182 FROM events GROUP BY 1"))
    assert mapping.events is not None
    assert shares == pytest.approx(mapping.events.channel.shares, abs=0.01)
    assert query(database_dsn, "SELECT max(n) FROM (SELECT count(DISTINCT channel) n FROM events GROUP BY session_id) s") == [(1,)]
    assert_versions_count_events(database_dsn)
    again = import_events(database_dsn, source, mapping, rejects=rejects)
    assert (again.stored, again.already_stored) == (0, 406_789)
    assert_versions_count_events(database_dsn)


@pytest.mark.data
def test_rees46(database_dsn: str, data_folder: Path, tmp_path: Path) -> None:
    source, mapping = data_folder / "rees46_2019_10_head.parquet", load_mapping("rees46")
    items = import_items(database_dsn, source, mapping, rejects=tmp_path / "items.jsonl")
    report = import_events(database_dsn, source, mapping, rejects=tmp_path / "events.jsonl")
    assert report.details == {"view": 17_056, "purchase": 214, "add_to_cart": 165}
    assert report.rejected["no session"] == 1
    assert_adds_up(report, tmp_path / "events.jsonl")
    assert_adds_up(items, tmp_path / "items.jsonl")
    assert query(database_dsn, "SELECT title, category, brand FROM items WHERE item_id = '3900821'") == [
        ("aqua appliances environment water heater", "appliances/environment/water_heater", "aqua")
    ]
    assert query(database_dsn, "SELECT count(*) FROM events WHERE action = 'purchase' AND (value IS NULL OR session_id IS NULL)") == [(0,)]
    assert_versions_count_events(database_dsn)
