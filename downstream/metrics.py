"""Metrics of a test set under case weights: ones give the metric, the counts of a bootstrap draw give that draw's
metric.

Every function takes ``weights`` (B, n), one row per draw, and returns (B,), so that thousands of draws cost a few
array operations. A metric that a draw does not define (nobody drawn, or a class absent for an AUC) is NaN there.
"""

import numpy as np


def accuracy(targets: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the weighted share of correct class predictions, (B,), from 0 to 1.

    Args:
        targets: (n,) true class indices.
        predicted: (n,) predicted class indices.
        weights: (B, n) non-negative case weights.
    """
    return _weighted_mean((targets == predicted).astype(np.float64), weights)


def mean_absolute_error(targets: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean absolute error, (B,), in the unit of the target (paper Eq. 6).

    Args:
        targets: (n,) true values.
        predicted: (n,) predicted values.
        weights: (B, n) non-negative case weights.
    """
    return _weighted_mean(np.abs(predicted - targets), weights)


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


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1).astype(np.float64)
    return np.divide(weights @ values, total, out=np.full(len(weights), np.nan), where=total > 0)
