"""Training on a real database: the run's own figures are reproduced, popularity is beaten, the bundle says what it is."""

import json
import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from server.settings import ServerSettings
from tests.integration import serving
from tests.integration.fixtures import NewShop
from training.config import TrainConfig
from training.run import TrainResult, evaluate, export, train


@pytest.fixture(scope="module")
def trained(new_shop: NewShop, tmp_path_factory: pytest.TempPathFactory) -> tuple[ServerSettings, TrainResult]:
    settings = new_shop()
    serving.fill(settings, tmp_path_factory.mktemp("sample"))
    return settings, train(settings, replace(TrainConfig.tiny(), evaluation_users=0))


def test_evaluating_a_run_again_gives_the_figures_it_was_saved_with(trained: tuple[ServerSettings, TrainResult], tmp_path: Path) -> None:
    """Fails when a feature is missing while training and there later (or the reverse), as profiles once were."""
    settings, result = trained
    rankings = tmp_path / "rankings.jsonl"
    everybody = evaluate(settings, result.run_dir, rankings=rankings)
    assert everybody["evaluated_users"] == result.metrics["evaluated_users"]
    lines = [json.loads(line) for line in rankings.read_text().splitlines()]
    assert len(lines) >= everybody["evaluated_users"]
    assert all(len(line["items"]) == len(set(line["items"])) for line in lines)
    for name in ("ndcg_at_10", "hr_at_10", "recall_at_20", "tower_ndcg_at_10", "collaborative_ndcg_at_10", "coverage"):
        assert math.isclose(everybody[name], result.metrics[name], abs_tol=1e-6), name


def test_the_model_beats_popularity_clearly(trained: tuple[ServerSettings, TrainResult]) -> None:
    metrics = trained[1].metrics
    assert metrics["ndcg_at_10"] > 3 * max(metrics["popularity_ndcg_at_10"], 0.01)


def test_the_bundle_names_its_contract_window_and_parity(trained: tuple[ServerSettings, TrainResult], tmp_path: Path) -> None:
    settings, result = trained
    manifest = export(settings, result.run_dir, tmp_path / "bundle")
    assert manifest.contract.name == "ranking_v1"
    assert {"encoder", "encoder_ragged_batch", "ranker"} <= set(manifest.parity)
    assert max(manifest.parity.values()) < 1e-4
    assert manifest.metrics["ndcg_at_10"] == pytest.approx(result.metrics["ndcg_at_10"])
    assert serving.NOW - timedelta(days=95) < manifest.data_from < manifest.data_until <= serving.NOW


def test_a_cut_inside_the_training_period_is_refused(trained: tuple[ServerSettings, TrainResult]) -> None:
    settings, result = trained
    with pytest.raises(ValueError, match="trained on"):
        evaluate(settings, result.run_dir, cut=serving.NOW - timedelta(days=60))
