"""UnderstandingService: what texts mean."""

from typing import Any

from concord.v1 import understanding_pb2, understanding_pb2_grpc
from server.domain import Embedding, Judgement, Leaning, TextSentiment
from server.rpc.interceptor import Context
from server.rpc.ports import Embedder, Sentiments
from server.rpc.validation import Validator

_LABELS = {leaning: understanding_pb2.SentimentLabel.Value(f"SENTIMENT_LABEL_{leaning.name}") for leaning in Leaning}


class UnderstandingServicer(understanding_pb2_grpc.UnderstandingServiceServicer):
    """Reads texts with the active model."""

    def __init__(self, embedder: Embedder, sentiments: Sentiments, validator: Validator) -> None:
        self._embedder = embedder
        self._sentiments = sentiments
        self._validator = validator

    async def EmbedText(self, request: understanding_pb2.EmbedTextRequest, _context: Context) -> understanding_pb2.EmbedTextResponse:
        """Returns the vector of each text."""
        embedded = await self._embedder.embed(self._validator.embed(request))
        return understanding_pb2.EmbedTextResponse(
            embeddings=[_embedding(one) for one in embedded.embeddings], model_version=embedded.model_version
        )

    async def AnalyzeSentiment(
        self, request: understanding_pb2.AnalyzeSentimentRequest, _context: Context
    ) -> understanding_pb2.AnalyzeSentimentResponse:
        """Returns how positive each text is, and what it says of which aspects."""
        analyzed = await self._sentiments.analyze(self._validator.texts(request))
        return understanding_pb2.AnalyzeSentimentResponse(
            sentiments=[_sentiment(one) for one in analyzed.sentiments], model_version=analyzed.model_version
        )


def _embedding(one: Embedding) -> understanding_pb2.TextEmbedding:
    vector = () if one.vector is None else one.vector.tolist()
    return understanding_pb2.TextEmbedding(vector=vector, token_count=one.token_count, truncated=one.truncated)


def _sentiment(one: TextSentiment) -> understanding_pb2.TextSentiment:
    aspects = [
        understanding_pb2.AspectSentiment(
            aspect=mention.aspect, term=mention.term, start_offset=mention.start, end_offset=mention.end, **_judgement(judgement)
        )
        for mention, judgement in one.aspects
    ]
    return understanding_pb2.TextSentiment(language=one.language, aspects=aspects, truncated=one.truncated, **_judgement(one.judgement))


def _judgement(one: Judgement) -> dict[str, Any]:
    return {"label": _LABELS[one.leaning], "score": one.score, "confidence": one.confidence}
