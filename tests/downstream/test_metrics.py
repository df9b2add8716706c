"""Metrics under case weights beside scikit-learn, lifelines and scikit-survival."""

import numpy as np
import pytest
import sklearn.metrics
from lifelines.utils import concordance_index as lifelines_concordance_index

from braindino.downstream import metrics

NAN = float("nan")
RNG = np.random.default_rng(4)
WEIGHTS = RNG.integers(0, 4, (6, 60))


def test_regression_metrics_equal_scikit_learn_with_sample_weights():
    targets = RNG.normal(60, 12, 60)
    predicted = targets + RNG.normal(2, 6, 60)
    root = metrics.root_mean_squared_error(targets, predicted, weights=WEIGHTS)
    share = metrics.r_squared(targets, predicted, weights=WEIGHTS)
    for draw, w in enumerate(WEIGHTS):
        expected = sklearn.metrics.root_mean_squared_error(targets, predicted, sample_weight=w)
        assert root[draw] == pytest.approx(expected, abs=1e-12)
        expected = sklearn.metrics.r2_score(targets, predicted, sample_weight=w)
        assert share[draw] == pytest.approx(expected, abs=1e-10)


def test_r_squared_keeps_its_digits_far_from_zero_and_is_nan_without_spread():
    targets = 1e6 + np.arange(5.0)
    predicted = targets + np.array([0.5, -0.5, 0.5, -0.5, 0.0])
    ones = np.ones((1, 5))
    assert metrics.r_squared(targets, predicted, weights=ones)[0] == pytest.approx(0.9, abs=1e-9)
    assert metrics.r_squared(targets, np.full(5, targets.mean()), weights=ones)[0] == pytest.approx(0, abs=1e-9)
    one_case = np.array([[0, 3, 0, 0, 0]])
    assert np.isnan(metrics.r_squared(targets, predicted, weights=one_case)[0])


def test_class_metrics_equal_scikit_learn_with_sample_weights():
    targets = RNG.integers(0, 3, 60)
    predicted = np.where(RNG.random(60) < 0.6, targets, RNG.integers(0, 3, 60))
    balanced = metrics.balanced_accuracy(targets, predicted, weights=WEIGHTS)
    positive, called = targets == 2, predicted == 2
    sensitivity = metrics.sensitivity(positive, called, weights=WEIGHTS)
    specificity = metrics.specificity(positive, called, weights=WEIGHTS)
    for draw, w in enumerate(WEIGHTS):
        expected = sklearn.metrics.balanced_accuracy_score(targets, predicted, sample_weight=w)
        assert balanced[draw] == pytest.approx(expected, abs=1e-12)
        expected = sklearn.metrics.recall_score(positive, called, sample_weight=w)
        assert sensitivity[draw] == pytest.approx(expected, abs=1e-12)
        expected = sklearn.metrics.recall_score(positive, called, pos_label=False, sample_weight=w)
        assert specificity[draw] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_brier_score_equals_scikit_learns(num_classes: int):
    probabilities = RNG.dirichlet(np.ones(num_classes), 60)
    targets = RNG.integers(0, num_classes, 60)
    ours = metrics.brier_score(targets, probabilities, weights=WEIGHTS)
    for draw, w in enumerate(WEIGHTS):
        expected = sklearn.metrics.brier_score_loss(
            targets, probabilities, sample_weight=w, labels=np.arange(num_classes)
        )
        assert ours[draw] == pytest.approx(expected, abs=1e-12)


def test_draws_without_a_class_and_empty_test_sets_give_nan():
    targets, predicted = np.array([0, 1, 1]), np.array([0, 1, 0])
    weights = np.array([[1, 1, 1], [2, 0, 0], [0, 2, 1]])
    np.testing.assert_allclose(metrics.balanced_accuracy(targets, predicted, weights=weights), [0.75, NAN, NAN])
    positive, called = targets == 1, predicted == 1
    np.testing.assert_allclose(metrics.sensitivity(positive, called, weights=weights), [0.5, NAN, 2 / 3])
    np.testing.assert_allclose(metrics.specificity(positive, called, weights=weights), [1, 1, NAN])
    nobody = np.empty(0, dtype=int)
    assert np.isnan(metrics.balanced_accuracy(nobody, nobody, weights=np.empty((2, 0)))).tolist() == [True, True]
    assert np.isnan(metrics.r_squared(nobody, nobody, weights=np.empty((2, 0)))).tolist() == [True, True]


def harrell(times, events, risks) -> float:
    """By the definition, pair by pair; of equal times an event comes before a censoring."""
    won = pairs = 0.0
    for i in range(len(times)):
        for j in range(len(times)):
            if events[i] and (times[i] < times[j] or (times[i] == times[j] and not events[j])):
                pairs += 1
                won += 1.0 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0.0
    return won / pairs


def test_the_concordance_index_of_a_draw_equals_lifelines_on_the_repeated_cases():
    times = RNG.integers(1, 15, 60).astype(float)
    events = RNG.random(60) < 0.6
    risks = RNG.integers(0, 6, 60).astype(float)
    ours = metrics.concordance_index(times, events, risks, weights=WEIGHTS)
    for draw, w in enumerate(WEIGHTS):
        rows = np.repeat(np.arange(60), w)
        expected = lifelines_concordance_index(times[rows], -risks[rows], events[rows])
        assert ours[draw] == pytest.approx(expected, abs=1e-12)
        assert ours[draw] == pytest.approx(harrell(times[rows], events[rows], risks[rows]), abs=1e-12)


def test_the_concordance_index_equals_scikit_survivals():
    """scikit-survival 0.28.0, ``concordance_index_censored``: 98 concordant, 14 discordant, 32 tied in risk."""
    times = np.array([3, 9, 5, 12, 2, 7, 9, 3, 12, 5, 7, 10, 4, 7, 12, 6, 9, 3, 10, 5.0])
    events = np.array([1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1])
    risks = np.array([4, 1, 3, 1, 4, 2, 2, 3, 1, 2, 3, 1, 4, 3, 2, 2, 2, 3, 2, 4.0])
    found = metrics.concordance_index(times, events, risks, weights=np.ones((1, 20)))[0]
    assert found == pytest.approx((98 + 32 / 2) / (98 + 14 + 32), abs=1e-12)


def test_the_concordance_index_is_the_same_in_blocks_and_nan_without_pairs(monkeypatch):
    times, events = RNG.exponential(5, 60), RNG.random(60) < 0.5
    risks = RNG.normal(size=60)
    whole = metrics.concordance_index(times, events, risks, weights=WEIGHTS)
    monkeypatch.setattr(metrics, "_PAIRS_AT_A_TIME", 60 * 7)
    np.testing.assert_allclose(metrics.concordance_index(times, events, risks, weights=WEIGHTS), whole, atol=1e-14)
    assert np.isnan(metrics.concordance_index(times, np.zeros(60), risks, weights=WEIGHTS)).all()
    perfect = metrics.concordance_index(times, events, -times, weights=WEIGHTS)
    np.testing.assert_allclose(perfect, 1.0)
