"""A listwise re-ranker: small networks read the best candidates of the blend by all their signals and by how they stand in each.

A sum of signals cannot say that an item which is first by one of them is worth more than its distance tells, or that neighbours
count for more where a customer has bought much. Networks that add to the blend's score can.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from features.item_table import FloatArray
from training.blend import SignalSource, allowed_items, chunks
from training.metrics import BoolArray
from training.sequence import Rows

# Chosen on validation targets of Amazon Beauty; see docs/LOG.md, 2026-11-30.
_CANDIDATES, _HIDDEN, _DROPOUT = 200, 32, 0.2
_EPOCHS, _LISTS_PER_STEP, _LEARNING_RATE, _WEIGHT_DECAY = 6, 32, 2e-3, 0.1
_LONG = 20  # items; longer histories are as long


@dataclass(frozen=True)
class Candidates:
    """The best items of some histories by the blend, best first.

    Attributes:
        rows: int64[u, c].
        features: float32[u, c, f]: the blend's score, every signal, the place among the candidates by each, and the length of the history.
        mass: float32[u], the share of the blend's probability that the candidates hold.
    """

    rows: Rows
    features: FloatArray
    mass: FloatArray


@dataclass(frozen=True)
class Reranker:
    """Networks from standardised features to what is added to a candidate's score.

    Attributes:
        nets: averaged.
        mean, scale: float32[f], of the features.
    """

    nets: Sequence[nn.Module]
    mean: FloatArray
    scale: FloatArray

    @torch.inference_mode()
    def scores(self, features: FloatArray) -> FloatArray:
        """Returns float32[u, c] of features float32[u, c, f]."""
        standard = torch.from_numpy((features - self.mean) / self.scale)
        added = torch.stack([net(standard).squeeze(-1) for net in self.nets]).mean(0)
        return np.asarray(features[..., 0] + added.numpy(), np.float32)


def fit_reranker(
    source: SignalSource,
    weights: FloatArray,
    histories: Sequence[Rows],
    targets: Sequence[int],
    *,
    excluded: BoolArray,
    seed: int,
    networks: int = 5,
) -> Reranker:
    """Learns to put the targets first among the blend's candidates; a target that is not among them teaches nothing.

    Args:
        source: computes the signals.
        weights: float32[s], the blend's.
        histories: of validation; towers and neighbours were fitted without what came next.
        targets: what came next, item rows.
        excluded: bool[n], items nobody may be ranked: those of the test.
        seed: of the networks and the order of the lists.
        networks: averaged; each begins from other weights.

    Raises:
        ValueError: no target is among the candidates.
    """
    parts = list(_candidates(source, weights, histories, excluded=excluded, stage="candidates of validation"))
    wanted = np.concatenate([part.rows for part in parts]) == np.array(targets)[:, None]
    useful = wanted.any(1)
    if not useful.any():
        raise ValueError("no target is among the candidates: there is nothing to learn a ranking from")
    features, places = np.concatenate([part.features for part in parts])[useful], torch.from_numpy(wanted[useful].argmax(1))
    flat = features.reshape(-1, features.shape[-1])
    mean, scale = flat.mean(0), flat.std(0) + 1e-6
    standard, base = torch.from_numpy((features - mean) / scale), torch.from_numpy(features[..., 0])
    nets = [_fit_network(standard, base, places, seed=networks * seed + number) for number in range(networks)]
    return Reranker(nets, mean, scale)


def _fit_network(standard: Tensor, base: Tensor, places: Tensor, *, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(standard.shape[-1], _HIDDEN), nn.GELU(), nn.Dropout(_DROPOUT), nn.Linear(_HIDDEN, 1))
    nn.init.zeros_(net[3].weight)  # type: ignore[arg-type]
    nn.init.zeros_(net[3].bias)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(net.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    for _ in range(_EPOCHS):
        for lists in torch.split(torch.randperm(len(places)), _LISTS_PER_STEP):
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(net(standard[lists]).squeeze(-1) + base[lists], places[lists]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval()


def rank(
    source: SignalSource, weights: FloatArray, reranker: Reranker, histories: Sequence[Rows], *, excluded: BoolArray, count: int
) -> tuple[Rows, FloatArray]:
    """Returns int64[u, count], the best items outside each history, best first, ties by row, and float32[u, count], their probabilities.

    Fewer than ``count`` where there are fewer candidates. A probability is that of the softmax over the candidates, times the share
    that the blend gives to all of them.
    """
    ranked, probability = list[Rows](), list[FloatArray]()
    for part in _candidates(source, weights, histories, excluded=excluded, stage="ranking"):
        scores = reranker.scores(part.features)
        order = np.lexsort((part.rows, -scores), axis=1)[:, :count]
        share = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)) * part.mass[:, None]
        ranked.append(np.take_along_axis(part.rows, order, 1))
        probability.append(np.take_along_axis(share, order, 1))
    return np.concatenate(ranked), np.concatenate(probability)


def _candidates(
    source: SignalSource, weights: FloatArray, histories: Sequence[Rows], *, excluded: BoolArray, stage: str
) -> Iterator[Candidates]:
    # As many for everybody, in a small catalogue no more than the customer who knows most of it has left.
    count = min(_CANDIDATES, int((~excluded).sum()) - max(len(np.unique(history)) for history in histories))
    for start, signals in chunks(source, histories, stage):
        part = histories[start : start + len(signals)]
        scores = weights @ signals
        scores[~np.array([allowed_items(history, excluded) for history in part])] = -np.inf
        rows = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        best = np.take_along_axis(scores, rows, 1)
        order = np.lexsort((rows, -best), axis=1)
        rows, best = np.take_along_axis(rows, order, 1), np.take_along_axis(best, order, 1)
        found = np.take_along_axis(signals, rows[:, None], 2).transpose(0, 2, 1)
        place = np.argsort(np.argsort(-found, axis=1, kind="stable"), axis=1)
        length = np.log([[max(1, min(len(history), _LONG))] * count for history in part])
        features = np.concatenate([best[..., None], found, 1 / np.log2(place + 2), length[..., None]], axis=2, dtype=np.float32)
        mass = np.exp(np.logaddexp.reduce(best, axis=1) - np.logaddexp.reduce(scores, axis=1))
        yield Candidates(rows, features, mass)
