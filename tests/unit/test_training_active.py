"""Active learning: every strategy chooses distinct rows, for the reason it gives."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from training.active import Strategy, badge, choose, clustered, entropy, k_center, margin
from training.labelling import read_pairs

RNG = np.random.default_rng(0)
PROBABILITIES = RNG.dirichlet((1.0, 1.0), 200).astype(np.float32)
EMBEDDINGS = RNG.normal(size=(200, 8)).astype(np.float32)
NOTHING = np.zeros((0, 8), np.float32)


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("count", [0, 1, 17, 200, 500])
def test_rows_are_distinct_and_as_many_as_asked_for(strategy: Strategy, count: int) -> None:
    rows = choose(strategy, PROBABILITIES, EMBEDDINGS, count=count, labelled=NOTHING, rng=np.random.default_rng(1))
    assert len(rows) == len(set(rows.tolist())) == min(count, 200)
    assert all(0 <= row < 200 for row in rows)
    again = choose(strategy, PROBABILITIES, EMBEDDINGS, count=count, labelled=NOTHING, rng=np.random.default_rng(1))
    assert np.array_equal(rows, again)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_pool_of_equal_rows_is_no_trouble(strategy: Strategy) -> None:
    sure, same = np.tile(np.array([[1.0, 0.0]], np.float32), (30, 1)), np.ones((30, 8), np.float32)
    rows = choose(strategy, sure, same, count=5, labelled=same[:2], rng=np.random.default_rng(1))
    assert len(set(rows.tolist())) == 5


@pytest.mark.parametrize("strategy", [Strategy.ENTROPY, Strategy.MARGIN])
def test_doubt_comes_first(strategy: Strategy) -> None:
    rows = choose(strategy, PROBABILITIES, EMBEDDINGS, count=20, labelled=NOTHING, rng=RNG)
    doubt = np.abs(PROBABILITIES[:, 1] - 0.5)
    assert doubt[rows].max() <= np.delete(doubt, rows).min()
    assert doubt[rows[0]] == doubt.min()


def test_entropy_and_margin_differ_with_more_classes() -> None:
    three = np.array([[0.5, 0.5, 0.0], [0.4, 0.3, 0.3]], np.float32)
    assert entropy(three).argmax() == 1
    assert margin(three).argmin() == 0
    assert entropy(np.array([[1.0, 0.0]], np.float32)) == pytest.approx(0.0, abs=1e-6)
    assert entropy(np.array([[0.5, 0.5]], np.float32)) == pytest.approx(np.log(2))


def groups(each: int = 50, kinds: int = 5) -> np.ndarray:
    """Five groups of pairs, far apart."""
    centres = np.eye(kinds, 8) * 50
    return (np.repeat(centres, each, axis=0) + np.random.default_rng(2).normal(size=(each * kinds, 8))).astype(np.float32)


def test_varied_choices_take_one_of_each_group() -> None:
    points, probability = groups(), np.random.default_rng(3).uniform(0.4, 0.49, 250)
    unsure = np.stack([1 - probability, probability], 1).astype(np.float32)
    for rows in (clustered(unsure, points, count=5, rng=RNG), k_center(points, NOTHING, count=5)):
        assert {row // 50 for row in rows.tolist()} == {0, 1, 2, 3, 4}
    drawn = [badge(unsure, points, count=5, rng=np.random.default_rng(seed)) for seed in range(10)]
    assert np.mean([len(set(rows // 50)) for rows in drawn]) > 4.5  # five at random give 3.4


def test_k_center_keeps_away_from_what_is_labelled() -> None:
    points = groups()
    rows = k_center(points, points[[0, 60, 110]], count=2)
    assert {row // 50 for row in rows.tolist()} == {3, 4}


def test_clusters_are_made_of_doubtful_rows_and_give_the_most_doubtful() -> None:
    points = groups()
    probability = np.random.default_rng(3).uniform(0, 1, 250)
    probabilities = np.stack([1 - probability, probability], 1).astype(np.float32)
    rows = clustered(probabilities, points, count=5, rng=np.random.default_rng(0))
    doubt = entropy(probabilities)
    assert doubt[rows].min() >= np.sort(doubt)[::-1][49]
    assert rows[0] == doubt.argmax()


def test_badge_prefers_doubt_among_alike() -> None:
    points = np.ones((100, 8), np.float32)
    probability = np.full(100, 0.999)
    probability[42] = 0.5
    rows = badge(np.stack([1 - probability, probability], 1).astype(np.float32), points, count=1, rng=RNG)
    assert rows.tolist() == [42]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_pairs_are_read_from_any_table_once_each(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame({"user_id": ["007", "007", "b"], "item_id": ["1", "1", "2"], "else": [1, 2, 3]})
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    assert read_pairs(path) == [("007", "1"), ("b", "2")]


def test_a_file_without_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("user_id,product\na,b\n")
    with pytest.raises(ValueError, match="no column item_id"):
        read_pairs(tmp_path / "pairs.csv")
    with pytest.raises(ValueError, match=r"pairs come as"):
        read_pairs(tmp_path / "pairs.xlsx")
