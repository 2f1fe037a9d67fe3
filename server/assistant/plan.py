"""From a message to what kind of answer it gets: one pure function of the message, the conversation, the articles and the catalogue."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from features.article_search import ArticleIndex, Hit
from features.lexical import analyse
from server.assistant.answer import SHOWN_ITEMS, Answer, Kind, Reason
from server.assistant.conversations import Turn
from server.assistant.reading import Ask, Reading
from server.assistant.rules import AssistantRules
from server.recommend.snapshot import Snapshot
from server.understand.classifiers import Classification
from server.understand.entities import Entity, EntityKind, find_entities
from server.understand.patterns import Bound

_QUOTES = 3  # kept of an answer, best first, for channels that may not quote the best one
_INTENT_CONFIDENCE = 0.8
_BRIEF = 3  # words that say something: such a message is about what it names, a longer one about what it says of it
_BESIDE = 1  # words beside a category or brand with which a message still is about nothing else
# Labels of an intent classifier that mean the same as the patterns; others only say whether a message is about the shop.
_INTENTS = {"contact_human_agent": Ask.PERSON, "complaint": Ask.COMPLAINT, "track_order": Ask.ORDERS | Ask.DELIVERY}
_FACTS = {Kind.PRICE: Ask.PRICE, Kind.STOCK: Ask.STOCK, Kind.SUGGESTIONS: Ask.SUGGESTIONS}


@dataclass(frozen=True)
class Wishes:
    """What suggested items must be; a bound counts in ``currency``, in any where that is empty."""

    categories: frozenset[str] = frozenset()
    brands: frozenset[str] = frozenset()
    min_price_micros: int | None = None
    max_price_micros: int | None = None
    currency: str = ""


@dataclass(frozen=True)
class Plan:
    """What the answer will be, before live facts.

    Attributes:
        reason: of a hand-over.
        hits: passages sure enough to be quoted, best first.
        rows: of the catalogue's items the answer is about, best first; of SUGGESTIONS the one to start from.
        wishes: of SUGGESTIONS.
        topic: of SUGGESTIONS that start from no item: words that describe what is wanted.
        order_ids: of ORDERS and RETURNS: those asked for; none: all.
    """

    kind: Kind
    language: str
    confidence: float = 1.0
    reason: Reason = Reason.UNSPECIFIED
    hits: tuple[Hit, ...] = ()
    rows: tuple[int, ...] = ()
    wishes: Wishes = field(default_factory=Wishes)
    topic: str = ""
    order_ids: tuple[str, ...] = ()
    asks_item: bool = False


def planned(
    reading: Reading,
    before: Sequence[Turn],
    intent: Classification | None,
    *,
    snapshot: Snapshot,
    articles: ArticleIndex,
    rules: AssistantRules,
) -> Plan:
    """Returns what to answer a message.

    Args:
        reading: the message.
        before: the turns before it, newest first.
        intent: what the bundle's intent classifier says, None where it has none.
        snapshot: the catalogue and the model.
        articles: of the shop.
        rules: when to hand over.
    """
    asks = reading.asks | _intended(intent)
    plain = Plan(Kind.CLARIFY, reading.language)
    if not reading.readable:
        return plain
    if asks & Ask.PERSON:
        return replace(plain, kind=Kind.HANDOVER, reason=Reason.ASKED_FOR_PERSON)
    if asks & Ask.COMPLAINT:
        return replace(plain, kind=Kind.HANDOVER, reason=Reason.COMPLAINT)
    if asks & Ask.COURTESY:
        return replace(plain, kind=Kind.COURTESY)
    mentions = _Mentions(find_entities(reading.text, snapshot.names), snapshot)
    rows, going_on = _meant(reading, mentions, before, snapshot)
    if going_on is not None and not asks & (Ask.PRICE | Ask.STOCK | Ask.SUGGESTIONS):
        asks |= going_on
    brief = len(reading.content) <= _BRIEF
    if reading.cheaper and brief and _last_with_items(before) is not None:
        asks |= Ask.SUGGESTIONS
    vector = snapshot.model.passage_vector(reading.text) if snapshot.model else None
    hits = articles.search(reading.text, vector, limit=_QUOTES)
    sure = tuple(hit for hit in hits if hit.confidence >= rules.min_confidence)
    best = hits[0].confidence if hits else 0.0
    article = replace(plain, kind=Kind.ARTICLE, hits=sure, confidence=best)
    by_rule = bool(sure) and bool(asks & Ask.RULE)
    if asks & Ask.SUGGESTIONS and not (by_rule and not rows):
        return _suggestions(plain, reading, rows, mentions, before, snapshot)
    if rows and asks & Ask.PRICE:
        return replace(plain, kind=Kind.PRICE, rows=rows)
    if rows and asks & Ask.STOCK and not by_rule:
        return replace(plain, kind=Kind.STOCK, rows=rows)
    if reading.elliptic and going_on is not None and asks & (Ask.PRICE | Ask.STOCK):  # "and in blue?", of which there is none
        return replace(plain, kind=Kind.PRICE if asks & Ask.PRICE else Kind.STOCK)
    if asks & (Ask.ORDERS | Ask.RETURNS) and not by_rule and (asks & (Ask.DELIVERY | Ask.HISTORY) or (brief and not sure)):
        kind = Kind.ORDERS if asks & Ask.ORDERS else Kind.RETURNS
        return replace(plain, kind=kind, hits=sure[:1] if asks & Ask.DELIVERY else (), order_ids=mentions.order_ids)
    if sure:
        return article
    if rows:
        return replace(plain, kind=Kind.PRICE, rows=rows)
    if mentions.wishes != Wishes() and not asks & Ask.RULE and (mentions.bounded or len(reading.topic(mentions.spans)) <= _BESIDE):
        return _suggestions(plain, reading, (), mentions, before, snapshot)
    if asks & (Ask.PRICE | Ask.STOCK):
        return replace(plain, asks_item=True)
    foreign = not intent.in_scope if intent is not None else best < rules.scope_confidence
    reason = Reason.OUT_OF_SCOPE if foreign else Reason.LOW_CONFIDENCE
    return replace(plain, kind=Kind.HANDOVER, reason=reason, confidence=best)


class _Mentions:
    """What a message names, in terms of the catalogue."""

    def __init__(self, entities: Sequence[Entity], snapshot: Snapshot) -> None:
        items = [one for one in entities if one.kind is EntityKind.ITEM]
        self.rows = _equally_named(items, snapshot)
        # "Like the red mug" names no category, though a mug is one.
        apart = [one for one in entities if not any(item.start <= one.start and one.end <= item.end for item in items)]
        self.order_ids = tuple(one.value for one in entities if one.kind is EntityKind.ORDER_ID)
        prices = [one for one in entities if one.kind is EntityKind.PRICE]
        least = [one.price_micros for one in prices if one.bound is Bound.LEAST and one.price_micros is not None]
        most = [one.price_micros for one in prices if one.bound is Bound.MOST and one.price_micros is not None]
        self.wishes = Wishes(
            categories=frozenset(one.value for one in apart if one.kind is EntityKind.CATEGORY),
            brands=frozenset(one.value for one in apart if one.kind is EntityKind.BRAND),
            min_price_micros=max(least, default=None),
            max_price_micros=min(most, default=None),
            currency=next((one.currency for one in prices if one.currency and one.bound is not Bound.EXACT), ""),
        )
        self.bounded = bool(least or most)
        self.spans = [(one.start, one.end) for one in entities]


def _equally_named(items: Sequence[Entity], snapshot: Snapshot) -> tuple[int, ...]:
    """Returns the rows of the items named best; of several equally well named ones all, as many as are shown."""
    best = max((one.confidence for one in items), default=0.0)
    return tuple(snapshot.table.rows[one.value] for one in items if one.confidence == best)[:SHOWN_ITEMS]


def _intended(intent: Classification | None) -> Ask:
    if intent is None or not intent.in_scope:
        return Ask.NOTHING
    label, probability = intent.top(1)[0]
    return _INTENTS.get(label, Ask.NOTHING) if probability >= _INTENT_CONFIDENCE else Ask.NOTHING


def _meant(reading: Reading, mentions: _Mentions, before: Sequence[Turn], snapshot: Snapshot) -> tuple[tuple[int, ...], Ask | None]:
    """Returns the items a message is about, and what it goes on asking for where it goes on from a turn that had items."""
    last = _last_with_items(before)
    if last is None:
        return mentions.rows, None
    held = [snapshot.table.rows[item.item_id] for item in last.items if item.item_id in snapshot.table.rows]
    going_on = _FACTS.get(last.kind, Ask.NOTHING)
    if mentions.rows:
        return mentions.rows, going_on if reading.elliptic else None
    if reading.place is not None and held:
        return (held[reading.place],) if reading.place < len(held) else (), going_on
    if reading.elliptic and reading.content and held:
        return _variants(held[0], reading.content, snapshot), going_on
    if (reading.refers or reading.elliptic) and held:
        return tuple(held[:1]), going_on
    return (), None


def _last_with_items(before: Sequence[Turn]) -> Answer | None:
    """Returns the newest answer that showed items, as it was shown in its channel."""
    for turn in before:
        shown = turn.answer.in_channel(turn.channel)
        if shown.items:
            return shown
    return None


def _variants(row: int, content: Sequence[str], snapshot: Snapshot) -> tuple[int, ...]:
    """Returns items named like one, but with other words: for "in blue" those of a red mug's kind that are blue."""
    wanted = {term for word in content for term in analyse(word)}
    found = find_entities(f"{' '.join(content)} {snapshot.table.titles[row]}", snapshot.names)
    rows = [snapshot.table.rows[one.value] for one in found if one.kind is EntityKind.ITEM]
    return tuple(other for other in rows if other != row and wanted <= set(analyse(snapshot.table.titles[other])))[:1]


def _suggestions(
    plain: Plan, reading: Reading, rows: tuple[int, ...], mentions: _Mentions, before: Sequence[Turn], snapshot: Snapshot
) -> Plan:
    wishes, last = mentions.wishes, _last_with_items(before)
    if reading.cheaper and wishes.max_price_micros is None and last is not None:
        rows = rows or tuple(snapshot.table.rows[item.item_id] for item in last.items[:1] if item.item_id in snapshot.table.rows)
        cheapest = min(last.items, key=lambda item: item.price_micros)
        wishes = replace(wishes, max_price_micros=max(cheapest.price_micros - 1, 0), currency=cheapest.currency)
    topic = "" if rows or wishes.categories or wishes.brands else " ".join(reading.topic(mentions.spans))
    return replace(plain, kind=Kind.SUGGESTIONS, rows=rows[:1], wishes=wishes, topic=topic)
