"""How much room the features of an encoder take, and whom their variance belongs to."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_ROUNDING = 1e-12
"""Of a sum of products, relative to it, generously."""


class Spread(NamedTuple):
    """Of features of n scans; NaN where not defined."""

    effective_rank: float
    """exp(-sum p log p), p the singular values of the centred features as shares of their sum (Roy and Vetterli 2007):
    1 for features along a line, at most min(n - 1, D)."""
    participation_ratio: float
    """(sum l)^2 / sum l^2, l the variances along the principal axes: as the rank, but led by the largest."""
    mean_cosine: float
    """Over all pairs of scans, features not centred."""
    first_share: float
    """Largest l / sum l."""
    between_within: float
    """Components of variance: (MS_between - MS_within) / n_0 / MS_within, of a one-way analysis of variance by subject,
    squares summed over the features. Below 0 where subjects differ less than their scans do; NaN where no subject has
    two scans, or a subject's scans do not differ, or there is but one subject."""


def measure_spread(features: np.ndarray, subjects: Sequence[str] | np.ndarray) -> Spread:
    """The spread of features (n, D) of scans of ``subjects``."""
    features = np.asarray(features, dtype=np.float64)
    centred = features - features.mean(axis=0)
    products = centred @ centred.T if len(features) < features.shape[1] else centred.T @ centred
    variances = np.linalg.eigvalsh(products)[::-1]
    # What rounding leaves is no direction, be it of features that are all equal or beside the largest variance.
    variances[variances <= _ROUNDING * max(variances[0], _ROUNDING * float((features**2).sum()))] = 0
    singular = np.sqrt(variances)
    rank = participation = first_share = np.nan
    if variances.any():
        shares = singular[singular > 0] / singular.sum()
        rank = float(np.exp(-(shares * np.log(shares)).sum()))
        participation = float(variances.sum() ** 2 / (variances**2).sum())
        first_share = float(variances[0] / variances.sum())
    return Spread(rank, participation, mean_cosine(features), first_share, between_within(features, subjects))


def mean_cosine(features: np.ndarray) -> float:
    """Mean cosine of all pairs of rows of (n, D); a row of 0 counts as similar to none. NaN for fewer than two."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)
    n = len(features)
    return float(((unit.sum(axis=0) ** 2).sum() - (unit**2).sum()) / (n * (n - 1))) if n > 1 else np.nan


def between_within(features: np.ndarray, subjects: Sequence[str] | np.ndarray) -> float:
    """Variance between subjects over variance within; see ``Spread``."""
    _, subject_of, counts = np.unique(np.asarray(subjects), return_inverse=True, return_counts=True)
    n, m = len(features), len(counts)
    if m < 2 or n == m:
        return np.nan
    means = np.zeros((m, features.shape[1]))
    np.add.at(means, subject_of, features)
    means /= counts[:, None]
    within = float(((features - means[subject_of]) ** 2).sum()) / (n - m)
    between = float((counts[:, None] * (means - features.mean(axis=0)) ** 2).sum()) / (m - 1)
    scans_of_a_subject = (n - (counts**2).sum() / n) / (m - 1)
    if within <= _ROUNDING**2 * float((features**2).sum()):
        return np.nan
    return (between - within) / scans_of_a_subject / within
