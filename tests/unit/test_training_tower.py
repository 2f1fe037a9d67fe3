"""The two-tower model: where it starts, what its loss counts, and that training is reproducible and teaches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.training_shop import DAY, START, activity_before, chain_log, item_table
from training.checkpoint import new_tower
from training.config import TrainConfig
from training.labels import Label, visit_labels
from training.model import TwoTower
from training.negatives import NegativeSampler
from training.on_sale import OnSale
from training.regimes import freeze_below
from training.text import Tokens, activity_texts, load_tokenizer, tokenize
from training.tracking import HISTORY, Trackers, open_trackers, read_history
from training.train import TowerSet, Trainer, mean_ndcg

CONFIG = replace(TrainConfig.tiny(), epochs=30, max_steps=0, patience=99, learning_rate=1e-3, dropout=0.0, negative_count=8)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return load_tokenizer("tiny")


def tower_set(tokenizer) -> TowerSet:  # type: ignore[no-untyped-def]
    log, table = chain_log(customers=40), item_table()
    labels = visit_labels(log, ("purchase",), start=START, end=START + 99 * DAY)
    texts = activity_texts([activity_before(log, label.user_id, label.time, table) for label in labels], table, 4)
    return TowerSet(labels, tokenize(tokenizer, texts, CONFIG.user_tokens))


def trainer(tokenizer, config: TrainConfig = CONFIG) -> Trainer:  # type: ignore[no-untyped-def]
    items = tokenize(tokenizer, item_table().texts, config.item_tokens)
    data = tower_set(tokenizer)
    return Trainer(new_tower(config, 12), items, train=data, validation=data, config=config)


def test_training_starts_from_the_pretrained_space(tokenizer) -> None:  # type: ignore[no-untyped-def]
    tower = new_tower(CONFIG, 12).eval()
    ids, mask = tokenize(tokenizer, ["a red cup", "pan"], 16).pad([0, 1])
    with torch.inference_mode():
        pooled = tower.pool(ids, mask)
        expected = torch.nn.functional.normalize(pooled, dim=-1)
        assert torch.allclose(tower.user_vector(pooled), expected)
        assert torch.allclose(tower.item_vector(pooled, torch.tensor([0, 1])), expected)


def test_padding_does_not_change_a_vector(tokenizer) -> None:  # type: ignore[no-untyped-def]
    tower = new_tower(CONFIG, 12).eval()
    tokens = tokenize(tokenizer, ["cup", "a much longer text about a pan and its lid"], 16)
    with torch.inference_mode():
        alone, together = tower.pool(*tokens.pad([0])), tower.pool(*tokens.pad([0, 1]))
    assert torch.allclose(alone[0], together[0], atol=1e-5)


def test_items_never_taken_have_no_residual(tokenizer) -> None:  # type: ignore[no-untyped-def]
    tower = new_tower(CONFIG, 3).eval()
    torch.nn.init.ones_(tower.residual.weight)
    tower.warm[1] = 1.0
    pooled = torch.eye(3, tower.vector_size)
    vectors = tower.item_vector(pooled, torch.arange(3))
    cold = tower.item_vector(pooled)
    assert torch.equal(vectors[[0, 2]], cold[[0, 2]])
    assert not torch.allclose(vectors[1], cold[1])


def test_the_loss_ignores_pairs_that_are_no_negatives(tokenizer) -> None:  # type: ignore[no-untyped-def]
    made = trainer(tokenizer)
    made.validate()
    rows = [0, 1, 2, 3]
    batch = made.batch(rows)
    pool = batch.item_rows.tolist()
    for place, row in enumerate(rows):
        label = made.train.labels[row]
        assert pool[place] in label.items
        for column, item in enumerate(pool):
            assert bool(batch.wrong[place, column]) == (column != place and item in {*label.items, *label.bought})
    made.tower.eval()
    with torch.no_grad():
        pools = torch.cat([made.tower.pool(batch.item_ids, batch.item_mask), batch.negative_pools])
        users = made.tower.user_vector(made.tower.pool(batch.user_ids, batch.user_mask)).numpy()
        items = made.tower.item_vector(pools, batch.item_rows).numpy()
        loss = float(made.tower(batch))
    logits = users @ items.T / CONFIG.temperature - batch.log_q.numpy()
    kept = [np.exp(logits[row][~batch.wrong[row].numpy()]).sum() for row in range(len(rows))]
    assert loss == pytest.approx(np.mean([np.log(kept[row]) - logits[row, row] for row in range(len(rows))]), rel=1e-4)


def test_log_q_is_the_expected_count_in_a_steps_pool() -> None:
    labels = [Label("a", 0, (0,), frozenset()), Label("b", 0, (0, 1), frozenset())]
    config = replace(CONFIG, batch_size=4, negative_count=2000, negative_power=0.5)
    drawn = NegativeSampler(labels, OnSale.always(4), config, np.random.default_rng(0)).draw([labels[0]] * 4, np.array([0, 0, 0, 1]))
    sampled = np.bincount(drawn.rows[4:], minlength=4)
    in_batch = 4 * np.array([2, 1, 0, 0]) / 3
    expected = {int(row): float(np.exp(log_q)) for row, log_q in zip(drawn.rows, drawn.log_q[0], strict=True)}
    assert np.allclose([expected[row] for row in range(4)], in_batch + sampled, rtol=0.15)


def test_the_same_seed_gives_the_same_losses(tokenizer) -> None:  # type: ignore[no-untyped-def]
    def losses() -> list[float]:
        made = trainer(tokenizer, replace(CONFIG, dropout=0.1))
        made.validate()
        made.tower.train()
        return [made.loop.step([list(range(8))], 0.2) for _ in range(4)]

    torch.set_num_threads(1)
    assert losses() == losses()


def test_training_teaches_the_chain_and_keeps_the_best_weights(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    made = trainer(tokenizer)
    with open_trackers((), tmp_path) as tracker:
        report = made.run(tracker)
    curves = read_history(tmp_path / HISTORY)
    assert [step for step, _ in curves["train/loss"]] == list(range(1, report.steps + 1))
    assert curves["validation/ndcg_at_10"][0] == (0, report.untrained_ndcg_at_10)
    assert max(value for _, value in curves["validation/ndcg_at_10"]) == report.ndcg_at_10
    assert report.steps > 0
    assert report.ndcg_at_10 > report.untrained_ndcg_at_10 + 0.1
    assert made.validate() == pytest.approx(report.ndcg_at_10)
    assert not made.tower.training


def test_training_that_does_harm_is_undone_and_stops(tokenizer) -> None:  # type: ignore[no-untyped-def]
    made = trainer(tokenizer, replace(CONFIG, head_learning_rate=50.0, learning_rate=5.0, patience=2, validations_per_epoch=4))
    taught = made.tower.state_dict()["user_head.weight"].clone()
    report = made.run(Trackers())
    assert report.steps < 30 * (len(made.train.labels) // CONFIG.batch_size)
    assert report.ndcg_at_10 >= report.untrained_ndcg_at_10
    assert made.validate() == pytest.approx(report.ndcg_at_10)
    assert torch.equal(taught, made.tower.user_head.weight) == (report.ndcg_at_10 == report.untrained_ndcg_at_10)


def test_a_bound_on_steps_is_kept(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert trainer(tokenizer, replace(CONFIG, max_steps=3)).run(Trackers()).steps == 3


def test_frozen_layers_do_not_move_and_do_not_drop_out(tokenizer) -> None:  # type: ignore[no-untyped-def]
    made = trainer(tokenizer, replace(CONFIG, trainable_layers=1, dropout=0.5))
    made.validate()
    tower: TwoTower = made.tower.train()
    bottom, top = tower.encoder.encoder.layer
    assert not bottom.training
    assert not tower.encoder.embeddings.training
    assert top.training
    before = {name: value.clone() for name, value in tower.encoder.state_dict().items()}
    made.loop.step([list(range(8))], 0.2)
    moved = {name for name, value in tower.encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("encoder.layer.1.") for name in moved)


def test_all_layers_can_be_trained() -> None:
    tower = new_tower(CONFIG, 3)
    freeze_below(tower.encoder, -1)
    assert all(parameter.requires_grad for parameter in tower.parameters())


def test_mean_ndcg_leaves_out_what_was_bought() -> None:
    items = np.eye(3, dtype=np.float32)
    label = Label("a", 0, (1,), frozenset({0}))
    assert mean_ndcg(np.array([[1.0, 0.5, 0.0]], np.float32), items, [label]) == 1.0


def test_unpadded_batches_hold_one_length_and_every_text_once() -> None:
    tokens = Tokens(((1, 2), (1, 2, 3), (4, 5), (6,), (7, 8)))
    batches = list(tokens.batches(2, padded=False))
    assert sorted(row for batch in batches for row in batch) == [0, 1, 2, 3, 4]
    assert all(len({len(tokens.ids[row]) for row in batch}) == 1 and len(batch) <= 2 for batch in batches)
