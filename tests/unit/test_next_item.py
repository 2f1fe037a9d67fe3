"""The next-item quality set on a small shop of its file format: what is fitted, what is held out and what is never looked at."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from training.quality import next_item
from training.quality.__main__ import app
from training.quality.result import QualityResult
from training.sequence import Rows, SequenceConfig
from training.sequence_fit import train_sequence_tower

ITEMS = 60
TINY = (SequenceConfig(width=16, epochs=6, batch_size=32, learning_rate=1e-2, warmup_steps=5, ema_decay=0.9),)
WITHOUT_TEXT = frozenset({"text"})


def write(folder: Path, sequences: list[Rows]) -> Path:
    """Writes a shop as the public set is written: item numbers from one, titles in words."""
    folder.mkdir(exist_ok=True)
    titles = [f"{'red' if item % 2 else 'blue'} thing {item // 2}" for item in range(ITEMS)]
    pd.DataFrame({"item": range(1, ITEMS + 1), "asin": "", "title": titles}).to_parquet(folder / next_item.ITEMS)
    lists = [(sequence + 1).tolist() for sequence in sequences]
    pd.DataFrame({"user": range(1, len(lists) + 1), "items": lists}).to_parquet(folder / next_item.SEQUENCES)
    return folder


@pytest.fixture(scope="module")
def ring() -> list[Rows]:
    """Walks on a ring of items, in steps of one."""
    rng = np.random.default_rng(0)
    return [(rng.integers(ITEMS) + np.arange(rng.integers(5, 9))) % ITEMS for _ in range(300)]


@pytest.fixture(scope="module")
def result(ring: list[Rows], tmp_path_factory: pytest.TempPathFactory) -> QualityResult:
    return next_item.run(write(tmp_path_factory.mktemp("ring"), ring), seed=0, without=WITHOUT_TEXT, configs=TINY)


def test_it_ranks_what_comes_next_first_and_never_the_history(result: QualityResult, ring: list[Rows]) -> None:
    ranked = [result.rankings[str(user)] for user in range(1, len(ring) + 1)]
    assert np.mean([line[0] == str(rows[-1] + 1) for line, rows in zip(ranked, ring, strict=True)]) > 0.9
    assert all(not set(line) & {str(row + 1) for row in rows[:-1]} for line, rows in zip(ranked, ring, strict=True))
    assert all(len(set(line)) == 50 for line in ranked)
    assert result.validation["ndcg_at_10"] > 0.9


def test_the_last_items_change_nothing(result: QualityResult, ring: list[Rows], tmp_path: Path) -> None:
    other = [np.append(rows[:-1], (rows[-1] + 7) % ITEMS) for rows in ring]
    again = next_item.run(write(tmp_path, other), seed=0, without=WITHOUT_TEXT, configs=TINY)
    assert again.rankings == result.rankings
    assert again.validation == result.validation


def test_cold_items_are_known_by_their_text_alone(ring: list[Rows], tmp_path: Path) -> None:
    found = next_item.run(write(tmp_path, ring), seed=0, cold=True, configs=TINY)
    tuning, test = next_item.cold_items(ITEMS)
    assert tuning.sum() == test.sum() == 3
    assert not (tuning & test).any()
    assert found.details["items_without_interactions"] == 6
    figures = found.details["test"]
    assert isinstance(figures, dict)
    assert figures["cold_users"] == sum(test[rows[-1]] for rows in ring)
    assert figures["warm_ndcg_at_10"] > 0.5
    assert figures["ratio"] == pytest.approx(figures["cold_ndcg_at_10"] / figures["warm_ndcg_at_10"])


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("text", "text_of_last"),
        ("sequence", "tower"),
        ("collaborative", "ease"),
        ("recency", "ease_recent"),
    ],
)
def test_parts_can_be_left_out(part: str, missing: str) -> None:
    assert missing not in next_item.signal_names(frozenset({part}))
    assert len(next_item.signal_names(frozenset({part}))) >= 4


def test_without_ensembling_there_is_one_tower(ring: list[Rows], tmp_path: Path) -> None:
    both = (*TINY, replace(TINY[0], width=32))
    data = write(tmp_path, ring[:60])
    for without, towers in ((WITHOUT_TEXT, 2), (WITHOUT_TEXT | {"ensemble"}, 1)):
        found = next_item.run(data, seed=0, without=without, configs=[replace(config, epochs=1) for config in both])
        assert isinstance(found.details["towers"], list)
        assert len(found.details["towers"]) == towers


def test_kept_towers_are_read_back_unless_settings_or_data_changed(
    result: QualityResult, ring: list[Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, kept, trained = write(tmp_path, ring), tmp_path / "towers", list[int]()

    def counted(*arguments: Any, config: SequenceConfig, **named: Any) -> Any:
        trained.append(config.seed)
        return train_sequence_tower(*arguments, config=config, **named)

    monkeypatch.setattr(next_item, "train_sequence_tower", counted)
    found = [next_item.run(data, seed=seed, without=WITHOUT_TEXT, configs=TINY, kept=kept) for seed in (0, 0, 1)]
    assert trained == [0, 1]
    assert found[0].rankings == found[1].rankings == result.rankings
    assert found[0].details == found[1].details
    assert found[2].rankings != result.rankings
    next_item.run(write(tmp_path, [ring[0][::-1], *ring[1:]]), seed=0, without=WITHOUT_TEXT, configs=TINY, kept=kept)
    assert trained == [0, 1, 0]  # other sequences
    next_item.run(data, seed=0, configs=TINY, kept=kept)
    assert trained == [0, 1, 0, 0]  # and with text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=next_item.ITEMS):
        next_item.run(tmp_path, seed=0)


def quality(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_writes_the_judges_file_and_ends_with_json(ring: list[Rows], tmp_path: Path) -> None:
    out = tmp_path / "new" / "rankings.jsonl"
    done = quality(
        "beauty",
        "--data",
        str(write(tmp_path, ring)),
        "--out",
        str(out),
        "--seed",
        "3",
        "--without",
        "text,ensemble",
        "--card",
        str(out.with_name("card.html")),
    )
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["user"] for line in lines] == [str(user) for user in range(1, len(ring) + 1)]
    assert all(len(line["items"]) == 50 for line in lines)
    last = json.loads(done.stdout.splitlines()[-1])
    assert {"set": "beauty", "seed": 3}.items() <= last.items()
    assert last["validation_ndcg_at_10"] > 0.5
    card = (tmp_path / "new" / "card.md").read_text()
    assert "tower 1: validation NDCG@10 by epoch" in card
    assert "seen 10 times and more" in card
    assert "Calibration" in (tmp_path / "new" / "card.html").read_text()


def test_the_card_measures_on_the_last_items(result: QualityResult, ring: list[Rows]) -> None:
    assert result.card is not None
    figures = {metric.name: metric for metric in result.card.metrics}
    ranked = [result.rankings[str(user)] for user in range(1, len(ring) + 1)]
    hits = np.mean([str(rows[-1] + 1) in line[:10] for line, rows in zip(ranked, ring, strict=True)])
    assert figures["hr_at_10"].value == pytest.approx(hits)
    assert sum(segment.customers for segment in result.card.segments) == 2 * len(ring)
    assert result.card.calibration is not None
    assert np.shape(result.card.calibration.probability) == (10 * len(ring),)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("beauty", "--without", "texts"), "unknown part texts"),
        (("beauty", "--data", "nowhere"), next_item.ITEMS),
        (("online_retail", "--data", "nowhere"), "online_retail.parquet"),
        (("books",), "books"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: tuple[str, ...], said: str) -> None:
    done = quality(*arguments)
    assert done.exit_code == 2
    assert said in done.output
