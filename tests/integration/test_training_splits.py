"""A whole run split by sessions, with exposures as negatives: it is measured again to the same figures, and keeps no customers."""

import math
import uuid
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from tests.integration import serving
from tests.integration.fixtures import NewShop
from tests.integration.times import NOW
from training import run
from training.config import TrainConfig
from training.evaluate import metrics_of
from training.negatives import NegativeSampler


def test_a_run_split_by_sessions_is_measured_again_to_the_same_figures(
    new_shop: NewShop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = new_shop()
    serving.fill(settings, tmp_path, users=60)
    with psycopg.connect(settings.postgres_dsn) as connection:
        items = [row[0] for row in connection.execute("SELECT item_id FROM items ORDER BY 1 LIMIT 20")]
        for (user,) in connection.execute("SELECT user_id FROM users").fetchall():
            connection.execute(
                "INSERT INTO exposures (user_id, exposure_id, slate_id, channel, surface, user_version, model_version, index_version, "
                "offer_version, as_of, item_ids, scores, prices_micros, degraded, stale, answered_at) "
                "VALUES (%s, %s, 's', 'web', 'home', 1, '', 1, 1, %s, %s, '{}', '{}', false, false, '2026-02-01')",
                [user, uuid.uuid4(), NOW, items],
            )
    shown: list[int] = []
    draw = NegativeSampler.draw

    def watched(self: NegativeSampler, labels, targets):  # type: ignore[no-untyped-def]
        shown.extend(len(label.shown) for label in labels)
        return draw(self, labels, targets)

    monkeypatch.setattr(NegativeSampler, "draw", watched)
    config = replace(TrainConfig.tiny(), split="session", session_folds=2, exposure_negatives=1.0, max_steps=3, evaluation_users=0)
    result = run.train(settings, config)
    assert max(shown) > 10
    assert result.metrics["evaluated_users"] > 15
    assert result.metrics["ndcg_at_10"] > result.metrics["popularity_ndcg_at_10"]
    assert not (result.run_dir / "customers").exists()
    again = metrics_of(run.evaluate(settings, result.run_dir))
    for name in ("evaluated_users", "ndcg_at_10", "tower_ndcg_at_10", "collaborative_ndcg_at_10", "candidate_recall"):
        assert math.isclose(again[name], result.metrics[name], abs_tol=1e-6), name
