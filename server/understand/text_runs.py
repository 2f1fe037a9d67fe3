"""Runs of a model's text graphs for many calls: texts tokenized in a thread of their own, rows of tokens run in batches."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

from features.item_table import FloatArray
from server.inference.batching import BATCH_TOKENS, Batcher, Row, Sharing
from server.inference.tokens import Rows, Tokens
from server.metrics import Metrics
from server.recommend.computing import Computing
from server.tracing import Origin, on_behalf_of, origin, span

_CALLS = 64  # tokenized at a time; each is a row of length 1, so that they share and nothing is padded

R = TypeVar("R")


@dataclass(frozen=True)
class Graph:
    """A graph that reads rows of tokens.

    Attributes:
        lane: rows of graphs with different lanes never share a run.
        sharing: with what a row may share a run and keep its bits.
        run: rows of token ids to float32[rows, n].
    """

    lane: Hashable
    sharing: Sharing
    run: Callable[[Rows], FloatArray]


@dataclass(frozen=True)
class _Text:
    """What a graph is handed: token ids, on behalf of a call."""

    run: Callable[[Rows], FloatArray]
    ids: Sequence[int]
    call: Origin


class TextRuns:
    """One queue for every text graph, so that what waits has one bound and one order.

    Args:
        computing: the threads that slates are computed in too, so that no more runs than these compete for the cores.
        batches: how many of those threads run texts at a time.
        waiting: texts that may wait.
        metrics: is told batches and stages.
        clock: monotonic seconds.
    """

    def __init__(
        self, computing: Computing, *, batches: int, waiting: int, metrics: Metrics, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        # Its own thread: 0.04 ms of tokenizing must not wait behind runs of 60 ms. Calls that come together share the way there and
        # back, which costs 0.1 ms.
        own = Computing(threads=1, waiting=1)
        self._tokenizing: Batcher[Callable[[], Any], Any] = Batcher(_read, own, batches=1, budget=_CALLS, waiting=waiting)
        self._batcher = Batcher(self._run, computing, batches=batches, budget=BATCH_TOKENS, waiting=waiting)

    @property
    def waiting_count(self) -> int:
        """Texts that wait to be run."""
        return self._batcher.waiting_count

    async def read(self, reading: Callable[[], R]) -> R:
        """Returns what ``reading`` returns, which tokenizes the texts of one call; in the tokenizing thread.

        Raises:
            OverloadedError: too many calls wait.
        """
        with self._stage("tokenize"):
            (result,) = await self._tokenizing.results([Row("tokenize", 1, Sharing.EQUAL_LENGTH, reading)])
        read: R = result
        return read

    async def results(self, graph: Graph, texts: Sequence[Tokens], *, stage: str) -> list[FloatArray | None]:
        """Returns what the graph gives for each text, float32[n], to the bit as a run of it alone; None where there is nothing to read.

        Raises:
            OverloadedError: too many texts wait.
        """
        call = origin()
        rows = [Row(graph.lane, len(text.ids), graph.sharing, _Text(graph.run, text.ids, call)) for text in texts if text.readable]
        with self._stage(stage):
            found = iter(await self._batcher.results(rows))
        return [next(found) if text.readable else None for text in texts]

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        started = self._clock()
        with span(stage):
            yield
        self._metrics.observe_encode_stage(stage, self._clock() - started)

    def _run(self, texts: Sequence[_Text]) -> Sequence[FloatArray]:
        self._metrics.observe_encode_batch(len(texts))
        with on_behalf_of([text.call for text in texts], "encoder batch"):
            return list(texts[0].run([text.ids for text in texts]))


def _read(readings: Sequence[Callable[[], Any]]) -> list[Any]:
    return [reading() for reading in readings]
