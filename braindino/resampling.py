"""Resampling by subject: all cases of a subject are drawn, or flipped, together, since they are one independent
observation however many they are (paper sec. 4.7)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from braindino.tables import number_text

ITERATIONS = 2000  # paper sec. 4.7
SEED = 42  # paper sec. 4.7
CONFIDENCE = 0.95
RANDOM_FLIPS = 10_000
# 16,384 sign patterns: fewer than would be drawn, give or take.
MAX_ENUMERATED_SUBJECTS = 14
_NUMBERS_AT_A_TIME = 8_000_000  # 64 MB of float64


class SubjectMeans(NamedTuple):
    """One value of each subject."""

    subjects: np.ndarray
    """(m,) names, sorted."""
    values: np.ndarray
    """(m,) mean over the subject's cases."""


def draw_subjects(
    subjects: Sequence[str] | np.ndarray,
    *,
    iterations: int = ITERATIONS,
    seed: int = SEED,
    strata: Sequence[object] | np.ndarray | None = None,
) -> np.ndarray:
    """(iterations, n) int: how often each of the n cases is drawn when subjects are drawn with replacement.

    Args:
        subjects: subject of each case.
        iterations: number of draws.
        seed: the same seed, subjects and strata give the same draws, so scores on the same cases stay paired.
        strata: of each case, such as its class; every draw then has as many subjects of each stratum as there are.
            A subject with cases in several strata is drawn among the subjects with the same several.
    """
    return np.concatenate(list(draw_blocks(subjects, iterations=iterations, seed=seed, strata=strata)))


def draw_blocks(
    subjects: Sequence[str] | np.ndarray,
    *,
    iterations: int = ITERATIONS,
    seed: int = SEED,
    strata: Sequence[object] | np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """The rows of ``draw_subjects`` in blocks of at most 64 MB, in order.

    Raises:
        ValueError: no case, or not one stratum for each.
    """
    if not len(subjects):
        raise ValueError("bootstrap: the test set is empty; nothing can be estimated")
    names, subject_of_case = np.unique(np.asarray(subjects), return_inverse=True)
    groups = _groups(subject_of_case, len(names), strata)
    rngs = [np.random.default_rng(seed)] if len(groups) == 1 else np.random.default_rng(seed).spawn(len(groups))
    block = max(1, _NUMBERS_AT_A_TIME // len(subjects))
    for start in range(0, iterations, block):
        num_draws = min(block, iterations - start)
        times = np.zeros((num_draws, len(names)), dtype=np.int64)
        for members, rng in zip(groups, rngs, strict=True):
            drawn = rng.integers(0, len(members), (num_draws, len(members)))
            cells = (drawn + len(members) * np.arange(num_draws)[:, None]).ravel()
            times[:, members] = np.bincount(cells, minlength=drawn.size).reshape(drawn.shape)
        yield times[:, subject_of_case]


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval of bootstrap values; NaN when fewer than half are defined."""
    defined = draws[~np.isnan(draws)]
    if 2 * len(defined) < len(draws) or not len(defined):
        return np.nan, np.nan
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_p(differences: np.ndarray) -> float:
    """Two-sided p of bootstrap differences: twice the smaller share on either side of zero, zeros on both, at most 1
    (paper sec. 4.7: the proportion of resampled differences crossing zero).

    0 means less than one draw. NaN draws are left out; the p is NaN when fewer than half are defined.
    """
    defined = differences[~np.isnan(differences)]
    if 2 * len(defined) < len(differences) or not len(defined):
        return float("nan")
    return min(1.0, 2 * min(float(np.mean(defined <= 0)), float(np.mean(defined >= 0))))


def p_text(p: float) -> str:
    """Two digits; ``<0.0005`` for the 0 of a bootstrap, or ``n/a``."""
    if p == 0:
        return f"<{1 / ITERATIONS:g}"
    return number_text(p, ".1e" if p < 0.001 else ".2g")


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
    rng = np.random.default_rng(seed)
    block = max(1, _NUMBERS_AT_A_TIME // len(sums))
    extreme = 0
    for start in range(0, RANDOM_FLIPS, block):
        signs = rng.choice((-1.0, 1.0), size=(min(block, RANDOM_FLIPS - start), len(sums)))
        extreme += int(np.count_nonzero(np.abs(signs @ sums) >= observed))
    return (extreme + 1) / (RANDOM_FLIPS + 1)


def holm(p_values: Sequence[float], *, strata: Sequence[object] | None = None) -> list[float]:
    """Holm's adjusted p values, in the order given; NaN stays NaN and is no test.

    Args:
        p_values: of one family of tests.
        strata: of each p value; given, the tests of each stratum are a family of their own.
    """
    if strata is None:
        strata = [None] * len(p_values)
    adjusted = [float("nan")] * len(p_values)
    families: dict[object, list[tuple[float, int]]] = {}
    for index, (p, stratum) in enumerate(zip(p_values, strata, strict=True)):
        if not np.isnan(p):
            families.setdefault(stratum, []).append((p, index))
    for tested in families.values():
        largest = 0.0
        for rank, (p, index) in enumerate(sorted(tested)):
            largest = max(largest, min(1.0, (len(tested) - rank) * p))
            adjusted[index] = largest
    return adjusted


def mean_by_subject(values: np.ndarray, subjects: Sequence[str] | np.ndarray) -> SubjectMeans:
    """The mean over each subject's cases, so that every subject counts once.

    Args:
        values: (n,) per case.
        subjects: subject of each case.
    """
    names, subject_of_case = np.unique(np.asarray(subjects), return_inverse=True)
    sums = np.bincount(subject_of_case, weights=values)
    return SubjectMeans(names, sums / np.bincount(subject_of_case))


def _groups(
    subject_of_case: np.ndarray, num_subjects: int, strata: Sequence[object] | np.ndarray | None
) -> list[np.ndarray]:
    """Indices of the subjects that are drawn among each other."""
    if strata is None:
        return [np.arange(num_subjects)]
    if len(strata) != len(subject_of_case):
        raise ValueError(f"bootstrap: {len(strata)} strata for {len(subject_of_case)} cases; expected one for each")
    strata_of_subject: list[set[str]] = [set() for _ in range(num_subjects)]
    for subject, stratum in zip(subject_of_case.tolist(), np.asarray(strata).tolist(), strict=True):
        strata_of_subject[subject].add(str(stratum))
    members: dict[tuple[str, ...], list[int]] = {}
    for subject, names in enumerate(strata_of_subject):
        members.setdefault(tuple(sorted(names)), []).append(subject)
    return [np.array(members[key]) for key in sorted(members)]
