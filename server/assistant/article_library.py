"""The shop's articles in process: read again when one has changed, indexed and encoded off the event loop."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import psycopg
import structlog
from psycopg.rows import TupleRow

from features.article_search import ArticleIndex
from features.articles import Article
from server.database import RECORD_AWAY, Pool
from server.fleet import FleetWatch
from server.inference.model import LoadedModel
from server.understand.vectors import StoredVectors

_log = structlog.get_logger(__name__)
# Indices kept: of the models before and after an activation, and of the articles before and after a change.
_KEPT = 4
# One statement, so one snapshot: the version read with the rows is exactly the one they add up to.
_CHANGES = """
SELECT s.article_version, a.article_id, a.title, a.body, a.url, a.language, a.tags, a.channels, a.deleted, a.updated_at
FROM fleet_state s LEFT JOIN articles a ON a.article_version > %s
"""


@dataclass(frozen=True)
class IndexedArticles:
    """All articles at one article_version, indexed: equal versions of articles and model give equal answers on every replica."""

    article_version: int
    index: ArticleIndex


class ArticleLibrary:
    """Keeps the articles that answers are made from. Whoever asks waits until those that are wanted are indexed, once for all."""

    def __init__(self, pool: Pool, fleet: FleetWatch) -> None:
        self._pool = pool
        self._fleet = fleet
        self._vectors = StoredVectors(pool)
        self._articles: Mapping[str, Article] = {}
        self._version = -1
        self._reading = asyncio.Lock()
        self._building: dict[tuple[int, str], asyncio.Task[IndexedArticles]] = {}

    async def at_least(self, article_version: int, model: LoadedModel | None) -> IndexedArticles:
        """Returns the articles at a version or later, with the model's vectors of them; without a model words alone count.

        Raises:
            psycopg.Error: PostgreSQL cannot say what changed; older articles are no answer.
        """
        if self._version < article_version:
            async with self._reading:
                if self._version < article_version:
                    await self._apply()
        key = (self._version, model.model_version if model else "")
        task = self._building.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._building[key] = asyncio.create_task(self._build(self._version, self._articles, model))
            for old in list(self._building)[:-_KEPT]:
                del self._building[old]
        return await asyncio.shield(task)

    async def run(self, pause_seconds: float) -> None:
        """Prepares what will be asked for, until cancelled: the newest articles under the model that answers."""
        while True:
            try:
                async with self._pool.connection() as connection:
                    row = await (await connection.execute("SELECT article_version FROM fleet_state")).fetchone()
                if row is not None and self._fleet.current is not None:
                    await self.at_least(row[0], self._fleet.current.model)
            except (psycopg.Error, *RECORD_AWAY) as error:
                _log.warning("articles wait for PostgreSQL", error=type(error).__name__)
            await asyncio.sleep(pause_seconds)

    async def _apply(self) -> None:
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(_CHANGES, [self._version])).fetchall()
        articles = dict(self._articles)
        for row in rows:
            if row[8]:
                articles.pop(row[1], None)
            elif row[1] is not None:
                articles[row[1]] = _article(row)
        self._articles, self._version = articles, int(rows[0][0])

    async def _build(self, version: int, articles: Mapping[str, Article], model: LoadedModel | None) -> IndexedArticles:
        index = await asyncio.to_thread(lambda: ArticleIndex([articles[name] for name in sorted(articles)]))
        if model is not None and len(index):
            encoded = await self._vectors.of(model.model_version, index.texts(), model.passage_vector)
            index = index.with_vectors(encoded)
        _log.info("articles ready", article_version=version, articles=len(articles), passages=len(index))
        return IndexedArticles(version, index)


def _article(row: TupleRow) -> Article:
    _, article_id, title, body, url, language, tags, channels, _, updated_at = row
    return Article(article_id, title, body, url, language, tuple(tags), tuple(channels), updated_at)
