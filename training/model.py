"""The two-tower model: one BERT reads items and customers; linear heads map both into one space of unit vectors."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

_MASKED = -1e4


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Averages the token vectors float[b, l, h] of the unmasked positions to float[b, h]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


@dataclass(frozen=True)
class Batch:
    """One training step: b labels against b in-batch and s sampled items.

    Attributes:
        user_ids, user_mask: int64[b, l] behaviour texts.
        item_ids, item_mask: int64[b, m] texts of the target items.
        item_rows: int64[b + s], rows of the targets, then of the sampled negatives.
        negative_pools: float32[s, h], pooled encoder outputs of the sampled items, from the last refresh.
        log_q: float32[b + s], log of the expected number of times each item is in the pool of such a step.
        wrong: bool[b, b + s], pairs that are no negatives: other targets of the label, and what its customer has already.
    """

    user_ids: Tensor
    user_mask: Tensor
    item_ids: Tensor
    item_mask: Tensor
    item_rows: Tensor
    negative_pools: Tensor
    log_q: Tensor
    wrong: Tensor


class Tower(nn.Module):
    """Whatever maps texts to customers' and items' vectors of one space."""

    @property
    @abstractmethod
    def vector_size(self) -> int:
        """Components of a vector, and of a pooled text."""

    @abstractmethod
    def pool(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns float32[b, h], texts int64[b, l] read by the encoder."""

    @abstractmethod
    def user_vector(self, pooled: Tensor) -> Tensor:
        """Returns unit user vectors, float32[b, d]."""

    @abstractmethod
    def item_vector(self, pooled: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns unit item vectors, float32[b, d]; without ``rows`` those of items never seen."""


class TwoTower(Tower):
    """Behaviour text and item text to vectors of one space.

    The heads start as identity and the residuals as zero, so training starts from the pretrained sentence space. The
    residual is what an item's text does not say; an item that was never a label (``warm`` is 0) has none, for all it could
    learn is that nobody wanted it yet.
    """

    warm: Tensor

    def __init__(self, encoder: PreTrainedModel, item_count: int, *, temperature: float) -> None:
        super().__init__()
        size = int(encoder.config.hidden_size)
        self.encoder = encoder
        self.user_head = nn.Linear(size, size)
        self.item_head = nn.Linear(size, size)
        for head in (self.user_head, self.item_head):
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)
        self.residual = nn.Embedding(item_count, size)
        nn.init.zeros_(self.residual.weight)
        self.register_buffer("warm", torch.zeros(item_count, 1))
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def train(self, mode: bool = True) -> Self:
        """Switches dropout on or off; frozen layers stay without it, which also makes them a third cheaper to run."""
        super().train(mode)
        for layer in (self.encoder.embeddings, *self.encoder.encoder.layer):
            if not any(parameter.requires_grad for parameter in layer.parameters()):
                layer.eval()
        return self

    @property
    def vector_size(self) -> int:
        """Components of a vector."""
        return self.user_head.out_features

    def pool(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns float32[b, h], the mean-pooled encoder output."""
        return mean_pool(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    def user_vector(self, pooled: Tensor) -> Tensor:
        """Returns unit user vectors, float32[b, d]."""
        return normalize(self.user_head(pooled), dim=-1)

    def item_vector(self, pooled: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns unit item vectors, float32[b, d]; without ``rows`` those of items never seen."""
        mapped = self.item_head(pooled)
        return normalize(mapped if rows is None else mapped + self.residual(rows) * self.warm[rows], dim=-1)

    def forward(self, batch: Batch) -> Tensor:
        """Returns the loss: softmax cross-entropy over the pool of items, corrected by log q (Yi et al., RecSys 2019)."""
        users = self.user_vector(self.pool(batch.user_ids, batch.user_mask))
        pools = torch.cat([self.pool(batch.item_ids, batch.item_mask), batch.negative_pools])
        items = self.item_vector(pools, batch.item_rows)
        temperature = self.log_temperature.exp().clamp(0.01, 1.0)
        logits = users @ items.T / temperature - batch.log_q
        return cross_entropy(logits.masked_fill(batch.wrong, _MASKED), torch.arange(len(users), device=users.device))


class ExportedEncoder(nn.Module):
    """What the server runs: one pass of the encoder, both heads."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns user_vector and item_vector, float32[b, d], of texts int64[b, l]."""
        pooled = self.tower.pool(input_ids, attention_mask)
        return self.tower.user_vector(pooled), self.tower.item_vector(pooled)


def freeze_below(tower: TwoTower, trainable_layers: int) -> None:
    """Leaves only the top encoder layers (and heads, residuals, temperature) trainable; -1 leaves everything so."""
    if trainable_layers < 0:
        return
    tower.encoder.requires_grad_(False)
    layers = tower.encoder.encoder.layer
    for layer in layers[len(layers) - min(trainable_layers, len(layers)) :]:
        layer.requires_grad_(True)
