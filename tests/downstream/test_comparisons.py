"""Comparisons of two models beside scipy, statsmodels and hand-worked cases."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from braindino.downstream import metrics
from braindino.downstream.comparisons import (
    corrected_t_over_splits,
    label_permutation,
    mcnemar,
    paired_bootstrap,
    paired_t,
    paired_t_over_splits,
    sign_flip,
)

NAN = float("nan")


def names(count: int) -> list[str]:
    return [f"s{i:03d}" for i in range(count)]


def test_the_paired_bootstrap_equals_scipys_with_the_same_draws_for_both_models():
    rng = np.random.default_rng(2)
    positive = rng.random(40) < 0.4
    first, second = positive + rng.standard_normal(40), 0.4 * positive + rng.standard_normal(40)
    ours = paired_bootstrap(
        lambda w: metrics.binary_auc(positive, first, weights=w),
        lambda w: metrics.binary_auc(positive, second, weights=w),
        names(40),
        what="auc",
        iterations=400,
        seed=7,
    )
    reference = scipy.stats.bootstrap(
        (np.arange(40),),
        lambda rows: roc_auc_score(positive[rows], first[rows]) - roc_auc_score(positive[rows], second[rows]),
        n_resamples=400,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(7),
    )
    draws = reference.bootstrap_distribution
    expected = (reference.confidence_interval.low, reference.confidence_interval.high)
    assert (ours.low, ours.high) == pytest.approx(expected, abs=1e-12)
    assert ours.p == pytest.approx(2 * min((draws <= 0).mean(), (draws >= 0).mean())) and 0 < ours.p < 1
    assert ours.difference == pytest.approx(roc_auc_score(positive, first) - roc_auc_score(positive, second))
    assert (ours.what, ours.n) == ("auc", 40)
    assert ours.method == (
        "paired 95 % percentile bootstrap over subjects, 400 of 400 draws, seed 7; p twice the smaller share beyond "
        "zero"
    )


def test_draws_that_do_not_define_both_models_are_left_out_and_too_few_give_no_p():
    positive = np.array([True, False, False])

    def auc(scores):
        return lambda w: metrics.binary_auc(positive, np.array(scores), weights=w)

    comparison = paired_bootstrap(auc([0.9, 0.1, 0.2]), auc([0.1, 0.9, 0.8]), ["a", "b", "c"], what="auc")
    kept = int(comparison.method.split(", ")[1].split()[0])
    assert kept == pytest.approx(2000 * 18 / 27, abs=80)
    assert (comparison.difference, comparison.low, comparison.high, comparison.p) == (1, 1, 1, 0)
    nothing = paired_bootstrap(auc([0.9, 0.1, 0.2]), lambda w: np.full(len(w), NAN), ["a", "b", "c"], what="auc")
    assert np.isnan([nothing.difference, nothing.low, nothing.p]).all() and "0 of 2000 draws" in nothing.method


def test_equal_models_differ_by_nothing_and_p_is_one():
    values = np.array([1.0, 2.0, 4.0, 3.0])

    def mean(w):
        return metrics.mean_absolute_error(np.zeros(4), values, weights=w)

    for comparison in (
        paired_bootstrap(mean, mean, names(4), what="mae"),
        paired_t(values, values, names(4), what="mae"),
        paired_t_over_splits(values, values, what="auc"),
        sign_flip(values, values, names(4), what="mae"),
        mcnemar(values > 2, values > 2, names(4)),
    ):
        assert (comparison.difference, comparison.low, comparison.high, comparison.p) == (0, 0, 0, 1), comparison


def test_the_paired_t_test_equals_scipys_with_its_interval():
    rng = np.random.default_rng(1)
    first, second = rng.gamma(2, 3, 25), rng.gamma(2, 3.5, 25)
    ours = paired_t(first, second, names(25), what="absolute error")
    reference = scipy.stats.ttest_rel(first, second)
    interval = reference.confidence_interval(0.95)
    assert ours.p == pytest.approx(reference.pvalue, abs=1e-14)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert (ours.difference, ours.n) == (pytest.approx(np.mean(first - second)), 25)
    over_splits = paired_t_over_splits(first[:5], second[:5], what="auc")
    assert over_splits.p == pytest.approx(scipy.stats.ttest_rel(first[:5], second[:5]).pvalue, abs=1e-14)
    assert over_splits.method == "paired t test over splits, 5 of 5 splits"


def test_cases_of_one_subject_are_averaged_before_they_are_tested():
    rng = np.random.default_rng(6)
    first, second = rng.gamma(2, 3, 12), rng.gamma(2, 3.5, 12)
    subjects = np.array(["a", "b", "b", "c", "c", "c", "d", "e", "e", "f", "g", "g"])
    means = [(first - second)[subjects == name].mean() for name in "abcdefg"]
    t = paired_t(first, second, subjects, what="error")
    flipped = sign_flip(first, second, subjects, what="error")
    assert (t.p, t.n) == (pytest.approx(scipy.stats.ttest_1samp(means, 0).pvalue), 7)
    reference = scipy.stats.permutation_test((means,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert (flipped.p, flipped.n) == (pytest.approx(reference.pvalue), 7)
    assert flipped.difference == pytest.approx(np.mean(means))
    # Every case ten times over is no more evidence.
    tenfold = [np.repeat(values, 10) for values in (first, second, subjects)]
    assert paired_t(*tenfold, what="error").p == pytest.approx(t.p)
    assert sign_flip(*tenfold, what="error").p == flipped.p


def test_the_sign_flip_test_with_many_subjects_draws_as_scipys():
    rng = np.random.default_rng(8)
    first, second = rng.normal(5.0, 1, 40), rng.normal(5.15, 1, 40)
    ours = sign_flip(first, second, names(40), what="absolute error")
    reference = scipy.stats.permutation_test(
        (first, second),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    assert 0.01 < ours.p < 0.5
    assert ours.p == pytest.approx(reference.pvalue, abs=0.015)
    assert ours.low < ours.difference < ours.high
    assert ours.method == (
        "sign-flip test over subjects, 10000 patterns drawn, seed 42; 95 % percentile bootstrap over subjects, 2000 of "
        "2000 draws, seed 42"
    )


def test_the_corrected_t_test_equals_nadeau_and_bengios_by_hand():
    """Differences .02 .04 .03 .06 .05: mean .04, s^2 = .00025, 5 splits, n2 / n1 = 1 / 4.

    t = .04 / sqrt((1 / 5 + 1 / 4) .00025) = 3.7712; uncorrected .04 / sqrt(.00025 / 5) = 5.6569.
    """
    first, second = np.array([0.82, 0.84, 0.83, 0.86, 0.85]), np.full(5, 0.8)
    ours = corrected_t_over_splits(first, second, num_train=400, num_test=100, what="auc")
    error = np.sqrt(0.45 * 0.00025)
    assert ours.p == pytest.approx(2 * scipy.stats.t.sf(0.04 / error, 4), abs=1e-10)
    assert ours.p == pytest.approx(0.0196, abs=1e-4)
    half = 2.7764451 * error
    assert (ours.difference, ours.low, ours.high) == pytest.approx((0.04, 0.04 - half, 0.04 + half), abs=1e-8)
    plain = paired_t_over_splits(first, second, what="auc")
    assert plain.p == pytest.approx(2 * scipy.stats.t.sf(5.656854, 4), abs=1e-8) and plain.p < ours.p
    assert "400 training and 100 test subjects" in ours.method


def test_splits_without_a_value_are_left_out_and_too_few_give_no_p():
    comparison = paired_t_over_splits([0.8, NAN, 0.9, 0.7], [0.7, 0.7, 0.85, NAN], what="auc")
    assert (comparison.n, comparison.difference) == (2, pytest.approx(0.075))
    assert comparison.method == "paired t test over splits, 2 of 4 splits"
    single = paired_t_over_splits([0.8], [0.7], what="auc")
    assert single.difference == pytest.approx(0.1) and np.isnan([single.p, single.low]).all()
    assert single.method.endswith("not defined: one difference only")
    level = paired_t_over_splits([0.8, 0.7], [0.7, 0.6], what="auc")
    assert np.isnan(level.p) and level.method.endswith("not defined: all differences are equal")
    assert np.isnan(paired_t_over_splits([NAN], [0.7], what="auc").difference)


def test_mcnemar_equals_statsmodels_and_the_binomial_test():
    """statsmodels 0.15.0, ``mcnemar([[5, 9], [2, 7]], exact=True)``: p = 0.0654296875."""
    first = np.repeat([True, True, False, False], [5, 9, 2, 7])
    second = np.repeat([True, False, True, False], [5, 9, 2, 7])
    ours = mcnemar(first, second, names(23))
    assert ours.p == pytest.approx(0.0654296875, abs=1e-12)
    assert ours.difference == pytest.approx(7 / 23) and ours.low < 7 / 23 < ours.high
    assert (ours.what, ours.n) == ("accuracy", 23)
    assert ours.method.startswith("exact McNemar test over subjects, 9 better by the first, 2 by the second; 95 %")
    assert mcnemar(second, first, names(23)).p == ours.p


def test_mcnemar_counts_a_subject_once_however_many_cases_it_has():
    first = np.array([True, True, True, True, False, True])
    second = np.array([False, False, True, False, True, True])
    subjects = ["a", "a", "a", "b", "c", "d"]
    ours = mcnemar(first, second, subjects)
    # a and b by the first, c by the second: p of 2 of 3 is 1; by cases it would be 3 against 1.
    assert ours.p == 1.0 and "2 better by the first, 1 by the second" in ours.method
    assert (ours.n, ours.difference) == (4, pytest.approx(2 / 6))


def test_a_stratum_without_cases_is_no_error_but_not_defined():
    none = np.array([])
    for comparison in (
        paired_t(none, none, [], what="error"),
        sign_flip(none, none, [], what="error"),
        mcnemar(none, none, []),
    ):
        assert np.isnan(comparison.p) and comparison.n == 0 and "not defined" in comparison.method


def test_values_that_are_missing_or_of_other_cases_are_refused():
    with pytest.raises(ValueError, match=r"case 1 of subject b has nan and 2\.0; expected finite values of both"):
        paired_t(np.array([1.0, NAN]), np.array([1.0, 2.0]), ["a", "b"], what="error")
    with pytest.raises(ValueError, match="2 values of the first, 3 of the second, 2 subjects; expected one of each"):
        sign_flip(np.zeros(2), np.zeros(3), ["a", "b"], what="error")
    with pytest.raises(ValueError, match="2 splits of the first, 1 of the second; expected the same splits"):
        paired_t_over_splits([0.5, 0.6], [0.5], what="auc")
    with pytest.raises(ValueError, match="0 training and 5 test subjects; expected some of both"):
        corrected_t_over_splits([0.5, 0.6], [0.5, 0.7], num_train=0, num_test=5, what="auc")


def test_permuted_labels_count_as_good_when_they_reach_the_observed_value():
    check = label_permutation(0.8, [0.5, 0.8, 0.6, 0.4, NAN, 0.9], what="auc")
    assert (check.p, check.n, check.permuted_mean) == (pytest.approx(3 / 6), 5, pytest.approx(0.64))
    assert check.method == "label permutation, 5 of 6 permutations, higher is better"
    errors = label_permutation(5.0, [9.0, 8.0, 5.0, 7.0], what="mae", higher_is_better=False)
    assert errors.p == pytest.approx(2 / 5)
    assert label_permutation(1.0, np.zeros(99), what="auc").p == pytest.approx(1 / 100)
    assert np.isnan(label_permutation(NAN, [0.5], what="auc").p) and np.isnan(label_permutation(0.5, [], what="auc").p)


def test_the_label_permutation_p_equals_scipys():
    rng = np.random.default_rng(0)
    scores = np.array([0.1, 0.4, 0.35, 0.8, 0.7, 0.9])
    labels = np.array([0, 0, 1, 1, 0, 1])
    permuted = [roc_auc_score(rng.permutation(labels), scores) for _ in range(800)]
    ours = label_permutation(roc_auc_score(labels, scores), permuted, what="auc")
    reference = scipy.stats.permutation_test(
        (labels,),
        lambda dealt: roc_auc_score(dealt, scores),
        permutation_type="pairings",
        vectorized=False,
        n_resamples=np.inf,  # all 720
        alternative="greater",
    )
    assert ours.p == pytest.approx(reference.pvalue, abs=0.05)


def test_under_no_difference_p_values_are_small_about_as_often_as_they_say():
    rng = np.random.default_rng(11)
    small = {"t": 0, "flip": 0, "bootstrap": 0}
    for trial in range(200):
        of_subject = rng.normal(0, 1, 25)
        differences = (of_subject[:, None] + rng.normal(0, 0.3, (25, 3))).ravel()
        subjects, zeros = np.repeat(names(25), 3), np.zeros(75)
        small["t"] += paired_t(differences, zeros, subjects, what="x").p < 0.05
        small["flip"] += sign_flip(differences, zeros, subjects, what="x", seed=trial).p < 0.05
        small["bootstrap"] += (
            paired_bootstrap(
                lambda w, d=differences: metrics.weighted_mean(d, w),
                lambda w: np.zeros(len(w)),
                subjects,
                what="x",
                iterations=400,
                seed=trial,
            ).p
            < 0.05
        )
    assert 2 <= small["t"] <= 20 and 2 <= small["flip"] <= 20 and 2 <= small["bootstrap"] <= 26, small
