"""The two-tower model: one BERT reads items and customers; linear heads map both into one space of unit vectors."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize
from transformers import PreTrainedModel

from training.distributed import gathered
from training.regimes import rest_frozen

_MASKED = -1e4


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Averages the token vectors float[b, l, h] of the unmasked positions to float[b, h].

    A product of matrices, not a sum over positions: ONNX Runtime sums a batch of one in another order than a larger one, and a
    product with a single row in another order when there is padding. Both made vectors depend on the batch by 1e-7. With the
    row of weights taken twice the exported graph gives the same bits in any batch, padded or not.
    """
    weights = mask.to(hidden.dtype)
    summed = (weights.unsqueeze(1).expand(-1, 2, -1) @ hidden)[:, 0]
    return summed / weights.sum(1, keepdim=True).clamp(min=1e-9)


@dataclass(frozen=True)
class Batch:
    """One training step: b labels against b in-batch and s other items; this process reads the texts of p of the labels.

    Attributes:
        user_ids, user_mask: int64[p, l] behaviour texts.
        item_ids, item_mask: int64[p, m] texts of the target items.
        item_rows: int64[b + s], rows of the targets, then of the sampled negatives.
        negative_pools: float32[s, h], pooled encoder outputs of the sampled items, from the last refresh.
        log_q: float32[p, b + s], what each logit is reduced by (``training.negatives``).
        wrong: bool[p, b + s], pairs that are no negatives.
        mine: places of this process's labels among the b.
        teacher: float32[p, b + s], a teacher's logits over the pool, to be imitated; None where nothing is distilled.
        teacher_weight: share of that in the loss, from 0 to 1; the labels have the rest.
    """

    user_ids: Tensor
    user_mask: Tensor
    item_ids: Tensor
    item_mask: Tensor
    item_rows: Tensor
    negative_pools: Tensor
    log_q: Tensor
    wrong: Tensor
    mine: Sequence[int]
    teacher: Tensor | None = None
    teacher_weight: float = 0.0

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def softmax_loss(logits: Tensor, wanted: Tensor, wrong: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross-entropy of ``wanted`` int64[b] among logits float32[b, n] without those that are ``wrong`` bool[b, n].

    Label smoothing spreads its share over the answers that are left, not over the wrong ones.
    """
    masked = logits.masked_fill(wrong, _MASKED)
    loss = cross_entropy(masked, wanted)
    if not label_smoothing:
        return loss
    spread = -log_softmax(masked, dim=-1).masked_fill(wrong, 0.0).sum(-1) / (~wrong).sum(-1)
    return (1.0 - label_smoothing) * loss + label_smoothing * spread.mean()


def softmax_divergence(logits: Tensor, teacher: Tensor, wrong: Tensor) -> Tensor:
    """Returns the mean divergence of the softmax of ``logits`` from that of ``teacher``, both float32[b, n] without what is wrong."""
    taught = log_softmax(teacher.masked_fill(wrong, _MASKED), dim=-1)
    return kl_div(log_softmax(logits.masked_fill(wrong, _MASKED), dim=-1), taught, reduction="batchmean", log_target=True)


class Tower(nn.Module):
    """Whatever maps texts to customers' and items' vectors of one space."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

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

    def __init__(self, encoder: PreTrainedModel, item_count: int, *, temperature: float, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
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
        rest_frozen(self.encoder)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.log_temperature.device

    @property
    def vector_size(self) -> int:
        """Components of a vector."""
        return self.user_head.out_features

    @property
    def temperature(self) -> Tensor:
        """What the cosines are divided by in the softmax, a learned number."""
        return self.log_temperature.exp().clamp(0.01, 1.0)

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
        """Returns the loss: softmax cross-entropy over the pool of items, corrected by log q (Yi et al., RecSys 2019).

        With a teacher, part of it is the divergence from the teacher's softmax over the same pool (Hinton et al., 2015).
        """
        user_pools = self.pool(batch.user_ids, batch.user_mask)
        targets = gathered(self.pool(batch.item_ids, batch.item_mask), batch.mine, len(batch.item_rows) - len(batch.negative_pools))
        # In float32 whatever BERT runs in: a logit of 20 in bfloat16 is known to 0.125 only.
        with torch.autocast(self.device.type, enabled=False):
            users = self.user_vector(user_pools.float())
            items = self.item_vector(torch.cat([targets.float(), batch.negative_pools]), batch.item_rows)
            logits = users @ items.T / self.temperature - batch.log_q
            wanted = torch.tensor(list(batch.mine), device=self.device)
            loss = softmax_loss(logits, wanted, batch.wrong, label_smoothing=self.label_smoothing)
            if batch.teacher is None:
                return loss
            divergence = softmax_divergence(logits, batch.teacher, batch.wrong)
            return (1.0 - batch.teacher_weight) * loss + batch.teacher_weight * divergence


class ExportedEncoder(nn.Module):
    """What the server runs: one pass of the encoder, both heads."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns user_vector and item_vector, float32[b, d], of texts int64[b, l]."""
        pooled = self.tower.pool(input_ids, attention_mask)
        return self.tower.user_vector(pooled), self.tower.item_vector(pooled)
