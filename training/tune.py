"""Hyper-parameter search: Optuna trials of the tower, judged on its validation labels, pruned early, kept in SQLite to go on later."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.trial import FrozenTrial, TrialState

from features.settings import Settings
from training.checkpoint import new_tower
from training.config import TrainConfig
from training.dataset import join_customers, open_shop, split_of
from training.distill import TowerData
from training.labels import choose_labels, keys_of
from training.progress import bar, quiet
from training.run import prepare_torch, tower_data
from training.space import Space
from training.text import load_tokenizer
from training.tracking import open_trackers
from training.train import Trainer

DEFAULT_SPACE = (
    "learning_rate=1e-5:3e-4:log",
    "head_learning_rate=1e-4:1e-2:log",
    "temperature=0.02:0.2:log",
    "dropout=0:0.3",
    "residual_decay=0.01:1:log",
    "negative_power=0:1",
    "negative_count=128,256,512,1024",
)
PRUNERS = ("median", "hyperband", "none")
# Trials that run to their end before any is cut off; with fewer the median says little.
_STARTUP_TRIALS = 4
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Search:
    """What to search, and for how long.

    Attributes:
        study: name of the study; one that exists goes on.
        trials: trials the study shall have in all, pruned ones included.
        timeout_s: seconds after which no further trial begins; 0 means no bound.
        pruner: one of ``PRUNERS``.
    """

    study: str
    trials: int
    timeout_s: float = 0.0
    pruner: str = "median"


@dataclass(frozen=True)
class TuneResult:
    """The study so far: its folder, the best configuration and its validation NDCG@10, and all trials."""

    folder: Path
    best: TrainConfig
    ndcg_at_10: float
    trials: tuple[FrozenTrial, ...]


class StudyMismatchError(Exception):
    """A study of this name was made on other data or another configuration; its trials cannot be compared with new ones."""


def tune(settings: Settings, base: TrainConfig, space: Space, search: Search) -> TuneResult:
    """Searches fields of the tower's configuration for the best validation NDCG@10; the holdout is never looked at.

    The folder ``<data_dir>/studies/<study>`` gets ``study.db``, ``best.json`` (a configuration) and ``history.png``.

    Raises:
        TrainingDataError: there is nothing to train on.
        StudyMismatchError: the study was made on other data or another configuration.
    """
    prepare_torch(base)
    shop = open_shop(settings)
    split = split_of(shop.log, base)
    labels = choose_labels(shop.log, split, base)
    customers = join_customers(shop.store, keys_of([*labels.tower, *labels.validation]))

    def prepare(config: TrainConfig) -> TowerData:
        return tower_data(shop, labels, customers, config=config, tokenizer=load_tokenizer(config.base_model), until=split.ranker_start)

    folder = settings.data_dir / "studies" / search.study
    folder.mkdir(parents=True, exist_ok=True)
    made_on = {"labels": len(labels.tower), "validation": len(labels.validation), "cut": split.cut, "config": base.record()}
    study = open_study(folder, search, base=base, made_on=made_on)
    if not study.trials:
        study.enqueue_trial(space.inside(base))  # the search can then only improve on what there was
    run_trials(study, objective_of(base, space, prepare, folder), search)
    return finish(study, folder, base)


def open_study(folder: Path, search: Search, *, base: TrainConfig, made_on: dict[str, Any]) -> optuna.Study:
    """Opens or creates the study; what a killed process left running counts as failed after two minutes without a heartbeat.

    Raises:
        StudyMismatchError: it was made on something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the table at the end says it, and the bars stay whole
    with quiet():  # it warns that heartbeats are experimental
        storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}", heartbeat_interval=60)
    study = optuna.create_study(
        storage=storage, study_name=search.study, direction="maximize", load_if_exists=True, pruner=_pruner(search, base)
    )
    # Another seed for every continuation: the same one would draw the first trials again.
    study.sampler = optuna.samplers.TPESampler(seed=base.seed + len(study.trials))
    before = study.user_attrs.get("made_on", made_on)
    if different := [name for name, value in made_on.items() if before[name] != value]:
        raise StudyMismatchError(f"the study {search.study!r} was made with other {', '.join(different)}; name another")
    study.set_user_attr("made_on", made_on)
    return study


def _pruner(search: Search, base: TrainConfig) -> BasePruner:
    if search.pruner == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=base.epochs * base.validations_per_epoch)
    return MedianPruner(n_startup_trials=_STARTUP_TRIALS) if search.pruner == "median" else NopPruner()


def objective_of(
    base: TrainConfig, space: Space, prepare: Callable[[TrainConfig], TowerData], folder: Path
) -> Callable[[optuna.Trial], float]:
    """Returns what a trial does: train a tower and return its best validation NDCG@10, reporting each validation on the way."""

    def objective(trial: optuna.Trial) -> float:
        config = replace(base, **space.suggest(trial, base))
        prepare_torch(config)
        data, seen = prepare(config), 0
        tower = new_tower(config, len(data.items))

        def told(_step: int, score: float) -> None:
            # Numbered, not counted in steps: the k-th validation follows the same share of the labels at any batch size.
            nonlocal seen
            seen += 1
            trial.report(score, seen)
            if trial.should_prune():
                raise optuna.TrialPruned

        trainer = Trainer(tower, data.items, train=data.train, validation=data.validation, config=config)
        with open_trackers(("tensorboard",), folder / f"trial{trial.number}") as tracker:
            return trainer.run(tracker, told).ndcg_at_10

    return objective


def run_trials(study: optuna.Study, objective: Callable[[optuna.Trial], float], search: Search) -> None:
    """Runs trials one after the other until the study has enough of them or the time is up."""
    started = time.monotonic()
    for _ in bar(range(search.trials - _finished(study)), "trials"):
        late = search.timeout_s and time.monotonic() - started > search.timeout_s
        if late or _finished(study) >= search.trials:  # another process may work on the same study
            break
        study.optimize(objective, n_trials=1)


def finish(study: optuna.Study, folder: Path, base: TrainConfig) -> TuneResult:
    """Writes the best configuration and the plot."""
    best = replace(base, **study.best_params)
    best.save(folder / "best.json")
    plot(study, folder / "history.png")
    return TuneResult(folder, best, study.best_value, tuple(study.trials))


def plot(study: optuna.Study, path: Path) -> None:
    """Draws every trial's NDCG@10 with the best so far, and the validations of each trial."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    history, curves = figure.subplots(1, 2, sharey=True)
    done = [trial for trial in study.trials if trial.state in _FINISHED and trial.value is not None]
    for state, mark, colour in ((TrialState.COMPLETE, "o", "tab:blue"), (TrialState.PRUNED, "x", "tab:grey")):
        chosen = [trial for trial in done if trial.state is state]
        history.scatter([t.number for t in chosen], [t.value for t in chosen], marker=mark, c=colour, label=state.name.lower())
    complete = [trial for trial in done if trial.state is TrialState.COMPLETE]
    best = [max(t.value or 0.0 for t in complete[: k + 1]) for k in range(len(complete))]
    history.step([t.number for t in complete], best, where="post", c="tab:red", label="best so far")
    history.set(xlabel="trial", ylabel="validation NDCG@10", title=study.study_name)
    history.legend()
    for trial in done:
        values = trial.intermediate_values
        curves.plot(list(values), list(values.values()), c="tab:blue" if trial in complete else "tab:grey", alpha=0.6)
    curves.set(xlabel="validation", title="on the way")
    figure.savefig(path, dpi=110)


def _finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=_FINISHED))
