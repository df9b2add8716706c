import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, mean_absolute_error, roc_auc_score

from braindino.downstream import metrics
from braindino.downstream.intervals import bootstrap_interval


def test_weighted_metrics_equal_scikit_learn_with_sample_weights_and_with_ties():
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 3, 50)
    scores = rng.integers(0, 4, (50, 3)) + 1.0  # few distinct values: many ties
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    weights = rng.integers(0, 4, (5, 50))
    predicted = probabilities.argmax(axis=1)
    auc = metrics.macro_auc(targets, probabilities, weights=weights)
    accuracy = metrics.accuracy(targets, predicted, weights=weights)
    error = metrics.mean_absolute_error(targets * 1.5, scores[:, 0], weights=weights)
    for draw, w in enumerate(weights):
        one_versus_rest = [roc_auc_score(targets == k, probabilities[:, k], sample_weight=w) for k in range(3)]
        assert auc[draw] == pytest.approx(np.mean(one_versus_rest), abs=1e-12)
        assert accuracy[draw] == pytest.approx(accuracy_score(targets, predicted, sample_weight=w), abs=1e-12)
        assert error[draw] == pytest.approx(
            mean_absolute_error(targets * 1.5, scores[:, 0], sample_weight=w), abs=1e-12
        )
    unweighted = metrics.macro_auc(targets, probabilities, weights=np.ones((1, 50)))[0]
    assert unweighted == pytest.approx(
        roc_auc_score(targets, probabilities, multi_class="ovr", average="macro"), abs=1e-12
    )


def test_with_one_scan_per_subject_the_interval_is_that_of_scipy():
    rng = np.random.default_rng(2)
    targets = (rng.random(40) < 0.4).astype(int)
    scores = targets * 0.5 + rng.standard_normal(40)
    positive = targets == 1

    ours = bootstrap_interval(
        lambda weights: metrics.binary_auc(positive, scores, weights=weights),
        [f"s{i:02d}" for i in range(40)],
        iterations=500,
        seed=7,
    )
    reference = scipy.stats.bootstrap(
        (np.arange(40),),
        lambda rows: roc_auc_score(targets[rows], scores[rows]),
        n_resamples=500,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert ours.estimate == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
    assert ours.n == 40
    assert ours.method == "95 % percentile bootstrap over subjects, 500 of 500 draws, seed 7"


def test_scans_of_one_subject_are_drawn_together():
    # Ten identical scans per subject add nothing: the interval is that of one scan per subject.
    errors = np.array([1.0, 2.0, 4.0, 8.0])
    zeros = np.zeros(4)
    single = bootstrap_interval(
        lambda weights: metrics.mean_absolute_error(zeros, errors, weights=weights), ["a", "b", "c", "d"]
    )
    repeated = bootstrap_interval(
        lambda weights: metrics.mean_absolute_error(zeros.repeat(10), errors.repeat(10), weights=weights),
        np.repeat(["a", "b", "c", "d"], 10),
    )
    assert (repeated.low, repeated.high, repeated.n) == (pytest.approx(single.low), pytest.approx(single.high), 4)


def test_draws_without_one_of_the_classes_are_left_out_and_counted():
    positive = np.array([True, False, False])
    interval = bootstrap_interval(
        lambda weights: metrics.binary_auc(positive, np.array([0.9, 0.1, 0.2]), weights=weights), ["a", "b", "c"]
    )
    # All three alike has no positive (8 / 27) or no negative (1 / 27): about a third of the draws.
    kept = int(interval.method.split(", ")[1].split()[0])
    assert kept == pytest.approx(2000 * 18 / 27, abs=80)
    assert (interval.estimate, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_an_interval_with_fewer_than_half_of_the_draws_is_not_given():
    interval = bootstrap_interval(
        lambda weights: metrics.binary_auc(np.array([True, True]), np.array([0.9, 0.1]), weights=weights), ["a", "b"]
    )
    assert np.isnan([interval.estimate, interval.low, interval.high]).all()
    assert "0 of 2000 draws" in interval.method


def test_blocks_of_draws_do_not_change_the_interval(monkeypatch):
    values = np.arange(6.0)

    def mean_of_values(weights):
        return metrics.mean_absolute_error(np.zeros(6), values, weights=weights)

    whole = bootstrap_interval(mean_of_values, list("abcdef"))
    monkeypatch.setattr("braindino.downstream.intervals._WEIGHTS_AT_A_TIME", 6 * 7)
    assert bootstrap_interval(mean_of_values, list("abcdef")) == whole


def test_an_empty_test_set_is_refused():
    with pytest.raises(ValueError, match="the test set is empty"):
        bootstrap_interval(lambda weights: weights.sum(axis=1), [])
