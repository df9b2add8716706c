"""The light head on frozen features, LayerNorm-Linear-GELU-Linear (paper sec. 4.3), many of them trained as one
batched computation.

A sweep over seeds and label ratios trains dozens of independent small heads on the same cached features. ``Heads``
stacks their parameters along a first axis M and multiplies them with ``baddbmm``; the loss is a sum over the heads
and Adam works element by element, so each head is trained exactly as it would be alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-5
ROWS_AT_A_TIME = 2048


@dataclass(frozen=True, kw_only=True)
class MlpHead:
    """How a head looks and how long it is trained: part of a task's row."""

    hidden_width: int = 672
    """Width of the hidden layer. The paper gives no width but says that 0.6 % of the parameters are trained; on
    768-dimensional ViT-B features 672 gives 0.60 % (640: 0.57 %, 768: 0.69 %)."""
    loss: Literal["cross_entropy", "squared_error"]
    """Paper Eq. 4 and Eq. 5."""
    optimiser: Literal["adam"] = "adam"
    """Paper sec. 4.3; the weight decay is Adam's L2 term."""
    learning_rate: float = 1e-4
    """Paper sec. 4.3."""
    weight_decay: float = 1e-5
    """Paper sec. 4.3."""
    steps: int = 1000
    """Optimiser steps, the same for every label ratio and never chosen by looking at the test set."""
    batch_size: int = 32
    """Scans per step."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return log(sum_k exp z_k) - z_y per case, (M, B), of logits (M, B, K) and classes (M, B) (paper Eq. 4)."""
    return outputs.logsumexp(dim=-1) - outputs.gather(-1, targets[..., None])[..., 0]


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (y_hat - y)^2 per case, (M, B), of outputs (M, B, 1) and targets (M, B) (paper Eq. 5)."""
    return (outputs[..., 0] - targets).square()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": cross_entropy, "squared_error": squared_error}
OPTIMISERS = {"adam": torch.optim.Adam}


class Heads(nn.Module):
    """M independent heads LayerNorm(D) - Linear(D, width) - GELU - Linear(width, K) with stacked parameters."""

    def __init__(self, seeds: Sequence[int], *, num_features: int, hidden_width: int, num_outputs: int) -> None:
        super().__init__()
        m = len(seeds)
        self.norm_weight = nn.Parameter(torch.ones(m, 1, num_features))
        self.norm_bias = nn.Parameter(torch.zeros(m, 1, num_features))
        self.hidden_weight = nn.Parameter(torch.empty(m, num_features, hidden_width))
        self.hidden_bias = nn.Parameter(torch.empty(m, 1, hidden_width))
        self.output_weight = nn.Parameter(torch.empty(m, hidden_width, num_outputs))
        self.output_bias = nn.Parameter(torch.empty(m, 1, num_outputs))
        with torch.no_grad():
            for index, seed in enumerate(seeds):
                generator = torch.Generator().manual_seed(seed)
                # The default of torch.nn.Linear: uniform within one over the root of the fan-in.
                for weight, bias in ((self.hidden_weight, self.hidden_bias), (self.output_weight, self.output_bias)):
                    bound = weight.shape[1] ** -0.5
                    weight[index].uniform_(-bound, bound, generator=generator)
                    bias[index].uniform_(-bound, bound, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs (M, B, K) of features (M, B, D): row m goes through head m."""
        normalised = F.layer_norm(features, features.shape[-1:], eps=LAYER_NORM_EPS)
        scaled = normalised * self.norm_weight + self.norm_bias
        hidden = F.gelu(torch.baddbmm(self.hidden_bias, scaled, self.hidden_weight))
        return torch.baddbmm(self.output_bias, hidden, self.output_weight)


def train_classifiers(
    features: Tensor,
    targets: Tensor,
    *,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    num_classes: int,
    head: MlpHead,
) -> np.ndarray:
    """Train one classifier per subset by cross-entropy (paper Eq. 4) and return class probabilities, (M, n,
    num_classes).

    The probabilities are those of all n rows; which of them a head never saw is the caller's split.

    Args:
        features: (n, D) float32, on the device to train on.
        targets: (n,) int64 class indices.
        subsets: for each head the row indices that it is trained on.
        seeds: for each head the seed of its start and of its batches.
        num_classes: number of classes K.
        head: shape and training.
    """
    outputs = _train(
        features, targets.expand(len(seeds), -1), subsets=subsets, seeds=seeds, num_outputs=num_classes, head=head
    )
    return outputs.softmax(dim=-1).numpy()


def train_regressors(
    features: Tensor,
    targets: Tensor,
    *,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    head: MlpHead,
) -> np.ndarray:
    """Train one regressor per subset by squared error (paper Eq. 5) and return its predictions of all rows, (M, n).

    Each head learns the target standardised with the mean and standard deviation of its own training rows, and its
    outputs are put back on the target's scale: with Adam at 1e-4 an output near 50 years would not be reached in
    thousands of steps.

    Args:
        features: (n, D) float32, on the device to train on.
        targets: (n,) float32 in the target's unit.
        subsets: for each head the row indices that it is trained on.
        seeds: for each head the seed of its start and of its batches.
        head: shape and training.
    """
    means = torch.stack([targets[rows].mean() for rows in subsets])[:, None]
    deviations = torch.stack([targets[rows].std(correction=0) for rows in subsets])[:, None]
    deviations = torch.where(deviations > 0, deviations, torch.ones_like(deviations))

    standardised = (targets - means) / deviations
    outputs = _train(features, standardised, subsets=subsets, seeds=seeds, num_outputs=1, head=head)
    return (outputs[..., 0] * deviations.cpu() + means.cpu()).numpy()


def _train(
    features: Tensor,
    targets: Tensor,
    *,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    num_outputs: int,
    head: MlpHead,
) -> Tensor:
    """Train on features (n, D) and targets (M, n) of each head; return the outputs of all rows, (M, n, K), on the
    CPU.
    """
    heads = Heads(seeds, num_features=features.shape[1], hidden_width=head.hidden_width, num_outputs=num_outputs)
    heads.to(features.device)
    optimiser = OPTIMISERS[head.optimiser](
        heads.parameters(), lr=head.learning_rate, weight_decay=head.weight_decay, fused=True
    )
    streams = torch.stack(
        [_row_stream(rows, seed, head.steps * head.batch_size) for rows, seed in zip(subsets, seeds, strict=True)]
    ).to(features.device)
    for rows in streams.split(head.batch_size, dim=1):
        losses = LOSSES[head.loss](heads(features[rows]), targets.gather(1, rows))
        optimiser.zero_grad()
        losses.mean(dim=1).sum().backward()
        optimiser.step()
    with torch.inference_mode():
        parts = [heads(part.expand(len(seeds), -1, -1)).cpu() for part in features.split(ROWS_AT_A_TIME)]
    return torch.cat(parts, dim=1)


def _row_stream(rows: np.ndarray, seed: int, length: int) -> Tensor:
    """Return (length,) row indices: one shuffled pass over ``rows`` after another."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(len(rows), generator=generator) for _ in range(-(-length // len(rows)))]
    return torch.from_numpy(np.asarray(rows, dtype=np.int64))[torch.cat(passes)[:length]]
