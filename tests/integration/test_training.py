"""Training on a real database: the run's own figures are reproduced, popularity is beaten, the bundle says what it is."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from features.bundle import Manifest, read_bundle
from server.inference.model import load_model
from server.settings import ServerSettings
from tests.integration import serving
from tests.integration.test_processes import environment, run
from training.config import TrainConfig
from training.dataset import open_shop
from training.evaluate import metrics_of
from training.pairs import train_pairs
from training.rating import Ratings, read_ratings
from training.run import TrainResult, evaluate, train
from training.tracking import HISTORY, read_history


def test_evaluating_a_run_again_gives_the_figures_it_was_saved_with(trained: tuple[ServerSettings, TrainResult], tmp_path: Path) -> None:
    """Fails when a feature is missing while training and there later (or the reverse), as profiles once were."""
    settings, result = trained
    rankings = tmp_path / "rankings.jsonl"
    everybody = metrics_of(evaluate(settings, result.run_dir, rankings=rankings))
    assert everybody["evaluated_users"] == result.metrics["evaluated_users"]
    lines = [json.loads(line) for line in rankings.read_text().splitlines()]
    assert len(lines) >= everybody["evaluated_users"]
    assert all(len(line["items"]) == len(set(line["items"])) for line in lines)
    for name in ("ndcg_at_10", "hr_at_10", "recall_at_20", "tower_ndcg_at_10", "collaborative_ndcg_at_10", "coverage"):
        assert math.isclose(everybody[name], result.metrics[name], abs_tol=1e-6), name


def test_the_model_beats_popularity_clearly(trained: tuple[ServerSettings, TrainResult]) -> None:
    metrics = trained[1].metrics
    assert metrics["ndcg_at_10"] > 3 * max(metrics["popularity_ndcg_at_10"], 0.01)


def test_the_bundle_names_its_contract_window_and_parity(
    trained: tuple[ServerSettings, TrainResult], bundled: tuple[Path, Manifest]
) -> None:
    result, manifest = trained[1], bundled[1]
    assert manifest.contract.name == "ranking_v1"
    assert {"encoder", "encoder_ragged_batch", "ranker"} <= set(manifest.parity)
    assert max(manifest.parity.values()) < 1e-4
    assert manifest.metrics["ndcg_at_10"] == pytest.approx(result.metrics["ndcg_at_10"])
    assert serving.NOW - timedelta(days=95) < manifest.data_from < manifest.data_until <= serving.NOW


@pytest.mark.long
def test_variants_of_an_encoder_are_measured_and_a_good_one_is_exported(
    trained: tuple[ServerSettings, TrainResult], tmp_path: Path
) -> None:
    settings, result = trained
    measured = run(settings, "quantize", COLUMNS="200")
    assert measured.returncode == 0, measured.stderr[-1000:]
    assert all(name in measured.stdout for name in ("fp32", "fused", "fp16", "int8", "int4", "static", "dynamic"))
    figures = {one["variant"]: one for one in json.loads((result.run_dir / "variants.json").read_text())}
    assert figures["fp32"]["ndcg_at_10"] == pytest.approx(result.metrics["tower_validation_ndcg_at_10"], abs=1e-6)
    assert figures["fp32"]["ndcg_loss"] == 0.0
    assert "ranges come from the batch" in " ".join(measured.stdout.split())
    exported = run(settings, "export", "--out", str(tmp_path / "bundle"), "--encoder", "static", "--fp16")
    assert exported.returncode == 0, exported.stderr[-1000:]
    manifest = read_bundle(tmp_path / "bundle")
    assert manifest.metrics["encoder_validation_ndcg_loss"] == pytest.approx(figures["static"]["ndcg_loss"], abs=1e-6)
    model = load_model(tmp_path / "bundle", provider="cpu", threads=2)  # golden outputs hold on the server's side
    assert model.item_vector("a red cup").shape == (manifest.vector_size,)
    refused = run(settings, "export", "--out", str(tmp_path / "none"), "--encoder", "dynamic")
    assert refused.returncode == 2
    assert "ranges come from the batch" in " ".join(refused.stderr.replace("│", " ").split())


@pytest.mark.long
def test_a_search_finds_a_configuration_and_an_ensemble_trains_with_it(trained: tuple[ServerSettings, TrainResult]) -> None:
    settings, _ = trained
    options = ("--preset", "tiny", "--set", "max_steps=4", "--study", "cli", "--space", "learning_rate=1e-4:1e-2:log", "--pruner", "none")
    for trials in ("1", "2"):  # the second goes on with the first one's study
        tuned = run(settings, "tune", "--trials", trials, *options)
        assert tuned.returncode == 0, tuned.stderr[-1000:]
        assert "best validation NDCG@10" in tuned.stdout
    best = settings.data_dir / "studies" / "cli" / "best.json"
    other = run(settings, "tune", "--trials", "3", *options, "--set", "temperature=0.1")
    assert other.returncode == 2
    assert "name another" in " ".join(other.stderr.replace("│", " ").split())
    config = replace(TrainConfig.load(best), ensemble=2, evaluation_users=20, ranker_epochs=2)
    result = train(settings, config, now=datetime(2026, 1, 1, tzinfo=UTC))
    assert result.metrics["tower_validation_ndcg_at_10"] == result.metrics["ensemble_validation_ndcg_at_10"]
    assert {"tower_0_validation_ndcg_at_10", "tower_1_validation_ndcg_at_10"} <= set(result.metrics)
    assert len(evaluate(settings, result.run_dir).users) > 20
    distilled = run(settings, "train", "--distil", "--preset", "tiny")
    assert distilled.returncode == 2
    assert "nothing to distil" in distilled.stderr


def test_a_cut_inside_the_training_period_is_refused(trained: tuple[ServerSettings, TrainResult]) -> None:
    settings, result = trained
    with pytest.raises(ValueError, match="trained on"):
        evaluate(settings, result.run_dir, cut=serving.NOW - timedelta(days=60))


def test_a_training_killed_and_resumed_ends_with_the_figures_of_one_that_was_not(
    trained: tuple[ServerSettings, TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill -9 of the command itself, after a checkpoint."""
    settings, result = trained
    assigned = [word for text in ("evaluation_users=0", "checkpoint_steps=3") for word in ("--set", text)]
    command = [sys.executable, "-m", "cli.main", "train", "--preset", "tiny", *assigned]
    log = settings.data_dir / "killed.log"
    known = set((settings.data_dir / "runs").iterdir())
    with log.open("w") as lines, subprocess.Popen(command, env=environment(settings), stdout=lines, stderr=lines) as process:
        try:
            until = time.monotonic() + 250
            while not list((settings.data_dir / "runs").glob("*/checkpoints/tower/step-*")):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.02)
        finally:
            process.kill()
    (run_dir,) = set((settings.data_dir / "runs").iterdir()) - known
    assert not (run_dir / "run.json").exists()
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["train", "--resume", str(run_dir)])
    assert done.exit_code == 0, done.output
    record = json.loads((run_dir / "run.json").read_text())
    assert record["metrics"] == pytest.approx(result.metrics, abs=1e-9)
    assert record["steps"] == result.steps
    assert not list(run_dir.glob("begun*"))
    assert [step for step, _ in read_history(run_dir / HISTORY)["train/loss"]] == list(
        range(1, result.steps + 1)
    )  # one curve over the kill
    again = CliRunner().invoke(app, ["train", "--resume", str(run_dir)])
    assert isinstance(again.exception, FileNotFoundError)
    assert CliRunner().invoke(app, ["train", "--resume", str(run_dir), "--set", "seed=1"]).exit_code == 2


def test_ratings_are_regressed_beside_the_mean(trained: tuple[ServerSettings, TrainResult]) -> None:
    """The sample shop's stars are thrown like dice, whoever gives them: there is nothing to learn but the mean."""
    settings, _ = trained
    result = train_pairs(settings, Ratings(), TrainConfig.tiny())
    assert 0.8 < result.metrics["mean_rmse"] < 1.5
    assert result.metrics["rmse"] == pytest.approx(result.metrics["mean_rmse"], rel=0.2)
    assert result.metrics["parity"] < 1e-4
    assert {path.name for path in result.run_dir.iterdir()} == {
        "rating.onnx",
        "rating.safetensors",
        "rating.json",
        "metrics.json",
        "invariance.json",
        "tensorboard",
        "history.jsonl",
    }
    curves = read_history(result.run_dir / HISTORY)
    assert {"train/loss", "validation/rmse", "test/rmse"} <= curves.keys()
    assert curves["test/rmse"] == [(result.steps, result.metrics["rmse"])]


def test_a_rating_and_its_review_count_once(trained: tuple[ServerSettings, TrainResult]) -> None:
    ratings = read_ratings(open_shop(trained[0]))
    assert len({(rating.user_id, rating.item) for rating in ratings}) == len(ratings) > 50
    assert {rating.value for rating in ratings} == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert [rating.time for rating in ratings] == sorted(rating.time for rating in ratings)
