"""Spread of features against hand-worked cases and independent formulas."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from braindino.downstream.spread import between_within, mean_cosine, measure_spread


def test_features_along_a_line_have_rank_one():
    found = measure_spread(np.outer([1.0, 2, 3, 4], [1.0, 2, 2]), list("abcd"))
    assert found.effective_rank == pytest.approx(1)
    assert found.participation_ratio == pytest.approx(1)
    assert found.first_share == pytest.approx(1)
    assert found.mean_cosine == pytest.approx(1)


def test_features_along_axes_that_vary_alike_have_as_many_ranks():
    found = measure_spread(np.vstack([3 * np.eye(5), -3 * np.eye(5)]) + 1, [str(i) for i in range(10)])
    assert found.effective_rank == pytest.approx(5)
    assert found.participation_ratio == pytest.approx(5)
    assert found.first_share == pytest.approx(0.2)


def test_unequal_axes_by_hand():
    # Singular values 3 sqrt 2 and sqrt 2: shares 3/4 and 1/4; variances 9 : 1.
    features = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    found = measure_spread(features, list("abcd"))
    assert found.effective_rank == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert found.participation_ratio == pytest.approx(100 / 82)
    assert found.first_share == pytest.approx(0.9)


@pytest.mark.parametrize("shape", [(12, 40), (60, 7)])
def test_ranks_are_those_of_the_singular_values(shape):
    features = np.random.default_rng(4).standard_normal(shape) @ np.diag(np.geomspace(1, 1e-3, shape[1])) + 100
    singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    shares = singular[: min(shape[0] - 1, shape[1])] / singular[: min(shape[0] - 1, shape[1])].sum()
    found = measure_spread(features, [str(row) for row in range(shape[0])])
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert found.participation_ratio == pytest.approx((singular**2).sum() ** 2 / (singular**4).sum(), rel=1e-9)
    assert found.first_share == pytest.approx(singular[0] ** 2 / (singular**2).sum(), rel=1e-9)


def test_mean_cosine_is_that_of_all_pairs():
    features = np.random.default_rng(0).standard_normal((9, 4)) + 1
    pairs = cosine_similarity(features)[np.triu_indices(9, 1)]
    assert mean_cosine(features) == pytest.approx(pairs.mean())
    assert np.isnan(mean_cosine(features[:1]))


def test_variance_between_and_within_by_hand():
    # Subjects at 0 and 10, two scans each, 1 apart: MS_within = 4 * 0.25 / 2, MS_between = 4 * 25 / 1.
    features = np.array([[-0.5], [0.5], [9.5], [10.5]])
    assert between_within(features, list("aabb")) == pytest.approx((100 - 0.5) / 2 / 0.5)


def test_components_of_variance_are_found_again():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 5, 400)
    subjects = np.repeat(np.arange(400), counts)
    features = 2 * rng.standard_normal((400, 6))[subjects] + rng.standard_normal((len(subjects), 6))
    assert between_within(features, subjects) == pytest.approx(4, rel=0.1)
    assert between_within(rng.standard_normal((len(subjects), 6)), subjects) == pytest.approx(0, abs=0.05)


def test_what_is_not_defined_is_not_a_number():
    assert np.isnan(between_within(np.eye(3), list("abc")))
    assert np.isnan(between_within(np.eye(3), list("aaa")))
    equal = measure_spread(np.full((5, 3), 0.1), list("aaabc"))  # three times 0.1 / 3 is not 0.1
    assert np.isnan([equal.effective_rank, equal.participation_ratio, equal.first_share, equal.between_within]).all()
    assert equal.mean_cosine == pytest.approx(1)
