"""The statistics of a model card against known answers."""

import numpy as np
import pytest

from training.estimates import Bin, bootstrap, calibration_error, gini, popularity_bias, reliability


def test_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    """1,000 samples of 100 values from an exponential distribution of mean 2; the share covered has a standard error of 0.7 and 1.6 %."""
    samples = np.random.default_rng(0).exponential(2.0, (1000, 100))
    for level, low, high in ((0.95, 0.91, 0.97), (0.5, 0.45, 0.55)):
        estimates = bootstrap(samples, seed=1, resamples=500, level=level)
        assert low < np.mean([each.low <= 2.0 <= each.high for each in estimates]) < high


def test_intervals_are_as_wide_as_theory_has_it() -> None:
    sample = np.random.default_rng(2).normal(5.0, 3.0, 2000)
    (estimate,) = bootstrap(sample, seed=0)
    assert estimate.value == pytest.approx(sample.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * sample.std() / np.sqrt(2000), rel=0.1)


def test_rows_are_resampled_together_and_a_seed_repeats_them() -> None:
    row = np.random.default_rng(3).random(50)
    first, shifted = bootstrap([row, row + 1], seed=7)
    assert (shifted.low, shifted.high) == pytest.approx((first.low + 1, first.high + 1))
    assert bootstrap([row, row + 1], seed=7) == [first, shifted]
    assert bootstrap([row], seed=8) != [first]


def test_one_customer_has_no_interval_and_none_no_mean() -> None:
    (one,) = bootstrap([[0.25]], seed=0)
    assert (one.value, one.low, one.high) == (0.25, None, None)
    assert bootstrap(np.zeros((2, 0)), seed=0)[1].value == 0.0


def test_calibration_error_of_known_predictions() -> None:
    said = np.array([0.1] * 50 + [0.7] * 50)
    came = np.array([1.0] * 5 + [0.0] * 45 + [1.0] * 15 + [0.0] * 35)
    bins = reliability(said, came, bins=2)
    assert bins == [Bin(50, pytest.approx(0.1), pytest.approx(0.1)), Bin(50, pytest.approx(0.7), pytest.approx(0.3))]
    assert calibration_error(bins) == pytest.approx(0.5 * 0.0 + 0.5 * 0.4)
    assert calibration_error([]) == 0.0


def test_true_probabilities_are_calibrated_and_overconfident_ones_are_not() -> None:
    rng = np.random.default_rng(4)
    truth = rng.random(20_000)
    came = (rng.random(20_000) < truth).astype(float)
    assert calibration_error(reliability(truth, came)) < 0.01
    assert calibration_error(reliability(np.sqrt(truth), came)) == pytest.approx(np.mean(np.sqrt(truth) - truth), abs=0.01)


def test_bins_hold_equal_numbers_whatever_the_order() -> None:
    said = np.random.default_rng(5).permutation(np.arange(95) / 100)
    bins = reliability(said, said)
    assert [part.count for part in bins] == [10, 9] * 5
    assert [part.probability for part in bins] == sorted(part.probability for part in bins)
    assert reliability([0.5, 0.1, 0.5, 0.5, 0.5], [1, 0, 0, 0, 0]) == [Bin(1, 0.1, 0.0), Bin(4, 0.5, 0.25)]  # ties stay together
    assert reliability([], []) == []


def test_gini_of_known_distributions() -> None:
    assert gini([3, 3, 3]) == pytest.approx(0.0)
    assert gini([0, 0, 0, 8]) == pytest.approx(0.75)
    assert gini([4, 1, 3, 2]) == pytest.approx(0.25)
    values = np.random.default_rng(6).exponential(1.0, 400)
    pairs = np.abs(values[:, None] - values[None, :]).mean() / (2 * values.mean())  # the definition
    assert gini(values) == pytest.approx(pairs)
    assert gini([0, 0]) == 0.0


def test_popularity_bias_of_a_catalogue_of_twenty() -> None:
    purchases = np.arange(20, 0, -1)  # the first tenth holds items 0 and 1, bought 20 and 19 times
    shown, taken = np.zeros(20), np.zeros(20)
    shown[[0, 1, 19]] = 6, 3, 1
    taken[[18, 19]] = 1, 3
    found = popularity_bias(purchases, shown, taken)
    assert found.bought[0] == pytest.approx(39 / 210)
    assert found.shown == pytest.approx((0.9, 0, 0, 0, 0, 0, 0, 0, 0, 0.1))
    assert found.taken == pytest.approx((0, 0, 0, 0, 0, 0, 0, 0, 0, 1.0))
    assert found.coverage == pytest.approx(3 / 20)
    assert found.mean_shown == pytest.approx((6 * 20 + 3 * 19 + 1) / 10)
    assert found.mean_taken == pytest.approx((2 * 1 + 1 * 3) / 4)
    assert found.gini_shown == pytest.approx(gini(shown))
    assert sum(found.bought) == pytest.approx(1.0)
