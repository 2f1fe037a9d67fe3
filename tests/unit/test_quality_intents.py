"""The intents run trains on one file and tests on the other, and nothing of the test file reaches what is trained or chosen."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from features.sample_shop import generate
from training.config import TrainConfig
from training.quality.__main__ import app
from training.quality.intents import run

TINY = replace(TrainConfig.intent(), base_model="tiny", epochs=2, learning_rate=2e-3, trainable_layers=-1, threads=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainConfig, "intent", classmethod(lambda _: TINY))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The sets in small: utterances of the sample shop, of one seed to learn from and of another to be tested on."""
    for name, seed in (("bitext_2020_intents", 7), ("bitext_21k_intents_sentiment", 8)):
        said = generate(seed, end=datetime(2026, 1, 1, tzinfo=UTC), users=1).utterances
        rows = [{"utterance": one.text, "intent": one.intent} for one in said if one.intent != "out_of_scope"]
        pd.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
    reviews = [f"this dress number {k} was lovely in summer. but too small for me number {k}" for k in range(30)]
    pd.DataFrame({"Review Text": [*reviews, None]}).to_parquet(tmp_path / "womens_clothing_reviews.parquet")
    pd.DataFrame({"title": ["", *(f"Nail Lacquer {k} oz" for k in range(20))]}).to_parquet(tmp_path / "amazon_beauty_items.parquet")
    pd.DataFrame({"review": [f"很好用{k}" for k in range(20)]}).to_parquet(tmp_path / "online_shopping_10_cats.parquet")
    return tmp_path


def figures(result: Any) -> dict[str, float]:
    found: dict[str, float] = result.details["test"]
    return found


def test_the_test_file_changes_nothing_but_what_it_measures(data: Path) -> None:
    honest = run(data, seed=0)
    path = data / "bitext_21k_intents_sentiment.parquet"
    frame = pd.read_parquet(path)
    frame["intent"] = frame["intent"].sample(frac=1, random_state=1).to_numpy()
    frame.to_parquet(path)
    scrambled = run(data, seed=0)
    assert scrambled.validation == honest.validation
    for name in ("temperature", "threshold"):
        assert scrambled.details[name] == honest.details[name]
    assert figures(honest)["accuracy"] > 2 * figures(scrambled)["accuracy"]
    assert figures(honest)["accuracy_upper"] == figures(honest)["accuracy_sample"]  # the base reads no case
    assert figures(honest)["tfidf_accuracy"] > 0.5
    wanted = {"macro_f1", "ece", "accuracy_typos", "accepted", "refused_reviews", "refused_titles", "refused_chinese", "auc_reviews"}
    assert wanted <= set(figures(honest))


def test_few_examples_and_parts_left_out(data: Path) -> None:
    few = run(data, seed=0, examples=5, without=frozenset({"fine_tuning", "names", "out_of_scope"}))
    assert few.details["utterances"] == 60
    assert "accuracy_typos" not in figures(few)
    assert 0 < figures(few)["accuracy"] < 1


@pytest.mark.parametrize(
    "name", ["bitext_2020_intents", "bitext_21k_intents_sentiment", "womens_clothing_reviews", "online_shopping_10_cats"]
)
def test_a_set_that_is_not_there_is_named(data: Path, name: str) -> None:
    (data / f"{name}.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=name):
        run(data, seed=0)


def test_the_last_line_is_json_and_no_rankings_are_written(data: Path) -> None:
    done = CliRunner().invoke(app, ["intents_5", "--data", str(data), "--out", str(data / "r.jsonl")])
    assert done.exit_code == 0, done.output
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith('{"set": "intents_5", "seed": 0')
    assert '"accuracy": ' in last
    assert '"macro_f1": ' in last
    assert not (data / "r.jsonl").exists()
    refused = CliRunner().invoke(app, ["intents", "--data", str(data), "--without", "ensemble"])
    assert refused.exit_code == 2
