"""Bootstrap intervals over subjects, as typed records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ITERATIONS = 2000  # paper sec. 4.7
BOOTSTRAP_SEED = 42  # paper sec. 4.7
CONFIDENCE = 0.95
_WEIGHTS_AT_A_TIME = 8_000_000  # 64 MB of float64

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval."""

    estimate: float
    """The metric on the whole test set; NaN where it is not defined."""
    low: float
    """Lower end of the interval; NaN when fewer than half of the draws define the metric."""
    high: float
    """Upper end of the interval."""
    n: int
    """Number of subjects that were resampled."""
    method: str
    """How the interval was made, in words."""


def bootstrap_interval(
    statistic: Statistic,
    subjects: Sequence[str] | np.ndarray,
    *,
    iterations: int = ITERATIONS,
    seed: int = BOOTSTRAP_SEED,
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
    """
    if not len(subjects):
        raise ValueError("bootstrap: the test set is empty; nothing can be estimated")
    names, subject_of_case = np.unique(np.asarray(subjects), return_inverse=True)
    num_subjects = len(names)
    rng = np.random.default_rng(seed)
    values = []
    block = max(1, _WEIGHTS_AT_A_TIME // len(subjects))
    for start in range(0, iterations, block):
        num_draws = min(block, iterations - start)
        drawn = rng.integers(0, num_subjects, (num_draws, num_subjects))
        cells = (drawn + num_subjects * np.arange(num_draws)[:, None]).ravel()
        times_drawn = np.bincount(cells, minlength=num_draws * num_subjects).reshape(num_draws, num_subjects)
        values.append(statistic(times_drawn[:, subject_of_case]))
    draws = np.concatenate(values)
    defined = draws[~np.isnan(draws)]
    low, high = np.nan, np.nan
    if 2 * len(defined) >= iterations:
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(defined, [tail, 100 - tail])
    return Estimate(
        estimate=float(statistic(np.ones((1, len(subjects)), dtype=np.int64))[0]),
        low=float(low),
        high=float(high),
        n=num_subjects,
        method=f"95 % percentile bootstrap over subjects, {len(defined)} of {iterations} draws, seed {seed}",
    )
