"""UnderstandingService: what texts mean."""

from typing import Any

from concord.v1 import understanding_pb2, understanding_pb2_grpc
from server.domain import Embedding
from server.rpc.interceptor import Context
from server.rpc.ports import Embedder, Intents, Sentiments
from server.rpc.translate import MICROS
from server.rpc.validation import Validator
from server.understand.entities import Entity
from server.understand.opinions import Judgement, Leaning, TextSentiment

_LABELS = {leaning: understanding_pb2.SentimentLabel.Value(f"SENTIMENT_LABEL_{leaning.name}") for leaning in Leaning}


class UnderstandingServicer(understanding_pb2_grpc.UnderstandingServiceServicer):
    """Reads texts with the active model."""

    def __init__(self, embedder: Embedder, intents: Intents, sentiments: Sentiments, validator: Validator) -> None:
        self._embedder = embedder
        self._intents = intents
        self._sentiments = sentiments
        self._validator = validator

    async def EmbedText(self, request: understanding_pb2.EmbedTextRequest, _context: Context) -> understanding_pb2.EmbedTextResponse:
        """Returns the vector of each text."""
        embedded = await self._embedder.embed(self._validator.embed(request))
        return understanding_pb2.EmbedTextResponse(
            embeddings=[_embedding(one) for one in embedded.embeddings], model_version=embedded.model_version
        )

    async def DetectIntent(
        self, request: understanding_pb2.DetectIntentRequest, _context: Context
    ) -> understanding_pb2.DetectIntentResponse:
        """Returns what the writer of a text wants and speaks of."""
        found = await self._intents.detect(self._validator.intent(request))
        return understanding_pb2.DetectIntentResponse(
            intents=[understanding_pb2.Intent(name=name, probability=probability) for name, probability in found.intents],
            in_scope=found.in_scope,
            entities=[_entity(one) for one in found.entities],
            token_count=found.token_count,
            truncated=found.truncated,
            model_version=found.model_version,
            index_version=found.index_version,
        )

    async def AnalyzeSentiment(
        self, request: understanding_pb2.AnalyzeSentimentRequest, _context: Context
    ) -> understanding_pb2.AnalyzeSentimentResponse:
        """Returns how positive each text is, and what it says of which aspects."""
        analyzed = await self._sentiments.analyze(self._validator.texts(request))
        return understanding_pb2.AnalyzeSentimentResponse(
            sentiments=[_sentiment(one) for one in analyzed.sentiments], model_version=analyzed.model_version
        )


def _entity(one: Entity) -> understanding_pb2.Entity:
    made = understanding_pb2.Entity(
        kind=f"ENTITY_KIND_{one.kind.name}",
        start=one.start,
        end=one.end,
        text=one.text,
        value=one.value,
        confidence=one.confidence,
        quantity=one.count or 0,
    )
    if one.price_micros is not None:
        units, rest = divmod(one.price_micros, MICROS)
        bound = f"PRICE_BOUND_{one.bound.name}"
        made.price.CopyFrom(understanding_pb2.SpokenPrice(currency_code=one.currency, units=units, nanos=rest * 1_000, bound=bound))
    return made


def _embedding(one: Embedding) -> understanding_pb2.TextEmbedding:
    vector = () if one.vector is None else one.vector.tolist()
    return understanding_pb2.TextEmbedding(vector=vector, token_count=one.token_count, truncated=one.truncated)


def _sentiment(one: TextSentiment) -> understanding_pb2.TextSentiment:
    aspects = [
        understanding_pb2.AspectSentiment(
            aspect=mention.aspect, term=mention.term, start=mention.start, end=mention.end, **_judgement(judgement)
        )
        for mention, judgement in one.aspects
    ]
    return understanding_pb2.TextSentiment(
        language=one.language or "", aspects=aspects, truncated=one.truncated, **_judgement(one.judgement)
    )


def _judgement(one: Judgement) -> dict[str, Any]:
    return {"label": _LABELS[one.leaning], "score": one.score, "confidence": one.confidence}
