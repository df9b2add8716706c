"""Metrics of a test set under case weights: ones give the metric, the counts of a bootstrap draw give that draw's
metric.

Every function takes ``weights`` (B, n), one row per draw, and returns (B,), so that thousands of draws cost a few
array operations. A metric that a draw does not define (nobody drawn, or a class absent for an AUC) is NaN there.
"""

import numpy as np

_PAIRS_AT_A_TIME = 8_000_000  # 64 MB of float64


def accuracy(targets: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the weighted share of correct class predictions, (B,), from 0 to 1.

    Args:
        targets: (n,) true class indices.
        predicted: (n,) predicted class indices.
        weights: (B, n) non-negative case weights.
    """
    return weighted_mean((targets == predicted).astype(np.float64), weights)


def mean_absolute_error(targets: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean absolute error, (B,), in the unit of the target (paper Eq. 6).

    Args:
        targets: (n,) true values.
        predicted: (n,) predicted values.
        weights: (B, n) non-negative case weights.
    """
    return weighted_mean(np.abs(predicted - targets), weights)


def macro_auc(targets: np.ndarray, probabilities: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the one-versus-rest ROC-AUC averaged over the classes with equal weight, (B,); two classes give the
    usual AUC.

    Args:
        targets: (n,) true class indices.
        probabilities: (n, K) predicted class probabilities (any monotone score per class does).
        weights: (B, n) non-negative case weights.
    """
    return np.mean(
        [binary_auc(targets == k, probabilities[:, k], weights=weights) for k in range(probabilities.shape[1])], axis=0
    )


def binary_auc(positive: np.ndarray, scores: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return P(score of a positive > score of a negative), ties counting one half, (B,).

    Args:
        positive: (n,) bool.
        scores: (n,) higher means more likely positive.
        weights: (B, n) non-negative case weights.
    """
    if not len(scores):
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    first_of_ties = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    sorted_weights = weights[:, order].astype(np.float64)
    # Weight of positives and negatives at each distinct score, lowest score first.
    positives = np.add.reduceat(sorted_weights * positive[order], first_of_ties, axis=1)
    negatives = np.add.reduceat(sorted_weights * ~positive[order], first_of_ties, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    won = (positives * (below + negatives / 2)).sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def root_mean_squared_error(targets: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the square root of the weighted mean squared error, (B,), in the unit of the target.

    Args:
        targets: (n,) true values.
        predicted: (n,) predicted values.
        weights: (B, n) non-negative case weights.
    """
    return np.sqrt(weighted_mean((predicted - targets) ** 2, weights))


def r_squared(targets: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the coefficient of determination 1 - sum w (y - p)^2 / sum w (y - mean y)^2, (B,); NaN where all targets
    drawn are equal.

    The mean is that of the cases drawn, so a constant prediction of the mean training target is at most 0.

    Args:
        targets: (n,) true values.
        predicted: (n,) predicted values.
        weights: (B, n) non-negative case weights.
    """
    # About the overall mean, so that large targets with a small spread lose no digits.
    centred = targets - np.mean(targets) if len(targets) else targets
    mean = weighted_mean(centred, weights)
    variance = weighted_mean(centred**2, weights) - mean**2
    defined = variance > 1e-12 * np.max(centred**2, initial=0)
    error = weighted_mean((predicted - targets) ** 2, weights)
    return 1 - np.divide(error, variance, out=np.full(len(weights), np.nan), where=defined)


def balanced_accuracy(targets: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the mean over the classes of the share of their cases that is predicted correctly, (B,).

    The classes are those of the test set; NaN where a draw lacks one.

    Args:
        targets: (n,) true class indices.
        predicted: (n,) predicted class indices.
        weights: (B, n) non-negative case weights.
    """
    if not len(targets):
        return np.full(len(weights), np.nan)
    correct = (targets == predicted).astype(np.float64)
    recalls = [weighted_mean(correct[targets == k], weights[:, targets == k]) for k in np.unique(targets)]
    return np.mean(recalls, axis=0)


def sensitivity(positive: np.ndarray, predicted_positive: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the weighted share of the positives that is predicted positive, (B,).

    Args:
        positive: (n,) bool.
        predicted_positive: (n,) bool.
        weights: (B, n) non-negative case weights.
    """
    return weighted_mean(predicted_positive[positive].astype(np.float64), weights[:, positive])


def specificity(positive: np.ndarray, predicted_positive: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the weighted share of the negatives that is predicted negative, (B,).

    Args:
        positive: (n,) bool.
        predicted_positive: (n,) bool.
        weights: (B, n) non-negative case weights.
    """
    return weighted_mean((~predicted_positive[~positive]).astype(np.float64), weights[:, ~positive])


def brier_score(targets: np.ndarray, probabilities: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean over cases of sum_k (p_k - [target = k])^2, (B,); with two classes half of it, the
    usual (p_1 - [target = 1])^2.

    Args:
        targets: (n,) true class indices.
        probabilities: (n, K) predicted class probabilities.
        weights: (B, n) non-negative case weights.
    """
    num_classes = probabilities.shape[1]
    squares = ((probabilities - np.eye(num_classes)[targets]) ** 2).sum(axis=1)
    return weighted_mean(squares / 2 if num_classes == 2 else squares, weights)


def concordance_index(times: np.ndarray, events: np.ndarray, risks: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return Harrell's P(risk_i > risk_j given that i had its event before j), ties in risk counting one half, (B,).

    Pairs are those with T_i < T_j and E_i = 1; of equal times, an event counts as before a censoring.

    Args:
        times: (n,) until the event or the end of observation.
        events: (n,) bool, or 1 where the event happened.
        risks: (n,) higher means an earlier event.
        weights: (B, n) non-negative case weights.
    """
    happened = np.asarray(events, dtype=bool)
    first = np.flatnonzero(happened)
    won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    w = weights.astype(np.float64)
    # A block of the pairs' first members against all second ones.
    block = max(1, _PAIRS_AT_A_TIME // max(1, len(times), len(weights)))
    for start in range(0, len(first), block):
        i = first[start : start + block, None]
        comparable = (times[i] < times) | ((times[i] == times) & ~happened)
        wins = comparable * ((risks[i] > risks) + 0.5 * (risks[i] == risks))
        pairs += (w[:, i[:, 0]] * (w @ comparable.T.astype(np.float64))).sum(axis=1)
        won += (w[:, i[:, 0]] * (w @ wins.T)).sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean of the values under each row of weights, (B,); NaN where all weights are 0.

    Args:
        values: (n,) one a case.
        weights: (B, n) non-negative case weights.
    """
    total = weights.sum(axis=1).astype(np.float64)
    return np.divide(weights @ values, total, out=np.full(len(weights), np.nan), where=total > 0)
