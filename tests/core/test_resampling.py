"""Resampling by subject: hand-worked cases, enumeration and scipy."""

from itertools import product

import numpy as np
import pytest
import scipy.stats

from braindino import resampling
from braindino.resampling import (
    bootstrap_p,
    draw_blocks,
    draw_subjects,
    holm,
    mean_by_subject,
    sign_flip_p,
)

NAN = float("nan")


def test_all_cases_of_a_subject_are_drawn_together_and_every_draw_has_as_many_subjects():
    subjects = ["a", "b", "a", "c", "a"]
    draws = draw_subjects(subjects, iterations=500, seed=1)
    assert draws.shape == (500, 5)
    assert (draws[:, 0] == draws[:, 2]).all() and (draws[:, 0] == draws[:, 4]).all()
    assert (draws[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert draws[:, 0].max() == 3, "a subject may be drawn three times of three"
    np.testing.assert_array_equal(draws, draw_subjects(subjects, iterations=500, seed=1))
    assert (draws != draw_subjects(subjects, iterations=500, seed=2)).any()


def enumerated_sign_flip(differences: np.ndarray, subjects: list[str]) -> float:
    names = sorted(set(subjects))
    observed = abs(differences.mean())
    extreme = []
    for signs in product((1, -1), repeat=len(names)):
        sign_of = dict(zip(names, signs, strict=True))
        flipped = np.mean([sign_of[subject] * value for subject, value in zip(subjects, differences, strict=True)])
        extreme.append(abs(flipped) >= observed - 1e-12)
    return float(np.mean(extreme))


@pytest.mark.parametrize("seed", range(6))
def test_the_sign_flip_test_equals_brute_force_over_all_signs_of_the_subjects(seed: int):
    rng = np.random.default_rng(seed)
    subjects = [f"s{i}" for i in rng.integers(0, 7, 15)]
    differences = rng.normal(0.03, 0.05, 15).round(2)
    assert sign_flip_p(differences, subjects) == pytest.approx(enumerated_sign_flip(differences, subjects))


def test_the_sign_flip_test_equals_scipys_where_every_case_is_a_subject():
    differences = np.array([0.02, 0.05, -0.01, 0.07, 0.03, 0.04, -0.02, 0.06, 0.01, 0.02])
    names = [str(i) for i in range(10)]
    reference = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_p(differences, names) == pytest.approx(reference.pvalue)


def test_beyond_fourteen_subjects_signs_are_drawn_and_agree_with_enumeration():
    rng = np.random.default_rng(3)
    differences = rng.normal(0.012, 0.04, 15)
    names = [str(i) for i in range(15)]
    assert sign_flip_p(differences, names) == pytest.approx(enumerated_sign_flip(differences, names), abs=0.015)
    assert sign_flip_p(np.full(40, 0.1), [str(i) for i in range(40)]) == pytest.approx(1 / 10_001)


def test_time_points_of_one_subject_are_no_independent_evidence():
    """Ten equal differences: as ten subjects p = 2 / 2^10, as two subjects 2 / 4."""
    differences = np.full(10, 0.05)
    assert sign_flip_p(differences, [str(i) for i in range(10)]) == pytest.approx(2 / 1024)
    assert sign_flip_p(differences, ["a"] * 5 + ["b"] * 5) == pytest.approx(0.5)


def test_holm_equals_the_hand_worked_steps():
    """Sorted 0.01, 0.02, 0.04, 0.05 times 4, 3, 2, 1: 0.04, 0.06, 0.08, 0.08 (never falling)."""
    assert holm([0.05, 0.01, 0.04, 0.02]) == pytest.approx([0.08, 0.04, 0.08, 0.06])
    adjusted = holm([0.6, NAN, 0.7])
    assert adjusted[0] == 1.0 and np.isnan(adjusted[1]) and adjusted[2] == 1.0


def test_draws_within_strata_keep_the_number_of_subjects_of_each_class():
    subjects = ["a", "b", "c", "d", "d", "e", "f"]
    classes = np.array([0, 0, 0, 1, 1, 1, 1])
    draws = draw_subjects(subjects, iterations=800, seed=3, strata=classes)
    first_cases = [0, 1, 2, 3, 5, 6]
    assert (draws[:, [0, 1, 2]].sum(axis=1) == 3).all()
    assert (draws[:, [3, 5, 6]].sum(axis=1) == 3).all()
    assert (draws[:, 3] == draws[:, 4]).all()
    # Of three drawn out of three, a given one is missing in (2 / 3)^3 of the draws.
    np.testing.assert_allclose((draws[:, first_cases] == 0).mean(axis=0), 8 / 27, atol=0.05)
    assert abs(np.corrcoef(draws[:, 0], draws[:, 3])[0, 1]) < 0.1, "strata are drawn independently"


def test_one_stratum_is_no_stratum_and_a_subject_in_two_classes_is_drawn_among_its_like():
    subjects = ["a", "b", "c", "c"]
    np.testing.assert_array_equal(draw_subjects(subjects, strata=["x"] * 4), draw_subjects(subjects))
    draws = draw_subjects([*subjects, "d", "d"], iterations=50, strata=[0, 0, 0, 1, 1, 0])
    assert (draws[:, :2].sum(axis=1) == 2).all() and (draws[:, [2, 4]].sum(axis=1) == 2).all()


@pytest.mark.parametrize("strata", [None, [0, 0, 1, 1, 1, 0]])
def test_blocks_of_draws_and_of_flips_change_nothing(monkeypatch, strata):
    subjects = list("abcdef")
    differences = np.random.default_rng(0).normal(0.3, 1, 20)
    names = [str(i) for i in range(20)]
    whole, p = draw_subjects(subjects, strata=strata), sign_flip_p(differences, names)
    monkeypatch.setattr(resampling, "_NUMBERS_AT_A_TIME", 6 * 7)
    blocks = list(draw_blocks(subjects, strata=strata))
    assert len(blocks) == 286 and max(map(len, blocks)) == 7
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert sign_flip_p(differences, names) == p


def test_no_case_and_missing_strata_are_refused():
    with pytest.raises(ValueError, match="the test set is empty"):
        draw_subjects([])
    with pytest.raises(ValueError, match="2 strata for 3 cases; expected one for each"):
        draw_subjects(["a", "b", "c"], strata=[0, 1])


def test_the_bootstrap_p_counts_zeros_on_both_sides_and_leaves_undefined_draws_out():
    assert bootstrap_p(np.array([-1.0, 0.0, 1.0, 2.0])) == 1.0
    assert bootstrap_p(np.array([-1.0, 1.0, 1.0, 2.0])) == 0.5
    assert bootstrap_p(np.array([-1.0, -1.0, 0.0, -2.0])) == bootstrap_p(np.array([1.0, 1.0, 0.0, 2.0])) == 0.5
    assert bootstrap_p(np.array([0.5, NAN, 1.0, 2.0])) == 0.0
    assert np.isnan(bootstrap_p(np.array([0.5, NAN, NAN])))


def test_holm_within_strata_takes_each_stratum_as_a_family():
    adjusted = holm([0.01, 0.03, 0.02, NAN, 0.04], strata=["young", "old", "young", "old", "old"])
    assert adjusted[:3] == pytest.approx([0.02, 0.06, 0.02])
    assert np.isnan(adjusted[3]) and adjusted[4] == pytest.approx(0.06)


def test_holm_equals_statsmodels():
    """statsmodels 0.15.0, ``multipletests(p, method="holm")``."""
    p = [0.011, 0.2, 0.0004, 0.049, 0.03, 0.51, 0.03]
    assert holm(p) == pytest.approx([0.066, 0.4, 0.0028, 0.15, 0.15, 0.51, 0.15], abs=1e-12)


def test_every_subject_has_one_mean():
    means = mean_by_subject(np.array([1.0, 5.0, 2.0, 6.0]), ["b", "a", "b", "a"])
    assert means.subjects.tolist() == ["a", "b"] and means.values.tolist() == [5.5, 1.5]
