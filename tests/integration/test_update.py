"""`concord train --since-last` on a real shop: events arrive, the active model is updated, and only a better one answers."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import Result
from typer.testing import CliRunner

from cli.main import app
from concord import Concord, user
from features.catalogue import Item, publish_epoch, upsert_items
from features.importers import import_folder, load_mapping
from features.models import ModelVersion, list_models
from features.sample_shop import generate, write
from features.sample_shop.shop import Shop
from server.settings import ServerSettings
from tests.integration import serving
from tests.integration.fixtures import NewShop
from tests.integration.test_processes import environment, run
from tests.integration.times import NOW, START
from training.config import TrainConfig
from training.run import export, train

# A first model that has hardly learned anything: one step of the tower, and a ranker as it was made.
POOR = replace(TrainConfig.tiny(), max_steps=1, ranker_epochs=0, threads=1)


@dataclass
class Growing:
    """A shop whose events arrive day by day, and the folder they are imported from."""

    settings: ServerSettings
    made: Shop
    folder: Path

    def arrive(self, until_day: int) -> None:
        """Imports everything up to a day; what is there already is not stored twice."""
        until = START + timedelta(days=until_day)
        write(replace(self.made, events=tuple(event for event in self.made.events if event.occurred_at < until)), self.folder)
        import_folder(self.settings.postgres_dsn, self.folder, load_mapping("sample_shop"), rejects=self.folder)

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
        return sorted((self.settings.data_dir / "runs").iterdir())


@pytest.fixture(scope="module")
def shop(new_shop: NewShop, tmp_path_factory: pytest.TempPathFactory) -> Growing:
    """Fifty days of a shop, and no model."""
    growing = Growing(new_shop(), generate(3, end=NOW, users=100, items=300), tmp_path_factory.mktemp("sample"))
    growing.arrive(50)
    return growing


@pytest.fixture(scope="module")
def updated(shop: Growing, tmp_path_factory: pytest.TempPathFactory) -> Growing:
    """The shop with a poor model, published and active."""
    bundle = tmp_path_factory.mktemp("bundle")
    export(shop.settings, train(shop.settings, POOR).run_dir, bundle)
    serving.deploy(shop.settings, bundle)
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
    "words", [("--dry-run",), ("--margin", "0.1"), ("--since-last", "--preset", "tiny"), ("--since-last", "--task", "clicks")]
)
def test_options_that_do_not_belong_together_are_refused(command: Any, words: tuple[str, ...]) -> None:
    done = command(*words)
    assert done.exit_code == 2
    assert "--since-last" in done.output or "keeps the active model's" in done.output


def test_without_new_events_nothing_is_done(updated: Growing, command: Any) -> None:
    before = (updated.models(), updated.runs)
    done = command("--since-last")
    assert (done.exit_code, "Nothing done: no events after" in done.output) == (0, True), done.output
    assert (updated.models(), updated.runs) == before


def test_too_few_new_events_are_left_for_later(updated: Growing, command: Any) -> None:
    updated.arrive(51)
    done = command("--since-last")
    assert (done.exit_code, "30 are needed" in done.output) == (0, True), done.output
    assert len(updated.models()) == 1


def test_a_dry_run_and_a_wrong_configuration_change_nothing(updated: Growing, command: Any) -> None:
    updated.arrive(70)
    before = (updated.models(), updated.runs)
    done = command("--since-last", "--dry-run", "--replay-fraction", "0.25")
    assert (done.exit_code, "Dry run" in done.output) == (0, True), done.output
    assert "replayed" in done.output
    refused = command("--since-last", "--set", "ranker_hidden=8")
    assert (refused.exit_code, "shape of the network" in refused.output) == (2, True), refused.output
    assert (updated.models(), updated.runs) == before


def test_a_challenger_that_learns_nothing_ranks_as_the_champion_and_does_not_replace_it(updated: Growing, command: Any) -> None:
    """It starts from the champion's weights, then: with a learning rate of almost zero both rank alike, to the last place."""
    champion = updated.active
    done = command("--since-last", "--set", "learning_rate=1e-12", "--set", "head_learning_rate=1e-12", "--set", "ranker_epochs=0")
    assert (done.exit_code, "stays published and inactive" in done.output) == (0, True), done.output
    assert updated.active == champion
    (challenger,) = [model for model in updated.models() if not model.active]
    report = json.loads((updated.runs[-1] / "update.json").read_text())
    assert (report["champion"], report["challenger"], report["wins"]) == (champion, challenger.model_version, False)
    assert report["champion_metrics"] == report["challenger_metrics"]
    assert report["gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert report["counts"]["new_visits"] > 0
    assert report["counts"]["replayed_visits"] > 0
    assert challenger.manifest["settings"]["warm_start"] == champion
    assert challenger.manifest["metrics"]["gain_ndcg_at_10"] == 0.0
    assert datetime.fromisoformat(report["cut"]) > datetime.fromisoformat(updated.models()[-1].manifest["data_until"])
    assert "does not win" in (updated.runs[-1] / "update.md").read_text()


def test_what_was_compared_already_is_not_trained_again(updated: Growing, command: Any) -> None:
    runs = updated.runs
    done = command("--since-last")
    assert (done.exit_code, "and is not active" in done.output) == (0, True), done.output
    assert (len(updated.models()), updated.runs) == (2, runs)


async def test_a_better_challenger_is_activated_on_the_servers_that_run(updated: Growing) -> None:
    """With a catalogue that has changed since: one item more, one less."""
    champion, settings = updated.active, updated.settings
    updated.arrive(90)
    with psycopg.connect(settings.postgres_dsn) as connection:
        upsert_items(connection, [Item("a-new-one", "Enamel mug", price_micros=9_000_000, currency="USD")])
        connection.execute("UPDATE items SET removed = true WHERE item_id = (SELECT min(item_id) FROM items WHERE item_id <> 'a-new-one')")
        publish_epoch(connection)
    async with serving.served(settings) as address:
        words = ("train", "--since-last", "--set", "ranker_epochs=20", "--set", "max_steps=5")
        done = await asyncio.to_thread(run, settings, *words)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        report = json.loads((updated.runs[-1] / "update.json").read_text())
        assert report["wins"], done.stdout
        assert report["gain"]["mean"] > 0.02
        assert f"active: {report['challenger']} (before: {champion}" in done.stdout
        async with Concord(address, channel="web", timeout=10.0) as web:
            answer = await web.recommend(user("u00001"), surface="home", limit=3)
    assert updated.active == report["challenger"] == answer.versions.model_version
