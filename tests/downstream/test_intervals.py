import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, mean_absolute_error, roc_auc_score

from braindino.downstream import metrics
from braindino.downstream.intervals import bootstrap_interval, split_interval


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
    monkeypatch.setattr("braindino.resampling._NUMBERS_AT_A_TIME", 6 * 7)
    assert bootstrap_interval(mean_of_values, list("abcdef")) == whole


def test_an_empty_test_set_is_refused():
    with pytest.raises(ValueError, match="the test set is empty"):
        bootstrap_interval(lambda weights: weights.sum(axis=1), [])


def test_a_stratified_interval_keeps_the_class_counts_and_equals_a_loop_over_classes():
    rng = np.random.default_rng(3)
    classes = np.repeat([0, 1], [30, 10])
    correct = (rng.random(40) < np.where(classes == 0, 0.9, 0.3)).astype(int)
    subjects = [f"s{i:02d}" for i in range(40)]

    def share(weights):
        return metrics.accuracy(np.ones(40, dtype=int), correct, weights=weights)

    interval = bootstrap_interval(share, subjects, strata=classes)
    loop = [
        np.mean(np.concatenate([rng.choice(correct[classes == k], (classes == k).sum()) for k in (0, 1)]))
        for _ in range(2000)
    ]
    assert (interval.low, interval.high) == pytest.approx(np.percentile(loop, [2.5, 97.5]), abs=0.026)
    assert interval.method == "95 % percentile bootstrap over subjects within classes, 2000 of 2000 draws, seed 42"
    counts = bootstrap_interval(lambda w: (w * (classes == 1)).sum(axis=1).astype(float), subjects, strata=classes)
    assert (counts.low, counts.high) == (10, 10)
    free = bootstrap_interval(share, subjects)
    assert free.high - free.low > interval.high - interval.low, "classes of different accuracy: less is left to chance"


def test_the_interval_over_splits_equals_scipys_student_t_interval():
    values = [0.81, 0.77, 0.93, 0.85, 0.9]
    interval = split_interval(values)
    expected = scipy.stats.t.interval(0.95, 4, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)
    assert (interval.estimate, interval.n) == (pytest.approx(np.mean(values)), 5)
    assert interval.method == "95 % Student t interval over splits, 5 of 5 splits"
    # The paper's ADNI interval .850 [.754, .947] is that of five splits with a standard deviation of .078.
    paper = split_interval(0.85 + 0.0777 * np.array([-1, -1, 0, 1, 1]))
    assert (paper.low, paper.high) == pytest.approx((0.754, 0.947), abs=1e-3)


def test_splits_without_a_value_are_left_out_and_one_split_has_no_interval():
    interval = split_interval([0.8, float("nan"), 0.9])
    assert (interval.estimate, interval.n) == (pytest.approx(0.85), 2)
    assert interval.method.endswith("2 of 3 splits")
    single = split_interval([0.8])
    assert single.estimate == 0.8 and np.isnan([single.low, single.high]).all()
    assert np.isnan(split_interval([]).estimate)
