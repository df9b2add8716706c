"""Intervals and paired tests on scores per case, in which all cases of a subject move together (paper sec. 4.7)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from braindino.resampling import SEED, bootstrap_p, draw_subjects, percentile_interval, sign_flip_p


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
    return PairedTest(
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_bootstrap=bootstrap_p(means),
        p_sign_flip=sign_flip_p(differences, owners, seed=seed),
        num_cases=len(differences),
        num_subjects=len(set(owners.tolist())),
        num_one_sided=one_sided,
    )
