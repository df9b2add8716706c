"""Two models on the same cases: differences with interval and p, as typed records (paper sec. 4.7).

Several cases of one subject are one independent observation: they are resampled together, or averaged first. All tests
are two-sided. Families of p values are adjusted with ``braindino.resampling.holm``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from braindino.downstream.intervals import Statistic, bootstrap_values, bootstrap_words, value_of
from braindino.downstream.metrics import weighted_mean
from braindino.resampling import (
    CONFIDENCE,
    ITERATIONS,
    MAX_ENUMERATED_SUBJECTS,
    RANDOM_FLIPS,
    SEED,
    bootstrap_p,
    mean_by_subject,
    percentile_interval,
    sign_flip_p,
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """First minus second, on the same cases."""

    what: str
    """What is compared: the name of the metric."""
    difference: float
    """First minus second; NaN where one of them is not defined."""
    low: float
    """Lower end of the 95 % interval of the difference; NaN where the method has none."""
    high: float
    """Upper end of the interval."""
    p: float
    """Two-sided, not adjusted; NaN where the test is not defined. A bootstrap p of 0 is less than one draw."""
    n: int
    """Number of subjects, or of splits."""
    method: str
    """How interval and p were made, in words."""


@dataclass(frozen=True, kw_only=True)
class LabelPermutation:
    """A metric beside the same metric under labels that were permuted, which have nothing to be learnt."""

    what: str
    """Name of the metric."""
    observed: float
    """Under the true labels."""
    permuted_mean: float
    """Mean under permuted labels: what chance gives."""
    p: float
    """(1 + number of permutations at least as good) / (1 + number of permutations)."""
    n: int
    """Number of permutations that define the metric."""
    method: str
    """How p was made, in words."""


def paired_bootstrap(
    first: Statistic,
    second: Statistic,
    subjects: Sequence[str] | np.ndarray,
    *,
    what: str,
    iterations: int = ITERATIONS,
    seed: int = SEED,
    strata: Sequence[object] | np.ndarray | None = None,
) -> Comparison:
    """Compare two statistics of the same cases by resampling subjects, the same for both in every draw (paper sec.
    4.7).

    p = min(1, 2 min(P(D <= 0), P(D >= 0))) over the differences D of the draws that define both; NaN, as the interval,
    when fewer than half do.

    Args:
        first: maps case weights (B, n) to values (B,); see ``metrics``.
        second: the same of the other model.
        subjects: subject of each of the n cases.
        what: name of the metric.
        iterations: number of draws.
        seed: of the draws.
        strata: class of each case; given, every draw keeps the number of subjects of each class.
    """

    def difference(weights: np.ndarray) -> np.ndarray:
        return first(weights) - second(weights)

    draws = bootstrap_values(difference, subjects, iterations=iterations, seed=seed, strata=strata)
    low, high = percentile_interval(draws)
    return Comparison(
        what=what,
        difference=value_of(difference, len(subjects)),
        low=low,
        high=high,
        p=bootstrap_p(draws),
        n=len(np.unique(np.asarray(subjects))),
        method=f"paired {bootstrap_words(draws, seed=seed, stratified=strata is not None)}; "
        "p twice the smaller share beyond zero",
    )


def paired_t(first: np.ndarray, second: np.ndarray, subjects: Sequence[str] | np.ndarray, *, what: str) -> Comparison:
    """Compare values per case, such as absolute errors, by a paired t test on subjects' means (paper sec. 4.7).

    Args:
        first: (n,) values of one model, such as |predicted - true|.
        second: (n,) values of the other on the same cases.
        subjects: subject of each case.
        what: name of the values.

    Raises:
        ValueError: a value is not finite, or the lengths differ.
    """
    differences = _subject_differences(first, second, subjects)
    return _t_comparison(differences, variance_of_mean=1.0, what=what, method="paired t test over subjects")


def paired_t_over_splits(first: Sequence[float], second: Sequence[float], *, what: str) -> Comparison:
    """Compare a metric split by split by a paired t test (paper sec. 4.7, ADNI).

    Splits share training subjects, so this p is too small; ``corrected_t_over_splits`` allows for that.

    Args:
        first: (k,) the metric of one model in each split; a split without a value (NaN) in either is left out.
        second: (k,) of the other model in the same splits.
        what: name of the metric.
    """
    differences, words = _split_differences(first, second)
    return _t_comparison(differences, variance_of_mean=1.0, what=what, method=f"paired t test over splits, {words}")


def corrected_t_over_splits(
    first: Sequence[float], second: Sequence[float], *, num_train: int, num_test: int, what: str
) -> Comparison:
    """Compare a metric split by split by the corrected resampled t test (Nadeau and Bengio 2003): the variance of the
    mean difference is (1 / k + num_test / num_train) s^2 instead of s^2 / k, since splits share training subjects.

    Args:
        first: (k,) the metric of one model in each split; a split without a value (NaN) in either is left out.
        second: (k,) of the other model in the same splits.
        num_train: subjects trained on in a split.
        num_test: subjects tested on in a split.
        what: name of the metric.

    Raises:
        ValueError: a split without subjects to train or to test on.
    """
    if num_train < 1 or num_test < 1:
        raise ValueError(f"corrected t test: {num_train} training and {num_test} test subjects; expected some of both")
    differences, words = _split_differences(first, second)
    return _t_comparison(
        differences,
        variance_of_mean=1 + len(differences) * num_test / num_train,
        what=what,
        method=f"corrected resampled t test (Nadeau-Bengio) over splits, {words}, {num_train} training and {num_test} "
        "test subjects",
    )


def sign_flip(
    first: np.ndarray, second: np.ndarray, subjects: Sequence[str] | np.ndarray, *, what: str, seed: int = SEED
) -> Comparison:
    """Compare values per case by flipping the signs of subjects' mean differences (paper sec. 4.7, brain age by age).

    Every pattern of signs is tried for up to 14 subjects; beyond, 10,000 are drawn. The interval is the bootstrap's.

    Args:
        first: (n,) values of one model, such as |predicted - true|.
        second: (n,) values of the other on the same cases.
        subjects: subject of each case.
        what: name of the values.
        seed: of the drawn signs and of the bootstrap.

    Raises:
        ValueError: a value is not finite, or the lengths differ.
    """
    differences = _subject_differences(first, second, subjects)
    if not len(differences):
        return _undefined(what, "sign-flip test over subjects; not defined: no subject")
    units = np.arange(len(differences))

    def mean(weights: np.ndarray) -> np.ndarray:
        return weighted_mean(differences, weights)

    draws = bootstrap_values(mean, units, seed=seed)
    low, high = percentile_interval(draws)
    exact = len(differences) <= MAX_ENUMERATED_SUBJECTS
    patterns = f"all {2 ** len(differences)} patterns" if exact else f"{RANDOM_FLIPS} patterns drawn, seed {seed}"
    return Comparison(
        what=what,
        difference=float(differences.mean()),
        low=low,
        high=high,
        p=sign_flip_p(differences, units, seed=seed),
        n=len(differences),
        method=f"sign-flip test over subjects, {patterns}; {bootstrap_words(draws, seed=seed, stratified=False)}",
    )


def mcnemar(
    first_correct: np.ndarray,
    second_correct: np.ndarray,
    subjects: Sequence[str] | np.ndarray,
    *,
    what: str = "accuracy",
    seed: int = SEED,
) -> Comparison:
    """Compare which cases two models get right by the exact McNemar test: a two-sided binomial test on the subjects
    that one of them gets right more often (paper sec. 4.7, kNN).

    With one case a subject these are the discordant pairs. A subject with several cases counts once, for the model
    that is right in more of them. The interval of the difference in accuracy is the bootstrap's.

    Args:
        first_correct: (n,) bool, whether one model is right.
        second_correct: (n,) bool, of the other on the same cases.
        subjects: subject of each case.
        what: name of the share that is compared.
        seed: of the bootstrap.

    Raises:
        ValueError: the lengths differ.
    """
    first, second = np.asarray(first_correct, dtype=np.float64), np.asarray(second_correct, dtype=np.float64)
    by_subject = _subject_differences(first, second, subjects)
    if not len(by_subject):
        return _undefined(what, "exact McNemar test over subjects; not defined: no subject")
    only_first, only_second = int(np.count_nonzero(by_subject > 0)), int(np.count_nonzero(by_subject < 0))
    discordant = only_first + only_second

    def difference(weights: np.ndarray) -> np.ndarray:
        return weighted_mean(first - second, weights)

    draws = bootstrap_values(difference, subjects, seed=seed)
    low, high = percentile_interval(draws)
    return Comparison(
        what=what,
        difference=value_of(difference, len(first)),
        low=low,
        high=high,
        p=float(scipy.stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        n=len(by_subject),
        method=f"exact McNemar test over subjects, {only_first} better by the first, {only_second} by the second; "
        f"{bootstrap_words(draws, seed=seed, stratified=False)}",
    )


def label_permutation(
    observed: float, permuted: Sequence[float] | np.ndarray, *, what: str, higher_is_better: bool = True
) -> LabelPermutation:
    """Say how often labels without meaning do as well: p = (1 + #{permuted >= observed}) / (1 + #permuted).

    Permutations that do not define the metric (NaN) are left out, and ``method`` says how many remained.

    Args:
        observed: the metric under the true labels.
        permuted: the metric when everything is repeated with permuted training labels, once for each permutation.
        what: name of the metric.
        higher_is_better: false for errors, where a permutation is as good if it is as low.
    """
    values = np.asarray(permuted, dtype=np.float64)
    defined = values[~np.isnan(values)]
    as_good = defined >= observed if higher_is_better else defined <= observed
    p = (1 + int(np.count_nonzero(as_good))) / (1 + len(defined))
    return LabelPermutation(
        what=what,
        observed=observed,
        permuted_mean=float(defined.mean()) if len(defined) else np.nan,
        p=np.nan if np.isnan(observed) or not len(defined) else p,
        n=len(defined),
        method=f"label permutation, {len(defined)} of {len(values)} permutations, "
        f"{'higher' if higher_is_better else 'lower'} is better",
    )


def _subject_differences(first: np.ndarray, second: np.ndarray, subjects: Sequence[str] | np.ndarray) -> np.ndarray:
    """Mean of first minus second of each subject, (m,)."""
    if not len(first) == len(second) == len(subjects):
        raise ValueError(
            f"comparison: {len(first)} values of the first, {len(second)} of the second, {len(subjects)} subjects; "
            "expected one of each for every case"
        )
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if not np.isfinite(differences).all():
        case = int(np.flatnonzero(~np.isfinite(differences))[0])
        raise ValueError(
            f"comparison: case {case} of subject {subjects[case]} has {first[case]} and {second[case]}; expected "
            "finite values of both models; leave out the cases that one of them does not have"
        )
    return mean_by_subject(differences, subjects).values


def _split_differences(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, str]:
    if len(first) != len(second):
        raise ValueError(
            f"comparison: {len(first)} splits of the first, {len(second)} of the second; expected the same splits"
        )
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    defined = differences[~np.isnan(differences)]
    return defined, f"{len(defined)} of {len(differences)} splits"


def _t_comparison(differences: np.ndarray, *, variance_of_mean: float, what: str, method: str) -> Comparison:
    """One-sample t test of differences with variance ``variance_of_mean`` s^2 / n of their mean."""
    n = len(differences)
    if not n:
        return _undefined(what, f"{method}; not defined: nothing to compare")
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1)) if n > 1 else np.nan
    if not np.any(differences):
        low, high, p = 0.0, 0.0, 1.0
        method = f"{method}; all differences are 0"
    elif n < 2 or spread <= 1e-12 * np.abs(differences).max():
        low, high, p = np.nan, np.nan, np.nan
        method = f"{method}; not defined: {'one difference only' if n < 2 else 'all differences are equal'}"
    else:
        error = spread * np.sqrt(variance_of_mean / n)
        half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * error
        low, high = float(mean - half), float(mean + half)
        p = float(2 * scipy.stats.t.sf(abs(mean) / error, n - 1))
    return Comparison(what=what, difference=mean, low=low, high=high, p=p, n=n, method=method)


def _undefined(what: str, method: str) -> Comparison:
    return Comparison(what=what, difference=np.nan, low=np.nan, high=np.nan, p=np.nan, n=0, method=method)
