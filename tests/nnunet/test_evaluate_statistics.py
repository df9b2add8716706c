"""Intervals and paired tests of segmentation scores: hand-worked cases, and how often the interval holds."""

import numpy as np
import pytest

from braindino.resampling import draw_subjects, percentile_interval
from nnunet_braindino.paired_tests import bootstrap_means, paired_test

NAN = float("nan")


def test_bootstrap_by_subject_equals_the_hand_worked_distribution():
    """Subject a has two cases (0, 0.3), b one (0.9): draws aa, ab, ba, bb with 1/4 each -> 0.15, 0.4, 0.4, 0.9."""
    values, subjects = np.array([0.0, 0.3, 0.9]), ["a", "a", "b"]
    means = bootstrap_means(values, draw_subjects(subjects, iterations=20_000))
    found, counts = np.unique(means.round(9), return_counts=True)
    np.testing.assert_allclose(found, [0.15, 0.4, 0.9])
    np.testing.assert_allclose(counts / 20_000, [0.25, 0.5, 0.25], atol=0.015)
    by_case = bootstrap_means(values, draw_subjects(["1", "2", "3"], iterations=20_000))
    assert len(np.unique(by_case.round(9))) == 9, "by case there are nine different means: subjects matter"


def test_cases_that_are_not_defined_are_left_out_of_every_draw():
    values, subjects = np.array([0.2, NAN, 0.8]), ["a", "b", "b"]
    draws = np.array([[1, 1, 1], [2, 0, 0], [0, 2, 2]])
    np.testing.assert_allclose(bootstrap_means(values, draws), [0.5, 0.2, 0.8])
    assert np.isnan(bootstrap_means(np.array([NAN, 1.0]), np.array([[2, 0]])))[0]
    assert all(np.isnan(percentile_interval(np.array([1.0, NAN, NAN]))))
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert len(subjects) == len(values)


def test_the_paired_test_says_the_difference_both_p_values_and_what_it_left_out():
    first = np.array([0.9, 0.8, 0.7, NAN, 0.6, 0.95])
    second = np.array([0.7, 0.85, 0.6, 0.0, NAN, 0.75])
    subjects = ["a", "a", "b", "c", "d", "e"]
    test = paired_test(first, second, subjects)
    assert test.difference == pytest.approx((0.2 - 0.05 + 0.1 + 0.2) / 4)
    assert (test.num_cases, test.num_subjects, test.num_one_sided) == (4, 3, 2)
    # Sums by subject 0.15, 0.1, 0.2: only all signs alike reach 0.45 in size, 2 patterns of 8.
    assert test.p_sign_flip == pytest.approx(2 / 8)
    assert test.p_bootstrap == 0.0 and 0 < test.low < test.difference < test.high
    swapped = paired_test(second, first, subjects)
    assert (swapped.difference, swapped.low, swapped.high) == pytest.approx((-test.difference, -test.high, -test.low))
    assert swapped.p_sign_flip == test.p_sign_flip


def test_the_bootstrap_p_is_twice_the_smaller_share_beyond_zero():
    """Two subjects, +0.3 and -0.1: draws give 0.3, 0.1, 0.1, -0.1, a quarter of them below zero."""
    test = paired_test(np.array([0.8, 0.4]), np.array([0.5, 0.5]), ["a", "b"])
    assert test.p_bootstrap == pytest.approx(0.5, abs=0.04)
    assert paired_test(np.array([0.5]), np.array([0.5]), ["a"]).p_bootstrap == 1.0
    nothing = paired_test(np.array([NAN]), np.array([0.5]), ["a"])
    assert np.isnan(nothing.difference) and np.isnan(nothing.p_sign_flip) and nothing.num_one_sided == 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Forty subjects with three correlated cases each; by case the interval would be too narrow."""
    rng = np.random.default_rng(0)
    covered = {"subject": 0, "case": 0}
    for trial in range(150):
        of_subject = rng.normal(0, 1, 40)
        values = (of_subject[:, None] + rng.normal(0, 0.3, (40, 3))).ravel()
        for kind, names in (("subject", np.repeat(np.arange(40), 3)), ("case", np.arange(120))):
            draws = draw_subjects([f"{n:03d}" for n in names], iterations=400, seed=trial)
            low, high = percentile_interval(bootstrap_means(values, draws))
            covered[kind] += low <= 0 <= high
    assert covered["subject"] >= 0.88 * 150 and covered["case"] <= 0.8 * 150
