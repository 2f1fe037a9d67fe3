"""The shop's sequence tower: it learns the shop, survives its folder and its export, and the server reads as the training did."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from features.behaviour import Activity, Behaviour
from features.bundle import FORMAT, GOLDEN, TOWER, FeatureContract, Manifest
from features.signals import CollaborativeWeights
from server.inference.model import LoadedModel, load_model
from tests.unit.training_shop import DAY, START, activity_before, chain_log, item_table
from training import checkpoint
from training.checkpoint import RunRecord, Trained
from training.config import TrainConfig
from training.dataset import TrainingDataError
from training.export import BundleContext, ParityError, check_tower, write_bundle
from training.labels import keys_of, visit_labels
from training.ranker import Ranker
from training.sequence_model import SequenceModel
from training.sequence_run import SequenceData, spec_of, train_model
from training.tracking import Trackers, open_trackers
from training.train import TowerReport
from training.windows import training_windows

# Small and sharp, so that the rule of the shop is learned in two seconds.
CONFIG = replace(
    TrainConfig.tiny(),
    tower="sequence",
    max_steps=0,
    sequence_epochs=12,
    sequence_dropout=0.1,
    sequence_input_dropout=0.1,
    sequence_learning_rate=5e-3,
    sequence_length=20,
    patience=12,
)
TABLE, LATER = item_table(), item_table(14)  # two items are listed after the training
SPLIT = START + 40 * DAY
CONTEXT = BundleContext(
    name="test",
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    contract=FeatureContract(name="ranking_v1", features=()),
    metrics={},
    cut=10**15,
    first_event=0,
    last_event=2 * 10**15,
)


def searching(activity: Activity) -> Activity:
    """The activity with a search before everything else, so that texts are in play."""
    oldest = activity.behaviours[-1].occurred_at
    return replace(activity, behaviours=(*activity.behaviours[:49], Behaviour("", "search", "app", oldest - DAY, "a cup")))


def data() -> SequenceData:
    log = chain_log(customers=80)
    windows = training_windows(log, visit_labels(log, ("purchase",), start=START, end=SPLIT), until=SPLIT, read=20)
    validation = visit_labels(log, ("purchase",), start=SPLIT, end=START + 99 * DAY)[:60]
    joined = [activity_before(log, user, time, TABLE) for user, time in [(w.user_id, w.time) for w in windows] + keys_of(validation)]
    activities = [searching(activity) for activity in joined]
    windows = [replace(window, foreseen=((), *window.foreseen)) for window in windows]
    return SequenceData(windows, activities[: len(windows)], validation, activities[len(windows) :])


def train(config: TrainConfig, folder: Path) -> tuple[Trained, TowerReport]:
    with open_trackers(("tensorboard",), folder) as tracker:
        model, tokenizer, report = train_model(TABLE, data(), config=config, tracker=tracker)
    ranker = Ranker(config.ranker_hidden)
    ranker.normalise_by(np.random.default_rng(0).normal(2, 3, (99, 23)).astype(np.float32))
    return Trained(config, model, tokenizer, ranker.eval(), TABLE.ids), report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, TowerReport, Path]:
    folder = tmp_path_factory.mktemp("tensorboard")
    return *train(CONFIG, folder), folder


@pytest.fixture(scope="module")
def trained(run: tuple[Trained, TowerReport, Path]) -> Trained:
    return run[0]


@pytest.fixture(scope="module")
def bundle(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("bundle")
    return folder, write_bundle(folder, trained, table=LATER, collaborative=CollaborativeWeights.empty(14), context=CONTEXT)


@pytest.fixture(scope="module")
def served(bundle: tuple[Path, Manifest]) -> LoadedModel:
    return load_model(bundle[0], provider="cpu", threads=1)


def test_it_learns_what_the_shop_does(run: tuple[Trained, TowerReport, Path]) -> None:
    _, report, folder = run
    assert report.ndcg_at_10 > report.untrained_ndcg_at_10 + 0.25
    assert report.ndcg_at_10 > 0.7
    assert report.steps > 0
    assert any(folder.iterdir())  # TensorBoard's log


def test_the_same_seed_gives_the_same_tower(trained: Trained, tmp_path: Path) -> None:
    config = replace(CONFIG, max_steps=4)
    (left, _), (right, _), (other, _) = (train(c, tmp_path) for c in (config, config, replace(config, seed=5)))
    weights = [model.tower.state_dict() for model in (left, right, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["tower.identity.weight"], weights[2]["tower.identity.weight"])


def test_the_vocabulary_is_what_the_training_met() -> None:
    spec = spec_of(data().activities, CONFIG)
    assert spec.actions == ("purchase", "search", "view")
    assert spec.channels == ("app", "web")
    assert (spec.length, spec.text_count) == (20, CONFIG.sequence_texts)


def test_nothing_to_learn_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="too few events"):
        train_model(TABLE, SequenceData([], [], [], []), config=CONFIG, tracker=Trackers())


def test_a_run_folder_gives_back_the_model(trained: Trained, tmp_path: Path) -> None:
    record = RunRecord(tuple(trained.item_ids), 10**15, {}, steps=3, seconds=1.5)
    checkpoint.save(trained, record, tmp_path)
    loaded, again = checkpoint.load(tmp_path)
    assert again == record
    vectors = trained.item_vectors(TABLE)
    activities = data().activities[:5]
    assert np.array_equal(loaded.item_vectors(TABLE), vectors)
    assert np.array_equal(loaded.user_vectors(activities, TABLE, vectors), trained.user_vectors(activities, TABLE, vectors))


def test_the_server_reads_a_customer_as_the_training_did(trained: Trained, served: LoadedModel) -> None:
    """Train/serve skew: the same activity gives the same vector in PyTorch as from the bundle, whatever happened in it."""
    vectors = trained.item_vectors(LATER)
    assert np.array_equal(served.item_vectors, vectors)
    activities = [activity.with_context(("i03", "gone"), "") for activity in data().activities[:20]]
    activities += [Activity(1, (Behaviour("", "message", "store", 5, "where is my pan"),)), Activity(0)]
    expected = trained.user_vectors(activities, LATER, vectors)
    for activity, vector in zip(activities, expected, strict=True):
        seen = served.user_vector(activity, LATER, vectors)
        assert (seen is None) == (not vector.any())
        if seen is not None:
            assert np.abs(seen - vector).max() < 1e-5
            assert np.linalg.norm(seen) == pytest.approx(1, abs=1e-5)
    assert expected[-2].any()


def test_the_manifest_and_the_golden_values_are_of_the_tower(bundle: tuple[Path, Manifest], trained: Trained) -> None:
    folder, manifest = bundle
    assert isinstance(trained.tower, SequenceModel)
    assert (manifest.tower, manifest.format, manifest.sequence) == ("sequence", FORMAT, trained.tower.spec)
    assert manifest.vector_size == CONFIG.sequence_width
    assert set(manifest.parity) >= {"encoder", "encoder_ragged_batch", "ranker", "tower"}
    assert max(manifest.parity.values()) < 1e-5
    assert manifest.invariance[TOWER]["padding"].bit_equal
    golden = np.load(folder / GOLDEN)
    assert golden["tower_length"].tolist() == [1, 2, 11, 20]
    assert len(np.unique(golden["tower_user_vectors"].round(3), axis=0)) == 4


def test_a_graph_of_another_tower_is_refused(bundle: tuple[Path, Manifest], trained: Trained, tmp_path: Path) -> None:
    for name in (TOWER, GOLDEN):
        (tmp_path / name).write_bytes((bundle[0] / name).read_bytes())
    other, _ = train(replace(CONFIG, seed=9, max_steps=2), tmp_path / "tensorboard")
    assert isinstance(other.tower, SequenceModel)
    with pytest.raises(ParityError, match="tower"):
        check_tower(other.tower, trained.item_vectors(TABLE), tmp_path)


def test_an_item_listed_later_is_its_text_as_the_server_encodes_it(trained: Trained, served: LoadedModel) -> None:
    for row in range(14):
        cold = np.abs(served.item_vector(LATER.texts[row]) - served.item_vectors[row]).max()
        assert (cold < 1e-5) == (row >= 12)
    newcomer = Activity(1, (Behaviour("i13", "view", "web", 10**15),))
    expected = trained.user_vectors([newcomer], LATER, served.item_vectors)[0]
    seen = served.user_vector(newcomer, LATER, served.item_vectors)
    assert seen is not None
    assert np.abs(seen - expected).max() < 1e-5
    other = served.user_vector(Activity(1, (Behaviour("i11", "view", "web", 10**15),)), LATER, served.item_vectors)
    assert not np.allclose(seen, other)


def test_the_encoder_says_of_one_text_what_the_tower_says_of_one_search(served: LoadedModel, trained: Trained) -> None:
    search = Activity(1, (Behaviour("", "search", "", 10**15, "a cup"),))
    expected = served.user_vector(search, TABLE, served.item_vectors)
    ids = np.array([served.tokenizer.encode("a cup").ids], np.int64)
    seen = served.encoder.run(["user_vector"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0]
    assert expected is not None
    assert np.abs(seen - expected).max() < 1e-5
