"""What the edge needs of the rooms behind it: one protocol per domain service, so that tests pass small fakes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from features.articles import Article, ArticlesWritten
from features.catalogue import Item, Relation, UpsertResult
from features.models import Activation, ModelVersion, OnUnready
from features.replicas import Replica
from server.assistant.assistant import Question, Reply
from server.domain import (
    Answer,
    CustomerProfile,
    Embedded,
    EmbedQuery,
    EntityKey,
    FeatureTable,
    Graph,
    IncomingEvent,
    ItemFilter,
    Linked,
    Receipt,
    RecommendQuery,
    RecordOutcome,
    Resolved,
    SearchAnswer,
    SearchQuery,
    Subject,
    Suggestions,
    SuggestQuery,
    Token,
    Unlinked,
)
from server.security.audit import AuditEntry
from server.security.principals import Principal
from server.understand.intents import IntentQuery, Understood
from server.understand.opinions import Analyzed


class Recorder(Protocol):
    """Stores events; see server.ingest.recorder."""

    async def record(self, events: Sequence[IncomingEvent]) -> RecordOutcome:
        """Commits events and returns one outcome each, in order."""
        ...


class Identities(Protocol):
    """Knows who stands behind an identity; see server.ingest.identities."""

    async def resolve(self, subject: Subject, *, create: bool = False) -> Resolved:
        """Returns the customer behind a subject, with an empty id when there is none and none was to be created."""
        ...


class IdentityGraph(Protocol):
    """Makes and takes back links between identities; see server.ingest.graph."""

    async def link(self, first: Subject, second: Subject, *, may_create: bool = True) -> Linked:
        """Makes two subjects one customer; without ``may_create`` the second must exist."""
        ...

    async def unlink(self, identity: Subject, subject: Subject | None) -> Unlinked:
        """Takes the link to the subject back, or all links of the identity's persona."""
        ...

    async def read(self, subject: Subject) -> Graph:
        """Returns a customer's personas and links."""
        ...


class Erasure(Protocol):
    """Forgets customers; see server.ingest.forget."""

    async def forget(self, subject: Subject) -> Receipt:
        """Erases a customer and returns the receipt."""
        ...


class Recommender(Protocol):
    """Ranks items; see server.recommend.recommender."""

    async def recommend(self, query: RecommendQuery) -> Answer:
        """Returns a page of a customer's slate."""
        ...

    async def rank(self, subject: Subject, *, channel: str, surface: str, item_ids: Sequence[str], token: Token | None) -> Answer:
        """Orders given items for a customer."""
        ...

    async def similar(self, item_id: str, *, channel: str, limit: int, filters: ItemFilter) -> Answer:
        """Returns items like a given one."""
        ...


class Searcher(Protocol):
    """Finds items by words; see server.search.searcher."""

    async def search(self, query: SearchQuery) -> SearchAnswer:
        """Returns a page of what a search finds."""
        ...


class Suggester(Protocol):
    """Completes what is typed; see server.search.suggester."""

    async def suggest(self, query: SuggestQuery) -> Suggestions:
        """Returns how a prefix may go on."""
        ...


class Profiles(Protocol):
    """Reads customers' profiles; see server.recommend.profiles."""

    async def read(self, subject: Subject, *, token: Token | None) -> CustomerProfile:
        """Returns a customer's profile, at least as new as the token."""
        ...


class Catalog(Protocol):
    """Keeps items; see server.catalog.service."""

    @property
    def index_version(self) -> int:
        """The index epoch this replica answers with."""
        ...

    @property
    def offer_version(self) -> int:
        """The newest offers this replica has seen."""
        ...

    async def upsert(self, items: Sequence[Item], relations: Sequence[Relation]) -> UpsertResult:
        """Stores items and relations, all or nothing."""
        ...

    async def get(self, item_ids: Sequence[str]) -> list[Item]:
        """Returns the items that exist."""
        ...

    async def list(self, *, page_size: int, after: str, category: str) -> list[Item]:
        """Returns items with ids above ``after``, in id order."""
        ...


class FeatureReader(Protocol):
    """Reads the online store; see server.online.features."""

    async def read(self, *, service: str, refs: Sequence[str], entities: Sequence[EntityKey]) -> FeatureTable:
        """Returns features of one or more entities, of a service or else of ``view:feature`` names."""
        ...


class Embedder(Protocol):
    """Reads texts with the active model; see server.understand.embedder."""

    async def embed(self, query: EmbedQuery) -> Embedded:
        """Returns the vectors of texts."""
        ...


class Assistant(Protocol):
    """Answers customers' questions; see server.assistant.assistant."""

    async def ask(self, question: Question) -> Reply:
        """Records a message and answers it, once for its event id."""
        ...


class Articles(Protocol):
    """Keeps the shop's articles; see server.assistant.articles."""

    async def upsert(self, articles: Sequence[Article]) -> ArticlesWritten:
        """Stores articles, all or none."""
        ...

    async def delete(self, article_ids: Sequence[str]) -> tuple[set[str], int]:
        """Deletes articles; returns the ids of those that were there, and the version."""
        ...

    async def list(self, *, page_size: int, after: str, language: str, tag: str) -> list[Article]:
        """Returns articles with ids above ``after``, in id order."""
        ...


class Intents(Protocol):
    """Says what texts are about; see server.understand.intents."""

    async def detect(self, query: IntentQuery) -> Understood:
        """Returns what the writer of a text wants and speaks of."""
        ...


class Sentiments(Protocol):
    """Judges texts with the active model; see server.understand.sentiment."""

    async def analyze(self, texts: Sequence[str]) -> Analyzed:
        """Returns how positive texts are, and what they say of which aspects."""
        ...


class Models(Protocol):
    """Knows the published models and moves the pointer; see server.models."""

    @property
    def loaded(self) -> set[str]:
        """Versions this replica holds in memory."""
        ...

    @property
    def activation_count(self) -> int:
        """How often the pointer had moved when this replica last looked."""
        ...

    async def list(self) -> list[ModelVersion]:
        """Returns all published models, newest first."""
        ...

    async def active(self) -> ModelVersion | None:
        """Returns the model the fleet answers with."""
        ...

    async def activate(self, model_version: str, *, on_unready: OnUnready, wait_seconds: float) -> Activation:
        """Makes a published model the active one, once every live replica is ready for it."""
        ...

    async def replicas(self) -> Sequence[Replica]:
        """Returns the server processes of the fleet."""
        ...


class Gate(Protocol):
    """Finds out who is calling; see server.security.gate."""

    @property
    def open_to_all(self) -> bool:
        """True where nobody has to prove anything."""
        ...

    async def authenticate(self, bearer: str, certificate_names: Sequence[str]) -> Principal:
        """Returns who calls, by what they sent after ``Bearer`` and the names of their certificate."""
        ...


class AuditLog(Protocol):
    """Notes admin calls, merges and refusals; see server.security.audit."""

    async def require(self, entry: AuditEntry) -> None:
        """Notes what is about to be done, or fails."""
        ...

    async def note(self, entry: AuditEntry) -> None:
        """Notes what was done."""
        ...

    async def note_refusal(self, entry: AuditEntry, *, at: float) -> None:
        """Notes a refused call, a bounded number a second."""
        ...


@dataclass(frozen=True)
class Services:
    """All domain services of a server process, the gate before them and the audit log beside them."""

    recorder: Recorder
    identities: Identities
    graph: IdentityGraph
    erasure: Erasure
    recommender: Recommender
    searcher: Searcher
    suggester: Suggester
    profiles: Profiles
    catalog: Catalog
    features: FeatureReader
    embedder: Embedder
    assistant: Assistant
    articles: Articles
    intents: Intents
    sentiments: Sentiments
    models: Models
    gate: Gate
    audit: AuditLog
