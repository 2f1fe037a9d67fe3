"""Texts to vectors of the active model: tokenized in a thread of their own, encoded in batches with those of other calls."""

from functools import partial

from server.domain import Embedded, Embedding, EmbedQuery, Purpose
from server.inference.model import LoadedModel
from server.inference.tokens import Tokens
from server.recommend.standing import Standings
from server.understand.text_runs import Graph, TextRuns


class Embedder:
    """Answers with the model that the fleet's pointer names, to the bit as a run of each text alone would."""

    def __init__(self, standings: Standings, runs: TextRuns) -> None:
        self._standings = standings
        self._runs = runs

    async def embed(self, query: EmbedQuery) -> Embedded:
        """Returns the vectors of texts.

        Raises:
            PreconditionError: no model is active.
            OverloadedError: too many texts wait.
            UnavailableError: the active model cannot be loaded here.
        """
        model = (await self._standings.of_nobody()).snapshot.require_model()
        texts = await self._runs.read(partial(_read, model, query))
        output = query.purpose.value
        graph = Graph((model.model_version, output), model.sharing, partial(model.text_vectors, output=output))
        vectors = await self._runs.results(graph, texts, stage="encode")
        embeddings = zip(vectors, texts, strict=True)
        return Embedded(
            tuple(Embedding(vector, len(text.ids) if text.readable else 0, text.truncated) for vector, text in embeddings),
            model.model_version,
        )


def _read(model: LoadedModel, query: EmbedQuery) -> list[Tokens]:
    trained = model.manifest.item_tokens if query.purpose is Purpose.ITEM else model.manifest.user_tokens
    return [model.tokens(text, min(query.max_tokens or trained, trained)) for text in query.texts]
