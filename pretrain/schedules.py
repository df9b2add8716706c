"""What changes over a run, as arrays indexed by iteration (paper sec. 4.2)."""

import math
from typing import Literal, NamedTuple

import numpy as np

LrScaling = Literal["dinov3", "sqrt", "none"]


class Schedules(NamedTuple):
    """One value for each iteration of the run, (iterations,) float64 each."""

    lr: np.ndarray
    last_layer_lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray
    teacher_temperature: np.ndarray


def effective_lr(base_lr: float, batch_size: int, *, scaling: LrScaling) -> float:
    """Peak learning rate for a global batch: base x 4 sqrt(B/1024) ("dinov3"), base x sqrt(B/1024) ("sqrt") or base.

    DINOv3 kept the name of DINOv2's rule and multiplied it by four: at the paper's batch of 1024 the base of 1e-4 means
    4e-4 under the first rule and 1e-4 under the other two.
    """
    factors = {"dinov3": 4 * math.sqrt(batch_size / 1024), "sqrt": math.sqrt(batch_size / 1024), "none": 1.0}
    return base_lr * factors[scaling]


def warmup_cosine(iterations: int, *, peak: float, final: float, warmup: int) -> np.ndarray:
    """Linear from peak/warmup up to peak at iteration warmup - 1, then half a cosine down to final at the last one."""
    index = np.arange(iterations)
    progress = (index - warmup + 1) / max(1, iterations - warmup)
    cosine = final + 0.5 * (peak - final) * (1 + np.cos(np.pi * np.clip(progress, 0, 1)))
    return np.where(index < warmup, peak * (index + 1) / max(1, warmup), cosine)


def linear_then_constant(iterations: int, *, start: float, end: float, ramp: int) -> np.ndarray:
    """Linear from start at iteration 0 to end at iteration `ramp`, constant afterwards."""
    return (
        start + (end - start) * np.clip(np.arange(iterations) / max(1, ramp), 0, 1)
        if ramp
        else np.full(iterations, float(end))
    )


def build_schedules(
    iterations: int,
    *,
    peak_lr: float,
    min_lr: float,
    warmup_iterations: int,
    last_layer_freeze_iterations: int,
    weight_decay: float,
    teacher_momentum: float,
    teacher_temperature: tuple[float, float],
    teacher_temperature_iterations: int,
) -> Schedules:
    """All schedules of a run; the prototypes stand still (learning rate 0) for the first iterations."""
    lr = warmup_cosine(iterations, peak=peak_lr, final=min_lr, warmup=warmup_iterations)
    start, end = teacher_temperature
    return Schedules(
        lr=lr,
        last_layer_lr=np.where(np.arange(iterations) < last_layer_freeze_iterations, 0.0, lr),
        weight_decay=np.full(iterations, weight_decay),
        momentum=np.full(iterations, teacher_momentum),
        teacher_temperature=linear_then_constant(iterations, start=start, end=end, ramp=teacher_temperature_iterations),
    )
