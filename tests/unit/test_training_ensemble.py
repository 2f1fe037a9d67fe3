"""Ensembles: the product of vectors is the mean cosine, one bundle holds them, and a student learns to answer like them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from features.bundle import ENCODER, read_bundle
from features.signals import CollaborativeWeights
from tests.unit.test_training_export import CONTEXT, session
from tests.unit.training_shop import item_table, tower_data
from training import checkpoint
from training.checkpoint import RunRecord, Trained, new_model, new_tower
from training.config import TrainConfig
from training.distill import Distiller, Places, TokenizerMismatchError, TowerData, train_towers, validate
from training.encode import pools
from training.ensemble import Ensemble
from training.export import write_bundle
from training.model import Tower, TwoTower
from training.ranker import Ranker
from training.text import load_tokenizer
from training.train import Trainer

CONFIG = replace(TrainConfig.tiny(), epochs=12, max_steps=0, patience=99, learning_rate=1e-3, dropout=0.0, negative_count=8)


@pytest.fixture(scope="module")
def data() -> TowerData:
    return tower_data(CONFIG)


def towers(count: int = 3) -> list[TwoTower]:
    """Untrained towers that differ in everything a tower learns."""
    made = []
    for seed in range(count):
        tower = new_tower(replace(CONFIG, seed=seed, temperature=0.05 * (seed + 1)), 12)
        torch.nn.init.normal_(tower.user_head.weight)
        torch.nn.init.normal_(tower.residual.weight)
        tower.warm[:6] = 1.0
        made.append(tower.eval())
    return made


@torch.inference_mode()
def vectors(tower: Tower, data: TowerData) -> tuple[torch.Tensor, torch.Tensor]:
    users = tower.user_vector(pools(tower, data.train.tokens, "users"))
    return users, tower.item_vector(pools(tower, data.items, "items"), torch.arange(len(data.items)))


@torch.inference_mode()
def softmax(tower: TwoTower, data: TowerData) -> torch.Tensor:
    users, items = vectors(tower, data)
    return (users @ items.T / tower.temperature).log_softmax(-1)


def test_the_product_of_an_ensembles_vectors_is_the_mean_cosine(data: TowerData) -> None:
    members = towers()
    users, items = vectors(Ensemble(members).eval(), data)
    assert users.shape == (len(data.train.labels), 3 * 32)
    assert torch.allclose(users.norm(dim=-1), torch.ones(len(users)), atol=1e-5)
    each = [vectors(member, data) for member in members]
    assert torch.allclose(users @ items.T, sum((u @ v.T for u, v in each), torch.zeros(())) / 3, atol=1e-5)


def test_the_teachers_logits_are_the_mean_of_the_members(data: TowerData) -> None:
    members = towers()
    ensemble = Ensemble(members).eval()
    with torch.inference_mode():
        users = ensemble.logits_user(pools(ensemble, data.train.tokens, "users"))
        items = vectors(ensemble, data)[1]
        each = [u @ v.T / member.temperature for member, (u, v) in zip(members, [vectors(m, data) for m in members], strict=True)]
    assert torch.allclose(users @ items.T, sum(each, torch.zeros(())) / 3, atol=1e-4)


def test_an_ensemble_is_saved_loaded_and_exported_as_one_bundle(tmp_path: Path) -> None:
    config = replace(CONFIG, ensemble=2)
    model = new_model(config, 11)
    assert isinstance(model, Ensemble)
    for tower in model.members:
        torch.nn.init.normal_(tower.item_head.weight)
    trained = Trained(config, model.eval(), load_tokenizer("tiny"), Ranker(config.ranker_hidden).eval(), item_table().ids[:11])
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    run.mkdir()
    checkpoint.save(trained, RunRecord(tuple(trained.item_ids), 10**15, {}, steps=1, seconds=1.0), run)
    loaded = checkpoint.load(run)[0]
    assert np.array_equal(loaded.item_vectors(item_table()), trained.item_vectors(item_table()))
    write_bundle(bundle, loaded, table=item_table(), collaborative=CollaborativeWeights.empty(12), context=CONTEXT)
    manifest = read_bundle(bundle)
    assert manifest.vector_size == 64
    assert max(manifest.parity.values()) < 1e-5
    assert session(bundle / ENCODER).get_outputs()[0].shape[1] == 64


def test_a_student_that_answers_like_its_teacher_has_nothing_left_to_learn(data: TowerData) -> None:
    teacher = towers(1)[0]
    teacher.warm[:] = 1.0  # as training makes it for all items that were ever a label
    student = new_tower(CONFIG, 12)
    student.load_state_dict(teacher.state_dict())
    same = Distiller(student, Ensemble([teacher]).eval(), data, replace(CONFIG, distil_weight=1.0))
    same.validate()
    batch = same.batch(range(8))
    assert batch.teacher is not None
    student.eval()
    with torch.no_grad():
        assert float(student(batch)) == pytest.approx(0.0, abs=1e-4)
        torch.nn.init.normal_(student.user_head.weight, generator=torch.Generator().manual_seed(1))
        apart = float(student(batch))
        half = float(student(replace(batch, teacher_weight=0.5)))
        labels = float(student(replace(batch, teacher=None)))
    assert apart > 0.1
    assert half == pytest.approx((apart + labels) / 2, rel=1e-4)


def test_a_student_learns_its_teachers_softmax(data: TowerData, tmp_path: Path) -> None:
    members = []
    for seed in (1, 2):
        members.append(new_tower(replace(CONFIG, seed=seed), 12))
        Trainer(members[-1], data.items, train=data.train, validation=data.validation, config=CONFIG).run(tmp_path)
    ensemble = Ensemble(members).eval()
    with torch.inference_mode():
        users = ensemble.logits_user(pools(ensemble, data.train.tokens, "users"))
        wanted = (users @ vectors(ensemble, data)[1].T).log_softmax(-1)
    student = new_tower(replace(CONFIG, seed=7), 12)
    before = float(torch.nn.functional.kl_div(softmax(student, data), wanted, log_target=True, reduction="batchmean"))
    report = Distiller(student, ensemble, data, replace(CONFIG, distil_weight=1.0)).run(tmp_path)
    after = float(torch.nn.functional.kl_div(softmax(student, data), wanted, log_target=True, reduction="batchmean"))
    assert report.steps > 0
    assert after < 0.5 * before


def test_every_member_has_its_own_seed_and_model_and_the_report_says_how_each_did(data: TowerData, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, max_steps=2, ensemble=2)
    ensemble, report, figures = train_towers(data, config, Places(tmp_path))
    assert isinstance(ensemble, Ensemble)
    first, second = ensemble.members
    assert not torch.equal(first.user_head.weight, second.user_head.weight)
    assert set(figures) == {"tower_0_validation_ndcg_at_10", "tower_1_validation_ndcg_at_10", "ensemble_validation_ndcg_at_10"}
    assert report.ndcg_at_10 == figures["ensemble_validation_ndcg_at_10"] == validate(ensemble, data)
    assert report.steps == 4
    student, taught, same = train_towers(data, replace(config, distil_weight=0.5), Places(tmp_path))
    assert isinstance(student, TwoTower)
    assert same == figures
    assert taught.steps == 6
    assert [config.member(k).seed for k in range(2)] == [CONFIG.seed, CONFIG.seed + 1]
    mixed = replace(config, ensemble=3, ensemble_models="tiny, other")
    assert [mixed.member(k).base_model for k in range(3)] == ["tiny", "other", "tiny"]


def test_towers_that_read_other_tokens_are_no_ensemble(data: TowerData, tmp_path: Path) -> None:
    other = tmp_path / "model" / "tokenizer.json"
    other.parent.mkdir()
    load_tokenizer("tiny").save(str(other))
    changed = Tokenizer.from_file(str(other))
    changed.add_tokens(["porcelain"])
    changed.save(str(other))
    with pytest.raises(TokenizerMismatchError, match="reads other tokens"):
        train_towers(data, replace(CONFIG, ensemble=2, ensemble_models=f"tiny,{other.parent}"), Places(tmp_path))


@pytest.mark.parametrize("values", [{"distil_weight": 1.5}, {"ensemble": 0}])
def test_impossible_ensembles_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        replace(CONFIG, **values)  # type: ignore[arg-type]
