"""Calibration beside scikit-learn, scipy and statsmodels."""

import numpy as np
import pytest
import scipy.stats
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from braindino.downstream.calibration import (
    calibrate_probabilities,
    calibrate_values,
    expected_calibration_error,
    linear_intercept,
    linear_slope,
    logistic_intercept,
    logistic_slope,
    reliability_table,
)

RNG = np.random.default_rng(9)
P = np.array([0.05, 0.9, 0.3, 0.6, 0.15, 0.8, 0.45, 0.7, 0.2, 0.55, 0.35, 0.95, 0.1, 0.65, 0.25])
Y = np.array([0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0], dtype=bool)
ONE = np.ones((1, 15))


def names(count: int) -> list[str]:
    return [f"s{i:03d}" for i in range(count)]


def test_the_reliability_table_equals_scikit_learns_calibration_curve():
    probabilities = np.round(RNG.random(80) * 0.7, 1)  # on the edges of the bins
    positive = RNG.random(80) < probabilities
    table = reliability_table(positive, probabilities, num_bins=10)
    filled = [row for row in table if row.n]
    share, mean = calibration_curve(positive, probabilities, n_bins=10)
    np.testing.assert_allclose([row.observed_share for row in filled], share)
    np.testing.assert_allclose([row.mean_predicted for row in filled], mean)
    assert len(table) == 10 and sum(row.n for row in table) == 80 and len(filled) < 10
    assert (table[0].low, table[0].high, table[9].high) == (0.0, pytest.approx(0.1), 1.0)
    empty = next(row for row in table if not row.n)
    assert np.isnan([empty.mean_predicted, empty.observed_share]).all()


def test_the_expected_calibration_error_equals_the_hand_worked_one_and_that_of_the_table():
    """Bins (0, .5] with .1 and .3, one of two positive; (.5, 1] with .8, positive: (|1 - .4| + |1 - .8|) / 3."""
    positive, probabilities = np.array([False, True, True]), np.array([0.1, 0.3, 0.8])
    weights = np.array([[1, 1, 1], [2, 0, 1], [0, 0, 0]])
    error = expected_calibration_error(positive, probabilities, weights=weights, num_bins=2)
    np.testing.assert_allclose(error, [0.8 / 3, (0.2 + 0.2) / 3, np.nan])
    table = reliability_table(Y, P)
    by_table = sum(row.n * abs(row.observed_share - row.mean_predicted) for row in table if row.n) / 15
    assert expected_calibration_error(Y, P, weights=ONE)[0] == pytest.approx(by_table)


def test_intercept_and_slope_equal_statsmodels():
    """statsmodels 0.15.0, ``Logit(y, [1, logit p])`` and ``GLM(y, 1, Binomial(), offset=logit p)``."""
    assert logistic_slope(Y, P, weights=ONE)[0] == pytest.approx(1.198655048, abs=1e-8)
    assert logistic_intercept(Y, P, weights=ONE)[0] == pytest.approx(-0.82803751, abs=1e-7)


def test_the_slope_of_every_draw_equals_scikit_learns_with_sample_weights():
    probabilities = RNG.beta(1, 2, 60)
    positive = RNG.random(60) < probabilities
    weights = RNG.integers(0, 4, (8, 60))
    logits = np.log(probabilities / (1 - probabilities))
    ours = logistic_slope(positive, probabilities, weights=weights)
    intercepts = logistic_intercept(positive, probabilities, weights=weights)
    for draw, w in enumerate(weights):
        model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=2000, solver="newton-cholesky")
        model.fit(logits[:, None], positive, sample_weight=w)
        assert ours[draw] == pytest.approx(model.coef_[0, 0], rel=1e-6)
        # At the maximum the weighted sums of outcomes and of probabilities agree.
        shifted = 1 / (1 + np.exp(-(logits + intercepts[draw])))
        assert w @ (positive - shifted) == pytest.approx(0, abs=1e-8)


def test_probabilities_that_were_made_too_extreme_have_a_slope_below_one():
    logits = RNG.normal(0, 1.5, 4000)
    positive = RNG.random(4000) < 1 / (1 + np.exp(-logits))
    for factor in (1.0, 2.0):
        probabilities = 1 / (1 + np.exp(-factor * logits))
        slope = logistic_slope(positive, probabilities, weights=np.ones((1, 4000)))[0]
        assert slope == pytest.approx(1 / factor, abs=0.08)
    shifted = 1 / (1 + np.exp(-(logits - 1)))
    assert logistic_intercept(positive, shifted, weights=np.ones((1, 4000)))[0] == pytest.approx(1, abs=0.1)


def test_draws_without_a_class_or_separated_or_without_spread_have_no_slope():
    probabilities = np.array([0.2, 0.7, 0.4, 0.9])
    positive = np.array([False, False, True, True])
    weights = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 2, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
    slope = logistic_slope(positive, probabilities, weights=weights)
    assert np.isnan(slope).tolist() == [False, True, True, True, True]
    intercept = logistic_intercept(positive, probabilities, weights=weights)
    assert np.isnan(intercept).tolist() == [False, True, True, False, True]
    assert np.isnan(logistic_slope(positive, np.full(4, 0.5), weights=weights)).all()


def test_probabilities_of_exactly_zero_and_one_are_kept_a_little_away():
    probabilities, positive = P.copy(), Y.copy()
    probabilities[:2] = 0, 1
    near = P.copy()
    near[:2] = 1e-7, 1 - 1e-7
    ours = logistic_slope(positive, probabilities, weights=ONE)
    np.testing.assert_allclose(ours, logistic_slope(positive, near, weights=ONE))
    assert np.isfinite(ours).all()


def test_the_intercept_is_found_far_from_where_the_search_begins():
    """Sure and wrong: all 1e-7, half of them positive. The log odds are too low by log(1e7 - 1), 16.1."""
    positive = np.array([True, False] * 10)
    found = logistic_intercept(positive, np.full(20, 1e-7), weights=np.ones((1, 20)))[0]
    assert found == pytest.approx(np.log(1e7 - 1), abs=1e-6)


def test_calibration_of_probabilities_says_how_many_draws_and_holds_its_interval():
    calibration = calibrate_probabilities(Y, P, names(15))
    assert calibration.slope.low < calibration.slope.estimate < calibration.slope.high
    assert calibration.slope.estimate == pytest.approx(1.198655048, abs=1e-8)
    assert calibration.intercept.estimate == pytest.approx(-0.82803751, abs=1e-7)
    kept = int(calibration.slope.method.split(", ")[1].split()[0])
    assert 1000 < kept < 2000 and calibration.n == 15
    # Every case ten times over is no more evidence.
    tenfold = calibrate_probabilities(np.repeat(Y, 10), np.repeat(P, 10), np.repeat(names(15), 10))
    assert (tenfold.slope.low, tenfold.slope.high) == pytest.approx((calibration.slope.low, calibration.slope.high))


def test_the_line_of_predicted_on_true_values_equals_scipys():
    targets = RNG.normal(60, 12, 40)
    predicted = 20 + 0.7 * targets + RNG.normal(0, 4, 40)
    weights = RNG.integers(0, 4, (5, 40))
    slope = linear_slope(targets, predicted, weights=weights)
    intercept = linear_intercept(targets, predicted, weights=weights)
    for draw, w in enumerate(weights):
        line = scipy.stats.linregress(np.repeat(targets, w), np.repeat(predicted, w))
        assert (slope[draw], intercept[draw]) == pytest.approx((line.slope, line.intercept), rel=1e-9)
    calibration = calibrate_values(targets, predicted, names(40))
    line = scipy.stats.linregress(targets, predicted)
    assert calibration.slope.estimate == pytest.approx(line.slope)
    assert calibration.intercept.estimate == pytest.approx(line.intercept)
    assert calibration.slope.low < 0.7 < calibration.slope.high < 1
    # The bootstrap's width is about that of the line's standard error.
    assert calibration.slope.high - calibration.slope.low == pytest.approx(2 * 1.96 * line.stderr, rel=0.3)
    assert np.isnan(linear_slope(targets, predicted, weights=np.eye(40)[:1])[0])


def test_values_that_are_no_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"case 1 has 1\.2; expected a probability from 0 to 1"):
        reliability_table(np.array([True, False]), np.array([0.5, 1.2]))
    with pytest.raises(ValueError, match="case 0 has nan; expected a probability from 0 to 1"):
        logistic_slope(np.array([True, False]), np.array([np.nan, 0.2]), weights=np.ones((1, 2)))
