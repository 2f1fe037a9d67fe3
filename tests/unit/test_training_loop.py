"""The loop: schedules, optimizers, accumulation, clipping, precision and early stopping do what their fields say."""

import math
from dataclasses import replace

import pytest
import torch

from tests.unit.test_training_classifier import CONFIG, HEAD, pairs, sets
from training.config import TrainConfig
from training.distributed import device_type, precision
from training.loop import Loop, Plan, learning_rate_scale
from training.model import softmax_loss
from training.pairs import PairTask, new_model

ROWS = list(range(16))


def loop(config: TrainConfig) -> Loop:
    model = new_model(HEAD, sets(), config)
    model.train()
    return Loop(PairTask(model, HEAD, sets(), config), Plan.of(64, config, metric="auc"), config=config)


def weights(made: Loop) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in made.task.model.parameters()])


def after_a_step(config: TrainConfig, batches: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    made = loop(config)
    before = weights(made)
    made.step(batches, 0.5)
    return before, weights(made)


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"),
    [("linear", 0.5 / 0.9, 0.0), ("cosine", (1 + math.cos(math.pi * 0.4 / 0.9)) / 2, 0.0), ("constant", 1.0, 1.0)],
)
def test_the_learning_rate_rises_and_follows_its_schedule(schedule: str, halfway: float, end: float) -> None:
    scale = learning_rate_scale(replace(CONFIG, schedule=schedule, warmup_fraction=0.1))
    assert scale(0.0) == pytest.approx(0.01)  # not zero: the first step would be wasted
    assert scale(0.05) == pytest.approx(0.51)
    assert scale(0.1) == pytest.approx(1.0)
    assert scale(0.5) == pytest.approx(halfway, abs=1e-6)
    assert scale(1.0) == pytest.approx(end, abs=1e-9)


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    config = replace(CONFIG, optimizer="sgd", clip_norm=1e9)
    start, once = after_a_step(config, [ROWS])
    _, twice = after_a_step(replace(config, accumulation_steps=2), [ROWS[:8], ROWS[8:]])
    assert not torch.equal(start, once)
    assert torch.allclose(once, twice, atol=1e-6)


def test_a_run_takes_accumulated_batches_for_one_step() -> None:
    made = loop(replace(CONFIG, accumulation_steps=2, epochs=1))
    assert made.plan.steps == 2
    assert made.run().step == 2


def test_clipping_bounds_what_a_step_of_sgd_moves() -> None:
    config = replace(CONFIG, optimizer="sgd", learning_rate=100.0, schedule="constant", clip_norm=1e-4, weight_decay=0.0)
    before, after = after_a_step(config, [ROWS])
    assert float((after - before).norm()) == pytest.approx(100.0 * 1e-4, rel=0.02)


def test_sgd_has_momentum_and_an_l2_penalty() -> None:
    config = replace(CONFIG, optimizer="sgd", learning_rate=0.1, schedule="constant", clip_norm=1e-9, weight_decay=0.0)
    decayed = replace(config, weight_decay=0.5)
    before, after = after_a_step(decayed, [ROWS])  # gradients are clipped to nothing, so that the penalty alone moves weights
    shrunk = (after / before)[(before != 0) & (before != after)]
    assert torch.allclose(shrunk, torch.tensor(0.95), atol=1e-4)
    made = loop(replace(config, momentum=0.5))
    (group, *_) = made.optimizer.param_groups
    assert (group["momentum"], group["lr"]) == (0.5, 0.1)


def test_bfloat16_trains_float32_weights_to_nearly_the_same_loss() -> None:
    exact, coarse = loop(CONFIG), loop(replace(CONFIG, mixed_precision="bf16"))
    losses = []
    for made in (exact, coarse):
        torch.manual_seed(0)
        losses.append(made.step([ROWS], 0.5))
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0] != losses[1]
    assert all(parameter.dtype == torch.float32 for parameter in coarse.task.model.parameters())
    assert coarse.run().step > 0
    assert coarse.task.model.answers(pairs(8)).dtype == torch.float32


def test_device_and_precision_are_chosen_by_what_is_there() -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert device_type(CONFIG) == here
    assert device_type(replace(CONFIG, device="cpu")) == "cpu"
    assert precision(CONFIG, "cpu") == "no"
    assert precision(replace(CONFIG, mixed_precision="bf16"), "cpu") == "bf16"
    if here == "cpu":
        with pytest.raises(ValueError, match="device"):
            loop(replace(CONFIG, device="cuda"))


def test_a_run_without_progress_stops_early() -> None:
    made = loop(replace(CONFIG, learning_rate=1e-12, patience=2, optimizer="sgd"))
    progress = made.run()
    assert progress.step == 2 * made.plan.every < made.plan.steps
    assert progress.best == progress.first


def test_figures_are_told_step_by_step() -> None:
    told: list[tuple[str, float, int]] = []
    made = loop(replace(CONFIG, epochs=1))
    progress = made.run(lambda name, value, step: told.append((name, value, step)))
    assert [(value, step) for name, value, step in told if name == "train/loss"] == [
        (loss, step + 1) for step, loss in enumerate(progress.losses)
    ]
    assert [step for name, _, step in told if name == "validation/auc"] == [0, 4]


def test_label_smoothing_spreads_over_the_answers_that_are_left() -> None:
    logits, wanted = torch.tensor([[2.0, 0.0, -1.0, 9.0]]), torch.tensor([0])
    wrong = torch.tensor([[False, False, False, True]])
    log_p = torch.log_softmax(logits[0, :3], 0)
    expected = -(0.7 * log_p[0] + 0.3 * log_p.mean())
    assert softmax_loss(logits, wanted, wrong, label_smoothing=0.3) == pytest.approx(float(expected), rel=1e-5)
    assert softmax_loss(logits, wanted, wrong) == pytest.approx(float(-log_p[0]), rel=1e-5)
    smoothed, plain = (HEAD.loss(logits[:, :2], wanted, replace(CONFIG, label_smoothing=share)) for share in (0.2, 0.0))
    assert float(smoothed) > float(plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "adam"),
        ("schedule", "steps"),
        ("device", "tpu"),
        ("mixed_precision", "fp8"),
        ("warmup_objective", "next"),
        ("accumulation_steps", "0"),
        ("label_smoothing", "1"),
        ("checkpoint_steps", "-1"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        CONFIG.with_values({name: value})


def test_a_frozen_encoder_has_nothing_to_warm_up() -> None:
    with pytest.raises(ValueError, match="warmup_objective"):
        CONFIG.with_values({"regime": "frozen", "warmup_objective": "mlm"})
