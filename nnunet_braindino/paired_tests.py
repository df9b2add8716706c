"""Intervals and paired tests on scores per case, in which all cases of a subject move together (paper sec. 4.7)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ITERATIONS = 2000  # paper sec. 4.7
SEED = 42  # paper sec. 4.7
CONFIDENCE = 0.95
RANDOM_FLIPS = 10_000
# 16,384 sign patterns: fewer than would be drawn, give or take.
MAX_ENUMERATED_SUBJECTS = 14


class PairedTest(NamedTuple):
    """The mean over cases of first minus second; NaN where no case is defined for both."""

    difference: float
    low: float
    """Lower end of the 95 % percentile bootstrap interval, subjects resampled."""
    high: float
    p_bootstrap: float
    """Twice the smaller share of bootstrap differences on either side of zero, at most 1; 0 is less than one draw."""
    p_sign_flip: float
    """Two-sided, signs flipped by subject: exact up to 14 subjects, else (k + 1) / (10,001)."""
    num_cases: int
    num_subjects: int
    num_one_sided: int
    """Cases left out because the score is defined for one of the two only."""


def draw_subjects(subjects: Sequence[str], *, iterations: int = ITERATIONS, seed: int = SEED) -> np.ndarray:
    """(iterations, n) int: how often each of the n cases is drawn when subjects are drawn with replacement.

    Args:
        subjects: subject of each case.
        iterations: number of draws.
        seed: the same seed and subjects give the same draws, so scores on the same cases stay paired.
    """
    names, subject_of_case = np.unique(np.asarray(subjects), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(0, len(names), (iterations, len(names)))
    cells = (drawn + len(names) * np.arange(iterations)[:, None]).ravel()
    times = np.bincount(cells, minlength=iterations * len(names)).reshape(iterations, len(names))
    return times[:, subject_of_case]


def bootstrap_means(values: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(iterations,) mean of the defined values in every draw; NaN in draws without any.

    Args:
        values: (n,) scores, NaN where not defined.
        draws: (iterations, n), from ``draw_subjects``.
    """
    defined = ~np.isnan(values)
    weights = draws[:, defined]
    total = weights.sum(axis=1)
    return np.where(total > 0, weights @ values[defined] / np.maximum(total, 1), np.nan)


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval of bootstrap values; NaN when fewer than half are defined."""
    defined = draws[~np.isnan(draws)]
    if 2 * len(defined) < len(draws) or not len(defined):
        return np.nan, np.nan
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def paired_test(first: np.ndarray, second: np.ndarray, subjects: Sequence[str], *, seed: int = SEED) -> PairedTest:
    """Compare two sets of scores on the same cases.

    Args:
        first: (n,) scores, NaN where not defined.
        second: (n,) scores of the same cases.
        subjects: subject of each case.
        seed: of the draws and of the flips.
    """
    defined = ~np.isnan(first) & ~np.isnan(second)
    one_sided = int(np.count_nonzero(np.isnan(first) ^ np.isnan(second)))
    if not defined.any():
        return PairedTest(np.nan, np.nan, np.nan, np.nan, np.nan, 0, 0, one_sided)
    differences = (first - second)[defined]
    owners = np.asarray(subjects)[defined]
    means = bootstrap_means(differences, draw_subjects(owners, seed=seed))
    low, high = percentile_interval(means)
    below, above = float(np.mean(means <= 0)), float(np.mean(means >= 0))
    return PairedTest(
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_bootstrap=min(1.0, 2 * min(below, above)),
        p_sign_flip=sign_flip_p(differences, owners, seed=seed),
        num_cases=len(differences),
        num_subjects=len(set(owners.tolist())),
        num_one_sided=one_sided,
    )


def sign_flip_p(differences: np.ndarray, subjects: Sequence[str] | np.ndarray, *, seed: int = SEED) -> float:
    """Two-sided p of a mean difference under the hypothesis that first and second may be exchanged, subject by subject.

    All patterns of signs are enumerated for up to 14 subjects; beyond, 10,000 are drawn and the observed one counts as
    one of them.

    Args:
        differences: (n,) per case, none of them NaN.
        subjects: subject of each case.
        seed: of the drawn patterns.
    """
    _, subject_of_case = np.unique(np.asarray(subjects), return_inverse=True)
    sums = np.bincount(subject_of_case, weights=differences)
    # Equal sums in another order of addition are as extreme.
    observed = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if len(sums) <= MAX_ENUMERATED_SUBJECTS:
        patterns = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ sums) >= observed))
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(RANDOM_FLIPS, len(sums)))
    extreme = int(np.count_nonzero(np.abs(signs @ sums) >= observed))
    return (extreme + 1) / (RANDOM_FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given; NaN stays NaN and is no test."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if not np.isnan(p))
    adjusted = [float("nan")] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted
