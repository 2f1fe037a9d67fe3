"""Articles in a real PostgreSQL: versions, deletion, and imports in every format with their rejects."""

import csv
import json
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.articles import Article, delete_articles, upsert_articles
from features.importers import MappingError, import_articles, load_mapping
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.integration.replicas import query

STORED = "SELECT article_id, title, body, url, language, tags, channels, article_version FROM articles WHERE NOT deleted ORDER BY 1"
ROWS: list[dict[str, Any]] = [
    {"article_id": "a", "title": "Returns", "body": "Within 30 days.", "tags": "policy|returns", "url": "https://shop.example/r"},
    {"article_id": "b", "title": "Shipping", "body": "Three days.", "tags": "", "url": ""},
    {"article_id": "b", "title": "Shipping", "body": "Two days; '); DROP TABLE articles; --", "tags": "", "url": ""},
    {"article_id": "c", "title": "", "body": "No title.", "tags": "", "url": ""},
    {"article_id": "d", "title": "Link", "body": "x", "tags": "", "url": "javascript:alert(1)"},
    {"article_id": "e", "title": "Bare", "body": "# a heading alone", "tags": "", "url": ""},
]


@pytest.fixture
def empty(new_shop: NewShop) -> ServerSettings:
    return new_shop()


def test_the_version_moves_when_an_article_changes_and_only_then(empty: ServerSettings) -> None:
    one = Article("a", "Returns", "Within 30 days.", tags=("policy",), channels=("web",))
    with psycopg.connect(empty.postgres_dsn) as connection:
        assert upsert_articles(connection, [one, Article("b", "B", "b")]).article_version == 1
        again = upsert_articles(connection, [one])
        assert (again.changed_count, again.article_version) == (0, 1)
        changed = upsert_articles(connection, [one, Article("b", "B", "other")])
        assert (changed.changed_count, changed.article_version) == (1, 2)
        assert delete_articles(connection, ["a", "nothing"]) == ({"a"}, 3)
        assert delete_articles(connection, ["a"]) == (set(), 3)
        assert upsert_articles(connection, []).article_version == 3
        assert connection.execute("SELECT article_id, title, body, article_version FROM articles WHERE deleted").fetchall() == [
            ("a", "", "", 3)
        ]
        assert upsert_articles(connection, [one]).article_version == 4  # back again
    assert [row["article_version"] for row in query(empty, STORED)] == [4, 2]


def written(folder: Path, suffix: str) -> Path:
    path = folder / f"articles{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json", ".jsonl"])
def test_every_format_is_imported_once_and_rejects_are_told(empty: ServerSettings, tmp_path: Path, suffix: str) -> None:
    source, rejects = written(tmp_path, suffix), tmp_path / "rejects.jsonl"
    report = import_articles(empty.postgres_dsn, source, None, rejects=rejects)
    assert (report.read, report.stored, report.repeated, report.already_stored) == (6, 2, 1, 0)
    assert report.rejected == {"title missing": 1, "url is not http": 1, "body has no text": 1}
    assert [json.loads(line)["reason"] for line in rejects.read_text().splitlines()] == list(report.rejected)
    stored = query(empty, STORED)
    assert [(row["title"], row["body"], row["tags"]) for row in stored] == [
        ("Returns", "Within 30 days.", ["policy", "returns"]),
        ("Shipping", "Two days; '); DROP TABLE articles; --", []),
    ]
    again = import_articles(empty.postgres_dsn, source, None, rejects=rejects)
    assert (again.stored, again.already_stored) == (0, 2)
    assert query(empty, STORED) == stored


def test_a_folder_of_markdown_files_is_imported(empty: ServerSettings, tmp_path: Path) -> None:
    (tmp_path / "help").mkdir()
    head = "---\ntitle: Rückgabe\nlanguage: de\ntags: [policy, 'returns']\nchannels: [web]\nurl: https://shop.example/r\n---\n"
    (tmp_path / "help" / "returns.md").write_text(f"{head}Innerhalb von 30 Tagen.\n", encoding="utf-8")
    (tmp_path / "shipping.md").write_bytes(b"# Shipping and delivery #\r\n\r\nThree days.\r\n")
    (tmp_path / "bare.md").write_text("Nothing but a paragraph.")
    (tmp_path / "bad-head.md").write_text("---\na: [\n---\nx")
    (tmp_path / "list-head.md").write_text("---\n- a\n---\nx")
    (tmp_path / "latin.md").write_bytes(b"caf\xe9")
    (tmp_path / "nowhere.md").write_text("---\nchannels: [moon]\n---\nx")
    (tmp_path / "notes.txt").write_text("no article")
    report = import_articles(empty.postgres_dsn, tmp_path, None, rejects=tmp_path / "rejects")
    assert report.rejected == {"the head is not YAML": 1, "not UTF-8": 1, "the head is not a mapping": 1, "unknown channel": 1}
    assert [(row["article_id"], row["title"], row["language"], row["channels"]) for row in query(empty, STORED)] == [
        ("bare", "bare", "", []),
        ("help/returns", "Rückgabe", "de", ["web"]),
        ("shipping", "Shipping and delivery", "", []),
    ]


def test_what_is_no_list_of_articles_is_named(empty: ServerSettings, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"title": 1}')
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.csv").write_text("question,answer\na,b\n")
    (tmp_path / "none").mkdir()
    for name, problem in (("a.json", "JSON list"), ("b.json", "not JSON"), ("c.csv", "no column 'title'"), ("none", "no Markdown")):
        with pytest.raises(MappingError, match=problem):
            import_articles(empty.postgres_dsn, tmp_path / name, None, rejects=tmp_path / "rejects")
    with pytest.raises(MappingError, match="articles"):
        import_articles(empty.postgres_dsn, tmp_path / "c.csv", load_mapping("rees46"), rejects=tmp_path / "rejects")
    report = import_articles(empty.postgres_dsn, tmp_path / "c.csv", load_mapping("faq"), rejects=tmp_path / "rejects")
    assert report.stored == 1
    assert query(empty, STORED)[0]["article_id"].startswith("faq-")


@pytest.mark.data
def test_the_public_faq_is_imported(empty: ServerSettings, data_folder: Path, tmp_path: Path) -> None:
    source = data_folder / "ecommerce_faq.parquet"
    report = import_articles(empty.postgres_dsn, source, load_mapping("faq"), rejects=tmp_path / "rejects")
    assert (report.read, report.stored, report.rejected) == (104, 104, {})
