"""`concord train --since-last` on a real shop: events arrive, the active model is updated, and only a better one answers."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from click.testing import Result
from safetensors.numpy import load_file
from typer.testing import CliRunner

from cli.main import app
from concord import Concord, user
from features.bundle import COLLABORATIVE, MANIFEST, TRAINING, Manifest, checksums, write_manifest
from features.catalogue import Item, publish_epoch, upsert_items
from features.classifiers import put_into
from features.importers import import_events, load_mapping
from features.models import ModelVersion, list_models
from features.sample_shop import generate, write
from features.sample_shop.shop import Shop
from server.settings import ServerSettings
from tests.integration import serving
from tests.integration.fixtures import NewShop
from tests.integration.test_processes import environment
from tests.integration.times import NOW
from tests.unit.bundles import write_classifier_folder
from training.config import TrainConfig
from training.events import to_micros
from training.ranker import Ranker
from training.runs import Begun, begin
from training.text import load_tokenizer
from training.warm_start import load_origin, save_origin

# Budgets of an update in these tests: seconds, not minutes.
SMALL = (
    "--min-customers",
    "10",
    *(word for field in ("ranker_labels=80", "evaluation_users=40", "threads=1") for word in ("--set", field)),
)


@dataclass
class Growing:
    """A shop whose events arrive day by day, and the folder they are imported from."""

    settings: ServerSettings
    future: Shop
    folder: Path

    def arrive(self, days: int) -> None:
        """Imports what happens within so many days after NOW; what is there already is not stored twice."""
        events = tuple(event for event in self.future.events if event.occurred_at < NOW + timedelta(days=days))
        write(replace(self.future, events=events), self.folder)
        source, rejects = self.folder / "events.parquet", self.folder / "rejects.jsonl"
        import_events(self.settings.postgres_dsn, source, load_mapping("sample_shop"), rejects=rejects)

    def models(self) -> list[ModelVersion]:
        """All published versions, newest first."""
        with psycopg.connect(self.settings.postgres_dsn) as connection:
            return list_models(connection)

    @property
    def active(self) -> str:
        """The version the fleet answers with."""
        return next(model.model_version for model in self.models() if model.active)

    @property
    def runs(self) -> list[Path]:
        """The run folders, oldest first."""
        return sorted((self.settings.data_dir / "runs").glob("*"))

    @property
    def report(self) -> dict[str, Any]:
        """What the newest run says of itself."""
        told: dict[str, Any] = json.loads((self.runs[-1] / "update.json").read_text())
        return told


def with_an_untrained_ranker(bundle: Path, folder: Path) -> Path:
    """Writes a bundle whose model ranks badly: an update of it has something to win. It also knows two intents."""
    shutil.copytree(bundle, folder)
    origin = load_origin(folder / TRAINING)
    torch.manual_seed(0)  # left to chance, one in six puts nothing wanted into the first ten: all are alike then, and nothing is compared
    ranker = Ranker(origin.trained.config.ranker_hidden)
    ranker.mean, ranker.scale = origin.trained.ranker.mean, origin.trained.ranker.scale
    save_origin(replace(origin, trained=replace(origin.trained, ranker=ranker)), folder / TRAINING)
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    scratch = folder.with_name("classifier")
    write_classifier_folder(scratch, "intent", ("ask", "buy"), load_tokenizer("tiny"))
    changes = {"model_version": "poor", "format": 3, "classifiers": put_into(folder, [scratch]), "files": dict(checksums(folder))}
    write_manifest(folder, manifest.model_copy(update=changes))
    return folder


def carried(model: ModelVersion) -> dict[str, dict[str, Any]]:
    """What a published bundle holds of an update's interest: tensors by name."""
    folder = Path(model.uri.removeprefix("file:"))
    with np.load(folder / COLLABORATIVE) as arrays:
        return {TRAINING: dict(load_file(folder / TRAINING)), COLLABORATIVE: dict(arrays)}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def shop(new_shop: NewShop, tmp_path_factory: pytest.TempPathFactory) -> Growing:
    """The sample shop as it is trained on, no model, and the months to come: the same customers and items, other visits."""
    settings, folder = new_shop(), tmp_path_factory.mktemp("sample")
    serving.fill(settings, folder)
    return Growing(settings, generate(4, end=NOW + timedelta(days=90), users=150), folder)


@pytest.fixture(scope="module")
def updated(shop: Growing, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Growing:
    """The shop with a poor model, published and active."""
    serving.deploy(shop.settings, with_an_untrained_ranker(bundle, tmp_path_factory.mktemp("bundle") / "poor"))
    return shop


@pytest.fixture
def command(shop: Growing, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs `concord train` with these words in this process."""
    for name, value in environment(shop.settings).items():
        monkeypatch.setenv(name, value)

    def call(*words: str) -> Result:
        return CliRunner().invoke(app, ["train", *words], env={"COLUMNS": "200"})

    return call


def test_without_an_active_model_there_is_nothing_to_update(command: Any) -> None:
    done = command("--since-last")
    assert done.exit_code == 2
    assert "no model is active" in done.output


@pytest.mark.parametrize(
    "words", ["--dry-run", "--margin 0.1", "--since-last --preset tiny", "--since-last --task clicks", "--since-last --resume x"]
)
def test_options_that_do_not_belong_together_are_refused(command: Any, words: str) -> None:
    done = command(*words.split())
    assert done.exit_code == 2
    assert "only with --since-last" in done.output or "keeps the active model's" in done.output


def test_without_new_events_nothing_is_done(updated: Growing, command: Any) -> None:
    done = command("--since-last")
    assert (done.exit_code, "Nothing done: no events after" in done.output) == (0, True), done.output
    assert (len(updated.models()), updated.runs) == (1, [])


def test_too_few_new_events_are_left_for_later(updated: Growing, command: Any) -> None:
    updated.arrive(5)
    done = command("--since-last")
    assert (done.exit_code, "30 are needed" in done.output) == (0, True), done.output
    assert (len(updated.models()), updated.runs) == (1, [])


def test_a_dry_run_and_a_wrong_configuration_change_nothing(updated: Growing, command: Any) -> None:
    updated.arrive(30)
    done = command("--since-last", "--dry-run", "--replay-fraction", "0.25")
    assert (done.exit_code, "Dry run" in done.output) == (0, True), done.output
    assert "replayed" in done.output
    refused = command("--since-last", "--set", "ranker_hidden=8")
    assert (refused.exit_code, "shape of the network" in refused.output) == (2, True), refused.output
    assert (len(updated.models()), updated.runs) == (1, [])


def test_a_challenger_that_learns_nothing_ranks_as_the_champion_and_does_not_replace_it(updated: Growing, command: Any) -> None:
    """It starts from the champion's weights, then: with a learning rate of almost zero both rank alike, to the last place.

    What is published is the champion with item-to-item weights fitted anew, for training on gained nothing.
    """
    champion = updated.active
    fields = ("learning_rate=1e-12", "head_learning_rate=1e-12", "ranker_epochs=0", "max_steps=1")
    done = command("--since-last", "--margin", "0.9", *SMALL, *(word for field in fields for word in ("--set", field)))
    assert (done.exit_code, "stays published and inactive" in done.output) == (0, True), done.output
    assert updated.active == champion
    (challenger,) = [model for model in updated.models() if not model.active]
    report = updated.report
    verdict = report["verdict"]
    assert (report["champion"], report["challenger"], verdict["wins"]) == (champion, challenger.model_version, False)
    assert report["refreshed_metrics"] == report["trained_metrics"]
    assert report["trained_metrics"]["hr_at_10"] > 0
    assert verdict["training_gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert verdict["kept"] == "refreshed"
    before, after = (carried(model) for model in (updated.models()[-1], challenger))
    assert same(before[TRAINING], after[TRAINING])  # the very model
    assert not same(before[COLLABORATIVE], after[COLLABORATIVE])  # with weights of the events that have come since
    assert challenger.manifest["data_until"] > updated.models()[-1].manifest["data_until"]
    assert report["counts"]["new_visits"] > 0
    assert report["counts"]["replayed_visits"] > 0
    assert challenger.manifest["settings"]["warm_start"] == champion
    assert challenger.manifest["classifiers"]["intent"]["labels"] == ["ask", "buy"]  # carried on: an update learns nothing about them
    assert challenger.manifest["metrics"]["training_gain_ndcg_at_10"] == 0.0
    assert challenger.manifest["metrics"]["ndcg_at_10"] == report["refreshed_metrics"]["ndcg_at_10"]
    assert datetime.fromisoformat(report["cut"]) > datetime.fromisoformat(updated.models()[-1].manifest["data_until"])
    assert "does not win" in (updated.runs[-1] / "update.md").read_text()


def test_what_was_compared_already_is_not_trained_again(updated: Growing, command: Any) -> None:
    done = command("--since-last")
    assert (done.exit_code, "and is not active" in done.output) == (0, True), done.output
    assert (len(updated.models()), len(updated.runs)) == (2, 2)


def test_an_update_that_was_broken_off_is_begun_anew(updated: Growing, command: Any, tmp_path: Path) -> None:
    begin(tmp_path, Begun("update", TrainConfig.tiny(), to_micros(NOW)))
    done = command("--resume", str(tmp_path))
    assert (done.exit_code, "begins it anew" in " ".join(done.output.split())) == (2, True), done.output


async def test_a_better_challenger_is_activated_on_the_servers_that_run(updated: Growing) -> None:
    """With a catalogue that has changed since: one item more, one less."""
    champion, settings = updated.active, updated.settings
    updated.arrive(40)
    with psycopg.connect(settings.postgres_dsn) as connection:
        upsert_items(connection, [Item("a-new-one", "Enamel mug", price_micros=9_000_000, currency="USD")])
        connection.execute("UPDATE items SET removed = true WHERE item_id = (SELECT min(item_id) FROM items WHERE item_id <> 'a-new-one')")
        publish_epoch(connection)
    async with serving.served(settings) as address:
        words = ("-m", "cli.main", "train", "--since-last", *SMALL, "--set", "max_steps=5")
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        told, complained = (text.decode() for text in await process.communicate())
        assert process.returncode == 0, told + complained[-2000:]
        report = updated.report
        assert report["verdict"]["wins"], told
        assert report["verdict"]["kept"] == "trained"
        assert report["verdict"]["training_gain"]["mean"] > 0.02
        assert f"active: {report['challenger']} (before: {champion}" in " ".join(told.split())
        async with Concord(address, channel="web", timeout=10.0) as web:
            answer = await web.recommend(user("u00002"), surface="home", limit=3)
    assert updated.active == report["challenger"] == answer.versions.model_version
