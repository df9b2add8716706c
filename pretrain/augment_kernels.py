"""The matrices of random crops on a GPU, each written in one pass; see ``augment.resize_matrix``."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def resize_matrix(start: Tensor, length: Tensor, flip: Tensor | None, *, size: int, source_size: int) -> Tensor:
    """As ``augment.resize_matrix``: (n,) float32 each, flip not 0 where flipped -> (n, size, source_size)."""
    count = len(start)
    matrices = torch.empty(count, size, source_size, device=start.device)
    if count:
        _resize_matrix[(count, size)](
            start.contiguous(),
            length.contiguous(),
            start if flip is None else flip.contiguous(),
            matrices,
            size,
            source_size,
            FLIPS=flip is not None,
            BLOCK=triton.next_power_of_2(source_size),
            num_warps=2,
        )
    return matrices


@triton.jit
def _resize_matrix(starts, lengths, flips, matrices, size, source_size, FLIPS: tl.constexpr, BLOCK: tl.constexpr):
    crop, row = tl.program_id(0), tl.program_id(1)
    start, length = tl.load(starts + crop), tl.load(lengths + crop)
    step = length / size
    output = row
    if FLIPS:
        output = tl.where(tl.load(flips + crop) != 0.0, size - 1 - row, row)
    target = start + (output + 0.5) * step
    column = tl.arange(0, BLOCK)
    center = column + 0.5
    x = tl.abs((center - target) / tl.maximum(step, 1.0))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    inside = (column < source_size) & (center > tl.floor(start)) & (center < tl.ceil(start + length))
    weight = tl.where(inside, weight, 0.0)
    place = (crop * size + row).to(tl.int64) * source_size + column
    tl.store(matrices + place, weight / tl.sum(weight, axis=0), mask=column < source_size)
