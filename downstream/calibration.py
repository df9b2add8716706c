"""Whether predictions mean what they say: probabilities beside observed shares, predicted beside true values."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from braindino.downstream.intervals import Estimate, bootstrap_interval
from braindino.downstream.metrics import weighted_mean

NUM_BINS = 10
# Of a probability, so that 0 and 1, which a softmax in float32 reaches, have a logit.
CLOSEST_TO_CERTAIN = 1e-7
_MAX_STEPS = 50
# On the scale of log odds; no finite slope is best where the outcomes are separated.
_SEPARATED = 50.0


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """The cases whose predicted probability lies in a range."""

    low: float
    """The range is low < probability <= high; the first holds 0 as well."""
    high: float
    n: int
    """Number of cases; 0 is listed too."""
    mean_predicted: float
    """NaN without cases."""
    observed_share: float
    """Of positives; NaN without cases."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The line between predictions and outcomes; a perfect one has intercept 0 and slope 1."""

    what: str
    """Which line."""
    intercept: Estimate
    """For probabilities: log odds that all of them are too low by (with slope 1). For values: predicted at true 0."""
    slope: Estimate
    """For probabilities: below 1 they are too extreme. For values: below 1 they shrink to the mean."""
    n: int
    """Number of subjects."""
    method: str
    """How it was made, in words."""


def reliability_table(
    positive: np.ndarray, probabilities: np.ndarray, *, num_bins: int = NUM_BINS
) -> tuple[ReliabilityBin, ...]:
    """Return predicted probability beside observed share in bins of equal width.

    Args:
        positive: (n,) bool.
        probabilities: (n,) predicted for the positive class.
        num_bins: of equal width from 0 to 1.

    Raises:
        ValueError: a probability outside 0 to 1.
    """
    edges, bin_of_case = _bins(probabilities, num_bins)
    table = []
    for number in range(num_bins):
        inside = bin_of_case == number
        count = int(np.count_nonzero(inside))
        table.append(
            ReliabilityBin(
                low=float(edges[number]),
                high=float(edges[number + 1]),
                n=count,
                mean_predicted=float(probabilities[inside].mean()) if count else np.nan,
                observed_share=float(positive[inside].mean()) if count else np.nan,
            )
        )
    return tuple(table)


def expected_calibration_error(
    positive: np.ndarray, probabilities: np.ndarray, *, weights: np.ndarray, num_bins: int = NUM_BINS
) -> np.ndarray:
    """Return the mean over cases of |observed share - mean predicted| of their bin, (B,), from 0 to 1.

    It is never below 0, so few cases give a value above that of a perfect model; compare models on the same cases.

    Args:
        positive: (n,) bool; for several classes, whether the predicted class is right.
        probabilities: (n,) predicted for the positive class; for several classes, of the predicted one.
        weights: (B, n) non-negative case weights.
        num_bins: of equal width from 0 to 1.

    Raises:
        ValueError: a probability outside 0 to 1.
    """
    _, bin_of_case = _bins(probabilities, num_bins)
    gaps = weights * (positive - probabilities)
    per_bin = [np.abs(gaps[:, bin_of_case == number].sum(axis=1)) for number in range(num_bins)]
    total = weights.sum(axis=1).astype(np.float64)
    return np.divide(np.sum(per_bin, axis=0), total, out=np.full(len(weights), np.nan), where=total > 0)


def logistic_intercept(positive: np.ndarray, probabilities: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return a of logit P(positive) = a + logit(predicted), (B,): calibration in the large. NaN where a draw lacks a
    class.

    Args:
        positive: (n,) bool.
        probabilities: (n,) predicted for the positive class.
        weights: (B, n) non-negative case weights.

    Raises:
        ValueError: a probability outside 0 to 1.
    """
    logits = _logits(probabilities)
    fitted = _fit_logistic(np.ones((len(logits), 1)), positive, weights=weights, offset=logits)
    return fitted[:, 0]


def logistic_slope(positive: np.ndarray, probabilities: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return b of logit P(positive) = a + b logit(predicted), (B,); below 1 the probabilities are too extreme.

    NaN where a draw lacks a class, has one predicted value only, or is separated by it (no finite slope is best).

    Args:
        positive: (n,) bool.
        probabilities: (n,) predicted for the positive class.
        weights: (B, n) non-negative case weights.

    Raises:
        ValueError: a probability outside 0 to 1.
    """
    logits = _logits(probabilities)
    centre, spread = np.mean(logits), np.std(logits)
    if not spread > 0:
        return np.full(len(weights), np.nan)
    design = np.stack([np.ones(len(logits)), (logits - centre) / spread], axis=1)
    return _fit_logistic(design, positive, weights=weights, offset=np.zeros(len(logits)))[:, 1] / spread


def linear_slope(targets: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the slope of the least-squares line of predicted on true values, (B,); below 1 predictions shrink to the
    mean. NaN where all targets drawn are equal.

    Args:
        targets: (n,) true values.
        predicted: (n,) predicted values.
        weights: (B, n) non-negative case weights.
    """
    # About the overall means, so that large values with a small spread lose no digits.
    x, y = targets - np.mean(targets), predicted - np.mean(predicted)
    mean_x = weighted_mean(x, weights)
    variance = weighted_mean(x * x, weights) - mean_x**2
    covariance = weighted_mean(x * y, weights) - mean_x * weighted_mean(y, weights)
    defined = variance > 1e-12 * np.max(x * x, initial=0)
    return np.divide(covariance, variance, out=np.full(len(weights), np.nan), where=defined)


def linear_intercept(targets: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the value of the least-squares line of predicted on true values at true 0, (B,), in the unit of the
    target.

    Args:
        targets: (n,) true values.
        predicted: (n,) predicted values.
        weights: (B, n) non-negative case weights.
    """
    slope = linear_slope(targets, predicted, weights=weights)
    return weighted_mean(predicted, weights) - slope * weighted_mean(targets, weights)


def calibrate_probabilities(
    positive: np.ndarray, probabilities: np.ndarray, subjects: Sequence[str] | np.ndarray
) -> Calibration:
    """Return calibration intercept and slope of binary probabilities with 95 % bootstrap intervals over subjects.

    Args:
        positive: (n,) bool.
        probabilities: (n,) predicted for the positive class.
        subjects: subject of each case.

    Raises:
        ValueError: no case, or a probability outside 0 to 1.
    """
    intercept = bootstrap_interval(lambda w: logistic_intercept(positive, probabilities, weights=w), subjects)
    slope = bootstrap_interval(lambda w: logistic_slope(positive, probabilities, weights=w), subjects)
    return Calibration(
        what="outcome on the logit of the predicted probability",
        intercept=intercept,
        slope=slope,
        n=slope.n,
        method="logistic regression; intercept with the slope fixed at 1; "
        f"probabilities kept {CLOSEST_TO_CERTAIN:g} away from 0 and 1",
    )


def calibrate_values(targets: np.ndarray, predicted: np.ndarray, subjects: Sequence[str] | np.ndarray) -> Calibration:
    """Return intercept and slope of predicted on true values with 95 % bootstrap intervals over subjects.

    Args:
        targets: (n,) true values.
        predicted: (n,) predicted values.
        subjects: subject of each case.

    Raises:
        ValueError: no case.
    """
    intercept = bootstrap_interval(lambda w: linear_intercept(targets, predicted, weights=w), subjects)
    slope = bootstrap_interval(lambda w: linear_slope(targets, predicted, weights=w), subjects)
    return Calibration(
        what="predicted on true value",
        intercept=intercept,
        slope=slope,
        n=slope.n,
        method="least squares of predicted on true",
    )


def _bins(probabilities: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges (num_bins + 1,), and the bin of every case (n,)."""
    _check_probabilities(probabilities)
    edges = np.linspace(0, 1, num_bins + 1)
    return edges, np.searchsorted(edges[1:-1], probabilities)


def _logits(probabilities: np.ndarray) -> np.ndarray:
    _check_probabilities(probabilities)
    p = np.clip(np.asarray(probabilities, dtype=np.float64), CLOSEST_TO_CERTAIN, 1 - CLOSEST_TO_CERTAIN)
    return np.log(p) - np.log1p(-p)


def _check_probabilities(probabilities: np.ndarray) -> None:
    wrong = ~((probabilities >= 0) & (probabilities <= 1))
    if wrong.any():
        case = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"calibration: case {case} has {probabilities[case]}; expected a probability from 0 to 1")


def _fit_logistic(design: np.ndarray, positive: np.ndarray, *, weights: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """(B, p) coefficients of a logistic regression in every draw, by Newton's method on all draws at once; NaN where
    none are best."""

    def log_likelihood(b: np.ndarray, w: np.ndarray) -> np.ndarray:
        eta = b @ design.T + offset
        return -(w * np.logaddexp(0, np.where(positive, -eta, eta))).sum(axis=1)

    num_coefficients = design.shape[1]
    w = weights.astype(np.float64)
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    fitted = np.full((len(w), num_coefficients), np.nan)
    running = np.arange(len(w))
    b = np.zeros((len(w), num_coefficients))
    value = log_likelihood(b, w)
    for _ in range(_MAX_STEPS):
        if not len(running):
            break
        p = _expit(b @ design.T + offset)
        gradient = (w * (positive - p)) @ design
        information = ((w * p * (1 - p)) @ products).reshape(-1, num_coefficients, num_coefficients)
        # Flat directions: a class or all spread of the predictor is absent, or the draw is separated.
        scale = np.trace(information, axis1=1, axis2=2) / num_coefficients
        flat = (scale < 1e-9) | (np.linalg.det(information) <= 1e-12 * scale**num_coefficients)
        far = np.abs(b).max(axis=1) > _SEPARATED
        good = ~(flat | far)
        running, b, w, value = running[good], b[good], w[good], value[good]
        step = np.linalg.solve(information[good], gradient[good][:, :, None])[:, :, 0]
        done = np.abs(step).max(axis=1) < 1e-9
        fitted[running[done]] = b[done]
        running, b, w, value, step = running[~done], b[~done], w[~done], value[~done], step[~done]
        # Rounding alone may lower the likelihood next to the maximum.
        floor = value - 1e-10 * np.abs(value)
        while (worse := log_likelihood(b + step, w) < floor).any():
            step[worse] /= 2
        b = b + step
        value = log_likelihood(b, w)
    return fitted


def _expit(eta: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-eta)), without overflow."""
    return np.exp(-np.logaddexp(0, -eta))
