"""Negatives keep to what was on sale, to what the customer did, and to what they were shown; and log q stays the truth."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import TrainConfig
from training.labels import Label
from training.negatives import Drawn, NegativeSampler
from training.on_sale import OnSale

CONFIG = TrainConfig(batch_size=3, negative_count=400, negative_power=0.5)


def on_sale(first: list[int], gaps: list[tuple[int, int, int]] | None = None) -> OnSale:
    return OnSale(np.array(first, np.int64), *np.array(gaps or [], np.int64).reshape(-1, 3).T)


def sampler(labels: list[Label], there: OnSale, config: TrainConfig = CONFIG, seed: int = 0) -> NegativeSampler:
    return NegativeSampler(labels, there, config, np.random.default_rng(seed))


def negatives(drawn: Drawn, place: int) -> set[int]:
    """The items a label is told apart from."""
    return set(drawn.rows[~drawn.wrong[place]].tolist()) - {int(drawn.rows[place])}


def test_what_was_not_on_sale_yet_or_any_more_is_no_negative() -> None:
    there = on_sale([0, 0, 0, 50, 10], [(2, 20, 40)])
    labels = [Label("a", 30, (0,), frozenset()), Label("b", 60, (1,), frozenset()), Label("c", 10, (0,), frozenset())]
    drawn = sampler(labels, there).draw(labels, np.array([0, 1, 0]))
    assert negatives(drawn, 0) == {1, 4}  # 2 is off sale, 3 comes later
    assert negatives(drawn, 1) == {0, 2, 3, 4}
    assert negatives(drawn, 2) == {1, 2}  # 4 is first seen at the label's own time: not before it


def test_the_end_of_a_time_off_sale_counts_from_just_after_it() -> None:
    there = on_sale([0, 0], [(1, 20, 40)])
    assert there.at([20, 21, 40, 41])[:, 1].tolist() == [True, False, False, True]


def test_what_was_bought_or_taken_on_the_visit_is_no_negative() -> None:
    labels = [Label("a", 1, (0,), frozenset({1}), frozenset({0, 2})), Label("b", 1, (3,), frozenset()), Label("c", 1, (1,), frozenset())]
    drawn = sampler(labels, on_sale([0] * 5)).draw(labels, np.array([0, 3, 1]))
    assert negatives(drawn, 0) == {3, 4}
    assert negatives(drawn, 1) == {0, 1, 2, 4}
    assert not drawn.wrong.diagonal().any()


def test_shown_items_are_negatives_of_their_own_label_alone_and_no_plain_ones() -> None:
    labels = [Label("a", 1, (0,), frozenset(), shown=(3, 4)), Label("b", 1, (1,), frozenset()), Label("c", 1, (2,), frozenset())]
    drawn = sampler(labels, on_sale([0] * 6), replace(CONFIG, exposure_negatives=2.0)).draw(labels, np.array([0, 1, 2]))
    plain = 3 + CONFIG.negative_count
    assert sorted(drawn.rows[plain:].tolist()) == [3, 4]
    assert drawn.wrong[:, plain:].tolist() == [[False] * 2, [True] * 2, [True] * 2]
    assert not {3, 4} & set(drawn.rows[:plain][~drawn.wrong[0, :plain]].tolist())
    assert {3, 4} <= negatives(drawn, 1)
    assert np.allclose(np.exp(-drawn.log_q[0, plain:]), 2.0)  # all of them drawn: each counts with its whole weight


def test_without_the_weight_exposures_change_nothing() -> None:
    shown, unshown = ([Label("a", 1, (0,), frozenset(), shown=rows)] * 3 for rows in ((3, 4), ()))
    one, other = (sampler(labels, on_sale([0] * 6)).draw(labels, np.array([0, 0, 0])) for labels in (shown, unshown))
    assert (one.rows.tolist(), one.wrong.tolist()) == (other.rows.tolist(), other.wrong.tolist())
    assert np.array_equal(one.log_q, other.log_q)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_pool_estimates_the_whole_sum_without_bias(power: float) -> None:
    """Over many steps each item counts exp(-log q) times its appearances: once if it may be a negative, w times if shown, else never."""
    there = on_sale([0] * 20 + [45] * 4, [(2, 5, 45)])
    shown = tuple(range(4, 14))
    labels = [Label(f"u{k}", 10 + 20 * (k % 3), (k % 3,), frozenset({3}), shown=shown if k in (1, 5) else ()) for k in range(7)]
    config = replace(CONFIG, batch_size=4, negative_count=6, negative_power=power, exposure_negatives=1.5)
    made, rng = sampler(labels, there, config), np.random.default_rng(1)
    total, steps = np.zeros(24), 6_000
    followed = labels[1]  # time 30: items 20 to 23 come later, 2 is off sale, 4 to 13 were shown, eight of them at a step
    for _ in range(steps):
        batch = [followed, *(labels[k] for k in rng.choice([0, 2, 3, 4, 5, 6], 3))]
        drawn = made.draw(batch, np.array([label.items[0] for label in batch]))
        counted = ~drawn.wrong[0]
        counted[0] = False
        np.add.at(total, drawn.rows[counted], np.exp(-drawn.log_q[0, counted].astype(np.float64)))
    mean = total / steps
    assert mean[[1, 2, 3, 20, 21, 22, 23]].tolist() == [0.0] * 7  # taken, off sale, bought, not there yet
    assert np.allclose(mean[14:20], 1.0, atol=0.12)
    assert np.allclose(mean[4:14], 1.5, atol=0.12)
    # A label's own target fills one of the four places of the batch: the others stand for 3 of the 4 draws that q expects.
    assert 0.6 < mean[0] < 1.2


items = st.integers(0, 7)


@st.composite
def shops(draw: st.DrawFn) -> tuple[list[Label], OnSale, float]:
    first = draw(st.lists(st.integers(0, 60), min_size=8, max_size=8))
    gaps = draw(st.lists(st.tuples(items, st.integers(0, 50), st.integers(51, 100)), max_size=3, unique_by=lambda gap: gap[0]))
    labels = [
        Label(
            f"u{k}",
            draw(st.integers(1, 100)),
            tuple(draw(st.lists(items, min_size=1, max_size=3, unique=True))),
            draw(st.frozensets(items, max_size=3)),
            draw(st.frozensets(items, max_size=3)),
            tuple(draw(st.lists(items, max_size=8, unique=True))),
        )
        for k in range(draw(st.integers(1, 5)))
    ]
    # An item is a target only where the customer had not bought it, and shown only where they did not take it.
    labels = [replace(label, bought=label.bought - set(label.items)) for label in labels]
    labels = [replace(label, shown=tuple(row for row in label.shown if row not in label.bought | label.taken)) for label in labels]
    return labels, on_sale(first, gaps), draw(st.sampled_from([0.0, 0.5, 3.0]))


@settings(max_examples=150, deadline=None)
@given(shops(), st.integers(0, 2**32 - 1))
def test_no_step_ever_breaks_a_rule(shop: tuple[list[Label], OnSale, float], seed: int) -> None:
    labels, there, weight = shop
    config = replace(CONFIG, batch_size=len(labels), negative_count=20, exposure_negatives=weight)
    rng = np.random.default_rng(seed)
    made = sampler(labels, there, config, seed)
    targets = np.array([rng.choice(label.items) for label in labels])
    drawn = made.draw(labels, targets)
    plain = len(labels) + config.negative_count
    assert np.isfinite(drawn.log_q).all()
    assert drawn.log_q.shape == drawn.wrong.shape == (len(labels), len(drawn.rows))
    assert drawn.rows[: len(labels)].tolist() == targets.tolist()
    for place, label in enumerate(labels):
        assert not drawn.wrong[place, place]
        for column in np.flatnonzero(~drawn.wrong[place]).tolist():
            row = int(drawn.rows[column])
            if column == place:
                continue
            assert there.at([label.time])[0, row]
            assert row not in {*label.items, *label.bought, *label.taken}
            assert (column >= plain) == bool(weight and row in label.shown)
        for row in made.pick(label, 5):
            assert there.at([label.time])[0, row]
            assert row not in {*label.items, *label.bought, *label.taken, *(label.shown if weight else ())}
