"""The server's domain values: what services take and answer. No protobuf, no Redis, no PostgreSQL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple
from uuid import UUID

from features.behaviour import Activity
from features.candidates import Source
from features.completions import Completion
from features.item_table import FloatArray
from features.layout import Ages, FeatureValue


class Subject(NamedTuple):
    """Who a request is about: a user id, or an identity in a channel. Exactly one of the two is set."""

    user_id: str = ""
    channel: str = ""
    channel_user_id: str = ""


class Token(NamedTuple):
    """A consistency token: whoever carries it sees this customer at ``version`` or later."""

    user_id: str
    version: int


@dataclass(frozen=True)
class EntityKey:
    """Whose online features to read: a customer's, an item's, or both ids for features that need either.

    ``token`` asks for a state of the customer at least as new.
    """

    user_id: str = ""
    item_id: str = ""
    token: Token | None = None


@dataclass(frozen=True)
class FeatureTable:
    """Online features of several entities.

    Attributes:
        values: by ``view:feature`` in the order asked for, one value an entity in their order, None where it is MISSING.
        ages: by view, status and event time of the values that are not.
    """

    values: Mapping[str, Sequence[Any]]
    ages: Mapping[str, Ages]


class Versions(NamedTuple):
    """What an answer was computed from. ``model_version`` is empty when no model is active."""

    user_version: int
    model_version: str
    index_version: int
    offer_version: int


class Stored(Enum):
    """What became of an event."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    REJECTED = "rejected"


class IncomingEvent(NamedTuple):
    """An event to be recorded, already validated; ``action`` is one of features.behaviour.ACTIONS.

    A named tuple, as is what becomes of it: of thousands a second, each is made in a third of the time of a frozen dataclass.
    """

    subject: Subject
    event_id: UUID
    channel: str
    action: str
    occurred_at: datetime
    item_id: str | None = None
    text: str | None = None
    value: float | None = None
    quantity: float | None = None
    session_id: str | None = None
    slate_id: str | None = None


class EventOutcome(NamedTuple):
    """What became of one event; ``reason``, ``field`` and ``message`` are set when it was rejected."""

    status: Stored
    user_id: str = ""
    reason: str = ""
    field: str = ""
    message: str = ""


@dataclass(frozen=True)
class RecordOutcome:
    """One outcome per event in request order, one token per customer, and whether the online store has caught up."""

    outcomes: tuple[EventOutcome, ...]
    tokens: tuple[Token, ...]
    online: bool


@dataclass(frozen=True)
class Resolved:
    """The customer behind a subject; ``user_id`` is empty when the identity is unknown and was not created."""

    user_id: str
    user_version: int
    created: bool


@dataclass(frozen=True)
class Linked:
    """The surviving customer of a link, and the customers merged into it by this call."""

    token: Token
    merged_user_ids: tuple[str, ...]


@dataclass(frozen=True)
class Unlinked:
    """What an unlink left: the identity's customer, those separated from it, and whether subject and identity are still one."""

    token: Token
    separated: tuple[Token, ...]
    removed_links: int
    still_linked: bool


@dataclass(frozen=True)
class Persona:
    """One of the users a customer consists of, with the identities (channel, channel_user_id) that belong to it."""

    user_id: str
    created_at: datetime
    identities: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Link:
    """Two personas declared to be one customer; ``left_id`` is the smaller id."""

    left_id: str
    right_id: str
    linked_at: datetime


@dataclass(frozen=True)
class Graph:
    """A customer's personas, the root first, and the links that hold them together."""

    token: Token
    personas: tuple[Persona, ...]
    links: tuple[Link, ...]


@dataclass(frozen=True)
class Receipt:
    """Proof that a customer was forgotten; it names nobody. ``counts`` maps kinds of rows to how many were deleted.

    ``online_erased`` says whether the online store has confirmed too; until then the server goes on trying.
    """

    receipt_id: str
    forgotten_at: datetime
    counts: Mapping[str, int]
    online_erased: bool


class ItemFilter(NamedTuple):
    """Which items of a slate to show; empty members do not filter. Filters only remove, never reorder."""

    categories: frozenset[str] = frozenset()
    brands: frozenset[str] = frozenset()
    min_price_micros: int | None = None
    max_price_micros: int | None = None
    currency: str = ""  # of the price bounds; items priced in another one do not pass them
    in_stock_only: bool = False
    exclude_item_ids: frozenset[str] = frozenset()


EVERYTHING = ItemFilter()


@dataclass(frozen=True)
class RecommendQuery:
    """A validated request for recommendations, or with a ``search_text`` (normalized) for what a search finds."""

    subject: Subject
    channel: str
    surface: str
    limit: int
    page_token: str = ""
    context_item_ids: tuple[str, ...] = ()
    filters: ItemFilter = EVERYTHING
    token: Token | None = None
    log_exposure: bool = True
    search_text: str = ""


@dataclass(frozen=True)
class ItemCard:
    """What an item shows whoever it is shown to: its description in an epoch and its live offer."""

    item_id: str
    title: str
    category: str
    brand: str
    image_ref: str
    price_micros: int | None
    currency: str
    in_stock: bool


class ShownItem(NamedTuple):
    """One item of an answer: its card, score, place in the slate, and why it is there.

    ``newcomer`` is set when the customer has no history, so that nothing but popularity and novelty spoke for the item.
    """

    card: ItemCard
    score: float
    position: int
    sources: Source
    newcomer: bool = False

    @property
    def item_id(self) -> str:
        """Which item it is."""
        return self.card.item_id


@dataclass(frozen=True)
class Answer:
    """A page of a slate with everything needed to audit it.

    Attributes:
        user_id, items, versions, slate_id, as_of, token, next_page_token: the page; the same whoever asks for it again.
        stale, degraded_reasons, stages, unknown_item_ids: of this answer; ``stages`` maps stage names to seconds.
        forms: other forms of the page by name, made once by whoever needs one: all that ask for it, ask for the same channel, place,
            filters, start and limit. None where nobody keeps the page.
    """

    user_id: str
    items: tuple[ShownItem, ...]
    versions: Versions
    slate_id: str
    as_of: datetime
    token: Token | None
    next_page_token: str = ""
    stale: bool = False
    degraded_reasons: tuple[str, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    unknown_item_ids: tuple[str, ...] = ()
    forms: dict[str, Any] | None = None


@dataclass(frozen=True)
class SearchQuery:
    """A validated search: the page asked for, and the event it is recorded as, None where it is not."""

    page: RecommendQuery
    event: IncomingEvent | None


class SearchOutcome(Enum):
    """Why the items of a search are what they are."""

    MATCHED = "matched"
    MEANING_ONLY = "meaning_only"
    RECOMMENDED_INSTEAD = "recommended_instead"
    NOTHING_ELIGIBLE = "nothing_eligible"
    NOTHING_TO_SHOW = "nothing_to_show"


class PriceRange(NamedTuple):
    """Prices from ``least_micros`` up to ``most_micros``, both inclusive, and how many items have one."""

    currency: str
    least_micros: int
    most_micros: int
    item_count: int


class Facets(NamedTuple):
    """What can be chosen among the items of a slate: values with how many items have them, each regardless of its own filter.

    Attributes:
        total: how many items pass all filters.
        categories, brands: (value, items), most items first, ties by value.
        price_ranges: by currency, the lowest first.
    """

    total: int
    categories: tuple[tuple[str, int], ...]
    brands: tuple[tuple[str, int], ...]
    price_ranges: tuple[PriceRange, ...]


@dataclass(frozen=True)
class SearchAnswer:
    """A page of what a search found.

    Attributes:
        page: the items, with ``token`` and ``degraded_reasons`` as the recording left them.
        corrected_query: what was searched for instead, empty where nothing was corrected.
        event_id: of the recorded search; None where none was recorded, or that is not known.
        recorded_version: of the customer with the search in it; 0 likewise.
    """

    page: Answer
    outcome: SearchOutcome
    corrected_query: str
    facets: Facets
    event_id: UUID | None = None
    recorded_version: int = 0


class SuggestQuery(NamedTuple):
    """A validated request for completions."""

    channel: str
    prefix: str
    limit: int


class Suggestions(NamedTuple):
    """Completions, and the versions they were made from."""

    completions: Sequence[Completion]
    versions: Versions


@dataclass(frozen=True)
class CustomerProfile:
    """A customer's whole profile: identities as (channel, channel_user_id), activity, and the decoded profile view."""

    user_id: str
    user_version: int
    identities: Sequence[tuple[str, str]]
    activity: Activity
    counters: Mapping[str, int]
    profile: Mapping[str, FeatureValue]


class Purpose(Enum):
    """What a text is; the value is the encoder's output for it."""

    ITEM = "item_vector"
    USER = "user_vector"


@dataclass(frozen=True)
class EmbedQuery:
    """A validated request for vectors; ``max_tokens`` 0 reads as much as the model was trained to."""

    texts: tuple[str, ...]
    purpose: Purpose
    max_tokens: int = 0


@dataclass(frozen=True)
class Embedding:
    """A text's unit vector, float32[d], and what it was made from; no vector where there was nothing to read."""

    vector: FloatArray | None
    token_count: int
    truncated: bool


@dataclass(frozen=True)
class Embedded:
    """One embedding a text, in order, and the model that made them."""

    embeddings: tuple[Embedding, ...]
    model_version: str
