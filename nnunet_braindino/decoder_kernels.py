"""LayerNorm and GELU of the decoder's maps on a GPU, in one pass forward and one backward.

At full resolution a map has 256 pixels for every token. In torch's operations it is rounded, normed, activated and
rounded back in passes of their own; here a value is read once and written once, and computed in float32 between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_VALUES = 2048  # of a program at a time
TILES = 8  # that a program sums the gradients of weight and bias over


def norm_gelu(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """gelu(layer_norm(x)) of rows x (N, C), in ``dtype``; scale and shift (C,) float32."""
    count, width = x.shape
    activated = torch.empty(count, width, device=x.device, dtype=dtype)
    block, rows = _tile(width)
    if count:
        _norm_gelu[(triton.cdiv(count, rows),)](
            x.contiguous(), scale, shift, activated, count, width, eps, ROWS=rows, BLOCK=block, num_warps=8
        )
    return activated


def norm_gelu_backward(
    x: Tensor, by_activated: Tensor, scale: Tensor, shift: Tensor, by_x: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`norm_gelu` gave once more, in the dtype of ``by_activated`` (N, C), and the gradients of scale and
    shift; that of x is written to ``by_x``, which is contiguous."""
    count, width = x.shape
    activated = torch.empty_like(by_activated, memory_format=torch.contiguous_format)
    block, rows = _tile(width)
    parts = triton.cdiv(count, rows * TILES)
    sums = torch.zeros(2, parts, width, device=x.device)
    if count:
        _norm_gelu_backward[(parts,)](
            x.contiguous(),
            by_activated.contiguous(),
            scale,
            shift,
            activated,
            by_x,
            sums,
            count,
            width,
            parts,
            eps,
            ROWS=rows,
            BLOCK=block,
            TILES=TILES,
            num_warps=8,
        )
    by_scale, by_shift = sums.sum(dim=1)
    return activated, by_scale, by_shift


def _tile(width: int) -> tuple[int, int]:
    """Values and rows that a program holds at a time."""
    block = triton.next_power_of_2(width)
    return block, max(1, TILE_VALUES // block)


@triton.jit
def _norm_gelu(x, scale, shift, activated, count, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < count) & (column < width)
    place = row * width + column
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1)[:, None] / width
    centred = tl.where(inside, values - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1)[:, None] / width + eps)
    gain = tl.load(scale + column, mask=column < width, other=0.0)
    offset = tl.load(shift + column, mask=column < width, other=0.0)
    y = centred * factor * gain + offset
    result = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    tl.store(activated + place, result.to(activated.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gelu_backward(
    x,
    by_activated,
    scale,
    shift,
    activated,
    by_x,
    sums,
    count,
    width,
    parts,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    part = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    column = lane[None, :]
    gain = tl.load(scale + column, mask=column < width, other=0.0)
    offset = tl.load(shift + column, mask=column < width, other=0.0)
    # Summed over the rows of a tile at the end only: to do it for each tile its threads would wait for each other.
    by_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    by_shift = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(TILES):
        row = ((part * TILES + tile) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < count) & (column < width)
        place = row * width + column
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(values, axis=1)[:, None] / width
        centred = tl.where(inside, values - mean, 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1)[:, None] / width + eps)
        normed = centred * factor
        y = normed * gain + offset
        below = 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
        tl.store(activated + place, (y * below).to(activated.dtype.element_ty), mask=inside)
        outer = tl.load(by_activated + place, mask=inside, other=0.0).to(tl.float32)
        through = outer * (below + y * 0.3989422804014327 * tl.exp(-0.5 * y * y))
        by_scale += through * normed
        by_shift += through
        inner = through * gain
        level = tl.sum(inner, axis=1)[:, None] / width
        along = tl.sum(inner * normed, axis=1)[:, None] / width
        result = (inner - level - normed * along) * factor
        tl.store(by_x + place, result.to(by_x.dtype.element_ty), mask=inside)
    tl.store(sums + part * width + lane, tl.sum(by_scale, axis=0), mask=lane < width)
    tl.store(sums + (parts + part) * width + lane, tl.sum(by_shift, axis=0), mask=lane < width)
