"""Training of a sequence tower: batches of similar length, a cosine schedule, averaged weights, the best epoch kept."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import get_cosine_schedule_with_warmup

from features.item_table import FloatArray
from training.distributed import average_gradients, largest, rank, world_size
from training.progress import bar
from training.sequence import Rows, SequenceConfig, SequenceTower, next_item_loss, pad_left

_POOL_BATCHES = 8


@dataclass(frozen=True)
class Steps:
    """A sequence to learn from.

    Attributes:
        rows: int64[l], what was done in order of time: item rows, or rows of the tower's ``queries``.
        targets: int64[l], the item that each step should foresee, -1 for none.
        context: int64[l, c], ids of each step; None where the tower has no ``contexts``.
    """

    rows: Rows
    targets: Rows
    context: Rows | None = None

    def __len__(self) -> int:
        return len(self.rows)


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
    steps = [Steps(sequence[:-1], sequence[1:]) for sequence in usable]
    return tower, fit(tower, lambda _: steps, validate=validate)[0]


class Observe(Protocol):
    """Told of the loss of each step and the validation of each epoch."""

    def __call__(self, name: str, value: float, step: int, /) -> None:
        """Notes one number."""


def fit(
    tower: SequenceTower,
    draw: Callable[[np.random.Generator], Sequence[Steps]],
    *,
    validate: Callable[[SequenceTower], float],
    observe: Observe = lambda name, value, step: None,
    max_steps: int = 0,
    time_budget_s: float = 0.0,
) -> tuple[list[float], int]:
    """Trains a tower and leaves it in inference mode at the weights of the best validation.

    Under ``torchrun`` every process takes its share of each epoch's batches, and gradients are averaged.

    Args:
        tower: as initialised.
        draw: the sequences of an epoch, always as many; targets may be drawn anew.
        validate: larger is better; called after each epoch with the averaged weights in inference mode.
        observe: where the course of the training goes.
        max_steps: optimizer steps at the most; 0 means no bound.
        time_budget_s: seconds after which no further step begins, and over which the rate falls at the latest; 0 means no bound.

    Returns:
        The validation of each epoch, and the number of optimizer steps.
    """
    config, started = tower.config, time.monotonic()
    average = AveragedModel(tower, multi_avg_fn=_moving_average(config.ema_decay))
    optimizer = torch.optim.AdamW(tower.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    total = step_count(len(draw(np.random.default_rng(config.seed))), config.batch_size, epochs=config.epochs, max_steps=max_steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, total)
    rate, spent = schedule.lr_lambdas[0], 0.0
    schedule.lr_lambdas = [lambda step: rate(max(step, min(spent, 1.0) * total))]
    history, best = list[float](), dict[str, Tensor]()
    tower.train()
    for count, (batch, last) in enumerate(bar(_steps(draw, config), "sequence tower", total), 1):
        observe("train/loss", _step(tower, batch, optimizer=optimizer), count)
        spent = largest((time.monotonic() - started) / time_budget_s) if time_budget_s else 0.0
        schedule.step()
        average.update_parameters(tower)
        ending = count == total or spent > 1.0
        if not (last or ending):
            continue
        averaged = cast("SequenceTower", average.module).eval()
        history.append(validate(averaged))
        observe("validation/ndcg_at_10", history[-1], count)
        if history[-1] > max(history[:-1], default=-math.inf):
            best = copy.deepcopy(averaged.state_dict())
        if ending or len(history) - 1 - int(np.argmax(history)) >= config.patience:
            break
    tower.load_state_dict(best)
    tower.eval()
    return history, count


def step_count(sequence_count: int, batch_size: int, *, epochs: int = 1, max_steps: int = 0) -> int:
    """Returns how many optimizer steps a run may take; ``max_steps`` 0 means no bound."""
    steps = epochs * math.ceil(math.ceil(sequence_count / batch_size) / world_size())
    return min(steps, max_steps) if max_steps else steps


def _moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Returns an exponential moving average whose window grows with the steps taken.

    With a fixed decay of 0.999 the random initial weights would still be 45 % of the average after 800 steps.
    """

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        weight = 1.0 - min(decay, (1.0 + float(count)) / (10.0 + float(count)))
        for left, right in zip(averaged, current, strict=True):
            left.lerp_(right, weight)

    return update


def _step(tower: SequenceTower, sequences: Sequence[Steps], *, optimizer: torch.optim.Optimizer) -> float:
    config, device = tower.config, tower.identity.weight.device
    kept = None
    if config.identity_dropout:
        kept = (torch.rand(len(tower.text), 1, device=device) >= config.identity_dropout).to(torch.float32)
    rows, filled = pad_left([sequence.rows for sequence in sequences], config.max_length)
    targets, _ = pad_left([sequence.targets for sequence in sequences], config.max_length)
    contexts = [sequence.context for sequence in sequences if sequence.context is not None]
    context = pad_left(contexts, config.max_length)[0].to(device) if contexts else None
    loss = next_item_loss(tower, rows.to(device), filled.to(device), targets.to(device), kept=kept, context=context)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    average_gradients(tower.parameters())
    nn.utils.clip_grad_norm_(tower.parameters(), config.clip_norm)
    optimizer.step()
    return float(loss.detach())


def _steps(draw: Callable[[np.random.Generator], Sequence[Steps]], config: SequenceConfig) -> Iterator[tuple[list[Steps], bool]]:
    """Yields this process's share of random batches of similar length, and whether each is the last of its epoch.

    Sorting pools of eight batches by length halves the padding, and mixes still.
    """
    rng, size, world = np.random.default_rng(config.seed), config.batch_size, world_size()
    for _ in range(config.epochs):
        sequences = draw(rng)
        order = rng.permutation(len(sequences))
        pools = [order[start : start + size * _POOL_BATCHES].tolist() for start in range(0, len(order), size * _POOL_BATCHES)]
        batches = [
            pool[start : start + size]
            for pool in (sorted(pool, key=lambda row: len(sequences[row])) for pool in pools)
            for start in range(0, len(pool), size)
        ]
        # Every process takes equally many: one that stopped earlier would leave the others waiting for its gradients.
        mine = np.resize(rng.permutation(len(batches)), math.ceil(len(batches) / world) * world)[rank() :: world]
        for count, place in enumerate(mine, 1):
            yield [sequences[row] for row in batches[place]], count == len(mine)
