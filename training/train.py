"""Fine-tunes the two-tower model on visit labels; under ``torchrun`` every process reads its share of each batch."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from features.item_table import FloatArray
from training.config import TrainConfig
from training.dataset import TrainingDataError
from training.encode import pools
from training.labels import Label
from training.loop import Loop, Plan, decayed
from training.metrics import best_rows, ndcg
from training.model import Batch, TwoTower
from training.negatives import NegativeSampler
from training.on_sale import OnSale
from training.progress import quiet
from training.regimes import Regime
from training.text import Tokens
from training.tracking import Tracker


@dataclass(frozen=True)
class TowerSet:
    """Labels with the tokens of their customers' behaviour texts, row by row; None for ``on_sale`` means everything, always."""

    labels: Sequence[Label]
    tokens: Tokens
    on_sale: OnSale | None = None


@dataclass(frozen=True)
class TowerReport:
    """How the fine-tuning went: optimizer steps, seconds, the best validation NDCG@10 and the one before training, each step's loss."""

    steps: int
    seconds: float
    ndcg_at_10: float
    untrained_ndcg_at_10: float
    losses: tuple[float, ...] = ()


class Trainer:
    """One fine-tuning run over fixed labels: the task of a loop."""

    def __init__(
        self,
        tower: TwoTower,
        items: Tokens,
        *,
        train: TowerSet,
        validation: TowerSet,
        config: TrainConfig,
        regime: Regime | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """Prepares a run.

        Args:
            tower: changed in place; on one device, and on the processor again after the run.
            items: tokens of all items, by row.
            train: what to learn.
            validation: what to choose the best weights by.
            config: how.
            regime: of the tower's encoder when a warm-up has chosen it already; by default the configured one.
            checkpoints: folder of checkpoints, gone on from when it holds any; None keeps none.
        """
        self.tower, self.items, self.train, self.validation, self.config = tower, items, train, validation, config
        self.rng = np.random.default_rng([config.seed, 0])
        self.sampler = NegativeSampler(train.labels, train.on_sale or OnSale.always(len(items)), config, self.rng)
        self.pools = torch.zeros(len(items), tower.vector_size)
        self.regime = regime or Regime(tower.encoder, config.regime or "top_k", config)
        tower.warm[[row for label in train.labels for row in label.items]] = 1.0
        plan = Plan.of(len(train.labels), config, metric="ndcg_at_10")
        self.loop = Loop(self, plan, config=config, regime=self.regime, folder=checkpoints)

    @property
    def model(self) -> TwoTower:
        """The tower."""
        return self.tower

    def run(self, tracker: Tracker | None = None, on_validation: Callable[[int, float], None] | None = None) -> TowerReport:
        """Trains until the epochs, steps, seconds or patience are used up, and leaves the best weights, merged, in the tower.

        ``tracker`` follows losses and validations. ``on_validation`` is told the step and the NDCG@10 of every validation after the
        first step; what it raises ends the training.

        Raises:
            TrainingDataError: a checkpoint to go on from was made on other labels or items.
        """
        with quiet():

            def log(name: str, value: float, step: int) -> None:
                if tracker:
                    tracker.scalar(name, value, step)
                if on_validation and step and name == "validation/ndcg_at_10":
                    on_validation(step, value)

            progress = self.loop.run(log)
        self.regime.merge()
        return TowerReport(progress.step, progress.elapsed, progress.best, progress.first, tuple(progress.losses))

    def groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups: no decay on the heads, which would pull them off the identity they start as."""
        tower, config = self.tower, self.config
        heads = [*tower.user_head.parameters(), *tower.item_head.parameters(), tower.log_temperature]
        return [
            *decayed([tower.encoder], peak=config.learning_rate, weight_decay=config.weight_decay),
            {"params": heads, "peak": config.head_learning_rate, "weight_decay": 0.0},
            {"params": [tower.residual.weight], "peak": config.head_learning_rate, "weight_decay": config.residual_decay},
        ]

    def batch(self, rows: Sequence[int], mine: Sequence[int] | None = None) -> Batch:
        """Assembles the step of some labels: one random target each, and what competes with it.

        Every process draws the same for all labels, and takes the texts of those at the places ``mine``; None means all.
        """
        own = range(len(rows)) if mine is None else mine
        labels = [self.train.labels[row] for row in rows]
        targets = np.array([self.rng.choice(label.items) for label in labels], np.int64)
        drawn = self.sampler.draw(labels, targets)
        return Batch(
            *self.train.tokens.pad([rows[place] for place in own]),
            *self.items.pad(targets[list(own)]),
            torch.from_numpy(drawn.rows),
            self.pools[drawn.rows[len(rows) :]],
            torch.from_numpy(drawn.log_q[list(own)]),
            torch.from_numpy(drawn.wrong[list(own)]),
            own,
        )

    def validate(self) -> float:
        """Refreshes the pooled item texts and returns NDCG@10 of the tower alone on the validation labels."""
        tower = self.tower
        self.pools = pools(tower, self.items, "refresh item vectors").clone()
        with torch.inference_mode():
            items = tower.item_vector(self.pools.to(tower.device), torch.arange(len(self.items), device=tower.device))
            users = tower.user_vector(pools(tower, self.validation.tokens, "validation").to(tower.device))
        return mean_ndcg(users.cpu().numpy(), items.cpu().numpy(), self.validation.labels)

    def state_dict(self) -> dict[str, Any]:
        """Returns the random generator, the pooled item texts and a mark of the data, for a checkpoint."""
        return {"rng": self.rng.bit_generator.state, "pools": self.pools, "data": self._mark()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            TrainingDataError: it was made on other labels or items.
        """
        if state["data"] != self._mark():
            raise TrainingDataError("its events before the cut or its items have changed since this run began; begin a new one")
        self.rng.bit_generator.state = state["rng"]
        self.pools = state["pools"]

    def _mark(self) -> str:
        """Returns a digest of everything that the steps read."""
        labels = [(label.user_id, label.time, label.items, sorted(label.bought)) for label in self.train.labels]
        return hashlib.sha256(repr((labels, self.train.tokens.ids, self.validation.tokens.ids, self.items.ids)).encode()).hexdigest()


def mean_ndcg(users: FloatArray, items: FloatArray, labels: Sequence[Label]) -> float:
    """Returns the mean NDCG@10 of ranking all items the customer has not bought by the product of vectors; 0 without labels."""
    scores = []
    for vector, label in zip(users, labels, strict=True):
        allowed = np.ones(len(items), np.bool_)
        allowed[list(label.bought)] = False
        scores.append(ndcg(best_rows(items @ vector, allowed, 10), set(label.items)))
    return float(np.mean(scores)) if scores else 0.0
