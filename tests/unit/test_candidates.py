"""Candidate generation against the plain rule, and that neither quotas nor ties depend on luck."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.candidates import CANDIDATE_COUNT, Candidates, Signals, Source, generate
from features.item_table import NEW_ARRIVAL_DAYS, FloatArray, ItemTable
from features.scores import Scores
from features.signals import SignalConfig, history
from tests.unit.tables import activity, table

QUOTA = {Source.RECENT: 24, Source.COLLABORATIVE: 96, Source.VECTOR: 72, Source.RELATION: 16, Source.NEW: 12, Source.POPULAR: 36}
NOBODY = history(activity(), table(0), SignalConfig())


def scores(rng: np.random.Generator, count: int, share: float) -> FloatArray:
    """Few distinct values, so that there are ties; some negative; a share of them zero."""
    return np.where(rng.random(count) < share, rng.integers(-2, 6, count), 0).astype(np.float32)


def best(values: FloatArray, excluded: "np.ndarray[tuple[int], np.dtype[np.bool_]]", count: int, *, positive: bool) -> list[int]:
    allowed = [row for row in range(len(values)) if not excluded[row] and (values[row] > 0 or not positive)]
    return sorted(allowed, key=lambda row: (-values[row], row))[:count]


def found(candidates: Candidates) -> dict[int, Source]:
    assert len(candidates.rows) == len(set(candidates.rows.tolist()))
    return {row: Source(source) for row, source in zip(candidates.rows.tolist(), candidates.sources.tolist(), strict=True)}


def shop(rng: np.random.Generator, count: int) -> ItemTable:
    popularity = rng.integers(0, 4, (count, 6)).astype(np.float32)
    return replace(table(count), popularity=popularity, age_days=rng.integers(0, 60, count).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 40, 255, 256, 257, 700]), st.floats(0, 1), st.floats(0, 1))
def test_every_source_gives_its_best_and_popular_items_fill_up(seed: int, count: int, share: float, gone: float) -> None:
    rng = np.random.default_rng(seed)
    items, excluded = shop(rng, count), rng.random(count) < gone
    signals = Signals(*(Scores.of_all(scores(rng, count, share)) for _ in range(3)))
    rows = rng.permutation(count)[:30]
    past = history(activity(*((f"i{row:03d}", "view", float(k)) for k, row in enumerate(rows))), items, SignalConfig())
    recent = np.zeros(count, np.float32)
    recent[past.rows] = past.weights
    new = np.maximum(NEW_ARRIVAL_DAYS + 1 - items.age_days, 0) * (items.age_days <= NEW_ARRIVAL_DAYS)
    loud = {
        Source.RECENT: recent,
        Source.COLLABORATIVE: signals.collaborative.values,
        Source.VECTOR: signals.vector.values,
        Source.RELATION: signals.relation.values,
        Source.NEW: new.astype(np.float32),
        Source.POPULAR: items.popularity_score,
    }
    expected: dict[int, Source] = {}
    for source, values in loud.items():
        for row in best(values, excluded, QUOTA[source], positive=source is not Source.POPULAR):
            expected[row] = expected.get(row, Source(0)) | source
    for row in best(loud[Source.POPULAR], excluded, CANDIDATE_COUNT, positive=False):
        if len(expected) < CANDIDATE_COUNT:
            expected[row] = expected.get(row, Source(0)) | Source.POPULAR
    assert found(generate(signals, past, items, excluded=excluded)) == expected


def test_quotas_fill_the_ranker_exactly() -> None:
    assert sum(QUOTA.values()) == CANDIDATE_COUNT


def test_equal_scores_give_the_lower_rows() -> None:
    level = Scores.of_all(np.ones(600, np.float32))
    items = replace(table(600), popularity=np.zeros((600, 6), np.float32))
    chosen = found(generate(Signals(level, level, level), NOBODY, items, excluded=np.zeros(600, np.bool_)))
    assert [row for row, source in chosen.items() if Source.COLLABORATIVE in source] == list(range(96))
    assert sorted(chosen) == list(range(CANDIDATE_COUNT))


def test_new_arrivals_are_new_for_four_weeks() -> None:
    nothing = Scores.none(400)
    ages = np.full(400, 200, np.float32)
    ages[[300, 301, 302]] = 0, 28, 28.5
    chosen = found(
        generate(Signals(nothing, nothing, nothing), NOBODY, replace(table(400), age_days=ages), excluded=np.zeros(400, np.bool_))
    )
    assert {row for row, source in chosen.items() if Source.NEW in source} == {300, 301}


@pytest.mark.parametrize("column", [1, 2, 4])
def test_popularity_counts_recent_purchases_most(column: int) -> None:
    counts = np.zeros((2, 6), np.float32)
    counts[0, 1], counts[1, column] = 1, 10
    first, second = replace(table(2), popularity=counts).popularity_score.tolist()
    assert second == pytest.approx({1: 10, 2: 0.5, 4: 0.2}[column])
    assert first == 1
