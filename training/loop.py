"""The loop that every BERT here is trained in: optimizer, schedule, precision, processes, early stopping and checkpoints."""

import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from training.config import TrainConfig
from training.distributed import any_process, new_accelerator, share_of, world_size
from training.progress import bar
from training.regimes import Regime

Log = Callable[[str, float, int], None]
"""Takes a figure: its name as ``group/name``, its value, the optimizer step."""

# The schedules of transformers count steps; a run here may be bounded by seconds, so they are asked for a share of these.
_SCHEDULE_STEPS = 10_000
_FIRST = 1e-3  # of the run: where the rise of the learning rate begins, lest the first step be wasted at zero
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class Batch(Protocol):
    """What a model takes in one call."""

    def to(self, device: torch.device) -> Self:
        """Returns the batch on another device."""


class Task(Protocol):
    """What is trained, and how one sees whether it got better; its state is what a checkpoint needs beside the weights."""

    @property
    def model(self) -> nn.Module:
        """Takes a batch and returns the mean loss of this process's rows."""

    def groups(self) -> list[dict[str, Any]]:
        """Returns the optimizer's groups of parameters, each with its ``peak`` learning rate."""

    def batch(self, rows: Sequence[int], mine: Sequence[int]) -> Batch:
        """Assembles a batch of ``rows``, of which this process takes those at the places ``mine``."""

    def validate(self) -> float:
        """Returns how good the model is, higher is better; leaves it in the mode it was in."""

    def state_dict(self) -> dict[str, Any]:
        """Returns random generators and whatever else the next batches depend on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned."""


@dataclass(frozen=True)
class Plan:
    """How far a loop goes.

    Attributes:
        rows: how many rows there are to train on.
        steps: optimizer steps at the most.
        every: optimizer steps between validations; 0 means none, and the last weights are kept instead of the best.
        seconds: at the most; 0 means no bound.
        stage: what the progress bar and the figures are called.
        metric: what a validation measures.
    """

    rows: int
    steps: int
    every: int = 0
    seconds: float = 0.0
    stage: str = "train"
    metric: str = ""

    @classmethod
    def of(cls, rows: int, config: TrainConfig, *, metric: str) -> "Plan":
        """Returns the plan of a fine-tuning on so many rows: epochs, steps, seconds and validations as configured."""
        per_epoch = rows // (config.batch_size * config.accumulation_steps) or 1
        steps = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
        every = max(per_epoch // config.validations_per_epoch, 1)
        return cls(rows, steps, every, seconds=config.time_budget_s, metric=metric)


@dataclass
class Progress:
    """How far a loop has come, and the best it has seen; part of every checkpoint.

    Attributes:
        step: optimizer steps taken.
        elapsed: seconds it took, in all sittings.
        first, best: validation before the first step, and the best one.
        worse: validations since the best one.
        losses: mean loss of each step.
        weights: of the best validation, trained parameters only.
    """

    step: int = 0
    elapsed: float = 0.0
    first: float = 0.0
    best: float = 0.0
    worse: int = 0
    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Returns all of it."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` returned."""
        vars(self).update(state)


class Loop:
    """One training of one task. Several processes take their shares of each batch, and one step of them is one of a single process."""

    def __init__(self, task: Task, plan: Plan, *, config: TrainConfig, regime: Regime | None = None, folder: Path | None = None) -> None:
        """Prepares a training.

        Args:
            task: what is trained.
            plan: how far.
            config: optimizer, schedule, precision, checkpoints.
            regime: told of every step, for AdaLoRA; None leaves ranks as they are.
            folder: where checkpoints go, and come from when it holds any; None means none.

        Raises:
            ValueError: there are more processes than rows in a batch; or device or precision are not to be had.
        """
        if plan.rows < world_size() or config.batch_size < world_size():
            raise ValueError(f"{world_size()} processes cannot share {plan.rows} rows in batches of {config.batch_size}")
        self.task, self.plan, self.config, self.regime = task, plan, config, regime
        self._folder = folder if config.checkpoint_steps else None
        self.accelerator = new_accelerator(config)
        self.model, self.optimizer = self.accelerator.prepare(task.model, make_optimizer(task.groups(), config))
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress, task, *([regime] if regime else []))
        self._scale = learning_rate_scale(config)

    def run(self, log: Log | None = None) -> Progress:
        """Trains until steps, seconds or patience are used up; leaves the best weights in the model, on the processor."""
        plan, progress = self.plan, self.progress
        resumed = self._load()
        started = time.monotonic() - progress.elapsed
        if plan.every and not resumed:
            progress.first = progress.best = self.task.validate()
            progress.weights = self._trained()
            if log:
                log(f"validation/{plan.metric}", progress.first, 0)
        self.model.train()
        batches = itertools.islice(self._batches(), progress.step * self.config.accumulation_steps, None)
        validated = progress.step
        for _ in bar(range(progress.step, plan.steps), plan.stage):
            progress.elapsed = time.monotonic() - started
            done = max(progress.step / plan.steps, progress.elapsed / plan.seconds if plan.seconds else 0.0)
            if any_process(done >= 1.0):
                break
            self._step_and_log(list(itertools.islice(batches, self.config.accumulation_steps)), done, log)
            if plan.every and progress.step % plan.every == 0 and progress.step < plan.steps:
                validated = self._validate(log)
                if progress.worse >= self.config.patience:
                    break
            if self._folder and progress.step % self.config.checkpoint_steps == 0:
                self._save(self._folder)
        if plan.every and validated != progress.step:
            self._validate(log)
        progress.elapsed = time.monotonic() - started
        self._finish()
        return progress

    def step(self, batches: Sequence[Sequence[int]], done: float) -> float:
        """Takes one optimizer step on some batches of rows; ``done`` is the share of the run behind it. Returns their mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._scale(done)
        losses = []
        for rows in batches:
            mine = share_of(len(rows))
            with self.accelerator.accumulate(self.model):
                # Mean over processes = mean over rows, also when the shares differ by one.
                loss = self.model(self.task.batch(rows, mine).to(self.accelerator.device)) * (len(mine) * world_size() / len(rows))
                losses.append(self.accelerator.reduce(loss.detach(), "mean"))
                self.accelerator.backward(loss + (self.regime.penalty() if self.regime else 0.0))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
                self.optimizer.step()
                if self.regime and self.accelerator.sync_gradients:
                    self.regime.after_step(min(done + 1.0 / self.plan.steps, 1.0))
                self.optimizer.zero_grad()
        return float(torch.stack(losses).mean())

    def _step_and_log(self, batches: Sequence[Sequence[int]], done: float, log: Log | None) -> None:
        loss = self.step(batches, done)
        self.progress.step += 1
        self.progress.losses.append(loss)
        if log:
            log(f"{self.plan.stage}/loss", loss, self.progress.step)

    def _validate(self, log: Log | None) -> int:
        """Validates, keeps the weights when they are the best so far, and returns the step."""
        progress, score = self.progress, self.task.validate()
        if log:
            log(f"validation/{self.plan.metric}", score, progress.step)
        progress.worse += 1
        if score > progress.best:
            progress.best, progress.worse, progress.weights = score, 0, self._trained()
        return progress.step

    def _trained(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.task.model.named_parameters() if value.requires_grad}

    def _finish(self) -> None:
        """Takes off what was put round the model, so that another loop or an export finds it as it was."""
        with torch.no_grad():
            for name, value in self.task.model.named_parameters():
                if name in self.progress.weights:
                    value.copy_(self.progress.weights[name])
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        vars(self.task.model).pop("_is_accelerate_prepared", None)  # or the next loop would leave it without processes and precision
        del self.model, self.optimizer
        self.task.model.cpu().eval()

    def _batches(self) -> Iterator[list[int]]:
        """Yields the rows of each batch, epoch after epoch; every process shuffles alike."""
        shuffle, size = np.random.default_rng(self.config.seed), self.config.batch_size
        while True:
            order = shuffle.permutation(self.plan.rows)
            for start in range(0, max(len(order) - size + 1, 1), size):
                yield order[start : start + size].tolist()

    def _save(self, folder: Path) -> None:
        """Writes a checkpoint beside the last one and then puts it in its place: a kill leaves the one or the other."""
        unfinished, finished = folder / "unfinished", folder / f"step-{self.progress.step:08d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            unfinished.rename(finished)
            for older in folder.glob("step-*"):
                if older != finished:
                    shutil.rmtree(older)

    def _load(self) -> bool:
        """Goes on from the newest checkpoint; returns whether there was one."""
        found = sorted(self._folder.glob("step-*")) if self._folder else []
        if found:
            self.accelerator.load_state(str(found[-1]))
        return bool(found)


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """Returns the configured optimizer; its rates are set at every step."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def learning_rate_scale(config: TrainConfig) -> Callable[[float], float]:
    """Returns the schedule: the share of the run that is done → the share of the peak learning rate."""
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the schedules of transformers come with an optimizer only
    rise = round(config.warmup_fraction * _SCHEDULE_STEPS)
    (curve,) = get_scheduler(_SCHEDULES[config.schedule], unused, num_warmup_steps=rise, num_training_steps=_SCHEDULE_STEPS).lr_lambdas

    def scale(done: float) -> float:
        share = min(done + _FIRST, config.warmup_fraction) if done < config.warmup_fraction else done
        return float(curve(share * _SCHEDULE_STEPS))

    return scale


def decayed(modules: Sequence[nn.Module], *, peak: float, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the groups of what is trainable in some modules: matrices with weight decay, biases and norms without."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "peak": peak, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "peak": peak, "weight_decay": 0.0},
    ]
