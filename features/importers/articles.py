"""Import of articles: a table in any format the importers read, or a folder of Markdown files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import yaml

from features.articles import Article, passages, upsert_articles
from features.importers.batches import BatchImport, Columns, good_rows
from features.importers.checks import Reasons
from features.importers.columns import source_column, text_column
from features.importers.fields import ListField, TextField
from features.importers.item_rows import parse_list
from features.importers.mapping import ArticlesMapping, Mapping, MappingError
from features.importers.report import ImportReport, Progress
from features.importers.sources import Malformed, Source, open_source, records_source
from features.settings import DEFAULT_CHANNELS

# In characters; those of ArticleService.
_LIMITS = {"article_id": 128, "title": 500, "body": 50_000, "url": 2_000, "language": 35}
_MOST_TAGS, _TAG_CHARS = 50, 200
_BATCH_ROWS = 1_000
_OPTIONAL = ("article_id", "url", "language", "tags", "channels")


def import_articles(
    dsn: str,
    source: Path,
    mapping: Mapping | None,
    *,
    rejects: Path,
    channels: Sequence[str] = DEFAULT_CHANNELS,
    progress: Progress | None = None,
) -> ImportReport:
    """Imports articles; importing the same ones again changes nothing.

    Args:
        dsn: the migrated database.
        source: a Parquet, CSV, JSON or JSON lines file, or a folder of Markdown files (``*.md``, in folders below it too). Of a
            Markdown file the id is its path without the suffix, the title its first heading or its name; YAML between two lines
            of ``---`` at its head may give ``article_id``, ``title``, ``url``, ``language``, ``tags`` and ``channels``.
        mapping: with an articles section. None: the columns have the names of an article's fields (folders need none).
        rejects: file for rows that were not stored, replaced.
        channels: registered channel names; an article for another is rejected.
        progress: called after each batch of rows.

    Raises:
        MappingError: no articles section, or a column the file lacks.
        OSError: a file cannot be read or written.
        psycopg.Error: the database refused.
    """
    if source.is_dir():
        opened, spec, dataset = _markdown(source), _plain(None), source.name
    elif mapping is None:
        opened = open_source(source, Mapping(dataset=source.stem), batch_rows=_BATCH_ROWS)
        spec, dataset = _plain(opened.columns), source.stem
    elif mapping.articles is None:
        raise MappingError(f"the mapping of {mapping.dataset!r} has no [articles] section")
    else:
        opened, spec, dataset = open_source(source, mapping, batch_rows=_BATCH_ROWS), mapping.articles, mapping.dataset
    opened.require(spec.columns(), "articles")
    run = BatchImport("articles", lambda rows, reasons: _articles(rows, spec, reasons, dataset=dataset, channels=channels), _store)
    return run(dsn, opened, rejects=rejects, progress=progress)


def _plain(columns: Sequence[str] | None) -> ArticlesMapping:
    """Returns the mapping of columns that have the names of an article's fields, as far as the source has them."""
    named = {name: name for name in _OPTIONAL if columns is None or name in columns}
    lists = {name: ListField(column=name) for name in named if name in ("tags", "channels")}
    return ArticlesMapping.model_validate({"title": "title", "body": "body", **named, **lists})


def _articles(rows: pa.Table, spec: ArticlesMapping, reasons: Reasons, *, dataset: str, channels: Sequence[str]) -> Columns:
    columns = {name: text_column(rows, getattr(spec, name)) for name in ("article_id", "title", "body", "url", "language")}
    columns["article_id"] = _ids(columns, spec.article_id, dataset)
    reasons.rules(rows, spec.reject)
    for name in ("article_id", "title", "body"):
        reasons.missing(columns[name], name)
    for name, limit in _LIMITS.items():
        reasons.longer(columns[name], limit, name)
    schemes = [url is None or url.startswith(("https://", "http://")) for url in columns["url"].to_pylist()]
    reasons.add(~np.array(schemes, bool), "url is not http")
    for name in ("tags", "channels"):
        field = getattr(spec, name)
        values = source_column(rows, field.column).to_pylist() if field else [()] * len(rows)
        lists = [parse_list(value, field.separator if field else "|") for value in values]
        reasons.add(np.array([value is None for value in lists], bool), f"{name} is not a list")
        columns[name] = pa.array([list(dict.fromkeys(value or ())) for value in lists], pa.list_(pa.string()))
    unknown = [not set(value) <= set(channels) for value in columns["channels"].to_pylist()]
    reasons.add(np.array(unknown, bool), "unknown channel")
    many = [len(value) > _MOST_TAGS or any(len(tag) > _TAG_CHARS for tag in value) for value in columns["tags"].to_pylist()]
    reasons.add(np.array(many, bool), f"more than {_MOST_TAGS} tags, or one of more than {_TAG_CHARS} characters")
    reasons.unstorable(columns.values())
    empty = [not passages(Article("", "", body or "")) for body in columns["body"].to_pylist()]
    reasons.add(np.array(empty, bool), "body has no text")
    return columns


def _ids(columns: Columns, spec: TextField | None, dataset: str) -> pa.Array:
    if spec is not None:
        return columns["article_id"]
    digests = [title and hashlib.sha256(title.encode()).hexdigest()[:16] for title in columns["title"].to_pylist()]
    return pa.array([digest and f"{dataset}-{digest}" for digest in digests], pa.string())


def _store(connection: psycopg.Connection, columns: Columns, reasons: Reasons) -> tuple[int, int]:
    given = [dict(zip(columns, row, strict=True)) for row in good_rows(columns, reasons)]
    articles = {row["article_id"]: _article(row) for row in given}  # of equal ids the last stands
    changed = upsert_articles(connection, list(articles.values())).changed_count
    return changed, len(articles) - changed


def _article(row: dict[str, Any]) -> Article:
    return Article(
        article_id=row["article_id"],
        title=row["title"],
        body=row["body"],
        url=row["url"] or "",
        language=row["language"] or "",
        tags=tuple(row["tags"]),
        channels=tuple(row["channels"]),
    )


def _markdown(folder: Path) -> Source:
    """Reads the Markdown files of a folder in the order of their paths, each as one row."""
    paths = sorted(folder.rglob("*.md"))
    if not paths:
        raise MappingError(f"{folder} has no Markdown files (*.md)")
    return records_source([_markdown_record(path, folder, number) for number, path in enumerate(paths, start=1)], _BATCH_ROWS)


def _markdown_record(path: Path, folder: Path, number: int) -> dict[str, Any] | Malformed:
    name = path.relative_to(folder).as_posix()
    try:
        head, body = _front_matter(path.read_text("utf-8-sig"))
    except UnicodeDecodeError:
        return Malformed(number, "not UTF-8", name)
    except (yaml.YAMLError, RecursionError):
        return Malformed(number, "the head is not YAML", name)
    if not isinstance(head, dict):
        return Malformed(number, "the head is not a mapping", name)
    first, _, rest = body.lstrip("\n").partition("\n")
    headed = first.startswith("# ")
    title = head.get("title") or (first[2:].strip(" #") if headed else path.stem)
    given = {field: head[field] for field in _OPTIONAL if head.get(field) is not None}
    return {"article_id": name.removesuffix(".md"), **given, "title": str(title), "body": rest if headed else body}


def _front_matter(text: str) -> tuple[Any, str]:
    """Returns the YAML at a file's head, an empty mapping where there is none, and what follows it."""
    text = text.replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return {}, text
    head, separator, body = text[4:].partition("\n---\n")
    return (yaml.safe_load(head) or {}, body) if separator else ({}, text)
