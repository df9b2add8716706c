"""Intervals of a metric, over subjects or over splits, as typed records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from braindino.resampling import CONFIDENCE, ITERATIONS, SEED, draw_blocks, percentile_interval

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval."""

    estimate: float
    """The metric on the whole test set, or its mean over splits; NaN where it is not defined."""
    low: float
    """Lower end of the interval; NaN when fewer than half of the draws define the metric, or with one split."""
    high: float
    """Upper end of the interval."""
    n: int
    """Number of subjects that were resampled, or of splits."""
    method: str
    """How the interval was made, in words."""


def bootstrap_interval(
    statistic: Statistic,
    subjects: Sequence[str] | np.ndarray,
    *,
    iterations: int = ITERATIONS,
    seed: int = SEED,
    strata: Sequence[object] | np.ndarray | None = None,
) -> Estimate:
    """Return the statistic with its 95 % percentile bootstrap interval, resampling subjects with replacement (paper
    sec. 4.7).

    All cases of a subject are drawn together, as often as the subject is drawn, so several scans of one subject
    count as the one independent observation that they are. Draws in which the statistic is NaN (an AUC without one
    of the classes) are left out, and ``method`` says how many remained.

    Args:
        statistic: maps case weights (B, n) to values (B,); see ``metrics``.
        subjects: subject of each of the n cases.
        iterations: number of draws.
        seed: of the draws; the same seed, subjects and order give the same draws, so models compared on one test
            set are paired.
        strata: class of each case; given, every draw keeps the number of subjects of each class (the paper's
            interval of the kNN accuracy).
    """
    draws = bootstrap_values(statistic, subjects, iterations=iterations, seed=seed, strata=strata)
    low, high = percentile_interval(draws)
    return Estimate(
        estimate=value_of(statistic, len(subjects)),
        low=low,
        high=high,
        n=len(np.unique(np.asarray(subjects))),
        method=bootstrap_words(draws, seed=seed, stratified=strata is not None),
    )


def split_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of a metric over splits with its 95 % Student t interval, mean +- t(0.975, k - 1) sd / sqrt(k)
    (paper sec. 4.7, ADNI).

    The splits share training subjects, so their values are not independent and the interval is somewhat too narrow.
    Splits without a value (NaN) are left out, and ``method`` says how many remained.

    Args:
        values: (k,) the metric of each split.
    """
    given = np.asarray(values, dtype=np.float64)
    defined = given[~np.isnan(given)]
    mean = float(defined.mean()) if len(defined) else np.nan
    half = np.nan
    if len(defined) > 1:
        half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(defined) - 1) * defined.std(ddof=1) / np.sqrt(len(defined))
    return Estimate(
        estimate=mean,
        low=float(mean - half),
        high=float(mean + half),
        n=len(defined),
        method=f"95 % Student t interval over splits, {len(defined)} of {len(given)} splits",
    )


def bootstrap_values(
    statistic: Statistic,
    subjects: Sequence[str] | np.ndarray,
    *,
    iterations: int = ITERATIONS,
    seed: int = SEED,
    strata: Sequence[object] | np.ndarray | None = None,
) -> np.ndarray:
    """Return the statistic of every draw, (iterations,); NaN where a draw does not define it. See
    ``bootstrap_interval``."""
    blocks = draw_blocks(subjects, iterations=iterations, seed=seed, strata=strata)
    return np.concatenate([statistic(weights) for weights in blocks])


def bootstrap_words(draws: np.ndarray, *, seed: int, stratified: bool) -> str:
    """Return how an interval was made from these draws."""
    within = "subjects within classes" if stratified else "subjects"
    num_defined = int(np.count_nonzero(~np.isnan(draws)))
    return f"95 % percentile bootstrap over {within}, {num_defined} of {len(draws)} draws, seed {seed}"


def value_of(statistic: Statistic, num_cases: int) -> float:
    """Return the statistic of the cases as they are, each once."""
    return float(statistic(np.ones((1, num_cases), dtype=np.int64))[0])
