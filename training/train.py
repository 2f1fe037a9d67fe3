"""Fine-tunes the two-tower model on visit labels; under ``torchrun`` every process takes its share of each epoch."""

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from features.item_table import FloatArray
from training.config import TrainConfig
from training.distributed import any_process, world_size
from training.encode import pools
from training.labels import Label
from training.metrics import best_rows, ndcg
from training.model import Batch, TwoTower, freeze_below
from training.progress import bar, quiet
from training.text import Tokens


@dataclass(frozen=True)
class TowerSet:
    """Labels with the tokens of their customers' behaviour texts, row by row."""

    labels: Sequence[Label]
    tokens: Tokens


@dataclass(frozen=True)
class TowerReport:
    """How the fine-tuning went: optimizer steps, seconds, the best validation NDCG@10 and the one before training."""

    steps: int
    seconds: float
    ndcg_at_10: float
    untrained_ndcg_at_10: float


class Sampler:
    """Draws negatives and knows how often any item is to be expected in a step's pool."""

    def __init__(self, labels: Sequence[Label], item_count: int, config: TrainConfig, rng: np.random.Generator) -> None:
        counts = np.bincount([row for label in labels for row in label.items], minlength=item_count).astype(np.float64)
        weights = (counts + 1.0) ** config.negative_power
        self._probability = weights / weights.sum()
        in_batch = config.batch_size * counts / max(counts.sum(), 1.0)
        self.log_q = np.log(in_batch + config.negative_count * self._probability).astype(np.float32)
        self._count, self._rng = config.negative_count, rng

    def negatives(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Returns rows of sampled items, drawn with replacement."""
        return self._rng.choice(len(self._probability), self._count, p=self._probability)


class Trainer:
    """One fine-tuning run over fixed labels."""

    def __init__(self, tower: TwoTower, items: Tokens, *, train: TowerSet, validation: TowerSet, config: TrainConfig) -> None:
        self.tower, self.items, self.train, self.validation, self.config = tower, items, train, validation, config
        self.rank, self.world = int(os.environ.get("RANK", 0)), world_size()
        self.rng = np.random.default_rng([config.seed, self.rank])
        self.sampler = Sampler(train.labels, len(items), config, self.rng)
        self.pools = torch.zeros(len(items), tower.vector_size)
        freeze_below(tower, config.trainable_layers)
        tower.warm[[row for label in train.labels for row in label.items]] = 1.0
        self.model: nn.Module = tower
        if self.world > 1:
            self.model = nn.parallel.DistributedDataParallel(tower)
        self._on_validation: Callable[[int, float], None] | None = None
        self.optimizer = torch.optim.AdamW(_parameter_groups(tower, config))

    def run(self, log_dir: Path, on_validation: Callable[[int, float], None] | None = None) -> TowerReport:
        """Trains until the epochs, steps, seconds or patience are used up, and leaves the best weights in the tower.

        ``on_validation`` is told the step and the NDCG@10 of every validation; what it raises ends the training.
        """
        self._on_validation = on_validation
        with quiet(), _summary_writer(log_dir, active=self.rank == 0) as writer:
            return self._run(writer)

    def _run(self, writer: Any) -> TowerReport:
        config, started = self.config, time.monotonic()
        per_epoch = len(self.train.labels) // (config.batch_size * self.world) or 1
        total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
        every = max(per_epoch // config.validations_per_epoch, 1)
        untrained = best = self.validate()
        weights, worse, step = copy.deepcopy(self.tower.state_dict()), 0, 0
        self.tower.train()
        for rows in bar(self._steps(total), "fine-tuning", total):
            elapsed = time.monotonic() - started
            done = max(step / total, elapsed / config.time_budget_s if config.time_budget_s else 0.0)
            if any_process(done >= 1.0):
                break
            loss = self.step(rows, done)
            step += 1
            if writer:
                writer.add_scalar("train/loss", loss, step)
            if step % every == 0 and step < total:
                weights, best, worse = self._keep_better(weights, best, worse, writer=writer, step=step)
                if worse >= config.patience:
                    break
        weights, best, _ = self._keep_better(weights, best, worse, writer=writer, step=step)
        self.tower.load_state_dict(weights)
        self.tower.eval()
        return TowerReport(step, time.monotonic() - started, best, untrained)

    def step(self, rows: Sequence[int], done: float) -> float:
        """Takes one optimizer step on some labels; ``done`` is the share of the run behind it. Returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(done, self.config.warmup_fraction)
        loss = self.model(self.batch(rows))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.tower.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return float(loss.detach())

    def batch(self, rows: Sequence[int]) -> Batch:
        """Assembles the step of some labels: one random target each, and the sampled negatives."""
        labels = [self.train.labels[row] for row in rows]
        targets = np.array([self.rng.choice(label.items) for label in labels], np.int64)
        negatives = self.sampler.negatives()
        pool = np.concatenate([targets, negatives])
        wrong = np.array([[row in label.bought or row in label.items for row in pool.tolist()] for label in labels])
        np.fill_diagonal(wrong, False)
        return Batch(
            *self.train.tokens.pad(rows),
            *self.items.pad(targets),
            torch.from_numpy(pool),
            self.pools[negatives],
            torch.from_numpy(self.sampler.log_q[pool]),
            torch.from_numpy(wrong),
        )

    def validate(self) -> float:
        """Refreshes the pooled item texts and returns NDCG@10 of the tower alone on the validation labels."""
        self.pools = pools(self.tower, self.items, "refresh item vectors").clone()
        with torch.inference_mode():
            items = self.tower.item_vector(self.pools, torch.arange(len(self.items))).numpy()
            users = self.tower.user_vector(pools(self.tower, self.validation.tokens, "validation")).numpy()
        return mean_ndcg(users, items, self.validation.labels)

    def _keep_better(self, weights: Any, best: float, worse: int, *, writer: Any, step: int) -> tuple[Any, float, int]:
        score = self.validate()
        if writer:
            writer.add_scalar("validation/ndcg_at_10", score, step)
        if self._on_validation:
            self._on_validation(step, score)
        return (copy.deepcopy(self.tower.state_dict()), score, 0) if score > best else (weights, best, worse + 1)

    def _steps(self, total: int) -> Iterator[Sequence[int]]:
        """Yields rows of labels per step; every process shuffles alike and takes its share."""
        shuffle = np.random.default_rng(self.config.seed)
        size, taken = self.config.batch_size, 0
        while taken < total:
            order = shuffle.permutation(len(self.train.labels))[self.rank :: self.world]
            for start in range(0, max(len(order) - size + 1, 1), size):
                yield order[start : start + size].tolist()
                taken += 1
                if taken == total:
                    return


def mean_ndcg(users: FloatArray, items: FloatArray, labels: Sequence[Label]) -> float:
    """Returns the mean NDCG@10 of ranking all items the customer has not bought by the product of vectors; 0 without labels."""
    scores = []
    for vector, label in zip(users, labels, strict=True):
        allowed = np.ones(len(items), np.bool_)
        allowed[list(label.bought)] = False
        scores.append(ndcg(best_rows(items @ vector, allowed, 10), set(label.items)))
    return float(np.mean(scores)) if scores else 0.0


def _parameter_groups(tower: TwoTower, config: TrainConfig) -> list[dict[str, Any]]:
    encoder = [p for p in tower.encoder.parameters() if p.requires_grad]
    heads = [*tower.user_head.parameters(), *tower.item_head.parameters()]
    # No weight decay on the heads (it would pull them off the identity they start as), nor on biases and norms.
    return [
        {"params": [p for p in encoder if p.ndim > 1], "peak": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": [p for p in encoder if p.ndim <= 1], "peak": config.learning_rate, "weight_decay": 0.0},
        {"params": [*heads, tower.log_temperature], "peak": config.head_learning_rate, "weight_decay": 0.0},
        {"params": [tower.residual.weight], "peak": config.head_learning_rate, "weight_decay": config.residual_decay},
    ]


def _schedule(done: float, warmup: float) -> float:
    return min((done + 1e-3) / warmup, 1.0) if done < warmup else max((1.0 - done) / (1.0 - warmup), 0.0)


def _summary_writer(log_dir: Path, *, active: bool) -> AbstractContextManager[Any]:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(log_dir)) if active else nullcontext()
