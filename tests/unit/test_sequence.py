"""The sequence tower: what a step may read, what an unknown item is known by, and that it learns what comes next."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from training.sequence import Rows, SequenceConfig, SequenceTower, log_probabilities, next_item_loss, pad_left
from training.sequence_fit import Steps, fit, train_sequence_tower

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


SHOP = replace(SMALL, positions=False, contexts=(3, 4), temperature=0.1)
QUERIES = torch.nn.functional.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(2)), dim=-1)


def shop_tower(config: SequenceConfig = SHOP) -> SequenceTower:
    """A tower as a shop's is: unit vectors, two searches after the items, and what was done beside each step."""
    torch.manual_seed(0)
    model = SequenceTower(config, text_of(), torch.ones(ITEMS), queries=QUERIES).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.distance.normal_()
        for table in model.contexts:
            table.weight.normal_()
    return model


def read(model: SequenceTower, rows: list[int], context: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        filled = torch.ones(1, len(rows), dtype=torch.bool)
        return model(torch.tensor([rows]), filled, model.item_vectors(), torch.tensor([context]))[0]


def test_a_later_step_changes_no_earlier_output_whatever_of_it_changes() -> None:
    model = shop_tower()
    rows, context = [1, 2, 3, 4, 5], [[0, 1], [1, 2], [2, 3], [1, 0], [2, 2]]
    before = read(model, rows, context)
    for changed_rows, changed in (
        ([1, 2, 3, 9, 5], context),
        ([1, 2, 3, ITEMS + 1, 5], context),
        (rows, [*context[:3], [0, 0], context[4]]),
        (rows, [*context[:3], [1, 3], context[4]]),
    ):
        after = read(model, changed_rows, changed)
        assert torch.equal(before[:3], after[:3])
        assert not torch.allclose(before[3], after[3])


def test_padding_in_front_changes_nothing_with_contexts() -> None:
    model = shop_tower()
    alone = read(model, [3, 4], [[1, 1], [2, 2]])
    rows, context = torch.tensor([[7, 8, 3, 4]]), torch.tensor([[[2, 3], [1, 0], [1, 1], [2, 2]]])
    with torch.no_grad():
        padded = model(rows, torch.tensor([[False, False, True, True]]), model.item_vectors(), context)[0, -2:]
    np.testing.assert_allclose(alone, padded, atol=1e-6)


def test_a_shops_vectors_are_of_unit_length_and_its_scores_are_scaled_cosines() -> None:
    model = shop_tower()
    items, users = model.item_vectors(), read(model, [1, ITEMS], [[0, 0], [1, 1]])
    assert torch.allclose(items.norm(dim=-1), torch.ones(ITEMS), atol=1e-5)
    assert torch.allclose(users.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert torch.allclose(model.scores(users, items), users @ items.T / 0.1, atol=1e-4)


def test_a_search_is_read_by_its_text_as_an_item_nobody_knows() -> None:
    known = torch.ones(ITEMS)
    known[4] = 0
    torch.manual_seed(0)
    model = SequenceTower(SHOP, text_of(), known, queries=text_of()[4:5]).eval()
    by_row, by_text = read(model, [1, 4], [[0, 0], [1, 1]]), read(model, [1, ITEMS], [[0, 0], [1, 1]])
    np.testing.assert_allclose(by_row, by_text, atol=1e-6)
    assert "queries" not in model.state_dict()


def test_steps_without_a_target_teach_nothing() -> None:
    model = shop_tower()
    rows, filled = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    context = torch.zeros(1, 3, 2, dtype=torch.int64)
    loss = next_item_loss(model, rows, filled, torch.tensor([[-1, 7, -1]]), kept=None, context=context)
    users = model(rows, filled, model.item_vectors(), context)[:, 1]
    logits = model.scores(users, model.item_vectors())
    assert torch.allclose(loss, cross_entropy(logits, torch.tensor([7]), label_smoothing=0.1), atol=1e-5)


def test_what_was_done_is_learned_where_it_decides_what_follows() -> None:
    """After item i comes i + 1 if the step says 1 and i - 1 if it says 2: rows alone cannot tell."""
    rng = np.random.default_rng(0)
    rows = rng.integers(ITEMS, size=(300, 4))
    said = rng.integers(1, 3, size=(300, 4))
    targets = (rows + np.where(said == 1, 1, -1)) % ITEMS
    steps = [Steps(r, t, np.stack([s, np.zeros(4, np.int64)], axis=1)) for r, t, s in zip(rows, targets, said, strict=True)]

    def right(model: SequenceTower) -> float:
        chosen = [read(model, r.tolist(), np.stack([s, s * 0], axis=1).tolist())[-1] for r, s in zip(rows[:40], said[:40], strict=True)]
        return float(((torch.stack(chosen) @ model.item_vectors().T).argmax(-1).numpy() == targets[:40, -1]).mean())

    torch.manual_seed(0)
    config = replace(SHOP, contexts=(3, 1), input_dropout=0.1, dropout=0.1, epochs=25)
    model = SequenceTower(config, text_of(), torch.ones(ITEMS), queries=QUERIES)
    seen: list[str] = []
    history, count = fit(model, lambda _: steps, validate=right, observe=lambda name, value, step: seen.append(f"{name} {step}"))
    assert max(history) > 0.9
    assert count == len(history) * 10
    assert [line for line in seen if line.startswith("validation")][:2] == ["validation/ndcg_at_10 10", "validation/ndcg_at_10 20"]


def test_steps_and_seconds_are_bounded() -> None:
    steps = [Steps(np.array([1, 2]), np.array([2, 3])) for _ in range(100)]
    config = replace(SMALL, epochs=50)

    def taken(**bounds: float) -> int:
        return fit(SequenceTower(config, text_of(), torch.ones(ITEMS)), lambda _: steps, validate=lambda _: 0.5, **bounds)[1]  # type: ignore[arg-type]

    assert taken(max_steps=3) == 3
    assert taken(time_budget_s=1e-9) == 1


def _train_one_of_two(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = SequenceTower(replace(SMALL, epochs=2, batch_size=10), text_of(), torch.ones(ITEMS))
    walks = cycles(50, np.random.default_rng(0))
    seen: list[int] = []
    history, count = fit(
        model,
        lambda _: [Steps(walk[:-1], walk[1:]) for walk in walks],
        validate=lambda averaged: -float(averaged.identity.weight.norm().detach()),
        observe=lambda name, value, step: seen.append(step) if name == "train/loss" else None,
    )
    torch.save({"weights": model.state_dict(), "history": history, "steps": count, "seen": seen}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_batches_and_agree_on_the_weights(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_one_of_two, args=(str(tmp_path),), nprocs=2)
    left, right = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert left["steps"] == right["steps"] == 2 * 3  # of five batches each process takes three: one is taken twice
    assert left["history"] == right["history"]
    assert all(torch.equal(left["weights"][name], right["weights"][name]) for name in left["weights"])
    torch.manual_seed(0)
    assert not torch.equal(left["weights"]["identity.weight"], SequenceTower(SMALL, text_of(), torch.ones(ITEMS)).identity.weight)
