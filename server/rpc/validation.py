"""The one validation layer: reads requests into domain values, or says which field breaks which rule."""

from collections.abc import Sequence

from concord.v1 import articles_pb2, catalog_pb2, common_pb2, features_pb2, recommendation_pb2, search_pb2, understanding_pb2
from features.articles import Article
from features.catalogue import Item, Relation
from server import tokens
from server.domain import EVERYTHING, EmbedQuery, EntityKey, ItemFilter, RecommendQuery, Subject, SuggestQuery, Token
from server.errors import InvalidRequestError
from server.rpc import rules
from server.rpc.translate import PURPOSES, RELATION_NAMES
from server.understand.intents import IntentQuery

# Where a search is shown. A slate of Recommend for a surface of this name is another one: it has no query.
SEARCH_SURFACE = "search"


class Validator:
    """Rules that need to know which channels and surfaces the shop has registered.

    Every method raises InvalidRequestError at the first violation; ``field`` arguments are the path used in it.
    """

    def __init__(self, *, channels: Sequence[str], surfaces: Sequence[str]) -> None:
        self._channels = frozenset(channels)
        self._surfaces = frozenset(surfaces)

    def channel(self, name: str, field: str) -> str:
        """Checks a channel's name."""
        return rules.member(name, field, of=self._channels, kind="channel")

    def surface(self, name: str, field: str) -> str:
        """Checks a surface's name."""
        return rules.member(name, field, of=self._surfaces, kind="surface")

    def identity(self, identity: common_pb2.ChannelIdentity, field: str) -> Subject:
        """Reads a channel identity."""
        channel_user_id = rules.identifier(identity.channel_user_id, f"{field}.channel_user_id", most=rules.CHANNEL_USER_ID_CHARS)
        return Subject(channel=self.channel(identity.channel, f"{field}.channel"), channel_user_id=channel_user_id)

    def subject(self, subject: common_pb2.Subject, field: str) -> Subject:
        """Reads who a call is about."""
        kind = subject.WhichOneof("subject")
        if kind is None:
            raise InvalidRequestError(field, "is required: a user_id or an identity", reason="SUBJECT_REQUIRED")
        if kind == "user_id":
            return Subject(user_id=rules.identifier(subject.user_id, f"{field}.user_id"))
        return self.identity(subject.identity, f"{field}.identity")

    def token(self, text: str, field: str) -> Token | None:
        """Reads a consistency token; empty means none."""
        return tokens.decode(rules.text(text, field, most=rules.TOKEN_CHARS), field) if text else None

    def recommend(self, request: recommendation_pb2.RecommendRequest) -> RecommendQuery:
        """Reads a request for recommendations; context items are put in order, because theirs does not matter."""
        context = rules.identifiers(request.context_item_ids, "context_item_ids", most=rules.CONTEXT_ITEMS)
        return RecommendQuery(
            subject=self.subject(request.subject, "subject"),
            channel=self.channel(request.channel, "channel"),
            surface=self.surface(request.surface, "surface"),
            limit=rules.page(request.limit, "limit", most=rules.LIMIT, default=rules.DEFAULT_LIMIT),
            page_token=rules.text(request.page_token, "page_token", most=rules.TOKEN_CHARS),
            context_item_ids=tuple(sorted(set(context))),
            filters=self.item_filter(request.filter, "filter") if request.HasField("filter") else EVERYTHING,
            token=self.token(request.consistency_token, "consistency_token"),
            log_exposure=not request.skip_exposure_logging,
        )

    def search(self, request: search_pb2.SearchRequest) -> RecommendQuery:
        """Reads which page of a search is asked for."""
        return RecommendQuery(
            subject=self.subject(request.subject, "subject"),
            channel=self.channel(request.channel, "channel"),
            surface=SEARCH_SURFACE,
            limit=rules.page(request.limit, "limit", most=rules.LIMIT, default=rules.DEFAULT_LIMIT),
            page_token=rules.text(request.page_token, "page_token", most=rules.TOKEN_CHARS),
            filters=self.item_filter(request.filter, "filter") if request.HasField("filter") else EVERYTHING,
            token=self.token(request.consistency_token, "consistency_token"),
            log_exposure=not request.skip_exposure_logging,
            search_text=rules.query(request.query, "query"),
        )

    def suggest(self, request: search_pb2.SuggestRequest) -> SuggestQuery:
        """Reads what is to be completed."""
        return SuggestQuery(
            channel=self.channel(request.channel, "channel"),
            prefix=rules.text(request.prefix, "prefix", most=rules.PREFIX_CHARS, too_long="TEXT_TOO_LONG"),
            limit=rules.page(request.limit, "limit", most=rules.SUGGESTIONS, default=rules.DEFAULT_SUGGESTIONS),
        )

    def item_filter(self, wanted: recommendation_pb2.ItemFilter, field: str) -> ItemFilter:
        """Reads the conditions on items; both price bounds must be in one currency and leave something between them."""
        least = rules.price(wanted.min_price, f"{field}.min_price") if wanted.HasField("min_price") else None
        most = rules.price(wanted.max_price, f"{field}.max_price") if wanted.HasField("max_price") else None
        if least is not None and most is not None:
            if wanted.min_price.currency_code != wanted.max_price.currency_code:
                raise InvalidRequestError(f"{field}.max_price.currency_code", "must be that of min_price")
            if most < least:
                raise InvalidRequestError(f"{field}.max_price", "must not be below min_price")
        return ItemFilter(
            categories=rules.labels(wanted.categories, f"{field}.categories"),
            brands=rules.labels(wanted.brands, f"{field}.brands"),
            min_price_micros=least,
            max_price_micros=most,
            currency=wanted.min_price.currency_code or wanted.max_price.currency_code,
            in_stock_only=wanted.in_stock_only,
            exclude_item_ids=frozenset(rules.identifiers(wanted.exclude_item_ids, f"{field}.exclude_item_ids", most=rules.ITEM_IDS)),
        )

    def items(self, request: catalog_pb2.UpsertItemsRequest) -> tuple[list[Item], list[Relation]]:
        """Reads items and relations to be stored."""
        rules.count(request.items, "items", most=rules.ITEMS)
        rules.count(request.relations, "relations", most=rules.RELATIONS)
        if not request.items and not request.relations:
            raise InvalidRequestError("items", "is required where there are no relations")
        return (
            [self._item(item, f"items[{index}]") for index, item in enumerate(request.items)],
            [_relation(relation, f"relations[{index}]") for index, relation in enumerate(request.relations)],
        )

    def _item(self, item: catalog_pb2.Item, field: str) -> Item:
        for index, channel in enumerate(item.channels):
            self.channel(channel, f"{field}.channels[{index}]")
        rules.each_once(item.channels, f"{field}.channels")
        if item.stock < 0:
            raise InvalidRequestError(f"{field}.stock", "must be at least 0")
        return Item(
            item_id=rules.identifier(item.item_id, f"{field}.item_id"),
            title=rules.text(item.title, f"{field}.title", most=rules.TITLE_CHARS, least=1),
            text=rules.text(item.text, f"{field}.text", most=rules.DESCRIPTION_CHARS),
            category=rules.text(item.category, f"{field}.category", most=rules.LABEL_CHARS),
            brand=rules.text(item.brand, f"{field}.brand", most=rules.LABEL_CHARS),
            price_micros=rules.price(item.price, f"{field}.price") if item.HasField("price") else None,
            currency=item.price.currency_code,
            stock=item.stock if item.HasField("stock") else None,
            channels=tuple(item.channels),
            image_ref=rules.text(item.image_ref, f"{field}.image_ref", most=rules.IMAGE_REF_CHARS),
            attributes=_attributes(item, f"{field}.attributes"),
            listed_at=rules.moment(item.listed_at, f"{field}.listed_at") if item.HasField("listed_at") else None,
        )

    def articles(self, request: articles_pb2.UpsertArticlesRequest) -> list[Article]:
        """Reads articles to be stored, each id once."""
        rules.count(request.articles, "articles", most=rules.ARTICLES, least=1)
        articles = [self._article(article, f"articles[{index}]") for index, article in enumerate(request.articles)]
        rules.each_once([article.article_id for article in articles], "articles")
        return articles

    def _article(self, article: articles_pb2.Article, field: str) -> Article:
        for index, channel in enumerate(article.channels):
            self.channel(channel, f"{field}.channels[{index}]")
        rules.each_once(article.channels, f"{field}.channels")
        rules.count(article.tags, f"{field}.tags", most=rules.TAGS)
        rules.each_once(article.tags, f"{field}.tags")
        if article.url and not article.url.startswith(("https://", "http://")):
            raise InvalidRequestError(f"{field}.url", "must begin with http:// or https://")
        return Article(
            article_id=rules.identifier(article.article_id, f"{field}.article_id"),
            title=rules.text(article.title, f"{field}.title", most=rules.TITLE_CHARS, least=1),
            body=rules.text(article.body, f"{field}.body", most=rules.BODY_CHARS, least=1),
            url=rules.text(article.url, f"{field}.url", most=rules.URL_CHARS),
            language=rules.text(article.language, f"{field}.language", most=rules.LANGUAGE_CHARS),
            tags=tuple(rules.text(tag, f"{field}.tags[{k}]", most=rules.LABEL_CHARS, least=1) for k, tag in enumerate(article.tags)),
            channels=tuple(article.channels),
        )

    def features(self, request: features_pb2.GetOnlineFeaturesRequest) -> tuple[str, tuple[str, ...], list[EntityKey]]:
        """Reads which features of which entities are asked for: a service's name or feature references, and the entities."""
        kind = request.WhichOneof("selection")
        if kind is None:
            raise InvalidRequestError("selection", "is required: a feature_service or features")
        rules.count(request.entities, "entities", most=rules.ENTITIES, least=1)
        keys = [self._entity(row, f"entities[{index}]") for index, row in enumerate(request.entities)]
        if kind == "feature_service":
            return rules.identifier(request.feature_service, "feature_service"), (), keys
        refs = rules.identifiers(request.features.feature_refs, "features.feature_refs", most=rules.FEATURE_REFS, least=1)
        for index, ref in enumerate(refs):
            rules.feature_ref(ref, f"features.feature_refs[{index}]")
        rules.each_once(refs, "features.feature_refs")
        return "", refs, keys

    def embed(self, request: understanding_pb2.EmbedTextRequest) -> EmbedQuery:
        """Reads texts to be encoded, and what they are."""
        texts = self.texts(request)
        if request.purpose not in PURPOSES:
            raise InvalidRequestError("purpose", "is required: a known purpose")
        if request.max_tokens and not rules.LEAST_TOKENS <= request.max_tokens <= rules.MOST_TOKENS:
            raise InvalidRequestError("max_tokens", f"must be {rules.LEAST_TOKENS} to {rules.MOST_TOKENS}, or 0 for the model's own limit")
        return EmbedQuery(texts, PURPOSES[request.purpose], request.max_tokens)

    def intent(self, request: understanding_pb2.DetectIntentRequest) -> IntentQuery:
        """Reads a text whose writer wants something."""
        self.channel(request.channel, "channel")
        text = rules.text(request.text, "text", most=rules.TEXT_CHARS)
        return IntentQuery(text, rules.page(request.top_k, "top_k", most=rules.TOP_K, default=rules.DEFAULT_TOP_K))

    def texts(self, request: understanding_pb2.EmbedTextRequest | understanding_pb2.AnalyzeSentimentRequest) -> tuple[str, ...]:
        """Reads texts to be understood, after the channel that asks."""
        self.channel(request.channel, "channel")
        rules.count(request.texts, "texts", most=rules.TEXTS, least=1)
        texts = tuple(rules.text(text, f"texts[{index}]", most=rules.TEXT_CHARS) for index, text in enumerate(request.texts))
        if sum(map(len, texts)) > rules.TEXTS_CHARS:
            raise InvalidRequestError("texts", f"must have at most {rules.TEXTS_CHARS:,} characters together")
        return texts

    def _entity(self, row: features_pb2.EntityRow, field: str) -> EntityKey:
        if not row.user_id and not row.item_id:
            raise InvalidRequestError(field, "must name a user_id or an item_id")
        return EntityKey(
            user_id=rules.text(row.user_id, f"{field}.user_id", most=rules.ID_CHARS),
            item_id=rules.text(row.item_id, f"{field}.item_id", most=rules.ID_CHARS),
            token=self.token(row.consistency_token, f"{field}.consistency_token"),
        )


def _attributes(item: catalog_pb2.Item, field: str) -> dict[str, str]:
    rules.count(item.attributes, field, most=rules.ATTRIBUTES)
    for key, value in item.attributes.items():
        rules.text(key, f"{field} key", most=rules.ATTRIBUTE_KEY_CHARS, least=1)
        rules.text(value, f"{field}[{key}]", most=rules.ATTRIBUTE_VALUE_CHARS)
    return dict(item.attributes)


def _relation(relation: catalog_pb2.ItemRelation, field: str) -> Relation:
    item_id = rules.identifier(relation.item_id, f"{field}.item_id")
    related = rules.identifier(relation.related_item_id, f"{field}.related_item_id")
    if related == item_id:
        raise InvalidRequestError(f"{field}.related_item_id", "must differ from item_id")
    if relation.kind not in RELATION_NAMES:
        raise InvalidRequestError(f"{field}.kind", "is required: a known kind of relation")
    weight = rules.number(relation.weight, f"{field}.weight", least=0, most=1) or 1.0
    return Relation(item_id, related, RELATION_NAMES[relation.kind], weight)
