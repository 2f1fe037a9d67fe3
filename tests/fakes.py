"""Small domain services for tests of the edge: each answers from what it is given and remembers what it was asked."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from features.articles import Article, ArticlesWritten
from features.aspects import Mention
from features.behaviour import Activity, Behaviour
from features.candidates import Source
from features.catalogue import Item, Relation, UpsertResult
from features.completions import Completion, CompletionKind
from features.layout import Ages, FeatureValue, Status
from features.models import Activation, ModelVersion, OnUnready
from features.replicas import Replica
from server.assistant.answer import Answer as AssistantAnswer
from server.assistant.answer import Kind, OfferedItem, OrderLine, Quote
from server.assistant.assistant import Question, Reply
from server.assistant.conversations import Turn
from server.assistant.words import in_words
from server.domain import (
    Answer,
    CustomerProfile,
    Embedded,
    Embedding,
    EmbedQuery,
    EntityKey,
    EventOutcome,
    Facets,
    FeatureTable,
    Graph,
    IncomingEvent,
    ItemCard,
    ItemFilter,
    Link,
    Linked,
    Persona,
    PriceRange,
    Receipt,
    RecommendQuery,
    RecordOutcome,
    Resolved,
    SearchAnswer,
    SearchOutcome,
    SearchQuery,
    ShownItem,
    Stored,
    Subject,
    Suggestions,
    SuggestQuery,
    Token,
    Unlinked,
    Versions,
)
from server.rpc.ports import Services
from server.security.audit import AuditEntry
from server.security.gate import Gate
from server.understand.entities import Entity, EntityKind
from server.understand.intents import IntentQuery, Understood
from server.understand.opinions import UNJUDGED, Analyzed, Judgement, Leaning, TextSentiment
from server.understand.patterns import Bound

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@dataclass
class Script:
    """What every call of a fake does first: wait, then fail, if it is told to."""

    calls: list[Any] = field(default_factory=list)
    error: Exception | None = None
    delay: float = 0.0
    cancelled: int = 0
    called: asyncio.Event = field(default_factory=asyncio.Event)

    async def play(self, call: Any) -> None:
        self.calls.append(call)
        self.called.set()
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error


@dataclass
class FakeRecorder(Script):
    """Stores everything once per event id, one customer per identity."""

    seen: set[Any] = field(default_factory=set)
    online: bool = True

    async def record(self, events: Sequence[IncomingEvent]) -> RecordOutcome:
        await self.play(tuple(events))
        outcomes = []
        users: dict[str, int] = {}
        for event in events:
            user_id = event.subject.user_id or f"u-{event.subject.channel_user_id}"
            status = Stored.DUPLICATE if event.event_id in self.seen else Stored.STORED
            self.seen.add(event.event_id)
            users[user_id] = len(self.seen)
            outcomes.append(EventOutcome(status, user_id))
        return RecordOutcome(tuple(outcomes), tuple(Token(user, version) for user, version in users.items()), self.online)


@dataclass
class FakeIdentities(Script):
    known: dict[Subject, str] = field(default_factory=dict)

    async def resolve(self, subject: Subject, *, create: bool = False) -> Resolved:
        await self.play((subject, create))
        if subject not in self.known and not create:
            return Resolved("", 0, created=False)
        created = subject not in self.known
        self.known.setdefault(subject, f"u{len(self.known) + 1}")
        return Resolved(self.known[subject], 0 if created else 3, created=created)


@dataclass
class FakeGraph(Script):
    async def link(self, first: Subject, second: Subject, *, may_create: bool = True) -> Linked:
        await self.play((first, second, may_create))
        return Linked(Token("u1", 9), ("u2",))

    async def unlink(self, identity: Subject, subject: Subject | None) -> Unlinked:
        await self.play((identity, subject))
        return Unlinked(Token("u2", 10), (Token("u1", 10),), removed_links=1, still_linked=False)

    async def read(self, subject: Subject) -> Graph:
        await self.play(subject)
        personas = (Persona("u1", NOW, (("app", "a"), ("web", "b"))), Persona("u2", NOW, ()))
        return Graph(Token("u1", 9), personas, (Link("u1", "u2", NOW),))


@dataclass
class FakeErasure(Script):
    async def forget(self, subject: Subject) -> Receipt:
        await self.play(subject)
        kinds = ("events", "shadowed_events", "exposures", "profiles", "outbox", "links", "identities", "users")
        return Receipt("r1", NOW, {kind: n for n, kind in enumerate(kinds, start=1)}, online_erased=True)


def shown(item_id: str, position: int, *, sources: Source = Source.POPULAR, newcomer: bool = False) -> ShownItem:
    card = ItemCard(
        item_id=item_id,
        title=f"Title {item_id}",
        category="Kitchen",
        brand="Acme",
        image_ref="",
        price_micros=19_990_000,
        currency="EUR",
        in_stock=True,
    )
    return ShownItem(card, score=1.0 - position / 8, position=position, sources=sources, newcomer=newcomer)


ANSWER = Answer(
    user_id="u1",
    items=(shown("i1", 0, sources=Source.COLLABORATIVE | Source.POPULAR), shown("i2", 1, newcomer=True)),
    versions=Versions(7, "m1", 3, 5),
    slate_id="s1",
    as_of=NOW,
    token=Token("u1", 7),
    next_page_token="next",
    degraded_reasons=("NO_ACTIVE_MODEL",),
    stages={"features": 0.001, "ranking": 0.0025},
)


@dataclass
class FakeRecommender(Script):
    answer: Answer = ANSWER

    async def recommend(self, query: RecommendQuery) -> Answer:
        await self.play(query)
        return self.answer

    async def rank(self, subject: Subject, *, channel: str, surface: str, item_ids: Sequence[str], token: Token | None) -> Answer:
        await self.play((subject, channel, surface, tuple(item_ids), token))
        return self.answer

    async def similar(self, item_id: str, *, channel: str, limit: int, filters: ItemFilter) -> Answer:
        await self.play((item_id, channel, limit, filters))
        return self.answer


@dataclass
class FakeSearcher(Script):
    async def search(self, query: SearchQuery) -> SearchAnswer:
        await self.play(query)
        facets = Facets(2, (("Kitchen", 2),), (("Acme", 2),), (PriceRange("EUR", 10_000_000, 19_999_999, 2),))
        found = replace(ANSWER, items=(shown("i1", 0, sources=Source.LEXICAL | Source.SEMANTIC | Source.VECTOR), shown("i2", 3)))
        return SearchAnswer(
            found, SearchOutcome.MATCHED, "blue mug", facets, query.event.event_id if query.event else None, 8 if query.event else 0
        )


@dataclass
class FakeSuggester(Script):
    async def suggest(self, query: SuggestQuery) -> Suggestions:
        await self.play(query)
        found = [Completion("blue mug", CompletionKind.PHRASE), Completion("Mugs & Cups", CompletionKind.CATEGORY)]
        return Suggestions([*found, Completion("Mugo", CompletionKind.BRAND)], Versions(0, "", 3, 5))


@dataclass
class FakeProfiles(Script):
    async def read(self, subject: Subject, *, token: Token | None) -> CustomerProfile:
        await self.play((subject, token))
        names = {
            "event_count": 4,
            "purchase_count": 1,
            "purchase_value": 10.5,
            "price_mean": 10.5,
            "price_low": 10.5,
            "price_high": 10.5,
            "top_categories": ["Garden", "Kitchen"],
            "top_category_shares": [0.25, 0.75],
            "top_brands": None,
            "top_brand_shares": None,
            "channel_names": ["web"],
            "channel_shares": [1.0],
        }
        return CustomerProfile(
            user_id="u1",
            user_version=4,
            identities=[("web", "b"), ("app", "a")],
            activity=Activity(4, (Behaviour("", "search", "web", 1_700_000_000_123_456, "x" * 200),)),
            counters={"views_7d": 3, "carts_7d": 0, "purchases_28d": 1, "searches_7d": 1},
            profile={name: FeatureValue(value, Status.MISSING if value is None else Status.PRESENT, NOW) for name, value in names.items()},
        )


@dataclass
class FakeCatalog(Script):
    items: dict[str, Item] = field(default_factory=dict)
    index_version: int = 2
    offer_version: int = 5

    async def upsert(self, items: Sequence[Item], relations: Sequence[Relation]) -> UpsertResult:
        await self.play((tuple(items), tuple(relations)))
        self.items |= {item.item_id: item for item in items}
        return UpsertResult(len(items), len(items), len(items), content_version=3, offer_version=6)

    async def get(self, item_ids: Sequence[str]) -> list[Item]:
        await self.play(tuple(item_ids))
        return [item for key, item in sorted(self.items.items()) if key in item_ids]

    async def list(self, *, page_size: int, after: str, category: str) -> "list[Item]":
        await self.play((page_size, after, category))
        return [item for key, item in sorted(self.items.items()) if key > after and category in ("", item.category)][:page_size]


@dataclass
class FakeFeatures(Script):
    table: FeatureTable = field(default_factory=lambda: FeatureTable({"v:f": [1]}, {"v": Ages([Status.PRESENT], [NOW])}))

    async def read(self, *, service: str, refs: Sequence[str], entities: Sequence[EntityKey]) -> FeatureTable:
        await self.play((service, tuple(refs), tuple(entities)))
        return self.table


@dataclass
class FakeEmbedder(Script):
    """Knows nothing to read in blanks; else a vector of three, and a token a word."""

    async def embed(self, query: EmbedQuery) -> Embedded:
        await self.play(query)
        unit = np.array([0.6, 0.8, 0.0], np.float32)
        read = [(len(text.split()), len(text) > 1_000) for text in query.texts]
        return Embedded(tuple(Embedding(unit if words else None, words, long) for words, long in read), "m1")


TURN = Turn(
    3,
    "app",
    "how much is it?",
    AssistantAnswer(
        Kind.PRICE,
        "en",
        quotes=(Quote("a1", "Returns", "https://shop.example/r", "How long", "**30** days", "30 days", (), 0.75),),
        items=(
            OfferedItem("i1", "Title <i1>", 19_990_000, "EUR", True, ()),
            OfferedItem("i2", "Title i2", 5_000_000, "EUR", False, ("app",)),
        ),
        orders=(OrderLine("e1", "i1", "Title i1", None, "2026-02-01", False),),
    ),
    Versions(7, "m1", 3, 5),
    9,
    NOW,
)


@dataclass
class FakeAssistant(Script):
    turn: Turn = TURN

    async def ask(self, question: Question) -> Reply:
        await self.play(question)
        shown = self.turn.answer.in_channel(question.channel)
        return Reply("u1", self.turn, shown, in_words(shown, question.how), Token("u1", self.turn.versions.user_version))


@dataclass
class FakeArticles(Script):
    articles: dict[str, Article] = field(default_factory=dict)

    async def upsert(self, articles: Sequence[Article]) -> ArticlesWritten:
        await self.play(tuple(articles))
        self.articles |= {article.article_id: article for article in articles}
        return ArticlesWritten(len(articles), 4)

    async def delete(self, article_ids: Sequence[str]) -> tuple[set[str], int]:
        await self.play(tuple(article_ids))
        return {name for name in article_ids if self.articles.pop(name, None)}, 5

    async def list(self, *, page_size: int, after: str, language: str, tag: str) -> "list[Article]":
        await self.play((page_size, after, language, tag))
        return [article for key, article in sorted(self.articles.items()) if key > after][:page_size]


@dataclass
class FakeIntents(Script):
    """Knows two intents, and one entity of each form."""

    async def detect(self, query: IntentQuery) -> Understood:
        await self.play(query)
        entities = (
            Entity(EntityKind.ITEM, 0, 3, query.text[:3], "i1", 0.75),
            Entity(EntityKind.PRICE, 4, 9, query.text[4:9], price_micros=19_990_000, currency="EUR", bound=Bound.MOST),
            Entity(EntityKind.QUANTITY, 10, 11, query.text[10:11], count=2),
        )
        known = (("track_order", 0.875), ("get_refund", 0.125))
        return Understood(known[: query.top_k], True, entities, 7, False, "m1", 3)


@dataclass
class FakeSentiments(Script):
    """Everything is praise, its first word of the price; blanks are not judged."""

    async def analyze(self, texts: Sequence[str]) -> Analyzed:
        await self.play(texts)
        praise = Judgement(Leaning.POSITIVE, 0.75, 0.875)
        return Analyzed(tuple(_praised(text, praise) if text.strip() else TextSentiment(UNJUDGED, None) for text in texts), "m1")


def _praised(text: str, praise: Judgement) -> TextSentiment:
    word = text.split()[0]
    return TextSentiment(praise, "en", ((Mention("price", word, 0, len(word)), praise),), truncated=len(text) > 1_000)


@dataclass
class FakeModels(Script):
    loaded: set[str] = field(default_factory=lambda: {"m1"})
    activation_count: int = 4
    models: tuple[ModelVersion, ...] = tuple(
        ModelVersion(
            version,
            f"file:///models/{version}",
            {"metrics": {"ndcg_at_10": 0.25}, "contract": {"name": "ranking_v1"}, "base_model": "bert"},
            NOW,
            NOW if active else None,
            active,
        )
        for version, active in (("m2", False), ("m1", True))
    )

    async def list(self) -> "list[ModelVersion]":
        await self.play(())
        return list(self.models)

    async def active(self) -> ModelVersion | None:
        await self.play(())
        return next((model for model in self.models if model.active), None)

    async def activate(self, model_version: str, *, on_unready: OnUnready, wait_seconds: float) -> Activation:
        await self.play((model_version, on_unready, wait_seconds))
        return Activation(model_version, "m1", 5)

    async def replicas(self) -> "list[Replica]":
        await self.play(())
        versions = {"m1": [1, 2]}
        broken = {"m2": "BUNDLE_INVALID: no"}
        return [Replica("r1", "10.0.0.1:50051", NOW, NOW, True, "m1", 4, 2, versions, broken, "c1", "10.0.0.2:50051", "cpu", False)]


@dataclass
class FakeAudit:
    """Keeps what is noted; ``error`` makes it fail as a store that is away would."""

    entries: "list[AuditEntry]" = field(default_factory=list)
    error: Exception | None = None

    async def require(self, entry: AuditEntry) -> None:
        if self.error is not None:
            raise self.error
        self.entries.append(entry)

    async def note(self, entry: AuditEntry) -> None:
        self.entries.append(entry)

    async def note_refusal(self, entry: AuditEntry, *, at: float) -> None:
        self.entries.append(entry)


@dataclass
class Fakes:
    """One of each."""

    recorder: FakeRecorder = field(default_factory=FakeRecorder)
    identities: FakeIdentities = field(default_factory=FakeIdentities)
    graph: FakeGraph = field(default_factory=FakeGraph)
    erasure: FakeErasure = field(default_factory=FakeErasure)
    recommender: FakeRecommender = field(default_factory=FakeRecommender)
    searcher: FakeSearcher = field(default_factory=FakeSearcher)
    suggester: FakeSuggester = field(default_factory=FakeSuggester)
    profiles: FakeProfiles = field(default_factory=FakeProfiles)
    catalog: FakeCatalog = field(default_factory=FakeCatalog)
    features: FakeFeatures = field(default_factory=FakeFeatures)
    embedder: FakeEmbedder = field(default_factory=FakeEmbedder)
    assistant: FakeAssistant = field(default_factory=FakeAssistant)
    articles: FakeArticles = field(default_factory=FakeArticles)
    intents: FakeIntents = field(default_factory=FakeIntents)
    sentiments: FakeSentiments = field(default_factory=FakeSentiments)
    models: FakeModels = field(default_factory=FakeModels)
    gate: Gate = field(default_factory=lambda: Gate(open_to_all=True))
    audit: FakeAudit = field(default_factory=FakeAudit)

    def services(self) -> Services:
        return Services(
            recorder=self.recorder,
            identities=self.identities,
            graph=self.graph,
            erasure=self.erasure,
            recommender=self.recommender,
            searcher=self.searcher,
            suggester=self.suggester,
            profiles=self.profiles,
            catalog=self.catalog,
            features=self.features,
            embedder=self.embedder,
            assistant=self.assistant,
            articles=self.articles,
            intents=self.intents,
            sentiments=self.sentiments,
            models=self.models,
            gate=self.gate,
            audit=self.audit,
        )
