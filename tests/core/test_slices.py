"""Which slices, and which way round."""

import itertools

import numpy as np
import pytest
import scipy.stats

from braindino.slices import axial_slices, gaussian_indices, scan_generator, uniform_indices
from braindino.volume import Volume


def test_slices_are_radiological_views_from_the_bottom_up() -> None:
    data = np.zeros((4, 6, 5), dtype=np.float32)
    data[3, 2, 1] = 1  # patient's right
    data[1, 5, 1] = 2  # anterior
    data[1, 2, 4] = 3  # superior
    slices = axial_slices(Volume(data, np.eye(4)), [1, 4])
    assert slices.shape == (2, 6, 4) and slices.dtype == np.float32
    assert slices[0, 3, 0] == 1  # right is the first column
    assert slices[0, 0, 2] == 2  # anterior is the first row
    assert slices[1, 3, 2] == 3


def test_gaussian_draws_are_sorted_without_repeats_and_reproducible() -> None:
    first = gaussian_indices(rng=scan_generator(7, "scan a"))
    assert len(first) == 128 == len(set(first)) and (np.diff(first) > 0).all()
    assert first.min() >= 0 and first.max() < 256
    np.testing.assert_array_equal(first, gaussian_indices(rng=scan_generator(7, "scan a")))
    assert (first != gaussian_indices(rng=scan_generator(7, "scan b"))).any()
    assert (first != gaussian_indices(rng=scan_generator(8, "scan a"))).any()


def test_single_draws_follow_the_truncated_normal() -> None:
    rng = np.random.default_rng(0)
    draws = np.concatenate([gaussian_indices(1, rng=rng) for _ in range(4000)])
    expected = scipy.stats.norm(128, 50).pdf(np.arange(256))
    edges = [0, 60, 100, 128, 156, 196, 256]
    counts, _ = np.histogram(draws, edges)
    shares = [expected[a:b].sum() / expected.sum() for a, b in itertools.pairwise(edges)]
    assert scipy.stats.chisquare(counts, np.array(shares) * len(draws)).pvalue > 0.001


def test_central_slices_are_drawn_more_often_than_outer_ones() -> None:
    rng = np.random.default_rng(1)
    frequency = np.zeros(256)
    for _ in range(200):
        frequency[gaussian_indices(rng=rng)] += 1
    assert frequency[96:160].mean() > 1.5 * np.concatenate([frequency[:32], frequency[224:]]).mean()


def test_uniform_indices_are_the_middles_of_equal_parts() -> None:
    np.testing.assert_array_equal(uniform_indices(4, 8), [1, 3, 5, 7])
    np.testing.assert_array_equal(uniform_indices(256, 256), np.arange(256))
    indices = uniform_indices()
    assert len(indices) == 128 and (np.diff(indices) == 2).all()


@pytest.mark.parametrize("num", [0, 257])
def test_more_slices_than_there_are_is_an_error(num: int) -> None:
    with pytest.raises(ValueError, match="num: found"):
        uniform_indices(num)
    with pytest.raises(ValueError, match="num: found"):
        gaussian_indices(num, rng=np.random.default_rng(0))
