"""The shop's articles as its backends write and list them."""

import asyncio
from collections.abc import Callable, Sequence

from psycopg import Connection
from psycopg.rows import TupleRow

from features.articles import Article, ArticlesWritten, delete_articles, upsert_articles
from server.database import Pool

_LIST = """
SELECT article_id, title, body, url, language, tags, channels, updated_at FROM articles
WHERE NOT deleted AND article_id > %(after)s AND (%(language)s = '' OR language = %(language)s) AND (%(tag)s = '' OR %(tag)s = ANY(tags))
ORDER BY article_id LIMIT %(limit)s
"""


class Articles:
    """Writes and lists articles; an answer that is begun after a write uses what it left."""

    def __init__(self, pool: Pool, *, connect: Callable[[], Connection[TupleRow]]) -> None:
        self._pool = pool
        self._connect = connect

    async def upsert(self, articles: Sequence[Article]) -> ArticlesWritten:
        """Stores articles, all or none."""

        def write() -> ArticlesWritten:
            with self._connect() as connection:
                return upsert_articles(connection, articles)

        return await asyncio.to_thread(write)

    async def delete(self, article_ids: Sequence[str]) -> tuple[set[str], int]:
        """Deletes articles; returns the ids of those that were there, and the version."""

        def write() -> tuple[set[str], int]:
            with self._connect() as connection:
                return delete_articles(connection, article_ids)

        return await asyncio.to_thread(write)

    async def list(self, *, page_size: int, after: str, language: str, tag: str) -> list[Article]:
        """Returns up to ``page_size`` articles with ids above ``after``, in id order; an empty language or tag means all."""
        values = {"after": after, "language": language, "tag": tag, "limit": page_size}
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(_LIST, values)).fetchall()
        return [_article(row) for row in rows]


def _article(row: TupleRow) -> Article:
    article_id, title, body, url, language, tags, channels, updated_at = row
    return Article(article_id, title, body, url, language, tuple(tags), tuple(channels), updated_at)
