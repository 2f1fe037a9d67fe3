"""The sequence tower: what a step may read, what an unknown item is known by, and that it learns what comes next."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from training.sequence import Rows, SequenceConfig, SequenceTower, log_probabilities, next_item_loss, pad_left, train_sequence_tower

ITEMS = 12
SMALL = SequenceConfig(width=16, max_length=6, epochs=30, batch_size=32, learning_rate=1e-2, warmup_steps=5, ema_decay=0.9, patience=30)


def text_of(count: int = ITEMS) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


def tower(known: torch.Tensor | None = None, config: SequenceConfig = SMALL) -> SequenceTower:
    torch.manual_seed(0)
    model = SequenceTower(config, text_of(), torch.ones(ITEMS) if known is None else known).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.distance.normal_()
        model.popularity.normal_()
    return model


def cycles(count: int, rng: np.random.Generator) -> list[Rows]:
    """Walks on a ring: after item i comes i + 1."""
    return [(np.arange(rng.integers(3, 9)) + rng.integers(ITEMS)) % ITEMS for _ in range(count)]


def test_a_step_reads_nothing_that_comes_after_it() -> None:
    model = tower()
    rows, filled = pad_left([np.array([1, 2, 3, 4, 5])], 6)
    changed = rows.clone()
    changed[0, 3] = 9
    items = model.item_vectors()
    with torch.no_grad():
        before, after = model(rows, filled, items), model(changed, filled, items)
    assert torch.equal(before[0, :3], after[0, :3])
    assert not torch.allclose(before[0, 3:], after[0, 3:])


def test_padding_changes_nothing_and_an_old_past_is_cut_off() -> None:
    model = tower()
    alone = log_probabilities(model, [np.array([3, 4])])
    beside = log_probabilities(model, [np.array([3, 4]), np.arange(6)])
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-5)
    long = log_probabilities(model, [np.concatenate([[7, 8, 9], np.arange(6)])])
    np.testing.assert_allclose(long[0], beside[1], atol=1e-5)


def test_a_history_without_items_gets_a_distribution() -> None:
    scores = log_probabilities(tower(), [np.zeros(0, np.int64)])
    assert np.exp(scores).sum() == pytest.approx(1.0, abs=1e-5)


def test_the_loss_is_cross_entropy_with_label_smoothing() -> None:
    model = tower()
    sequences = [np.array([1, 2, 3, 4]), np.array([5, 6, 7])]
    rows, filled = pad_left([sequence[:-1] for sequence in sequences], 6)
    targets, _ = pad_left([sequence[1:] for sequence in sequences], 6)
    items = model.item_vectors()
    logits = model.scores(model(rows, filled, items)[filled], items)
    expected = cross_entropy(logits, targets[filled], label_smoothing=SMALL.label_smoothing)
    assert torch.allclose(next_item_loss(model, rows, filled, targets, kept=None), expected, atol=1e-5)


def test_an_item_without_interactions_is_its_text_alone() -> None:
    known = torch.ones(ITEMS)
    known[4] = 0
    model = tower(known)
    assert model.text_map is not None
    with torch.no_grad():
        assert torch.allclose(model.item_vectors()[4], model.text_map(model.text[4]))
        logits = model.scores(torch.zeros(1, SMALL.width), model.item_vectors())
    assert logits[0, 4] == 0
    assert (logits[0, torch.arange(ITEMS) != 4] != 0).all()


def test_it_learns_what_comes_next_the_same_way_each_time() -> None:
    rng = np.random.default_rng(0)
    sequences, held_out = cycles(200, rng), cycles(40, rng)

    def validate(model: SequenceTower) -> float:
        scores = log_probabilities(model, [sequence[:-1] for sequence in held_out])
        return float((scores.argmax(-1) == [sequence[-1] for sequence in held_out]).mean())

    text = text_of().numpy()
    model, history = train_sequence_tower(sequences, text, config=SMALL, validate=validate)
    assert validate(model) == max(history) > 0.95
    again, same = train_sequence_tower(sequences, text, config=SMALL, validate=validate)
    assert same == history
    assert all(torch.equal(left, right) for left, right in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    other, _ = train_sequence_tower(sequences, text, config=replace(SMALL, seed=1, epochs=1), validate=validate)
    assert not torch.equal(other.identity.weight, again.identity.weight)


def test_text_alone_carries_an_item_that_nobody_touched() -> None:
    """Items come in pairs of equal text; the one of the pair that was never seen is expected where its twin is."""
    rng = np.random.default_rng(0)
    text = np.concatenate([text_of(ITEMS).numpy()] * 2)
    config = replace(SMALL, identity_dropout=0.5)
    epochs = itertools.count()  # the last epoch is the best
    model, _ = train_sequence_tower(cycles(300, rng), text, config=config, validate=lambda _: float(next(epochs)))
    scores = log_probabilities(model, [np.array([3, 4, 5])])[0]
    assert scores[ITEMS:].argmax() == 6


def test_a_tower_can_do_without_text() -> None:
    model, _ = train_sequence_tower(
        cycles(50, np.random.default_rng(0)),
        np.zeros((ITEMS, 0), np.float32),
        config=replace(SMALL, epochs=1),
        validate=lambda _: 0.0,
    )
    assert model.text_map is None
    assert np.isfinite(log_probabilities(model, [np.array([1])])).all()
