"""The ranker: a small network over the features of one customer's candidates, trained to put what was bought on top."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from features.candidates import CANDIDATE_COUNT
from features.item_table import FloatArray
from features.ranking import RANKING_FEATURES
from training.config import TrainConfig
from training.metrics import ndcg
from training.progress import bar
from training.scoring import Query
from training.tracking import Tracker, Trackers

_LISTS_PER_STEP = 64
_VALIDATION_SHARE = 0.2


class Ranker(nn.Module):
    """A linear score plus one hidden layer; the normalisation of its input is part of the graph."""

    mean: Tensor
    scale: Tensor

    def __init__(self, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        size = len(RANKING_FEATURES)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.linear = nn.Linear(size, 1, bias=False)
        self.deep = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1, bias=False))

    def normalise_by(self, features: FloatArray) -> None:
        """Sets the normalisation from training rows float32[m, 23]; a feature that never varies is only centred."""
        spread = features.std(0)
        self.mean.copy_(torch.from_numpy(features.mean(0)))
        self.scale.copy_(torch.from_numpy(np.where(spread > 1e-6, 1.0 / np.maximum(spread, 1e-6), 1.0).astype(np.float32)))

    def forward(self, features: Tensor) -> Tensor:
        """Returns scores float32[..., c] of rows float32[..., c, 23]; outliers are cut at 8 standard deviations."""
        x = ((features - self.mean) * self.scale).clamp(-8.0, 8.0)
        scores: Tensor = (self.linear(x) + self.deep(x)).squeeze(-1)
        return scores

    @torch.inference_mode()
    def order(self, query: Query) -> list[int]:
        """Returns the item rows of a query's candidates, best first."""
        return ordered(query, self(torch.from_numpy(query.features)).numpy())


@dataclass(frozen=True)
class Lists:
    """Padded lists: features float32[l, 256, 23], filled bool[l, 256], wanted bool[l, 256]."""

    features: Tensor
    filled: Tensor
    wanted: Tensor


def to_lists(queries: Sequence[Query]) -> Lists:
    """Stacks the queries that have a wanted item among their candidates; the others cannot teach the ranker anything."""
    useful = [query for query in queries if set(query.label.items) & set(query.candidates.rows.tolist())]
    features = torch.zeros(len(useful), CANDIDATE_COUNT, len(RANKING_FEATURES))
    filled = torch.zeros(len(useful), CANDIDATE_COUNT, dtype=torch.bool)
    wanted = torch.zeros_like(filled)
    for place, query in enumerate(useful):
        count = len(query.candidates.rows)
        features[place, :count] = torch.from_numpy(query.features)
        filled[place, :count] = True
        wanted[place, :count] = torch.from_numpy(np.isin(query.candidates.rows, query.label.items))
    return Lists(features, filled, wanted)


def list_loss(scores: Tensor, filled: Tensor, wanted: Tensor) -> Tensor:
    """Returns the listwise softmax cross-entropy, each list's wanted items sharing one unit of weight."""
    log_p = log_softmax(scores.masked_fill(~filled, -1e9), dim=-1)
    return -((log_p * wanted).sum(-1) / wanted.sum(-1)).mean()


def train_ranker(queries: Sequence[Query], config: TrainConfig, *, start: Ranker | None = None, tracker: Tracker | None = None) -> Ranker:
    """Trains on the earlier queries and stops early on the last fifth of them, by time.

    With ``start`` training goes on from its weights and its normalisation, and returns them if no pass improves on them.
    """
    tracker = tracker or Trackers()
    torch.manual_seed(config.seed)
    ranker = Ranker(config.ranker_hidden, dropout=config.ranker_dropout)
    if start is not None:
        ranker.load_state_dict(start.state_dict())
    ordered = sorted(queries, key=lambda query: query.label.time)
    edge = int(len(ordered) * (1 - _VALIDATION_SHARE))
    lists, validation = to_lists(ordered[:edge]), ordered[edge:]
    if not len(lists.features):
        return ranker.eval()
    if start is None:
        ranker.normalise_by(lists.features[lists.filled].numpy())
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=config.ranker_learning_rate, weight_decay=config.ranker_weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    best = -1.0 if start is None else validate(ranker, validation)
    weights, worse = copy.deepcopy(ranker.state_dict()), 0
    for epoch in bar(range(1, config.ranker_epochs + 1), "ranker"):
        tracker.scalar("ranker/loss", _epoch(ranker, lists, optimizer, generator), epoch)
        score = validate(ranker, validation)
        tracker.scalar("ranker/validation_ndcg_at_10", score, epoch)
        best, weights, worse = (score, copy.deepcopy(ranker.state_dict()), 0) if score > best else (best, weights, worse + 1)
        if worse >= config.ranker_patience:
            break
    ranker.load_state_dict(weights)
    return ranker.eval()


def _epoch(ranker: Ranker, lists: Lists, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> float:
    """Passes over the lists once and returns the mean loss of the steps."""
    ranker.train()
    losses: list[float] = []
    for rows in torch.split(torch.randperm(len(lists.features), generator=generator), _LISTS_PER_STEP):
        loss = list_loss(ranker(lists.features[rows]), lists.filled[rows], lists.wanted[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def validate(ranker: Ranker, queries: Sequence[Query]) -> float:
    """Returns NDCG@10 over all queries, those without a wanted candidate included; 0 without queries."""
    if not queries:
        return 0.0
    ranker.eval()
    with torch.inference_mode():
        scores = ranker(torch.from_numpy(np.concatenate([query.features for query in queries]))).numpy()
    parts = np.split(scores, np.cumsum([len(query.features) for query in queries])[:-1])
    gains = [ndcg(ordered(query, part)[:10], set(query.label.items)) for query, part in zip(queries, parts, strict=True)]
    return float(np.mean(gains))


def ordered(query: Query, scores: FloatArray) -> list[int]:
    """Returns the item rows of a query's candidates by score, best first, ties by row."""
    rows = query.candidates.rows
    return [int(row) for row in rows[np.lexsort((rows, -scores))]]
