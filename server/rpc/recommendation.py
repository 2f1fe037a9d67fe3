"""RecommendationService: what to show a customer."""

from functools import lru_cache
from typing import Any

from concord.v1 import recommendation_pb2, recommendation_pb2_grpc, search_pb2
from features.candidates import Source
from server.domain import Answer, ItemCard, ShownItem
from server.rpc import rules
from server.rpc.interceptor import Context
from server.rpc.ports import Recommender
from server.rpc.translate import money_of, set_duration, timestamp_of, token_text, versions_message
from server.rpc.validation import Validator

_MOST_MESSAGES = 65_536
_MESSAGE = "message"  # the form of a page that is kept here
# Strongest first: what is about this customer stands before what is true for everybody.
_REASONS = (
    (Source.LEXICAL, recommendation_pb2.REASON_CODE_MATCHES_WORDS),
    (Source.SEMANTIC, recommendation_pb2.REASON_CODE_MATCHES_MEANING),
    (Source.COLLABORATIVE, recommendation_pb2.REASON_CODE_BOUGHT_TOGETHER),
    (Source.VECTOR | Source.RECENT, recommendation_pb2.REASON_CODE_SIMILAR_TO_RECENT),
    (Source.RELATION, recommendation_pb2.REASON_CODE_COMPLEMENT),
    (Source.NEW, recommendation_pb2.REASON_CODE_NEW_ARRIVAL),
    (Source.POPULAR, recommendation_pb2.REASON_CODE_POPULAR),
)


class RecommendationServicer(recommendation_pb2_grpc.RecommendationServiceServicer):
    """Ranks items for customers."""

    def __init__(self, recommender: Recommender, validator: Validator) -> None:
        self._recommender = recommender
        self._validator = validator
        self._messages = ItemMessages()

    async def Recommend(self, request: recommendation_pb2.RecommendRequest, _context: Context) -> recommendation_pb2.RecommendResponse:
        """Returns a page of the customer's slate for a surface."""
        answer = await self._recommender.recommend(self._validator.recommend(request))
        if answer.forms is None:
            response = self._page(answer)
        else:
            page = answer.forms.get(_MESSAGE)
            if page is None:
                page = answer.forms[_MESSAGE] = self._page(answer)
            response = recommendation_pb2.RecommendResponse()
            response.CopyFrom(page)
        say_how(response, answer)
        return response

    def _page(self, answer: Answer) -> recommendation_pb2.RecommendResponse:
        page = recommendation_pb2.RecommendResponse(
            versions=versions_message(answer.versions),
            slate_id=answer.slate_id,
            as_of=timestamp_of(answer.as_of),
            next_page_token=answer.next_page_token,
            user_id=answer.user_id,
            consistency_token=token_text(answer.token),
        )
        for item in answer.items:
            self._messages.add(page.items, item)
        return page

    async def RankItems(self, request: recommendation_pb2.RankItemsRequest, _context: Context) -> recommendation_pb2.RankItemsResponse:
        """Orders given items for a customer."""
        item_ids = rules.identifiers(request.item_ids, "item_ids", most=rules.ITEM_IDS, least=1)
        answer = await self._recommender.rank(
            self._validator.subject(request.subject, "subject"),
            channel=self._validator.channel(request.channel, "channel"),
            surface=self._validator.surface(request.surface, "surface"),
            item_ids=tuple(dict.fromkeys(item_ids)),
            token=self._validator.token(request.consistency_token, "consistency_token"),
        )
        response = recommendation_pb2.RankItemsResponse(
            unknown_item_ids=answer.unknown_item_ids,
            versions=versions_message(answer.versions),
            as_of=timestamp_of(answer.as_of),
            user_id=answer.user_id,
            consistency_token=token_text(answer.token),
        )
        for item in answer.items:
            self._messages.add(response.items, item)
        say_how(response, answer)
        return response

    async def SimilarItems(
        self, request: recommendation_pb2.SimilarItemsRequest, _context: Context
    ) -> recommendation_pb2.SimilarItemsResponse:
        """Returns the items most like a given one."""
        answer = await self._recommender.similar(
            rules.identifier(request.item_id, "item_id"),
            channel=self._validator.channel(request.channel, "channel"),
            limit=rules.page(request.limit, "limit", most=rules.LIMIT, default=rules.DEFAULT_LIMIT),
            filters=self._validator.item_filter(request.filter, "filter"),
        )
        return recommendation_pb2.SimilarItemsResponse(
            items=[_similar(item) for item in answer.items], versions=versions_message(answer.versions)
        )


class ItemMessages:
    """The part of an item's message that is in its card, made once a card: making it anew takes 4 µs, copying it 1 µs.

    Cards are told apart by identity, which is safe while they are held here; with more than 65,536 it begins anew.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[ItemCard, recommendation_pb2.RecommendedItem]] = {}

    def add(self, items: Any, item: ShownItem) -> None:
        """Appends an item to a repeated field."""
        card = item.card
        known = self._made.get(id(card))
        if known is None or known[0] is not card:
            if len(self._made) >= _MOST_MESSAGES:
                self._made.clear()
            known = self._made[id(card)] = card, _of_card(card)
        message = items.add()
        message.CopyFrom(known[1])
        message.score = item.score
        message.position = item.position
        message.reason_codes.extend(_reasons(item.sources, item.newcomer))


def _of_card(card: ItemCard) -> recommendation_pb2.RecommendedItem:
    return recommendation_pb2.RecommendedItem(**_described(card))


def _similar(item: ShownItem) -> recommendation_pb2.SimilarItem:
    return recommendation_pb2.SimilarItem(similarity=item.score, **_described(item.card))


def _described(card: ItemCard) -> dict[str, Any]:
    """Returns the fields that every message about an item has."""
    return {
        "item_id": card.item_id,
        "title": card.title,
        "category": card.category,
        "brand": card.brand,
        "image_ref": card.image_ref,
        "price": money_of(card.price_micros, card.currency),
        "in_stock": card.in_stock,
    }


@lru_cache(maxsize=512)
def _reasons(sources: Source, newcomer: bool) -> tuple[recommendation_pb2.ReasonCode, ...]:
    """Remembered, because arithmetic on flags took half the time of translating an item; there are 512 combinations."""
    first = (recommendation_pb2.REASON_CODE_NEW_CUSTOMER,) if newcomer else ()
    return first + tuple(reason for source, reason in _REASONS if sources & source)


def say_how(
    response: recommendation_pb2.RecommendResponse | recommendation_pb2.RankItemsResponse | search_pb2.SearchResponse, answer: Answer
) -> None:
    """Adds how an answer came about. Fields are set one by one: messages made to be copied into another take twice as long."""
    if answer.degraded_reasons:
        response.degraded = True
        response.degraded_reasons.extend(answer.degraded_reasons)
    response.stale = answer.stale
    for stage, seconds in answer.stages.items():
        timing = response.stage_timings.add()
        timing.stage = stage
        set_duration(timing.duration, seconds)
