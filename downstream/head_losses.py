"""Gradients of the losses of the heads (paper Eq. 4, 5, 9, 11) with respect to the outputs.

Each takes outputs (M, B, K) of M heads, targets (M, B), or (M, B, 2) for time and event, and weights (M, B) of the
cases, and returns the gradient (M, B, K) of every head's own mean loss. The losses themselves are never needed:
training has a fixed length and nothing is chosen by them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SQUARED_SHARE = 0.2  # alpha of paper Eq. 9
HUBER_DELTA = 1.0  # delta of paper Eq. 9


def cross_entropy_gradient(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Of log(sum_k exp z_k) - z_y (paper Eq. 4), the mean weighted as in torch.nn.CrossEntropyLoss."""
    gradient = outputs.softmax(dim=-1)
    gradient.scatter_add_(-1, targets[..., None], gradient.new_full((*targets.shape, 1), -1.0))
    return gradient * (weights / weights.sum(dim=1, keepdim=True))[..., None]


def squared_error_gradient(outputs: Tensor, targets: Tensor, _weights: Tensor) -> Tensor:
    """Of (y_hat - y)^2 (paper Eq. 5)."""
    return (outputs - targets[..., None]) * (2 / targets.shape[1])


def log_mixed_gradient(outputs: Tensor, targets: Tensor, _weights: Tensor) -> Tensor:
    """Of 0.2 d^2 + 0.8 (0.5 |d| + 0.5 Huber(d)), d the error of log(1 + y) (paper Eq. 9)."""
    error = outputs - targets[..., None]
    robust = 0.5 * error.sign() + 0.5 * error.clamp(-HUBER_DELTA, HUBER_DELTA)
    return (SQUARED_SHARE * 2 * error + (1 - SQUARED_SHARE) * robust) / targets.shape[1]


def cox_gradient(outputs: Tensor, targets: Tensor, _weights: Tensor) -> Tensor:
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
