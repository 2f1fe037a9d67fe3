"""The shop's articles as the system of record keeps them, and the passages that answers quote."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from markdown_it import MarkdownIt
from markdown_it.token import Token
from psycopg import Connection
from psycopg.rows import TupleRow

# What a passage may grow to, in characters: an encoder reads about 96 tokens, and who asks reads no page.
PASSAGE_CHARS = 500
_SENTENCE = re.compile(r".+?(?:[.!?\n](?=\s)|[。!?]|\Z)\s*", re.DOTALL)
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~-])")


@dataclass(frozen=True)
class Article:
    """One article.

    Attributes:
        body: Markdown.
        url: where it can be read; empty: nowhere.
        language: such as ``en``; empty where nobody said.
        channels: where it may be quoted; empty: everywhere.
        updated_at: when it last changed; None before it is stored.
    """

    article_id: str
    title: str
    body: str
    url: str = ""
    language: str = ""
    tags: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    updated_at: datetime | None = None


@dataclass(frozen=True)
class Passage:
    """What an answer quotes: the text below one heading of an article, or a part of it.

    Attributes:
        heading: the one above it, empty where there is none.
        markdown: as written.
        text: without markup.
    """

    article_id: str
    heading: str
    markdown: str
    text: str


@dataclass(frozen=True)
class ArticlesWritten:
    """What a write did: how many articles changed, and the version that holds them."""

    changed_count: int
    article_version: int


# The fleet_state row is locked first, so that two writes never interleave: see upsert_items.
_UPSERT = """
WITH given AS (
    SELECT * FROM jsonb_to_recordset(%(articles)s::jsonb)
        AS g (article_id text, title text, body text, url text, language text, tags text[], channels text[])
), changed AS (
    SELECT g.* FROM given g LEFT JOIN articles a USING (article_id)
    WHERE a.article_id IS NULL OR (a.title, a.body, a.url, a.language, a.tags, a.channels, a.deleted)
          IS DISTINCT FROM (g.title, g.body, g.url, g.language, g.tags, g.channels, false)
), state AS (
    UPDATE fleet_state SET article_version = article_version + CASE WHEN EXISTS (SELECT 1 FROM changed) THEN 1 ELSE 0 END
    RETURNING article_version
), written AS (
    INSERT INTO articles AS a (article_id, title, body, url, language, tags, channels, article_version)
    SELECT c.*, state.article_version FROM changed c, state
    ON CONFLICT (article_id) DO UPDATE SET
        title = excluded.title, body = excluded.body, url = excluded.url, language = excluded.language, tags = excluded.tags,
        channels = excluded.channels, article_version = excluded.article_version, updated_at = now(), deleted = false
)
SELECT (SELECT count(*) FROM changed), article_version FROM state
"""
_DELETE = """
WITH state AS (
    UPDATE fleet_state SET article_version = article_version
        + CASE WHEN EXISTS (SELECT 1 FROM articles WHERE article_id = ANY(%(ids)s) AND NOT deleted) THEN 1 ELSE 0 END
    RETURNING article_version
), gone AS (
    UPDATE articles a SET deleted = true, title = '', body = '', url = '', tags = '{}', updated_at = now(),
        article_version = state.article_version
    FROM state WHERE a.article_id = ANY(%(ids)s) AND NOT a.deleted RETURNING a.article_id
)
SELECT coalesce((SELECT array_agg(article_id) FROM gone), '{}'), article_version FROM state
"""
_LOCK = "SELECT 1 FROM fleet_state FOR UPDATE"


def upsert_articles(connection: Connection[TupleRow], articles: Sequence[Article]) -> ArticlesWritten:
    """Stores articles in the caller's transaction; each id must stand once. ``article_version`` moves only when one changed."""
    rows = [{name: value for name, value in asdict(article).items() if name != "updated_at"} for article in articles]
    connection.execute(_LOCK)
    row = connection.execute(_UPSERT, {"articles": json.dumps(rows)}).fetchone()
    assert row is not None
    return ArticlesWritten(row[0], row[1])


def delete_articles(connection: Connection[TupleRow], article_ids: Sequence[str]) -> tuple[set[str], int]:
    """Deletes articles in the caller's transaction; returns the ids of those that were there, and the version."""
    connection.execute(_LOCK)
    row = connection.execute(_DELETE, {"ids": list(article_ids)}).fetchone()
    assert row is not None
    return set(row[0]), row[1]


def passages(article: Article) -> list[Passage]:
    """Cuts an article into passages: blocks below one heading, joined while they stay within PASSAGE_CHARS.

    HTML is text like any other. An article without any block (headings alone) has no passages.
    """
    body = article.body.replace("\r\n", "\n").replace("\r", "\n")
    lines, tokens = body.split("\n"), MarkdownIt("commonmark", {"html": False}).enable("table").parse(body)
    found: list[Passage] = []
    for heading, markdown, text in _blocks(tokens, lines):
        last = found[-1] if found else None
        if last is not None and last.heading == heading and len(last.text) + len(text) < PASSAGE_CHARS:
            found[-1] = Passage(article.article_id, heading, f"{last.markdown}\n\n{markdown}", f"{last.text}\n{text}")
        else:
            found.append(Passage(article.article_id, heading, markdown, text))
    return found


def escaped(text: str) -> str:
    """Returns Markdown that shows ``text`` as it is, whatever markup stands in it."""
    return _MARKUP.sub(r"\\\1", text)


def text_hash(text: str) -> str:
    """Returns the identity of a text that the encoder reads: 32 hex digits of SHA-256, never those of an item's description."""
    return hashlib.sha256(f"passage\x1f{text}".encode()).hexdigest()[:32]


def passage_text(title: str, passage: Passage) -> str:
    """Returns what the encoder reads of a passage: what it is about, then what it says."""
    return " ".join(part for part in (title, passage.heading, passage.text) if part)


def _blocks(tokens: Sequence[Token], lines: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yields (heading, Markdown, text) of each outermost block that has text; one longer than a passage comes in pieces."""
    heading, place = "", 0
    while place < len(tokens):
        end = _end(tokens, place)
        token, texts = tokens[place], [_text(each) for each in tokens[place:end]]
        text = "\n".join(filter(None, texts))
        if token.type == "heading_open":
            heading = text
        elif text and token.map is not None:
            pieces = _pieces(text)
            if len(pieces) == 1:
                yield heading, "\n".join(lines[slice(*token.map)]).strip(), text
            else:  # cut anywhere, markup would stay open: pieces are quoted as text
                yield from ((heading, escaped(piece), piece) for piece in pieces)
        place = end


def _end(tokens: Sequence[Token], place: int) -> int:
    """Returns where the outermost block that begins at ``place`` has ended."""
    while tokens[place].nesting > 0 or tokens[place].level > 0:
        place += 1
    return place + 1


def _pieces(text: str) -> list[str]:
    """Cuts a text after sentences into pieces of PASSAGE_CHARS; a longer sentence is cut where it reaches that."""
    if len(text) <= 2 * PASSAGE_CHARS:
        return [text]
    found = [""]
    for sentence in _SENTENCE.findall(text):
        for start in range(0, len(sentence), PASSAGE_CHARS):
            part = sentence[start : start + PASSAGE_CHARS]
            if found[-1] and len(found[-1]) + len(part) > PASSAGE_CHARS:
                found.append("")
            found[-1] += part
    return [piece.strip() for piece in found if piece.strip()]


def _text(token: Token) -> str:
    """Returns the text of one token without markup: an inline run, or a block of code."""
    if token.type in ("fence", "code_block"):
        return token.content.strip()
    parts = [" " if child.type in ("softbreak", "hardbreak") else child.content for child in token.children or ()]
    return " ".join("".join(parts).split())
