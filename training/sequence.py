"""The sequence tower: a small causal transformer over item vectors that predicts the next item at every step.

An item's vector is an id embedding plus a linear map of its text vector, used at the input and at the output (Kang & McAuley,
"Self-Attentive Sequential Recommendation", ICDM 2018; full-catalogue cross-entropy as in Klenitskiy & Vasilev, RecSys 2023).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, log_softmax, scaled_dot_product_attention
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_cosine_schedule_with_warmup

from features.item_table import FloatArray
from training.progress import bar
from training.softmax import mean_log_normaliser

Rows = npt.NDArray[np.int64]
_POOL_BATCHES = 8
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
        ema_decay: of the running average of the weights, which is what is validated and kept.
        seed: of initial weights, order and dropout.
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
    """

    text: Tensor
    known: Tensor

    def __init__(self, config: SequenceConfig, text: Tensor, known: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("text", text)
        self.register_buffer("known", known.to(torch.float32)[:, None])
        self.identity = nn.Embedding(len(text), config.width)
        self.text_map = nn.Linear(text.shape[1], config.width, bias=False) if text.shape[1] else None
        self.position = nn.Embedding(config.max_length, config.width)
        for table in (self.identity, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.popularity = nn.Parameter(torch.zeros(len(text)))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def item_vectors(self, kept: Tensor | None = None) -> Tensor:
        """Returns float[n, w]; ``kept`` float[n, 1] says which items keep their id embedding in this step."""
        identity = self.identity.weight * (self.known if kept is None else self.known * kept)
        return identity if self.text_map is None else identity + self.text_map(self.text)

    def forward(self, rows: Tensor, filled: Tensor, items: Tensor) -> Tensor:
        """Returns user vectors float[b, l, w] after each step.

        Args:
            rows: int64[b, l], item rows, the newest last; padding comes first.
            filled: bool[b, l], false for padding.
            items: float[n, w], what ``item_vectors`` returns.
        """
        config, length = self.config, rows.shape[1]
        places = torch.arange(config.max_length - length, config.max_length, device=rows.device)
        x = items[rows] * math.sqrt(config.width) + self.position(places)
        x = dropout(x, config.input_dropout, self.training)
        earlier = torch.ones(length, length, dtype=torch.bool, device=rows.device).tril()
        # A padded step reads itself: a row that may read nothing is NaN after the softmax.
        itself = torch.eye(length, dtype=torch.bool, device=rows.device)
        visible = ((earlier & filled[:, None, :]) | itself)[:, None]
        for block in self.blocks:
            x = block(x, visible)
        users: Tensor = self.norm(x)
        return users

    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Returns logits float[m, n] of user vectors float[m, w]."""
        return users @ items.T + self.popularity * self.known[:, 0]


def next_item_loss(tower: SequenceTower, rows: Tensor, filled: Tensor, targets: Tensor, *, kept: Tensor | None) -> Tensor:
    """Returns the cross-entropy over the full catalogue with label smoothing, averaged over the filled steps.

    The smoothed part is the mean logit, which is a product with the mean item vector.
    """
    smoothing, items = tower.config.label_smoothing, tower.item_vectors(kept)
    users, wanted = tower(rows, filled, items)[filled], targets[filled]
    bias = tower.popularity * tower.known[:, 0]
    target = (users * items[wanted]).sum(-1) + bias[wanted]
    average = users @ items.mean(0) + bias.mean()
    loss: Tensor = mean_log_normaliser(users, items, bias) - ((1 - smoothing) * target + smoothing * average).mean()
    return loss


def pad_left(histories: Sequence[Rows], length: int) -> tuple[Tensor, Tensor]:
    """Returns rows int64[b, l] and filled bool[b, l] of histories cut to their ``length`` newest items."""
    width = max(1, min(length, max(map(len, histories))))
    rows = np.zeros((len(histories), width), np.int64)
    filled = np.zeros((len(histories), width), np.bool_)
    for place, history in enumerate(histories):
        newest = history[-width:]
        if len(newest):
            rows[place, -len(newest) :] = newest
            filled[place, -len(newest) :] = True
    return torch.from_numpy(rows), torch.from_numpy(filled)


def train_sequence_tower(
    sequences: Sequence[Rows],
    text: FloatArray,
    *,
    config: SequenceConfig,
    validate: Callable[[SequenceTower], float],
    device: str = "cpu",
) -> tuple[SequenceTower, list[float]]:
    """Trains a tower on item sequences and returns it with the validation of each epoch, at the weights of the best one.

    Args:
        sequences: item rows in order of time, int64[l] each; those of less than two items teach nothing.
        text: float32[n, t], the items' text vectors; t may be 0.
        config: settings; the same ones and the same number of threads give the same tower.
        validate: larger is better; called after each epoch with the averaged weights in inference mode.
        device: of PyTorch.
    """
    torch.manual_seed(config.seed)
    usable = [sequence[-config.max_length - 1 :] for sequence in sequences if len(sequence) > 1]
    known = torch.zeros(len(text))
    known[np.unique(np.concatenate(usable))] = 1.0
    tower = SequenceTower(config, torch.from_numpy(text), known).to(device)
    average = AveragedModel(tower, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(tower.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    steps = config.epochs * math.ceil(len(usable) / config.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, steps)
    history, best = list[float](), dict[str, Tensor]()
    tower.train()
    for batch, last in bar(_steps(usable, config), "sequence tower", steps):
        _step(tower, batch, optimizer=optimizer)
        schedule.step()
        average.update_parameters(tower)
        if not last:
            continue
        averaged = cast("SequenceTower", average.module).eval()
        history.append(validate(averaged))
        if history[-1] > max(history[:-1], default=-math.inf):
            best = copy.deepcopy(averaged.state_dict())
        if len(history) - 1 - int(np.argmax(history)) >= config.patience:
            break
    tower.load_state_dict(best)
    return tower.eval(), history


def _step(tower: SequenceTower, batch: Sequence[Rows], *, optimizer: torch.optim.Optimizer) -> None:
    config, device = tower.config, tower.identity.weight.device
    rows, filled = pad_left([sequence[:-1] for sequence in batch], config.max_length)
    targets, _ = pad_left([sequence[1:] for sequence in batch], config.max_length)
    kept = None
    if config.identity_dropout:
        kept = (torch.rand(len(tower.text), 1, device=device) >= config.identity_dropout).to(torch.float32)
    loss = next_item_loss(tower, rows.to(device), filled.to(device), targets.to(device), kept=kept)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(tower.parameters(), config.clip_norm)
    optimizer.step()


def _steps(sequences: Sequence[Rows], config: SequenceConfig) -> Iterator[tuple[list[Rows], bool]]:
    """Yields random batches of similar length, and whether each is the last of its epoch.

    Sorting pools of eight batches by length halves the padding, and mixes still.
    """
    rng, size = np.random.default_rng(config.seed), config.batch_size
    for _ in range(config.epochs):
        order = rng.permutation(len(sequences))
        pools = [order[start : start + size * _POOL_BATCHES].tolist() for start in range(0, len(order), size * _POOL_BATCHES)]
        batches = [
            pool[start : start + size]
            for pool in (sorted(pool, key=lambda row: len(sequences[row])) for pool in pools)
            for start in range(0, len(pool), size)
        ]
        for count, place in enumerate(rng.permutation(len(batches)), 1):
            yield [sequences[row] for row in batches[place]], count == len(batches)


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
