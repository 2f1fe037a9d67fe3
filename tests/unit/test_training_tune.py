"""Hyper-parameter search: what a space may say, that trials prune and resume, and what a study leaves behind."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.unit.training_shop import tower_data
from training.config import TrainConfig
from training.distill import TowerData
from training.progress import quiet
from training.space import Choices, Space, Span
from training.tune import DEFAULT_SPACE, Search, StudyMismatchError, finish, objective_of, open_study, run_trials

CONFIG = replace(TrainConfig.tiny(), threads=1, max_steps=0, patience=99, dropout=0.0, negative_count=8)
MADE_ON = {"labels": 3, "config": {"seed": 1}}


def opened(folder: Path, search: Search, **made_on: object) -> optuna.Study:
    return open_study(folder, search, base=CONFIG, made_on=MADE_ON | made_on)


def test_a_space_is_read_from_text() -> None:
    base = TrainConfig()
    space = Space.parse(["learning_rate=1e-5:1e-4:log", "batch_size=16:64", "trainable_layers=0,2,-1"], base)
    assert space.fields["learning_rate"] == Span(1e-5, 1e-4, True)
    assert space.fields["batch_size"] == Span(16, 64, False)
    assert space.fields["trainable_layers"] == Choices((0, 2, -1))
    assert space.inside(base) == {"learning_rate": 5e-5, "batch_size": 32, "trainable_layers": 2}
    assert space.inside(replace(base, learning_rate=1.0, trainable_layers=5)) == {"batch_size": 32}
    assert set(Space.parse(DEFAULT_SPACE, base).inside(base)) == {text.split("=")[0] for text in DEFAULT_SPACE}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate", "neither"),
        ("learning_rat=1:2", "unknown training field 'learning_rat'"),
        ("learning_rate=2:1", "empty range"),
        ("learning_rate=0:1:log", "by logarithm"),
        ("learning_rate=1:2:lin", "no range"),
        ("base_model=a:b", "no range"),
        ("batch_size=1.5:3", "not of type int"),
        ("dropout=0:2", "dropout"),
        ("cut=2011-01-01,2011-02-01", "cannot be searched"),
        ("validation_labels=10:20", "cannot be searched"),
        ("ranker_hidden=16:64", "cannot be searched"),
    ],
)
def test_what_cannot_be_searched_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space.parse([text], TrainConfig())


def test_values_are_drawn_of_the_fields_own_type() -> None:
    space = Space.parse(["learning_rate=1e-5:1e-4:log", "batch_size=16:64", "negative_count=1,2"], CONFIG)
    drawn = [space.suggest(trial, CONFIG) for trial in (optuna.create_study().ask() for _ in range(20))]
    assert {type(one["batch_size"]) for one in drawn} == {int}
    assert all(1e-5 <= one["learning_rate"] <= 1e-4 and one["negative_count"] in (1, 2) for one in drawn)
    assert len({one["learning_rate"] for one in drawn}) > 10


def test_trials_train_towers_and_the_best_is_kept(tmp_path: Path) -> None:
    data = tower_data(CONFIG, customers=5)
    base = replace(CONFIG, epochs=2, batch_size=8, validations_per_epoch=2, head_learning_rate=1e-6, learning_rate=1e-7)
    space = Space.parse(["head_learning_rate=1e-6,3e-2"], base)
    search = Search("first", trials=3, pruner="none")
    study = opened(tmp_path, search)
    study.enqueue_trial(space.inside(base))
    study.enqueue_trial({"head_learning_rate": 3e-2})
    prepared: list[TrainConfig] = []

    def prepare(config: TrainConfig) -> TowerData:
        prepared.append(config)
        return data

    run_trials(study, objective_of(base, space, prepare, tmp_path), search)
    result = finish(study, tmp_path, base)
    assert [config.head_learning_rate for config in prepared[:2]] == [1e-6, 3e-2]
    assert len(result.trials) == 3
    assert result.best == replace(base, head_learning_rate=3e-2) == TrainConfig.load(tmp_path / "best.json")
    assert result.ndcg_at_10 == study.trials[1].value > study.trials[0].value
    assert len(study.trials[0].intermediate_values) >= 4
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("trial*/tensorboard/*"))) == 3


def scripted(trial: optuna.Trial) -> float:
    """Fails to learn on every odd trial."""
    score = 0.1 if trial.number % 2 else 0.5 + trial.suggest_float("x", 0, 0.1)
    for step in range(1, 5):
        trial.report(score, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return score


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_hopeless_trials_are_pruned(tmp_path: Path, pruner: str) -> None:
    search = Search("pruned", trials=14, pruner=pruner)
    study = opened(tmp_path, search)
    run_trials(study, scripted, search)
    pruned = [trial for trial in study.trials if trial.state is TrialState.PRUNED]
    assert pruned
    assert {trial.number % 2 for trial in pruned} >= {1}
    assert all(trial.last_step is not None and trial.last_step < 4 for trial in pruned if trial.number % 2)
    assert len(study.trials) == 14


def test_a_study_goes_on_where_it_was_and_draws_other_values(tmp_path: Path) -> None:
    first = Search("again", trials=3, pruner="none")
    run_trials(opened(tmp_path, first), scripted, first)
    run_trials(opened(tmp_path, first), scripted, first)
    more = Search("again", trials=7, pruner="none")
    study = opened(tmp_path, more)
    assert len(study.trials) == 3
    run_trials(study, scripted, more)
    drawn = [trial.params["x"] for trial in study.trials if trial.params]
    assert len(study.trials) == 7
    assert len(set(drawn)) == len(drawn) == 4


def test_a_trial_that_was_killed_does_not_count(tmp_path: Path) -> None:
    search = Search("killed", trials=2, pruner="none")
    with quiet():  # it warns that nobody tends this trial's heartbeat, which is the point
        opened(tmp_path, search).ask()
    study = opened(tmp_path, search)
    run_trials(study, scripted, search)
    assert [trial.state for trial in study.trials].count(TrialState.COMPLETE) == 2


def test_no_trial_begins_when_the_time_is_up(tmp_path: Path) -> None:
    search = Search("late", trials=50, timeout_s=1e-9)
    study = opened(tmp_path, search)
    run_trials(study, scripted, search)
    assert not study.trials


def test_a_study_of_other_data_or_settings_is_not_continued(tmp_path: Path) -> None:
    opened(tmp_path, Search("mine", trials=1))
    opened(tmp_path, Search("mine", trials=1))
    with pytest.raises(StudyMismatchError, match="other labels"):
        opened(tmp_path, Search("mine", trials=1), labels=4)
