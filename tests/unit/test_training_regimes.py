"""Each regime trains what it says and nothing else, and leaves a plain BERT that computes what was trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertModel

from features.signals import CollaborativeWeights
from tests.unit.test_training_export import CONTEXT
from tests.unit.test_training_tower import CONFIG, tower_set
from tests.unit.training_shop import item_table
from training import checkpoint
from training.checkpoint import RunRecord, Trained, new_tower
from training.config import TrainConfig
from training.export import write_bundle
from training.pairs import PairModel, PairSets, fit
from training.ranker import Ranker
from training.regimes import Regime
from training.text import load_tokenizer, tokenize
from training.train import Trainer

PEFT = ("lora", "adalora", "adapter")
HEADS = {"user_head.weight", "user_head.bias", "item_head.weight", "item_head.bias", "residual.weight", "log_temperature"}


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return load_tokenizer("tiny")


def configured(regime: str) -> TrainConfig:
    return replace(CONFIG, regime=regime, max_steps=12, dropout=0.1, trainable_layers=1, learning_rate=1e-2, adapter_rank=2)


def trainer(tokenizer, regime: str) -> Trainer:  # type: ignore[no-untyped-def]
    config, data = configured(regime), tower_set(tokenizer)
    items = tokenize(tokenizer, item_table().texts, config.item_tokens)
    return Trainer(new_tower(config, 12), items, train=data, validation=data, config=config)


def moved(made: Trainer) -> set[str]:
    """Takes two steps and returns the encoder's parameters that changed, checking that every head did."""
    made.validate()
    made.tower.train()
    before = {name: value.detach().clone() for name, value in made.tower.named_parameters()}
    for done in (0.2, 0.4):
        made.loop.step([list(range(8))], done)
    changed = {name for name, value in made.tower.named_parameters() if not torch.equal(value, before[name])}
    assert changed >= HEADS
    return {name.removeprefix("encoder.") for name in changed - HEADS}


def test_full_trains_everything(tokenizer) -> None:  # type: ignore[no-untyped-def]
    made = trainer(tokenizer, "full")
    changed = moved(made)
    assert {name.split(".")[0] for name in changed} == {"embeddings", "encoder"}
    # A key's bias shifts all attention scores of a query alike: its gradient is nothing but rounding.
    names = {name for name, _ in made.tower.encoder.named_parameters()}
    assert {name for name in names - changed if not name.endswith("key.bias")} == set()


def test_top_k_trains_the_top_layers(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert {name[:15] for name in moved(trainer(tokenizer, "top_k"))} == {"encoder.layer.1"}


def test_frozen_trains_the_heads_only(tokenizer) -> None:  # type: ignore[no-untyped-def]
    made = trainer(tokenizer, "frozen")
    assert moved(made) == set()
    assert not any(layer.training for layer in (made.tower.encoder.embeddings, *made.tower.encoder.encoder.layer))


@pytest.mark.parametrize(("regime", "added"), [("lora", "lora_"), ("adalora", "lora_"), ("adapter", "ia3_")])
def test_what_peft_adds_is_all_that_is_trained(tokenizer, regime: str, added: str) -> None:  # type: ignore[no-untyped-def]
    changed = moved(trainer(tokenizer, regime))
    assert changed
    assert all(added in name for name in changed)


@pytest.mark.parametrize("regime", PEFT)
def test_merging_leaves_a_plain_bert_with_the_same_answers(tokenizer, regime: str) -> None:  # type: ignore[no-untyped-def]
    made, plain = trainer(tokenizer, regime), new_tower(CONFIG, 12)
    moved(made)
    tower, batch = made.tower.eval(), tokenize(tokenizer, ["cup number 2", "bought pan number 3; viewed a lid"], 16).pad([0, 1])
    with torch.inference_mode():
        trained, untrained = tower.user_vector(tower.pool(*batch)), plain.eval().user_vector(plain.pool(*batch))
        made.regime.merge()
        merged = tower.user_vector(tower.pool(*batch))
    assert (merged - trained).abs().max() < 1e-5
    assert (trained - untrained).abs().max() > 1e-3
    assert type(tower.encoder) is BertModel
    assert tower.state_dict().keys() == plain.state_dict().keys()


def test_adalora_ends_with_the_mean_rank_it_was_given(tokenizer) -> None:  # type: ignore[no-untyped-def]
    made = trainer(tokenizer, "adalora")
    made.validate()
    made.tower.train()
    for step in range(12):
        made.loop.step([list(range(8))], step / 12)
    values = [value for name, value in made.tower.encoder.named_parameters() if ".lora_E." in name]
    assert len(values) == 12  # query, key, value and three dense layers of two layers
    assert 0 < sum(int((value != 0).sum()) for value in values) <= 2 * len(values)
    assert sum(value.numel() for value in values) == 3 * len(values)


@pytest.mark.parametrize("regime", PEFT)
def test_a_run_is_saved_loaded_and_exported_as_any_other(tokenizer, regime: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    made, table = trainer(tokenizer, regime), item_table()
    made.run(tmp_path / "log")
    config = replace(configured(regime), ranker_hidden=8)
    trained = Trained(config, made.tower, tokenizer, Ranker(8).eval(), table.ids)
    (tmp_path / "run").mkdir()
    checkpoint.save(trained, RunRecord(table.ids, 0, {}, 1, 1.0), tmp_path / "run")
    loaded, _ = checkpoint.load(tmp_path / "run")
    assert (loaded.item_vectors(table) == trained.item_vectors(table)).all()
    if regime == "lora":  # one export: the weights are a plain BERT's, by the lines above
        manifest = write_bundle(
            tmp_path / "bundle", trained, table=table, collaborative=CollaborativeWeights.empty(len(table.ids)), context=CONTEXT
        )
        assert max(manifest.parity.values()) < 1e-4


@pytest.mark.parametrize("regime", ["frozen", "lora"])
def test_a_head_over_pairs_always_trains_its_pooler(regime: str) -> None:
    from tests.unit.test_training_classifier import HEAD, pairs

    config = replace(configured(regime), max_steps=2)
    model = PairModel(HEAD, config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    regime_of = Regime(model.bert.base_model, regime, config)
    assert {name for name, value in model.named_parameters() if value.requires_grad} >= {"bert.bert.pooler.dense.weight"}
    regime_of.merge()
    fit(PairModel(HEAD, config), HEAD, PairSets(pairs(), pairs()), config=config)
    assert before.keys() == model.state_dict().keys()


def test_a_regime_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="regime"):
        TrainConfig.tiny().with_values({"regime": "most"})
