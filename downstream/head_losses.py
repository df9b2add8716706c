"""Gradients of the losses of the heads (paper Eq. 4, 5, 9, 11) with respect to the outputs.

Each takes outputs (M, B, K) of M heads, targets and ``shares`` (M, B, 1) of the cases in their batch, and returns the
gradient (M, B, K) of every head's own mean loss. Targets are (M, B, K) of 0 and 1 for classes, (M, B) for values,
(M, B, 2) for time and event: what can be computed before training is not computed in every step. The losses themselves
are never needed: training has a fixed length and nothing is chosen by them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SQUARED_SHARE = 0.2  # alpha of paper Eq. 9
HUBER_DELTA = 1.0  # delta of paper Eq. 9


def batch_shares(weights: Tensor) -> Tensor:
    """(..., B, 1) part of each case in its batch, of weights (..., B)."""
    return (weights / weights.sum(dim=-1, keepdim=True))[..., None]


def cross_entropy_gradient(outputs: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """Of log(sum_k exp z_k) - z_y (paper Eq. 4), the mean weighted as in torch.nn.CrossEntropyLoss."""
    return outputs.softmax(dim=-1).sub_(targets).mul_(shares)


def squared_error_gradient(outputs: Tensor, targets: Tensor, _shares: Tensor) -> Tensor:
    """Of (y_hat - y)^2 (paper Eq. 5)."""
    return (outputs - targets[..., None]) * (2 / targets.shape[1])


def log_mixed_gradient(outputs: Tensor, targets: Tensor, _shares: Tensor) -> Tensor:
    """Of 0.2 d^2 + 0.8 (0.5 |d| + 0.5 Huber(d)), d the error of log(1 + y) (paper Eq. 9)."""
    error = outputs - targets[..., None]
    robust = 0.5 * error.sign() + 0.5 * error.clamp(-HUBER_DELTA, HUBER_DELTA)
    return (SQUARED_SHARE * 2 * error + (1 - SQUARED_SHARE) * robust) / targets.shape[1]


def cox_gradient(outputs: Tensor, targets: Tensor, _shares: Tensor) -> Tensor:
    """Of the negative log partial likelihood with Breslow's handling of ties, mean over events (paper Eq. 11).

    A batch without an event says nothing: its gradient is zero.
    """
    times, events = targets.unbind(dim=-1)
    at_risk = times[:, None, :] >= times[:, :, None]
    shares = outputs[..., 0][:, None, :].masked_fill(~at_risk, -torch.inf).softmax(dim=-1)
    gradient = (shares * events[..., None]).sum(dim=1) - events
    return (gradient / events.sum(dim=1, keepdim=True).clamp(min=1))[..., None]


GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy_gradient,
    "squared_error": squared_error_gradient,
    "log_mixed": log_mixed_gradient,
    "cox": cox_gradient,
}
