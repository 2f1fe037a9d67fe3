"""The model card of a real run: every section, figures that can be computed another way, and its place in the bundle."""

import json
import re
from functools import partial
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner

from cli.main import app
from features.bundle import CARD_HTML, CARD_MARKDOWN, Manifest, read_bundle
from server.settings import ServerSettings
from tests.unit.test_training_card import SECTIONS, Page, plots
from training.card import ModelCard, number, render_markdown
from training.facts import Facts, base_licence
from training.results import Evaluation
from training.run import TrainResult
from training.run_card import card_of_run


@pytest.fixture(scope="module")
def card(trained: tuple[ServerSettings, TrainResult], bundled: tuple[Path, Manifest]) -> ModelCard:
    return card_of_run(trained[1].run_dir, bundled[1])


@pytest.fixture(scope="module")
def evaluation(trained: tuple[ServerSettings, TrainResult]) -> Evaluation:
    return Evaluation.load(trained[1].run_dir)


def test_a_bundle_carries_its_card_with_every_section(bundled: tuple[Path, Manifest]) -> None:
    folder, manifest = bundled
    assert {CARD_HTML, CARD_MARKDOWN} <= set(manifest.files)
    assert read_bundle(folder) == manifest  # checksums of the cards among them
    page, text = (folder / CARD_HTML).read_text(), (folder / CARD_MARKDOWN).read_text()
    for title in SECTIONS.values():
        assert f"<h2>{title}</h2>" in page
        assert f"\n## {title}\n" in text
    assert manifest.model_version in Page(page).text
    assert len(plots(page)) == 4 + 1 + 5 + 1  # learning curves, calibration, five dimensions, popularity


def test_the_metrics_are_the_runs_own_and_their_intervals_hold_them(card: ModelCard, trained: tuple[ServerSettings, TrainResult]) -> None:
    shown = {metric.name: metric for metric in card.metrics}
    for name, value in trained[1].metrics.items():
        assert shown[name].value == pytest.approx(value, abs=1e-9), name
    for name in ("ndcg_at_10", "hr_at_10", "recall_at_20", "tower_ndcg_at_10", "candidate_recall"):
        assert shown[name].low < shown[name].value < shown[name].high
    assert shown["ndcg_at_10_over_recent_popularity"].low > 0  # the sample shop is that regular
    assert f"| ndcg\\_at\\_10 | {number(trained[1].metrics['ndcg_at_10'])} |" in render_markdown(card)


def test_segments_count_the_customers_they_name(
    card: ModelCard, evaluation: Evaluation, trained: tuple[ServerSettings, TrainResult]
) -> None:
    """The channel of each visit is read anew from the events, one customer at a time."""
    settings, result = trained
    cut = json.loads((result.run_dir / "run.json").read_text())["cut"]
    counted: dict[str, int] = {}
    with psycopg.connect(settings.postgres_dsn) as connection:
        for user in evaluation.users:
            events = connection.execute(
                "SELECT channel FROM events WHERE user_id = %s AND action = 'purchase' AND item_id IS NOT NULL "
                "AND extract(epoch FROM occurred_at) * 1000000 >= %s ORDER BY occurred_at, event_id",
                [user.user_id, cut],
            ).fetchall()
            counted[events[0][0]] = counted.get(events[0][0], 0) + 1
            earlier = connection.execute(
                "SELECT DISTINCT channel FROM (SELECT channel FROM events WHERE user_id = %s AND "
                "extract(epoch FROM occurred_at) * 1000000 < %s ORDER BY occurred_at DESC, event_id DESC LIMIT 50) x ORDER BY 1",
                [user.user_id, cut],
            ).fetchall()
            assert user.history_channels == tuple(row[0] for row in earlier)
    by_channel = {segment.name: segment for segment in card.segments if segment.dimension == "channel of the visit"}
    assert {name: segment.customers for name, segment in by_channel.items()} == counted
    assert len(counted) > 3
    mean = sum(segment.customers * segment.metrics[0].value for segment in by_channel.values()) / len(evaluation.users)
    assert mean == pytest.approx(result.metrics["ndcg_at_10"])
    known = [segment for segment in card.segments if segment.dimension == "new and known customers"]
    assert sum(segment.customers for segment in known) == len(evaluation.users)


def test_popularity_and_calibration_are_those_of_the_recommendations(card: ModelCard, evaluation: Evaluation) -> None:
    assert card.popularity is not None
    assert sum(card.popularity.shown) == 10 * len(evaluation.users)
    assert sum(card.popularity.taken) == sum(len(user.wanted) for user in evaluation.users)
    assert card.calibration is not None
    assert len(card.calibration.probability) == 10 * len(evaluation.users)
    first_hits = sum(user.rankings[""][0] in user.wanted for user in evaluation.users)
    assert sum(took > 0 for took in card.calibration.observed[::10]) == first_hits


def test_the_window_the_curves_and_the_hardware_are_there(card: ModelCard, trained: tuple[ServerSettings, TrainResult]) -> None:
    settings, result = trained
    with psycopg.connect(settings.postgres_dsn) as connection:
        row = connection.execute("SELECT count(*), count(DISTINCT user_id), min(occurred_at) FROM events").fetchone()
    assert row is not None
    assert (card.data["events"], card.data["customers"]) == row[:2]
    assert card.data["events from"] == f"{row[2]:%Y-%m-%d %H:%M} UTC"
    curves = {curve.name: curve for curve in card.curves}
    assert set(curves) >= {"train/loss", "validation/ndcg_at_10", "ranker/loss", "ranker/validation_ndcg_at_10"}
    assert len(curves["train/loss"].steps) == result.steps
    assert max(curves["validation/ndcg_at_10"].values) == result.metrics["tower_validation_ndcg_at_10"]
    assert {"processor", "memory", "time of the whole run"} <= set(card.training)
    assert card.base_licence == "none: random weights"
    assert base_licence("") == "apache-2.0"


def test_a_run_of_an_earlier_release_has_a_shorter_card(trained: tuple[ServerSettings, TrainResult], tmp_path: Path) -> None:
    for name in ("run.json", "config.json"):
        (tmp_path / name).write_bytes((trained[1].run_dir / name).read_bytes())
    card = card_of_run(tmp_path)
    assert {metric.name: metric.value for metric in card.metrics} == trained[1].metrics
    assert (card.segments, card.calibration, card.popularity, list(card.curves)) == ((), None, None, [])
    assert "## Calibration" not in render_markdown(card)
    with pytest.raises(FileNotFoundError):
        Facts.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        card_of_run(tmp_path / "nothing")


def test_reports_from_the_command_line(trained: tuple[ServerSettings, TrainResult], bundled: tuple[Path, Manifest], tmp_path: Path) -> None:
    settings, result = trained
    json_file, page, text = tmp_path / "e.json", tmp_path / "card.html", tmp_path / "card.md"
    named = {"CONCORD_POSTGRES_DSN": settings.postgres_dsn, "CONCORD_REDIS_URL": settings.redis_url}
    command = partial(CliRunner().invoke, app, env=named | {"CONCORD_DATA_DIR": str(settings.data_dir), "COLUMNS": "200"})
    done = command(["evaluate", str(result.run_dir), "--by", "channel", "--by", "customer", "--json", str(json_file)])
    assert done.exit_code == 0, done.output
    for title in ("channel of the visit", "channels of the history", "new and known customers"):
        assert title in done.stdout
    assert "price of the wanted items" not in done.stdout
    written = json.loads(json_file.read_text())
    assert written["metrics"]["ndcg_at_10"]["value"] == pytest.approx(result.metrics["ndcg_at_10"], abs=1e-6)
    assert set(written["segments"]) == {"channel", "history_channel", "customer", "category", "price_band"}
    assert sum(part["customers"] for part in written["segments"]["channel"]) == result.metrics["evaluated_users"]
    assert re.search(rf"{written['segments']['channel'][0]['name']}\W+{written['segments']['channel'][0]['customers']}", done.stdout)
    assert command(["card", str(bundled[0]), "--html", str(page), "--markdown", str(text)]).exit_code == 0
    assert page.read_bytes() == (bundled[0] / CARD_HTML).read_bytes()
    assert text.read_bytes() == (bundled[0] / CARD_MARKDOWN).read_bytes()
    assert command(["card", str(result.run_dir)]).stdout == render_markdown(card_of_run(result.run_dir))
    assert command(["card"]).stdout.startswith("# Model card: ")  # of the newest run
    before = sorted((settings.data_dir / "runs").iterdir())
    missing = command(["train", "--track", "mlflow", "--preset", "tiny"])
    assert missing.exit_code == 2
    assert "mlflow is not installed" in " ".join(missing.output.split())
    assert sorted((settings.data_dir / "runs").iterdir()) == before  # nothing was begun
