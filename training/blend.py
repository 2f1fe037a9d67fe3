"""Signals of the next item: towers, item-to-item neighbours and text, added up with listwise weights learned on validation targets."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from features.item_table import FloatArray
from training.collaborative import co_visitation, ease
from training.metrics import BoolArray
from training.progress import bar
from training.sequence import Rows

# Votes of a customer's newest items, the newest first, in the neighbourhood of three steps.
_VOTES = (1.0, 0.6, 0.4, 0.3, 0.2)
_REACH = 3
_DECAY = 0.6
_EASE_REGULARISATION = 50.0
_NEWEST_READ = 4
_STEPS, _LISTS_PER_STEP, _LEARNING_RATE = 400, 128, 0.05

# Every signal with the kind of knowledge it stands for; the scales bring their spread near one, so that one learning rate suits all.
SIGNALS = {
    "tower": "sequence",
    "window_neighbours": "collaborative",
    "ease_recent": "collaborative",
    "ease": "collaborative",
    "cosine_neighbours": "collaborative",
    "walk": "collaborative",
    "popularity": "collaborative",
    "text_of_last": "text",
    "text_of_recent": "text",
    "text_of_nearest": "text",
    "words_of_last": "text",
    "words_of_recent": "text",
    "words_of_nearest": "text",
}
RECENCY = ("ease_recent", "text_of_last", "text_of_recent", "words_of_last", "words_of_recent")
_COLD = ("tower", *(name for name, part in SIGNALS.items() if part == "text"))

Towers = Callable[[Sequence[Rows]], FloatArray]


@dataclass(frozen=True)
class Neighbours:
    """Item-to-item weights and popularity of one set of training sequences.

    Attributes:
        window: sparse [n, n], neighbours within three steps, forward twice as heavy, damped by the neighbour's popularity.
        ease: float32[n, n].
        cosine: sparse [n, n].
        counts: float32[n], interactions per item.
    """

    window: sp.csr_matrix
    ease: FloatArray
    cosine: sp.csr_matrix
    counts: FloatArray


def fit_neighbours(sequences: Sequence[Rows], item_count: int) -> Neighbours:
    """Counts the neighbours of sequences of item rows, int64[l] each."""
    owner = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    items = np.concatenate(sequences)
    x = sp.csr_matrix((np.ones(len(items), np.float32), (owner, items)), (len(sequences), item_count))
    counts = np.bincount(items, minlength=item_count).astype(np.float32)
    x.data[:] = 1.0  # an item taken twice is summed to two
    # By rows in memory: scipy's product of a sparse matrix with one by columns copies it whole, 0.6 GB, at every call.
    weights = np.ascontiguousarray(ease(x, _EASE_REGULARISATION))
    return Neighbours(_window(owner, items, counts), weights, sp.csr_matrix(co_visitation(x)), counts)


def _window(owner: Rows, items: Rows, counts: FloatArray) -> sp.csr_matrix:
    shape = (len(counts), len(counts))
    near = sp.csr_matrix(shape, dtype=np.float32)
    for step in range(1, _REACH + 1):
        same = owner[step:] == owner[:-step]
        left, right = items[:-step][same], items[step:][same]
        weight = np.full(len(left), 1.0 / step, np.float32)
        near = near + sp.csr_matrix((weight, (left, right)), shape) + sp.csr_matrix((0.5 * weight, (right, left)), shape)
    return sp.csr_matrix(near.multiply(1.0 / np.sqrt(np.maximum(counts, 1.0))))


@dataclass(frozen=True)
class SignalSource:
    """Computes the signals of histories.

    Attributes:
        towers: log-probabilities float32[u, n] of histories; None leaves the towers out.
        neighbours: item-to-item weights.
        text: float32[n, t], unit text vectors.
        words: sparse [n, n], what ``word_similarity`` returns.
        cold: bool[n], items without training interactions; they get an offset and text weights of their own.
        names: the signals used, of SIGNALS.
    """

    towers: Towers | None
    neighbours: Neighbours
    text: FloatArray
    words: sp.csr_matrix
    cold: BoolArray
    names: tuple[str, ...] = tuple(SIGNALS)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the signals in order; those that hold for cold items only come last."""
        return (*self.names, *(() if not self.cold.any() else ("cold", *(f"cold_{name}" for name in self._cold_names))))

    @property
    def _cold_names(self) -> tuple[str, ...]:
        return tuple(name for name in _COLD if name in self.names)

    def signals(self, histories: Sequence[Rows]) -> FloatArray:
        """Returns float32[u, s, n], s in the order of ``columns``."""
        last, recent = self._past(histories, (1.0,)), self._past(histories, _decay(histories))
        shares = sp.csr_matrix(recent.multiply(1.0 / np.maximum(recent.sum(1), 1e-9)))
        makers: dict[str, Callable[[], FloatArray]] = {
            "tower": lambda: self._tower(histories),
            "window_neighbours": lambda: np.log1p(20 * (self._past(histories, _VOTES) @ self.neighbours.window).toarray()),
            "ease_recent": lambda: 24 * (recent @ self.neighbours.ease),
            "ease": lambda: 24 * (self._past(histories, np.ones_like(_decay(histories))) @ self.neighbours.ease),
            "cosine_neighbours": lambda: np.log1p(10 * (recent @ self.neighbours.cosine).toarray()),
            "walk": lambda: np.log1p(200 * (recent @ self._step @ self._step).toarray()),
            "popularity": lambda: np.broadcast_to(np.log1p(self.neighbours.counts), (len(histories), len(self.text))),
            "text_of_last": lambda: 5 * (last @ self.text) @ self.text.T,
            "text_of_recent": lambda: 5 * (shares @ self.text) @ self.text.T,
            "text_of_nearest": lambda: 5 * self._nearest(histories, lambda items: self.text[items] @ self.text.T),
            "words_of_last": lambda: 5 * (last @ self.words).toarray(),
            "words_of_recent": lambda: 5 * (shares @ self.words).toarray(),
            "words_of_nearest": lambda: 5 * self._nearest(histories, lambda items: self.words[items].toarray()),
        }
        result = np.zeros((len(histories), len(self.columns), len(self.text)), np.float32)
        for place, name in enumerate(self.names):
            result[:, place] = makers[name]()
        if self.cold.any():
            result[:, len(self.names), self.cold] = 1.0
            for place, name in enumerate(self._cold_names, len(self.names) + 1):
                result[:, place, self.cold] = result[:, self.names.index(name)][:, self.cold]
        return result

    def _tower(self, histories: Sequence[Rows]) -> FloatArray:
        if self.towers is None:
            raise ValueError("signal 'tower' needs towers")
        return self.towers(histories)

    def _past(self, histories: Sequence[Rows], weights: "Sequence[float] | FloatArray") -> sp.csr_matrix:
        """Returns sparse float32[u, n]: an item's weight by how many items came after it, its newest place counting."""
        rows, columns, values = list[int](), list[int](), list[float]()
        for place, history in enumerate(histories):
            newest = dict[int, float]()
            for back, item in zip(weights, history[::-1].tolist(), strict=False):
                newest.setdefault(item, float(back))
            rows += [place] * len(newest)
            columns += list(newest)
            values += list(newest.values())
        return sp.csr_matrix((np.array(values, np.float32), (rows, columns)), (len(histories), len(self.text)))

    @cached_property
    def _step(self) -> sp.csr_matrix:
        """Sparse [n, n]: how likely a walk over the neighbours goes from a row's item to a column's."""
        return sp.csr_matrix(self.neighbours.window.multiply(1.0 / np.maximum(self.neighbours.window.sum(1), 1e-9)))

    def _nearest(self, histories: Sequence[Rows], similarity: Callable[[list[int]], FloatArray]) -> FloatArray:
        nearest = np.full((len(histories), len(self.text)), -1.0, np.float32)
        for back in range(_NEWEST_READ):
            known = [place for place, history in enumerate(histories) if len(history) > back]
            if known:
                nearest[known] = np.maximum(nearest[known], similarity([int(histories[place][-1 - back]) for place in known]))
        return nearest


def _decay(histories: Sequence[Rows]) -> FloatArray:
    return (_DECAY ** np.arange(max(map(len, histories), default=0))).astype(np.float32)


def fit_weights(source: SignalSource, histories: Sequence[Rows], targets: Sequence[int], *, excluded: BoolArray, seed: int) -> FloatArray:
    """Returns float32[s]: the weights under which the softmax over the items outside the history best predicts the targets.

    Args:
        source: computes the signals.
        histories: of validation; towers and neighbours were fitted without what came next.
        targets: what came next, item rows; one that stands in its history already is left out.
        excluded: bool[n], items nobody may be ranked: those of the test.
        seed: of the order of the lists.
    """
    torch.manual_seed(seed)
    useful = [place for place, (history, target) in enumerate(zip(histories, targets, strict=True)) if target not in history]
    histories, targets = [histories[place] for place in useful], [targets[place] for place in useful]
    # fp16: 4,000 lists of 12,101 items and 20 signals are 1.9 GB; its rounding of 5e-4 is far below what moves a weight.
    signals = torch.cat(
        [torch.from_numpy(part.astype(np.float16)) for _, part in chunks(source, histories, "signals of validation")],
    )
    allowed = torch.from_numpy(np.array([allowed_items(history, excluded) for history in histories]))
    wanted = torch.tensor(targets)
    weights = nn.Parameter(torch.tensor([1.0 if name == "tower" else 0.1 for name in source.columns]))
    optimizer = torch.optim.Adam([weights], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in bar(range(_STEPS), "weights of the signals"):
        rows = torch.randint(len(histories), (min(_LISTS_PER_STEP, len(histories)),))
        optimizer.zero_grad(set_to_none=True)
        _list_loss(weights, signals[rows].float(), allowed[rows], wanted[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return weights.detach().numpy()


def _list_loss(weights: Tensor, signals: Tensor, allowed: Tensor, wanted: Tensor) -> Tensor:
    scores = (weights[None, None] @ signals).squeeze(1).masked_fill(~allowed, -torch.inf)
    loss: Tensor = -log_softmax(scores, -1).gather(1, wanted[:, None]).mean()
    return loss


def allowed_items(history: Rows, excluded: BoolArray) -> BoolArray:
    """Returns bool[n]: the items outside the history and outside ``excluded``."""
    allowed = ~excluded
    allowed[history] = False
    return allowed


def chunks(source: SignalSource, histories: Sequence[Rows], stage: str, size: int = 256) -> Iterator[tuple[int, FloatArray]]:
    """Yields the signals of some histories at a time, float32[u, s, n], each with the place of the first."""
    for start in bar(range(0, len(histories), size), stage):
        yield start, source.signals(histories[start : start + size])
