"""An exported bundle is whole, agrees with PyTorch, and a graph that does not is refused."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer

from features.bundle import COLLABORATIVE, ENCODER, GOLDEN, ITEMS, RANKER, TOKENIZER, FeatureContract, Manifest, read_bundle
from features.signals import CollaborativeWeights
from tests.unit.training_shop import item_table
from training import checkpoint
from training.checkpoint import RunRecord, Trained, new_tower
from training.config import TrainConfig
from training.export import BundleContext, ParityError, export_encoder, write_bundle, write_golden
from training.ranker import Ranker
from training.text import load_tokenizer

CONFIG = TrainConfig.tiny()
CONTEXT = BundleContext(
    name="test",
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    contract=FeatureContract(name="ranking_v1", features=()),
    metrics={"ndcg_at_10": 0.5},
    cut=10**15,
    first_event=0,
    last_event=2 * 10**15,
)


def make_trained() -> Trained:
    torch.manual_seed(3)
    tower = new_tower(CONFIG, 11)
    torch.nn.init.normal_(tower.residual.weight)
    tower.warm[:9] = 1.0
    ranker = Ranker(CONFIG.ranker_hidden)
    ranker.normalise_by(np.random.default_rng(0).normal(2, 3, (99, 23)).astype(np.float32))
    return Trained(CONFIG, tower.eval(), load_tokenizer("tiny"), ranker.eval(), item_table().ids[:11])  # the table has one item more


@pytest.fixture(scope="module")
def trained() -> Trained:
    return make_trained()


@pytest.fixture(scope="module")
def folder(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder, trained, table=item_table(), collaborative=CollaborativeWeights.empty(12), context=CONTEXT)
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return read_bundle(folder)


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_the_manifest_says_what_the_model_is(manifest: Manifest) -> None:
    assert manifest.model_version.startswith("test-")
    assert manifest.vector_size == 32
    assert manifest.metrics == {"ndcg_at_10": 0.5}
    assert manifest.settings["seed"] == CONFIG.seed
    assert "refitted" in str(manifest.settings["collaborative_weights_of"])
    assert set(manifest.parity) == {"encoder", "encoder_ragged_batch", "ranker"}
    assert max(manifest.parity.values()) < 1e-5
    assert set(manifest.invariance) == {ENCODER, RANKER}
    assert all(one.bit_equal for measured in manifest.invariance.values() for one in measured.values())


def test_the_graphs_have_the_shapes_the_server_expects(folder: Path) -> None:
    encoder = session(folder / ENCODER)
    assert [(i.name, i.type, len(i.shape)) for i in encoder.get_inputs()] == [
        ("input_ids", "tensor(int64)", 2),
        ("attention_mask", "tensor(int64)", 2),
    ]
    assert [o.name for o in encoder.get_outputs()] == ["user_vector", "item_vector"]
    ranker = session(folder / RANKER)
    assert [(i.name, i.shape) for i in ranker.get_inputs()] == [("features", [256, 23])]
    assert [(o.name, o.shape) for o in ranker.get_outputs()] == [("scores", [256])]


def test_item_vectors_are_the_servers_plus_the_residual(folder: Path, trained: Trained) -> None:
    table, items = item_table(), np.load(folder / ITEMS)
    assert tuple(items["item_ids"]) == table.ids
    assert tuple(items["content_hashes"]) == table.content_hashes
    assert np.allclose(np.linalg.norm(items["vectors"], axis=1), 1, atol=1e-5)
    tokenizer, encoder = Tokenizer.from_file(str(folder / TOKENIZER)), session(folder / ENCODER)
    for row, text in enumerate(table.texts):
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        cold = encoder.run(["item_vector"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0]
        same = np.allclose(cold, items["vectors"][row], atol=1e-5)
        assert same == (row >= 9)  # rows 9 and 10 were never taken, row 11 is new since the training


def test_golden_values_are_single_unpadded_runs(folder: Path) -> None:
    golden, encoder = np.load(folder / GOLDEN), session(folder / ENCODER)
    assert len(set(golden["lengths"].tolist())) > 2
    for k, length in enumerate(golden["lengths"]):
        ids = golden["input_ids"][k : k + 1, :length]
        user, item = encoder.run(["user_vector", "item_vector"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        assert np.allclose(user[0], golden["user_vectors"][k], atol=1e-6)
        assert np.allclose(item[0], golden["item_vectors"][k], atol=1e-6)
    scores = session(folder / RANKER).run(["scores"], {"features": golden["ranker_features"]})[0]
    assert np.allclose(scores, golden["ranker_scores"], atol=1e-6)
    assert np.std(scores) > 0


def test_collaborative_weights_are_over_the_same_items(folder: Path) -> None:
    weights = np.load(folder / COLLABORATIVE)
    assert len(weights["indptr"]) == len(np.load(folder / ITEMS)["item_ids"]) + 1
    assert {weights["indptr"].dtype.name, weights["indices"].dtype.name, weights["weights"].dtype.name} == {"int64", "int32", "float32"}


def test_a_graph_of_another_model_is_refused(folder: Path, trained: Trained, tmp_path: Path) -> None:
    for name in (ENCODER, RANKER):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other = make_trained()
    torch.nn.init.normal_(other.tower.user_head.weight)
    export_encoder(other, tmp_path / ENCODER)
    with pytest.raises(ParityError, match="encoder"):
        write_golden(tmp_path, trained, ["a cup", "a pan"])


def test_a_run_folder_gives_back_the_model(trained: Trained, tmp_path: Path) -> None:
    record = RunRecord(tuple(trained.item_ids), 10**15, {"ndcg_at_10": 0.25}, steps=3, seconds=1.5)
    checkpoint.save(trained, record, tmp_path)
    loaded, again = checkpoint.load(tmp_path)
    assert again == record
    assert loaded.config == CONFIG
    assert np.array_equal(loaded.item_vectors(item_table()), trained.item_vectors(item_table()))
    features = torch.randn(5, 23)
    assert torch.equal(loaded.ranker(features), trained.ranker(features))


def test_an_unfinished_run_is_not_loaded(trained: Trained, tmp_path: Path) -> None:
    replace(CONFIG, seed=1).save(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path)


def test_a_bundle_is_replaced_and_anything_else_is_left_alone(folder: Path, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError):
        write_bundle(tmp_path, trained, table=item_table(), collaborative=CollaborativeWeights.empty(12), context=CONTEXT)
    assert (tmp_path / "thesis.txt").exists()
    (folder / "stale").write_text("of an older bundle")
    manifest = write_bundle(folder, trained, table=item_table(), collaborative=CollaborativeWeights.empty(12), context=CONTEXT)
    assert "stale" not in manifest.files
    assert read_bundle(folder) == manifest
