"""Texts to vectors of the active model: tokenized in a thread of their own, encoded in batches with those of other calls."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from features.item_table import FloatArray
from server.domain import Embedded, Embedding, EmbedQuery, Purpose
from server.inference.batching import BATCH_TOKENS, Batcher, Row, Sharing
from server.inference.model import LoadedModel, Tokens
from server.metrics import Metrics
from server.recommend.computing import Computing
from server.recommend.standing import Standings
from server.tracing import Origin, on_behalf_of, origin, span

_CALLS = 64  # tokenized at a time; each is a row of length 1, so that they share and nothing is padded


@dataclass(frozen=True)
class _Text:
    """What the encoder is handed: token ids, whose vector is asked for by ``output``, on behalf of a call."""

    model: LoadedModel
    output: str
    ids: Sequence[int]
    call: Origin


class Embedder:
    """Answers with the model that the fleet's pointer names, to the bit as a run of each text alone would.

    Args:
        standings: where the fleet stands.
        computing: the threads that slates are computed in too, so that no more runs than these compete for the cores.
        batches: how many of those threads encode at a time.
        waiting: texts that may wait.
        metrics: is told batches and stages.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        standings: Standings,
        computing: Computing,
        *,
        batches: int,
        waiting: int,
        metrics: Metrics,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._standings = standings
        self._metrics = metrics
        self._clock = clock
        # Its own thread: 0.04 ms of tokenizing must not wait behind runs of 60 ms. Calls that come together share the way there and
        # back, which costs 0.1 ms.
        self._tokenizing = Batcher(_tokenize, Computing(threads=1, waiting=1), batches=1, budget=_CALLS, waiting=waiting)
        self._batcher = Batcher(self._encode, computing, batches=batches, budget=BATCH_TOKENS, waiting=waiting)

    @property
    def waiting_count(self) -> int:
        """Texts that wait to be encoded."""
        return self._batcher.waiting_count

    async def embed(self, query: EmbedQuery) -> Embedded:
        """Returns the vectors of texts.

        Raises:
            PreconditionError: no model is active.
            OverloadedError: too many texts wait.
            UnavailableError: the active model cannot be loaded here.
        """
        model = (await self._standings.of_nobody()).snapshot.require_model()
        with self._stage("tokenize"):
            (texts,) = await self._tokenizing.results([Row(model.model_version, 1, Sharing.EQUAL_LENGTH, (model, query))])
        with self._stage("encode"):
            vectors = iter(await self._batcher.results([_row(model, query.purpose, text) for text in texts if text.readable]))
        return Embedded(
            tuple(Embedding(next(vectors), len(t.ids), t.truncated) if t.readable else Embedding(None, 0, t.truncated) for t in texts),
            model.model_version,
        )

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        started = self._clock()
        with span(stage):
            yield
        self._metrics.observe_encode_stage(stage, self._clock() - started)

    def _encode(self, texts: Sequence[_Text]) -> Sequence[FloatArray]:
        first = texts[0]
        self._metrics.observe_encode_batch(len(texts))
        with on_behalf_of([text.call for text in texts], "encoder batch"):
            return list(first.model.text_vectors([text.ids for text in texts], first.output))


def _tokenize(calls: Sequence[tuple[LoadedModel, EmbedQuery]]) -> list[list[Tokens]]:
    return [_read(model, query) for model, query in calls]


def _read(model: LoadedModel, query: EmbedQuery) -> list[Tokens]:
    trained = model.manifest.item_tokens if query.purpose is Purpose.ITEM else model.manifest.user_tokens
    return [model.tokens(text, min(query.max_tokens or trained, trained)) for text in query.texts]


def _row(model: LoadedModel, purpose: Purpose, text: Tokens) -> Row[_Text]:
    lane = (model.model_version, purpose)
    return Row(lane, len(text.ids), model.sharing, _Text(model, purpose.value, text.ids, origin()))
