"""UnderstandingService: what texts mean."""

from concord.v1 import understanding_pb2, understanding_pb2_grpc
from server.domain import Embedding
from server.rpc.interceptor import Context
from server.rpc.ports import Embedder
from server.rpc.validation import Validator


class UnderstandingServicer(understanding_pb2_grpc.UnderstandingServiceServicer):
    """Reads texts with the active model."""

    def __init__(self, embedder: Embedder, validator: Validator) -> None:
        self._embedder = embedder
        self._validator = validator

    async def EmbedText(self, request: understanding_pb2.EmbedTextRequest, _context: Context) -> understanding_pb2.EmbedTextResponse:
        """Returns the vector of each text."""
        embedded = await self._embedder.embed(self._validator.embed(request))
        return understanding_pb2.EmbedTextResponse(
            embeddings=[_embedding(one) for one in embedded.embeddings], model_version=embedded.model_version
        )


def _embedding(one: Embedding) -> understanding_pb2.TextEmbedding:
    vector = () if one.vector is None else one.vector.tolist()
    return understanding_pb2.TextEmbedding(vector=vector, token_count=one.token_count, truncated=one.truncated)
