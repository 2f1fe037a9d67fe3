"""The sequence tower: a small causal transformer over item vectors that predicts the next item at every step.

An item's vector is an id embedding plus a linear map of its text vector, used at the input and at the output (Kang & McAuley,
"Self-Attentive Sequential Recommendation", ICDM 2018; full-catalogue cross-entropy as in Klenitskiy & Vasilev, RecSys 2023).
A shop's tower also reads searches and messages (rows after the items', by text alone) and what was done, where and after how long.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, log_softmax, normalize, scaled_dot_product_attention

from features.item_table import FloatArray
from training.softmax import mean_log_normaliser

Rows = npt.NDArray[np.int64]
_SCORED_AT_ONCE = 512


@dataclass(frozen=True)
class SequenceConfig:
    """Settings of a sequence tower; the defaults were chosen on the validation part of Amazon Beauty.

    Attributes:
        width: components of item and user vectors.
        layers, heads: of the transformer.
        max_length: newest items of a history that are read.
        dropout: inside the transformer.
        input_dropout: on the input vectors; strong, because a shop's sequences are short and few.
        identity_dropout: share of items that lose their id embedding in a step, so that text alone learns to carry an item.
        label_smoothing: share of the target's probability that is spread over the catalogue.
        epochs: passes over the sequences at the most.
        patience: epochs without a better validation after which training stops.
        batch_size: sequences per step.
        learning_rate, weight_decay: of AdamW; the rate rises over ``warmup_steps`` and falls as a cosine.
        clip_norm: gradients are scaled down to this Euclidean norm.
        ema_decay: of the moving average of the weights, which is what is validated and kept; smaller in the first steps.
        seed: of initial weights, order and dropout.
        positions: whether a step's place, counted from the newest, has an embedding; distances between steps are always known.
        contexts: sizes of the vocabularies that describe a step besides its item (action, channel, gap); empty for none.
        context_dropout: share of these ids that are read as 0, the unknown, in training.
        temperature: of the softmax at first, learned; items and customers are then unit vectors, as the server needs them, and
            nothing else tells popular items. 0 leaves vectors as long as they are.
    """

    width: int = 128
    layers: int = 2
    heads: int = 2
    max_length: int = 50
    dropout: float = 0.4
    input_dropout: float = 0.5
    identity_dropout: float = 0.0
    label_smoothing: float = 0.1
    epochs: int = 20
    patience: int = 3
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200
    clip_norm: float = 5.0
    ema_decay: float = 0.999
    seed: int = 0
    positions: bool = True
    contexts: tuple[int, ...] = ()
    context_dropout: float = 0.0
    temperature: float = 0.0


class _Block(nn.Module):
    """Causal attention with a learned bias per head and distance, then a feed-forward layer; both pre-norm."""

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.rate = config.heads, config.dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projection = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(4 * width, width))
        self.distance = nn.Parameter(torch.zeros(config.heads, config.max_length))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Returns float[b, l, w]; ``visible`` bool[b, 1, l, l] says what each step may read."""
        batch, length, width = x.shape
        heads = self.projection(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        back = torch.arange(length, device=x.device)
        bias = self.distance[:, (back[:, None] - back).clamp(min=0)].masked_fill(~visible, -torch.inf)
        rate = self.rate if self.training else 0.0
        read = scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=bias.to(heads.dtype), dropout_p=rate)
        x = x + dropout(self.output(read.transpose(1, 2).reshape(batch, length, width)), self.rate, self.training)
        return x + dropout(self.feed(self.feed_norm(x)), self.rate, self.training)


class SequenceTower(nn.Module):
    """Item rows in order of time to a user vector after each of them.

    Attributes:
        text: float32[n, t], the items' text vectors; t is 0 for a tower that knows ids only.
        known: float32[n, 1], 1 for items with training interactions; the others are read and scored by their text alone.
        queries: float32[m, t], text vectors of what is read but is no item; their rows follow those of the items.
    """

    text: Tensor
    known: Tensor
    queries: Tensor

    def __init__(self, config: SequenceConfig, text: Tensor, known: Tensor, *, queries: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("text", text)
        self.register_buffer("known", known.to(torch.float32)[:, None])
        self.register_buffer("queries", text[:0] if queries is None else queries, persistent=False)
        self.identity = nn.Embedding(len(text), config.width)
        self.text_map = nn.Linear(text.shape[1], config.width, bias=False) if text.shape[1] else None
        self.position = nn.Embedding(config.max_length, config.width) if config.positions else None
        contexts = [nn.Embedding(size, config.width) for size in config.contexts]
        for table in (self.identity, *([self.position] if self.position else []), *contexts):
            nn.init.normal_(table.weight, std=0.02)
        self.contexts = nn.ModuleList(contexts)
        self.popularity = None if config.temperature else nn.Parameter(torch.zeros(len(text)))
        self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log()) if config.temperature else None
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def item_vectors(self, kept: Tensor | None = None) -> Tensor:
        """Returns float[n, w]; ``kept`` float[n, 1] says which items keep their id embedding in this step."""
        identity = self.identity.weight * (self.known if kept is None else self.known * kept)
        return self.finished(identity if self.text_map is None else identity + self.text_map(self.text))

    def mapped(self, text: Tensor) -> Tensor:
        """Returns what text vectors float[m, t] contribute to item vectors float[m, w]."""
        assert self.text_map is not None
        contribution: Tensor = self.text_map(text)
        return contribution

    def text_vectors(self, text: Tensor) -> Tensor:
        """Returns float[m, w], in the space of items, of text vectors float[m, t] of what is no known item."""
        return self.finished(self.mapped(text))

    def finished(self, vectors: Tensor) -> Tensor:
        """Scales vectors to unit length where the tower compares by cosine."""
        return normalize(vectors, dim=-1) if self.config.temperature else vectors

    def forward(self, rows: Tensor, filled: Tensor, items: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns user vectors float[b, l, w] after each step.

        Args:
            rows: int64[b, l], item rows, the newest last; padding comes first.
            filled: bool[b, l], false for padding.
            items: float[n, w], what ``item_vectors`` returns.
            context: int64[b, l, c], ids of each step by vocabulary of ``contexts``.
        """
        table = torch.cat([items, self.text_vectors(self.queries)]) if len(self.queries) else items
        return self.read(table[rows], filled, context)

    def read(self, vectors: Tensor, filled: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns what ``forward`` does, of steps given as vectors float[b, l, w]."""
        config, length, device = self.config, vectors.shape[1], vectors.device
        x = vectors * math.sqrt(config.width)
        if self.position is not None:
            x = x + self.position(torch.arange(config.max_length - length, config.max_length, device=device))
        if context is not None:
            x = x + self._described(context)
        x = dropout(x, config.input_dropout, self.training)
        earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        # A padded step reads itself: a row that may read nothing is NaN after the softmax.
        itself = torch.eye(length, dtype=torch.bool, device=device)
        visible = ((earlier & filled[:, None, :]) | itself)[:, None]
        for block in self.blocks:
            x = block(x, visible)
        return self.finished(self.norm(x))

    def _described(self, context: Tensor) -> Tensor:
        if self.training and self.config.context_dropout:
            context = context * (torch.rand(context.shape, device=context.device) >= self.config.context_dropout)
        return torch.stack([table(ids) for table, ids in zip(self.contexts, context.unbind(-1), strict=True)]).sum(0)

    def logit_parts(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what user vectors float[m, w] contribute to a product with item vectors, and each item's own share float[n]."""
        if self.log_temperature is not None:
            return users / self.log_temperature.exp().clamp(0.01, 1.0), users.new_zeros(len(self.text))
        assert self.popularity is not None
        return users, self.popularity * self.known[:, 0]

    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Returns logits float[m, n] of user vectors float[m, w]."""
        users, bias = self.logit_parts(users)
        return users @ items.T + bias


def next_item_loss(
    tower: SequenceTower, rows: Tensor, filled: Tensor, targets: Tensor, *, kept: Tensor | None, context: Tensor | None = None
) -> Tensor:
    """Returns the cross-entropy over the full catalogue with label smoothing, averaged over the steps that have a target.

    The smoothed part is the mean logit, which is a product with the mean item vector.

    Args:
        tower: in training mode or not.
        rows: as ``SequenceTower.forward`` takes it.
        filled: likewise.
        targets: int64[b, l], the item each step should foresee; negative for none.
        kept: as ``SequenceTower.item_vectors`` takes it.
        context: as ``SequenceTower.forward`` takes it.
    """
    smoothing, items = tower.config.label_smoothing, tower.item_vectors(kept)
    asked = filled & (targets >= 0)
    read, wanted = tower(rows, filled, items, context)[asked], targets[asked]
    users, bias = tower.logit_parts(read)
    target = (users * items[wanted]).sum(-1) + bias[wanted]
    average = users @ items.mean(0) + bias.mean()
    loss: Tensor = mean_log_normaliser(users, items, bias) - ((1 - smoothing) * target + smoothing * average).mean()
    return loss


def pad_left(histories: Sequence[Rows], length: int) -> tuple[Tensor, Tensor]:
    """Returns rows int64[b, l, ...] and filled bool[b, l] of histories int64[h, ...] cut to their ``length`` newest entries."""
    width = max(1, min(length, max(map(len, histories))))
    rows = np.zeros((len(histories), width, *histories[0].shape[1:]), np.int64)
    filled = np.zeros((len(histories), width), np.bool_)
    for place, history in enumerate(histories):
        newest = history[-width:]
        if len(newest):
            rows[place, -len(newest) :] = newest
            filled[place, -len(newest) :] = True
    return torch.from_numpy(rows), torch.from_numpy(filled)


@torch.inference_mode()
def log_probabilities(tower: SequenceTower, histories: Sequence[Rows]) -> FloatArray:
    """Returns float32[u, n], the logarithm of each item's probability to come next; histories may be empty."""
    device, items = tower.identity.weight.device, tower.item_vectors()
    result = np.empty((len(histories), len(items)), np.float32)
    for start in range(0, len(histories), _SCORED_AT_ONCE):
        rows, filled = pad_left(histories[start : start + _SCORED_AT_ONCE], tower.config.max_length)
        users = tower(rows.to(device), filled.to(device), items)[:, -1]
        result[start : start + len(rows)] = log_softmax(tower.scores(users, items).float(), -1).cpu().numpy()
    return result
