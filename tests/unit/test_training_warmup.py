"""The warm-up: both objectives learn from a shop without labels, train the regime's part of the encoder, and can be resumed."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from features.behaviour import Activity, Behaviour
from tests.unit.training_shop import DAY, START, activity_before, chain_log, item_table
from training.checkpoint import new_tower
from training.config import TrainConfig
from training.dataset import TrainingDataError
from training.model import TwoTower
from training.regimes import Regime
from training.warmup import Contrastive, Masked, warm_up

CONFIG = replace(TrainConfig.tiny(), warmup_steps=30, learning_rate=3e-3, dropout=0.0)


def histories(customers: int = 40) -> list[Activity]:
    log, table = chain_log(customers=customers), item_table()
    return [activity_before(log, user, START + 99 * DAY, table) for user in log.users]


def faithful(items: int = 12) -> list[Activity]:
    """Customers of one item each: the parts of their histories are as alike as they can be."""
    ids = item_table().ids[:items]
    return [Activity(4, tuple(Behaviour(item, "view", "web", START + k) for k in (4, 3, 2, 1))) for item in ids]


def warmed(
    objective: str, config: TrainConfig = CONFIG, *, on: Sequence[Activity] = (), folder: Path | None = None
) -> tuple[TwoTower, list[float]]:
    torch.set_num_threads(1)
    config = replace(config, warmup_objective=objective)
    tower = new_tower(config, 12)
    Regime(tower.encoder, config.regime or "top_k", config)
    return tower, warm_up(tower, on or histories(), item_table(), config=config, folder=folder).losses


def test_it_learns_to_fill_in_the_shops_words() -> None:
    tower, losses = warmed("mlm", replace(CONFIG, warmup_steps=10))
    assert len(losses) == 10
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5
    assert not tower.training


def test_it_learns_to_tell_histories_apart() -> None:
    tower, losses = warmed("contrastive", replace(CONFIG, warmup_steps=40, batch_size=12, learning_rate=1e-3), on=faithful())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert not tower.training


@pytest.mark.parametrize("objective", ["mlm", "contrastive"])
def test_only_the_regimes_part_of_the_encoder_moves(objective: str) -> None:
    tower, _ = warmed(objective, replace(CONFIG, trainable_layers=1, warmup_steps=2))
    plain = new_tower(CONFIG, 12).state_dict()
    moved = {name for name, value in tower.state_dict().items() if not torch.equal(value, plain[name])}
    assert moved
    assert all(name.startswith("encoder.encoder.layer.1.") for name in moved)


def test_masked_tokens_are_guessed_with_the_encoders_own_embeddings() -> None:
    tower = new_tower(CONFIG, 12)
    task = Masked(tower, histories(), item_table(), CONFIG)
    assert task.model.bert.cls.predictions.decoder.weight is tower.encoder.embeddings.word_embeddings.weight
    batch = task.batch(list(range(len(task))), range(len(task)))
    share = float((batch.labels >= 0).sum() / batch.attention_mask.sum())
    assert 0.08 < share < 0.2
    assert (batch.labels[batch.attention_mask == 0] == -100).all()


def test_the_two_parts_of_a_history_are_its_newer_and_its_older_items() -> None:
    task = Contrastive(new_tower(CONFIG, 12), histories(6), item_table(), replace(CONFIG, behaviour_limit=50))
    for activity in histories(6):
        newer, older = task._parts(activity, 3)
        titles = [
            [item_table().title_of(behaviour.item_id) for behaviour in part] for part in (activity.behaviours[:3], activity.behaviours[3:])
        ]
        for text, expected in zip((newer, older), titles, strict=True):
            assert {phrase.split(" ", 1)[1] for phrase in text.split("; ")} == set(expected)
    batch = task.batch([4, 1, 2], range(3))
    assert [ids.shape[0] for ids, _ in (batch.newer, batch.older)] == [batch.count] * 2 == [3, 3]


def test_a_history_too_short_to_cut_is_left_out() -> None:
    short = [replace(activity, behaviours=activity.behaviours[:3]) for activity in histories(6)]
    with pytest.raises(TrainingDataError, match="4 behaviours"):
        warm_up(new_tower(CONFIG, 12), short, item_table(), config=replace(CONFIG, warmup_objective="contrastive"))


@pytest.mark.parametrize("objective", ["mlm", "contrastive"])
def test_a_warm_up_goes_on_from_its_checkpoint(objective: str, tmp_path: Path) -> None:
    config = replace(CONFIG, dropout=0.1, warmup_steps=5, checkpoint_steps=3)
    whole, losses = warmed(objective, config)
    warmed(objective, config, folder=tmp_path)
    assert os.listdir(tmp_path) == ["step-00000003"]  # the last two steps are done again, as after a kill
    resumed, again = warmed(objective, config, folder=tmp_path)
    assert again == losses
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
