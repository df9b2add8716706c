"""Survival by predicted risk: Kaplan-Meier curves, the log-rank test, and Cox regression on a few clinical facts (paper
sec. 4.3.4 and 4.7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from braindino.resampling import CONFIDENCE

_Z = float(scipy.stats.norm.ppf((1 + CONFIDENCE) / 2))
_MAX_STEPS = 50
# exp(20) between cases one standard deviation apart: no finite coefficient is best.
_SEPARATED = 20.0


@dataclass(frozen=True, kw_only=True)
class SurvivalCurve:
    """The Kaplan-Meier estimate of a group."""

    what: str
    """The group."""
    times: np.ndarray
    """(t,) the times at which cases had their event or left, ascending."""
    survival: np.ndarray
    """(t,) probability of no event up to and including each time; 1 before the first."""
    low: np.ndarray
    """(t,) lower end of the 95 % interval; 1 before the first event, NaN where the survival is 0."""
    high: np.ndarray
    """(t,) upper end."""
    at_risk: np.ndarray
    """(t,) int, cases under observation just before each time."""
    num_events: np.ndarray
    """(t,) int, events at each time."""
    median: float
    """First time at which the survival is at most 1/2; inf where it never is."""
    median_low: float
    """First time at which the lower end of the interval is at most 1/2."""
    median_high: float
    """First time at which the upper end is at most 1/2; inf where it never is."""
    n: int
    """Number of cases."""
    method: str
    """How it was made, in words."""


@dataclass(frozen=True, kw_only=True)
class LogRank:
    """Two groups' survival compared."""

    what: str
    """The two groups."""
    statistic: float
    """Chi-squared with one degree of freedom; NaN where a group is empty or no pair can be compared."""
    p: float
    """Two-sided."""
    n: int
    """Number of cases of both groups."""
    method: str
    """How it was made, in words."""


@dataclass(frozen=True, kw_only=True)
class RiskGroups:
    """Test cases divided at the median risk of the training cases."""

    cut: float
    """Median of the training risks; cases above it are the high-risk group."""
    high_risk: SurvivalCurve | None
    """None where nobody is above the cut."""
    low_risk: SurvivalCurve | None
    """None where nobody is at or below the cut."""
    log_rank: LogRank


@dataclass(frozen=True, kw_only=True)
class CoxFit:
    """A proportional-hazards model."""

    names: tuple[str, ...]
    """Of the covariates."""
    coefficients: np.ndarray
    """(p,) log hazard ratio for one unit of each covariate."""
    standard_errors: np.ndarray
    """(p,) from the observed information."""
    low: np.ndarray
    """(p,) lower end of the 95 % (Wald) interval of the coefficients."""
    high: np.ndarray
    p: np.ndarray
    """(p,) two-sided Wald p."""
    means: np.ndarray
    """(p,) of the training covariates; a case at them has the risk 0."""
    log_likelihood: float
    """Partial, at the coefficients."""
    n: int
    """Number of cases."""
    num_events: int
    method: str
    """How it was made, in words."""

    def risks(self, covariates: np.ndarray) -> np.ndarray:
        """Return the log hazard relative to the mean training case, (n,).

        Args:
            covariates: (n, p) in the order of ``names``.
        """
        return (covariates - self.means) @ self.coefficients


def kaplan_meier(
    times: np.ndarray, events: np.ndarray, subjects: Sequence[str] | np.ndarray, *, what: str
) -> SurvivalCurve:
    """Return the Kaplan-Meier curve with Greenwood's variance on the scale of log(-log S), and its median.

    Censored cases count until they leave: the median of the curve is not the median of the times.

    Args:
        times: (n,) until the event or the end of observation.
        events: (n,) bool, or 1 where the event happened.
        subjects: subject of each case, each once.
        what: the group, in words.

    Raises:
        ValueError: no case, a time or event that is none, or a subject with several cases.
    """
    times, happened = _checked(times, events, subjects)
    distinct, index = np.unique(times, return_inverse=True)
    num_events = np.bincount(index, weights=happened).astype(np.int64)
    leaving = np.bincount(index)
    at_risk = len(times) - np.cumsum(leaving) + leaving
    survival = np.cumprod((at_risk - num_events) / at_risk)
    left = at_risk - num_events
    terms = np.divide(num_events, at_risk * left, out=np.zeros(len(distinct)), where=left > 0)
    inner = (survival > 0) & (survival < 1)
    log_survival = np.log(survival, out=np.full(len(distinct), np.nan), where=inner)
    reach = _Z * np.sqrt(np.cumsum(terms)) / -log_survival
    low, high = (np.exp(log_survival * np.exp(sign * reach)) for sign in (1, -1))
    low[survival == 1] = high[survival == 1] = 1.0
    return SurvivalCurve(
        what=what,
        times=distinct,
        survival=survival,
        low=low,
        high=high,
        at_risk=at_risk,
        num_events=num_events,
        median=_first_half(distinct, survival),
        median_low=_first_half(distinct, low),
        median_high=_first_half(distinct, high),
        n=len(times),
        method=f"Kaplan-Meier, {int(happened.sum())} events; 95 % Greenwood interval, log-log",
    )


def log_rank(
    times: np.ndarray,
    events: np.ndarray,
    in_first: np.ndarray,
    subjects: Sequence[str] | np.ndarray,
    *,
    what: str,
) -> LogRank:
    """Return the two-sided log-rank test of two groups.

    Args:
        times: (n,) until the event or the end of observation.
        events: (n,) bool, or 1 where the event happened.
        in_first: (n,) bool, whether a case is of the first group.
        subjects: subject of each case, each once.
        what: the two groups, in words.

    Raises:
        ValueError: no case, a time or event that is none, or a subject with several cases.
    """
    times, happened = _checked(times, events, subjects)
    member = np.asarray(in_first, dtype=bool)
    # Without an event while both groups were under observation scipy divides zero by zero.
    with np.errstate(invalid="ignore", divide="ignore"):
        groups = [scipy.stats.CensoredData.right_censored(times[g], ~happened[g]) for g in (member, ~member)]
        z = scipy.stats.logrank(*groups).statistic if member.any() and not member.all() else np.nan
    defined = bool(np.isfinite(z))
    words = "two-sided log-rank test, chi-squared with 1 degree of freedom"
    return LogRank(
        what=what,
        statistic=float(z**2) if defined else np.nan,
        p=float(scipy.stats.chi2.sf(z**2, 1)) if defined else np.nan,
        n=len(times),
        method=words if defined else f"{words}; not defined: no event while both groups were under observation",
    )


def risk_cut(train_risks: np.ndarray) -> float:
    """Return the median risk of the TRAINING cases, which divides test cases before one of them is seen (paper sec.
    4.7).

    Raises:
        ValueError: there is none, or one is not finite.
    """
    _check_risks("training", train_risks)
    return float(np.median(train_risks))


def compare_risk_groups(
    times: np.ndarray,
    events: np.ndarray,
    risks: np.ndarray,
    subjects: Sequence[str] | np.ndarray,
    *,
    cut: float,
) -> RiskGroups:
    """Return the survival of the test cases above the cut beside that of the others, and their log-rank test.

    Args:
        times: (n,) of the test cases, until the event or the end of observation.
        events: (n,) bool, or 1 where the event happened.
        risks: (n,) predicted for the test cases; higher means an earlier event.
        subjects: subject of each test case, each once.
        cut: from ``risk_cut``, by the same model's risks of the training cases.

    Raises:
        ValueError: no case, a time, event or risk that is none, or a subject with several cases.
    """
    _check_risks("test", risks)
    high = np.asarray(risks) > cut
    names, times, events = np.asarray(subjects), np.asarray(times), np.asarray(events)
    test = log_rank(times, events, high, names, what="risk above against at or below the median training risk")
    curves = [
        kaplan_meier(times[group], events[group], names[group], what=words) if group.any() else None
        for group, words in ((high, "high risk"), (~high, "low risk"))
    ]
    return RiskGroups(cut=cut, high_risk=curves[0], low_risk=curves[1], log_rank=test)


def fit_cox(
    covariates: np.ndarray,
    times: np.ndarray,
    events: np.ndarray,
    *,
    names: Sequence[str] | None = None,
    subjects: Sequence[str] | np.ndarray | None = None,
) -> CoxFit:
    """Fit Cox's proportional-hazards model by Newton's method, with Breslow's handling of ties (paper Eq. 11).

    Maximises ``sum over events i of x_i b - log(sum of exp(x_j b) over T_j >= T_i)``.

    Args:
        covariates: (n, p), a few clinical facts such as the age.
        times: (n,) until the event or the end of observation.
        events: (n,) bool, or 1 where the event happened.
        names: of the covariates, for the record and for errors; "covariate 1" and so on unless given.
        subjects: subject of each case, to be checked that each is there once, as intervals and p suppose.

    Raises:
        ValueError: no event, a value that is no number, a covariate that is constant or follows from the others, or
            one that separates: no finite coefficient is best.
    """
    subjects = [f"number {case}" for case in range(len(times))] if subjects is None else subjects
    times, happened = _checked(times, events, subjects)
    x = np.asarray(covariates, dtype=np.float64)
    if names is None:
        names = [f"covariate {column + 1}" for column in range(x.shape[-1])]
    if x.shape != (len(times), len(names)):
        raise ValueError(
            f"Cox regression: covariates of shape {x.shape} for {len(times)} cases and the names {', '.join(names)}; "
            f"expected {(len(times), len(names))}"
        )
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0].tolist()
        raise ValueError(
            f"Cox regression: {names[column]} of subject {subjects[row]} is {x[row, column]}; expected a number; "
            "leave out the cases without"
        )
    if not happened.any():
        raise ValueError(f"Cox regression: no event among {len(times)} cases; nothing can be learnt of the hazard")
    means, scales = x.mean(axis=0), x.std(axis=0)
    constant = scales <= 1e-12 * np.maximum(np.abs(means), 1e-300)
    if constant.any():
        name = names[int(np.flatnonzero(constant)[0])]
        raise ValueError(f"Cox regression: {name} is the same in all {len(times)} cases; leave it out")
    z = (x - means) / scales
    if np.linalg.matrix_rank(z, tol=1e-8 * np.sqrt(len(z))) < z.shape[1]:
        raise ValueError(
            f"Cox regression: among {', '.join(names)} one follows from the others in these {len(times)} cases; leave "
            "one out"
        )
    b, likelihood, information = _newton(z, times, happened, names)
    coefficients = b / scales
    errors = np.sqrt(np.diag(np.linalg.inv(information))) / scales
    return CoxFit(
        names=tuple(names),
        coefficients=coefficients,
        standard_errors=errors,
        low=coefficients - _Z * errors,
        high=coefficients + _Z * errors,
        p=2 * scipy.stats.norm.sf(np.abs(coefficients) / errors),
        means=means,
        log_likelihood=likelihood,
        n=len(times),
        num_events=int(happened.sum()),
        method="Cox regression, Breslow ties, Newton's method; Wald intervals and p",
    )


def _newton(
    z: np.ndarray, times: np.ndarray, happened: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, float, np.ndarray]:
    """Coefficients of standardised covariates with their log-likelihood and observed information."""
    b = np.zeros(z.shape[1])
    likelihood, gradient, information = _partial_likelihood(z, times, happened, b)
    for _ in range(_MAX_STEPS):
        # Where nothing is left to learn from the data the information is zero along some direction.
        if np.abs(b).max() > _SEPARATED or np.linalg.cond(information) > 1e12:
            break
        step = np.linalg.solve(information, gradient)
        if np.abs(step).max() < 1e-10:
            return b, likelihood, information
        tried = _partial_likelihood(z, times, happened, b + step)
        # Rounding alone may lower the value next to the maximum.
        while tried[0] < likelihood - 1e-10 * abs(likelihood):
            step = step / 2
            tried = _partial_likelihood(z, times, happened, b + step)
        b = b + step
        likelihood, gradient, information = tried
    raise ValueError(
        f"Cox regression: no finite coefficients fit best; {names[int(np.argmax(np.abs(b)))]}, or it with the others, "
        f"separates: the cases with the {int(happened.sum())} events all come first, or last. Leave it out, or use "
        "more cases"
    )


def _partial_likelihood(
    z: np.ndarray, times: np.ndarray, happened: np.ndarray, b: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Breslow's log partial likelihood, its gradient (p,) and its negative second derivative (p, p)."""
    order = np.argsort(-times, kind="stable")
    z, times, happened = z[order], times[order], happened[order]
    eta = z @ b
    hazard = np.exp(eta - eta.max())
    # The risk set of a case holds all cases with the same time or a later one: up to the last of its ties.
    last = np.searchsorted(-times, -times, side="right") - 1
    total = np.cumsum(hazard)[last]
    mean = np.cumsum(hazard[:, None] * z, axis=0)[last] / total[:, None]
    square = np.cumsum(hazard[:, None, None] * z[:, :, None] * z[:, None, :], axis=0)[last] / total[:, None, None]
    log_total = np.log(total) + eta.max()
    likelihood = float((eta - log_total)[happened].sum())
    gradient = (z - mean)[happened].sum(axis=0)
    information = (square - mean[:, :, None] * mean[:, None, :])[happened].sum(axis=0)
    return likelihood, gradient, information


def _check_risks(name: str, risks: np.ndarray) -> None:
    if not len(risks) or not np.isfinite(risks).all():
        raise ValueError(
            f"risk groups: {np.count_nonzero(np.isfinite(risks))} finite of {len(risks)} {name} risks; expected one or "
            "more, all finite"
        )


def _checked(
    times: np.ndarray, events: np.ndarray, subjects: Sequence[str] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Times as float and events as bool, each subject once."""
    t, e = np.asarray(times, dtype=np.float64), np.asarray(events, dtype=np.float64)
    if not len(t) == len(e) == len(subjects) or not len(t):
        raise ValueError(
            f"survival: {len(t)} times, {len(e)} events, {len(subjects)} subjects; expected as many of each, and some"
        )
    wrong = ~(np.isfinite(t) & (t >= 0) & ((e == 0) | (e == 1)))
    if wrong.any():
        case = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"survival: subject {subjects[case]} has time {t[case]:g} and event {e[case]:g}; expected a time of 0 or "
            "more and an event of 0 or 1"
        )
    names, counts = np.unique(np.asarray(subjects), return_counts=True)
    if len(names) < len(t):
        raise ValueError(
            f"survival: subject {names[counts > 1][0]} has {counts.max()} cases; expected one a subject, who has one "
            "survival; average the risks of a subject's cases first"
        )
    return t, e == 1


def _first_half(times: np.ndarray, survival: np.ndarray) -> float:
    reached = np.flatnonzero(survival <= 0.5)
    return float(times[reached[0]]) if len(reached) else np.inf
