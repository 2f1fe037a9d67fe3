"""ArticleService: the shop's own articles."""

from concord.v1 import articles_pb2, articles_pb2_grpc
from features.articles import Article
from server.rpc import rules
from server.rpc.interceptor import Context
from server.rpc.paging import fitting, page_token, read_page_token
from server.rpc.ports import Articles
from server.rpc.translate import timestamp_of
from server.rpc.validation import Validator


class ArticleServicer(articles_pb2_grpc.ArticleServiceServicer):
    """Stores, lists and deletes articles."""

    def __init__(self, articles: Articles, validator: Validator) -> None:
        self._articles = articles
        self._validator = validator

    async def UpsertArticles(self, request: articles_pb2.UpsertArticlesRequest, _context: Context) -> articles_pb2.UpsertArticlesResponse:
        """Stores articles, all or none."""
        written = await self._articles.upsert(self._validator.articles(request))
        return articles_pb2.UpsertArticlesResponse(changed_count=written.changed_count, article_version=written.article_version)

    async def ListArticles(self, request: articles_pb2.ListArticlesRequest, _context: Context) -> articles_pb2.ListArticlesResponse:
        """Lists articles in the order of their ids; one more than the page holds tells whether there is a next one."""
        page_size = rules.page(request.page_size, "page_size", most=rules.PAGE_SIZE, default=rules.DEFAULT_PAGE_SIZE)
        found = await self._articles.list(
            page_size=page_size + 1,
            after=read_page_token(request.page_token),
            language=rules.text(request.language, "language", most=rules.LANGUAGE_CHARS),
            tag=rules.text(request.tag, "tag", most=rules.LABEL_CHARS),
        )
        shown = fitting([_article(article) for article in found[:page_size]])
        more = len(shown) < len(found)
        return articles_pb2.ListArticlesResponse(articles=shown, next_page_token=page_token(shown[-1].article_id) if more else "")

    async def DeleteArticles(self, request: articles_pb2.DeleteArticlesRequest, _context: Context) -> articles_pb2.DeleteArticlesResponse:
        """Deletes articles."""
        wanted = dict.fromkeys(rules.identifiers(request.article_ids, "article_ids", most=rules.ITEM_IDS, least=1))
        deleted, version = await self._articles.delete(list(wanted))
        return articles_pb2.DeleteArticlesResponse(
            deleted_count=len(deleted),
            not_found_article_ids=[article_id for article_id in wanted if article_id not in deleted],
            article_version=version,
        )


def _article(article: Article) -> articles_pb2.Article:
    return articles_pb2.Article(
        article_id=article.article_id,
        title=article.title,
        body=article.body,
        url=article.url,
        language=article.language,
        tags=article.tags,
        channels=article.channels,
        updated_at=timestamp_of(article.updated_at),
    )
