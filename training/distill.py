"""Trains one tower, several that are averaged, or one that learns to answer like several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from training.checkpoint import new_tower
from training.config import TrainConfig
from training.encode import pools
from training.ensemble import Ensemble
from training.model import Batch, Tower, TwoTower
from training.regimes import Regime
from training.text import Tokens, load_tokenizer
from training.tracking import Prefixed, Tracker
from training.train import TowerReport, TowerSet, Trainer, mean_ndcg


class TokenizerMismatchError(Exception):
    """The base models of an ensemble do not share a tokenizer, and a bundle has one; the message names the model."""


@dataclass(frozen=True)
class TowerData:
    """What towers learn from: the items' texts, the labels to train on and those to validate on."""

    items: Tokens
    train: TowerSet
    validation: TowerSet


class Distiller(Trainer):
    """Trains a student on the labels and on the softmax that a teacher puts over each step's items.

    The teacher reads every text once, before the first step: it does not change, and neither do the texts.
    """

    def __init__(
        self,
        student: TwoTower,
        teacher: Ensemble,
        data: TowerData,
        config: TrainConfig,
        *,
        regime: Regime | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """Prepares a run; see ``Trainer``. ``config.distil_weight`` is the teacher's share of the loss."""
        super().__init__(
            student,
            data.items,
            train=data.train,
            validation=data.validation,
            config=config,
            regime=regime,
            checkpoints=checkpoints,
        )
        with torch.inference_mode():
            users = teacher.logits_user(pools(teacher, data.train.tokens, "teacher: customers"))
            items = teacher.item_vector(pools(teacher, data.items, "teacher: items"), torch.arange(len(data.items)))
        # Out of inference mode: what takes part in a backward pass may not be an inference tensor.
        self._users, self._items = users.clone(), items.clone()

    def batch(self, rows: Sequence[int], mine: Sequence[int] | None = None) -> Batch:
        """Assembles a step as ever, with the teacher's logits over its pool; both softmaxes are corrected by log q alike."""
        made = super().batch(rows, mine)
        own = [rows[place] for place in made.mine]
        logits = self._users[own] @ self._items[made.item_rows].T - made.log_q
        return replace(made, teacher=logits, teacher_weight=self.config.distil_weight)


@dataclass(frozen=True)
class Places:
    """Where trainings leave what they write: who follows them, and the folder of checkpoints by the tower's name, None for none."""

    tracker: Tracker
    checkpoints: Callable[[str], Path] | None = None

    def of(self, name: str) -> Path | None:
        """Returns the folder of a tower's checkpoints."""
        return self.checkpoints(name) if self.checkpoints else None


Prepare = Callable[[TwoTower, TrainConfig, str], Regime]
"""Chooses what of a tower is trained, given its configuration and name, and may warm it up."""


def chosen_regime(tower: TwoTower, config: TrainConfig, _name: str) -> Regime:
    """Returns the configured regime, without a warm-up."""
    return Regime(tower.encoder, config.regime or "top_k", config)


def train_towers(
    data: TowerData, config: TrainConfig, places: Places, prepare: Prepare = chosen_regime, *, start: Tower | None = None
) -> tuple[Tower, TowerReport, dict[str, float]]:
    """Trains what the configuration asks for: one tower, an ensemble, or an ensemble distilled into one tower.

    With ``start``, one tower or an ensemble goes on from its weights, in place.

    Returns:
        The model, how its training went (steps and seconds of all towers), and the validation NDCG@10 of the towers behind it:
        ``tower_<k>_validation_ndcg_at_10``, ``ensemble_validation_ndcg_at_10``; empty where there is one tower.

    Raises:
        TokenizerMismatchError: the base models of an ensemble do not share a tokenizer.
    """
    begun = start.members if isinstance(start, Ensemble) else [start] if isinstance(start, TwoTower) else []
    if config.ensemble == 1:
        tower = begun[0] if begun else new_tower(config, len(data.items))
        return tower, _train(tower, data, config, places=places, prepare=prepare, name="tower"), {}
    _check_tokenizers(config)
    towers, reports = [], []
    for number in range(config.ensemble):
        member = config.member(number)
        towers.append(begun[number] if begun else new_tower(member, len(data.items)))
        reports.append(_train(towers[-1], data, member, places=places, prepare=prepare, name=f"tower{number}"))
    ensemble = Ensemble(towers).eval()
    figures = {f"tower_{k}_validation_ndcg_at_10": report.ndcg_at_10 for k, report in enumerate(reports)}
    figures["ensemble_validation_ndcg_at_10"] = validate(ensemble, data)
    report = _sum(reports, figures["ensemble_validation_ndcg_at_10"])
    if not config.distil_weight:
        return ensemble, report, figures
    student = new_tower(config, len(data.items))
    taught = _train(student, data, config, places=places, prepare=prepare, name="student", teacher=ensemble)
    return student, _sum([*reports, taught], taught.ndcg_at_10), figures


def _train(
    tower: TwoTower, data: TowerData, config: TrainConfig, *, places: Places, prepare: Prepare, name: str, teacher: Ensemble | None = None
) -> TowerReport:
    regime = prepare(tower, config, name)
    if teacher is None:
        trainer = Trainer(
            tower,
            data.items,
            train=data.train,
            validation=data.validation,
            config=config,
            regime=regime,
            checkpoints=places.of(name),
        )
    else:
        trainer = Distiller(tower, teacher, data, config, regime=regime, checkpoints=places.of(name))
    return trainer.run(places.tracker if name == "tower" else Prefixed(places.tracker, name))


@torch.inference_mode()
def validate(tower: Tower, data: TowerData) -> float:
    """Returns NDCG@10 of a tower alone on the validation labels."""
    items = tower.item_vector(pools(tower, data.items, "item vectors"), torch.arange(len(data.items))).numpy()
    users = tower.user_vector(pools(tower, data.validation.tokens, "validation")).numpy()
    return mean_ndcg(users, items, data.validation.labels)


def _sum(reports: Sequence[TowerReport], ndcg: float) -> TowerReport:
    seconds, untrained = sum(report.seconds for report in reports), reports[0].untrained_ndcg_at_10
    return TowerReport(sum(report.steps for report in reports), seconds, ndcg, untrained)


def _check_tokenizers(config: TrainConfig) -> None:
    own = load_tokenizer(config.base_model).to_str()
    for model in {config.member(number).base_model for number in range(config.ensemble)}:
        if load_tokenizer(model).to_str() != own:
            raise TokenizerMismatchError(f"training field 'ensemble_models': {model!r} reads other tokens than {config.base_model!r}")
