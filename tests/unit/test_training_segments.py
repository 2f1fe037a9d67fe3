"""An evaluation kept and read back, and its metrics in all and by segment, against values computed by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from training.evaluate import metrics_of
from training.results import Catalogue, Evaluation, UserResult
from training.segments import DIMENSIONS, all_segments, bought_band, metrics_with_intervals, price_bands, segments_by

CATALOGUE = Catalogue(
    ids=("a", "b", "c", "d", "e"),
    titles=("A", "B", "C", "D", "E"),
    categories=("cups", "cups", "pans", "", "pans"),
    prices=(1.0, 2.0, 3.0, 4.0, None),
    purchases=(9, 5, 2, 1, 0),
)
SECOND = 1 / math.log2(3)  # the gain of a second place


def user(name: str, wanted: tuple[int, ...], ranked: tuple[int, ...], **more: object) -> UserResult:
    popular = (0, 1, 2, 3)
    rankings = {"": ranked, "popularity_": popular, "recent_popularity_": popular, "tower_": (3,), "collaborative_": (2, 1)}
    made = UserResult(name, "web", ("web",), 0, wanted, rankings, (0.5, 0.25), 0.5)
    return replace(made, **more)  # type: ignore[arg-type]


USERS = (
    user("u1", (0, 2), (0, 2, 1), history_channels=("app", "web"), bought_count=4),
    user("u2", (1,), (0, 1), channel="store", history_channels=("store",), bought_count=25, candidate_recall=1.0),
    user("u3", (3,), (0, 1, 2), channel="", history_channels=()),
)
EVALUATION = Evaluation(CATALOGUE, USERS)


def figures(dimension: str, metric: str = "ndcg_at_10") -> dict[str, tuple[int, float]]:
    found = segments_by(EVALUATION, dimension)
    assert {segment.dimension for segment in found} == {DIMENSIONS[dimension]}
    return {s.name: (s.customers, next(m.value for m in s.metrics if m.name == metric)) for s in found}


def test_an_evaluation_is_read_back_as_it_was(tmp_path: Path) -> None:
    EVALUATION.save(tmp_path)
    assert Evaluation.load(tmp_path) == EVALUATION
    Evaluation(CATALOGUE, ()).save(tmp_path)
    assert Evaluation.load(tmp_path) == Evaluation(CATALOGUE, ())


def test_the_metrics_of_an_evaluation_are_means_over_its_customers() -> None:
    metrics = metrics_of(EVALUATION)
    assert metrics["ndcg_at_10"] == pytest.approx((1 + SECOND + 0) / 3)
    assert metrics["hr_at_10"] == pytest.approx(2 / 3)
    assert metrics["popularity_recall_at_20"] == 1.0
    assert metrics["tower_hr_at_10"] == pytest.approx(1 / 3)
    assert metrics["coverage"] == pytest.approx(3 / 5)
    assert metrics["candidate_recall"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert metrics["evaluated_users"] == 3.0


def test_intervals_hold_the_means_and_the_gain_is_paired() -> None:
    metrics = {metric.name: metric for metric in metrics_with_intervals(EVALUATION)}
    assert list(metrics)[:3] == ["ndcg_at_10", "hr_at_10", "recall_at_20"]
    assert {name: metrics[name].value for name in metrics_of(EVALUATION)} == pytest.approx(metrics_of(EVALUATION))
    for name in ("ndcg_at_10", "candidate_recall"):
        assert metrics[name].low <= metrics[name].value <= metrics[name].high
    assert (metrics["coverage"].low, metrics["evaluated_users"].low) == (None, None)
    gain = metrics["ndcg_at_10_over_recent_popularity"]
    assert gain.value == pytest.approx(metrics["ndcg_at_10"].value - metrics["recent_popularity_ndcg_at_10"].value)
    alike = [user(f"p{k}", (k,), (0, 1, 2, 3)) for k in range(3)]  # the model ranks as popularity does, well for some and badly for others
    paired = {metric.name: metric for metric in metrics_with_intervals(Evaluation(CATALOGUE, tuple(alike)))}
    assert paired["ndcg_at_10_over_recent_popularity"].low == paired["ndcg_at_10_over_recent_popularity"].high == 0.0
    assert paired["ndcg_at_10"].low < paired["ndcg_at_10"].high


def test_by_channel_of_the_visit_each_customer_counts_once() -> None:
    assert figures("channel") == {"store": (1, SECOND), "unknown": (1, 0.0), "web": (1, pytest.approx(1.0))}


def test_by_channels_of_the_history_a_customer_counts_in_each() -> None:
    assert figures("history_channel") == {"app": (1, 1.0), "store": (1, SECOND), "unknown": (1, 0.0), "web": (1, 1.0)}


def test_new_and_known_customers_come_in_order() -> None:
    assert list(figures("customer")) == ["new: nothing bought yet", "known: 1 to 4 items bought", "known: 20 and more items bought"]
    assert [bought_band(count) for count in (0, 1, 4, 5, 19, 20)] == [
        "new: nothing bought yet",
        *["known: 1 to 4 items bought"] * 2,
        *["known: 5 to 19 items bought"] * 2,
        "known: 20 and more items bought",
    ]


def test_by_category_only_its_own_wanted_items_count() -> None:
    """u1 wanted a cup (ranked first) and a pan (ranked second); u2 a cup (second); u3 an item without category (not found)."""
    found = figures("category")
    assert found == {"cups": (2, pytest.approx((1 + SECOND) / 2)), "none": (1, 0.0), "pans": (1, SECOND)}
    assert next(iter(found)) == "cups"
    assert figures("category", "recent_popularity_ndcg_at_10")["pans"] == (1, pytest.approx(0.5))  # third place


def test_price_bands_are_quarters_of_what_sells() -> None:
    bands, order = price_bands(CATALOGUE)
    assert order == ("below 1.75", "1.75 to 2.50", "2.50 to 3.25", "3.25 and more", "no price")
    assert bands == list(order)
    assert [name for name, _ in figures("price_band").items()] == ["below 1.75", "1.75 to 2.50", "2.50 to 3.25", "3.25 and more"]
    equal = replace(CATALOGUE, prices=(2.0,) * 5)
    assert set(price_bands(equal)[0]) == {"2.00 and more"}
    assert set(price_bands(replace(CATALOGUE, prices=(None,) * 5))[0]) == {"no price"}


def test_an_evaluation_of_nobody_has_no_segments() -> None:
    assert all_segments(Evaluation(CATALOGUE, ())) == []
    assert metrics_with_intervals(Evaluation(CATALOGUE, ()))[0].value == 0.0
    assert {segment.dimension for segment in all_segments(EVALUATION)} == set(DIMENSIONS.values())
