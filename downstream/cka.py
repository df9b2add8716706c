"""Linear centred kernel alignment of two encoders over the same scans (Kornblith et al. 2019; paper sec. 4.6).

With Gram matrices K = X X' and L = Y Y' of centred features,

    CKA = <K, L> / sqrt(<K, K> <L, L>) = |Y'X|^2 / (|X'X| |Y'Y|),

1 for features that are rotations and multiples of each other. The ratio is biased upwards: with few scans and many
features every two encoders look alike. The debiased ratio takes the unbiased estimate of each product instead (HSIC_1
of Song et al. 2012, also called U-centring): around 0 for features that have nothing to do with each other, however
few the scans.

Intervals leave out one subject at a time (jackknife), on the scale of Fisher's z. The bootstrap does not do: it draws
scans twice, and two copies of a scan are alike to every encoder, which lifts the alignment of every draw above that of
the scans themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from braindino.resampling import CONFIDENCE

MIN_UNITS = 4
"""Fewer define no unbiased estimate, and three points are nearly always aligned."""
_LARGEST = 1 - 1e-12
_NO_VARIANCE = 1e-20
"""Share of the sum of squares that rounding leaves of features that are all equal."""


class Alignment(NamedTuple):
    """CKA of two encoders, plain and debiased, with 95 % intervals."""

    cka: float
    low: float
    high: float
    debiased: float
    debiased_low: float
    debiased_high: float
    subjects: int
    """How many were left out, one at a time."""
    method: str
    """How the intervals were made, in words."""


class Products(NamedTuple):
    """Inner products of two centred Gram matrices: (1 + m,) over all units, then without each of m subjects."""

    plain: np.ndarray
    unbiased: np.ndarray


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """CKA of features (n, D) and (n, D') of the same n scans; NaN where one of them is the same for all.

    In the form with features, whose cost grows with n and not with n^2.
    """
    x, y = _centred(first), _centred(second)
    norm = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / norm) if norm > 0 else np.nan


def align(first: np.ndarray, second: np.ndarray, subjects: Sequence[str] | np.ndarray) -> Alignment:
    """CKA of features (n, D) and (n, D') of the same n scans, with intervals over their subjects.

    Args:
        first: features of one encoder.
        second: of the other.
        subjects: of each scan; all scans of a subject are left out together.

    Raises:
        ValueError: fewer than 4 scans, or not the same number everywhere.
    """
    K, L = gram(first), gram(second)
    return combine(gram_products(K, L, subjects), gram_products(K, K, subjects), gram_products(L, L, subjects))


def gram(features: np.ndarray) -> np.ndarray:
    """(n, n) float64 Gram matrix of features (n, D) centred over the n scans; all 0 where they are the same for all."""
    centred = _centred(features)
    return centred @ centred.T


def gram_products(K: np.ndarray, L: np.ndarray, subjects: Sequence[str] | np.ndarray) -> Products:
    """<H K H, H L H> of Gram matrices (n, n), and its unbiased counterpart up to the factor n (n - 3) that ratios do
    not need, for all scans and without each subject.

    What a subject's scans add to sums over rows and over everything is taken off, so that all m + 1 values cost little
    more than one.
    """
    if not K.shape == L.shape == (len(subjects), len(subjects)) or len(subjects) < MIN_UNITS:
        raise ValueError(
            f"CKA: features of {len(K)} and {len(L)} scans of {len(subjects)} named subjects; expected the same scans, "
            f"{MIN_UNITS} or more"
        )
    _, subject_of = np.unique(np.asarray(subjects), return_inverse=True)
    order = np.argsort(subject_of, kind="stable")
    starts = np.flatnonzero(np.diff(subject_of[order], prepend=-1))
    kept = np.ones((len(subjects), 1 + len(starts)))
    kept[np.arange(len(subjects)), 1 + subject_of] = 0

    def row_sums(matrix: np.ndarray) -> np.ndarray:
        """(n, 1 + m) sums over the columns of the scans that are kept; 0 in the rows of those that are not."""
        of_subject = np.add.reduceat(matrix[:, order], starts, axis=1)
        total = matrix.sum(axis=1, keepdims=True)
        return np.hstack([total, total - of_subject]) * kept

    n = kept.sum(axis=0)
    both = row_sums(K * L).sum(axis=0)
    rows_k, rows_l = row_sums(K), row_sums(L)
    plain = both - 2 / n * (rows_k * rows_l).sum(axis=0) + rows_k.sum(axis=0) * rows_l.sum(axis=0) / n**2
    diagonal_k, diagonal_l = kept * np.diag(K)[:, None], kept * np.diag(L)[:, None]
    both -= (diagonal_k * diagonal_l).sum(axis=0)
    rows_k -= diagonal_k
    rows_l -= diagonal_l
    with np.errstate(divide="ignore", invalid="ignore"):  # without a subject, fewer than 4 scans may be left
        unbiased = (
            both
            - 2 / (n - 2) * (rows_k * rows_l).sum(axis=0)
            + rows_k.sum(axis=0) * rows_l.sum(axis=0) / ((n - 1) * (n - 2))
        )
    unbiased[n < MIN_UNITS] = np.nan
    return Products(plain, unbiased)


def combine(across: Products, first: Products, second: Products) -> Alignment:
    """CKA from the products of two encoders with each other and of each with itself."""
    plain = _ratio(across.plain, first.plain, second.plain)
    debiased = _ratio(across.unbiased, first.unbiased, second.unbiased)
    subjects = len(plain) - 1
    words = f"95 % jackknife over {subjects} subjects, Student's t on Fisher's z"
    low, high = _jackknife(plain)
    if low < 0:
        low = 0.0  # the plain ratio cannot fall below it
    return Alignment(
        float(plain[0]), low, high, float(debiased[0]), *_jackknife(debiased), subjects=subjects, method=words
    )


def _centred(features: np.ndarray) -> np.ndarray:
    """(n, D) float64 with mean 0, scaled so that products of any features stay in range."""
    features = np.asarray(features, dtype=np.float64)
    centred = features - features.mean(axis=0)
    squares = float((centred**2).sum())
    if squares <= _NO_VARIANCE * float((features**2).sum()):
        return np.zeros_like(centred)
    centred /= np.sqrt(squares / len(features))
    return centred


def _ratio(across: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    product = first * second
    return np.divide(across, np.sqrt(product), out=np.full(len(across), np.nan), where=product > 0)


def _jackknife(values: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval of ``values[0]`` from the values without each subject; NaN where one is not defined or
    there are fewer than three.
    """
    z = np.arctanh(np.clip(values, -_LARGEST, _LARGEST))
    without, m = z[1:], len(z) - 1
    if m < 3 or np.isnan(z).any():
        return np.nan, np.nan
    error = np.sqrt((m - 1) / m * ((without - without.mean()) ** 2).sum())
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, m - 1) * error
    return float(np.tanh(z[0] - half)), float(np.tanh(z[0] + half))
