"""The passes over tokens between a block's matrix products, on a GPU.

At 200,000 tokens these passes, not the products, are what a block would wait for: gathering the rows that drop path
leaves, normalising, rounding, turning q and k, scaling, adding. Each kernel reads its input once and writes its result
once, computes in float32 and allocates nothing else. Triton programs; in its interpreter they run on a CPU, slowly,
which is how they are compared with the plain formulation (tests/core/test_token_kernels.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a program that works on single values


def normalize_rows(x: Tensor, rows: Tensor | None, *, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of x (T, D) with mean 0 and variance 1: (T', D) in ``dtype``, and what each was multiplied by, (T',).

    rows: (T',) which; None for all.
    """
    count = len(x) if rows is None else len(rows)
    width = x.shape[1]
    normed = torch.empty(count, width, device=x.device, dtype=dtype)
    rstd = torch.empty(count, device=x.device)
    if count:
        _normalize_rows[(count,)](
            x.contiguous(),
            rstd if rows is None else rows,
            normed,
            rstd,
            width,
            eps,
            GATHER=rows is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4,
        )
    return normed, rstd


def normalize_rows_backward(
    gradient: Tensor | None, by_normed: Tensor, normed: Tensor, rstd: Tensor, place: Tensor | None, *, like: Tensor
) -> Tensor:
    """``gradient`` (T, D) plus what comes back through :func:`normalize_rows`, a new tensor (T, D) like ``like``.

    gradient: None for zero. by_normed: (T', D). place: (T,) where in T' a row is, -1 if nowhere; None if T' is T.
    """
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    width = like.shape[1]
    if len(like):
        _normalize_rows_backward[(len(like),)](
            result if gradient is None else gradient.contiguous(),
            by_normed.contiguous(),
            normed,
            rstd,
            rstd if place is None else place,
            result,
            width,
            ADD=gradient is not None,
            SOME=place is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4,
        )
    return result


def add_branch(x: Tensor, branch: Tensor, place: Tensor | None, scale: Tensor | None) -> Tensor:
    """x (T, D) plus scale * branch (T', D), a new tensor in the dtype of x; scale (T',) float32 or None for one."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[1]
    if len(x):
        _add_branch[(len(x),)](
            x.contiguous(),
            branch.contiguous(),
            result if place is None else place,
            result if scale is None else scale,
            result,
            width,
            SOME=place is not None,
            SCALED=scale is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4,
        )
    return result


def gather_scaled(x: Tensor, rows: Tensor | None, scale: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """scale * x[rows]: (T', D) in ``dtype`` from x (T, D); scale (T',) float32 or None for one."""
    count = len(x) if rows is None else len(rows)
    width = x.shape[1]
    result = torch.empty(count, width, device=x.device, dtype=dtype)
    if count:
        _gather_scaled[(count,)](
            x.contiguous(),
            result if rows is None else rows,
            result if scale is None else scale,
            result,
            width,
            GATHER=rows is not None,
            SCALED=scale is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4,
        )
    return result


def rotate_in_place(qkv: Tensor, rope: Tensor) -> None:
    """Turn q and k of qkv (T, 3, heads, head_dim) by their angles; rope (2, T, 1, head_dim), see attention.rotate."""
    count, _, heads, width = qkv.shape
    if count:
        _rotate_in_place[(count, 2)](
            qkv,
            rope[0],
            rope[1],
            heads,
            width // 2,
            HEADS=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(width // 2),
            num_warps=2,
        )


def join_turned_back(by_q: Tensor, by_k: Tensor, by_v: Tensor, rope: Tensor, joined: Tensor) -> None:
    """Fill (T, 3, heads, head_dim) with gradients (T, heads, head_dim) of turned q and k, turned back, and of v.

    rope: (2, T, 1, head_dim), its rows contiguous.
    """
    count, heads, width = by_v.shape
    if count:
        _join_turned_back[(count, 3)](
            by_q.contiguous(),
            by_k.contiguous(),
            by_v.contiguous(),
            rope[0],
            rope[1],
            joined,
            heads,
            width // 2,
            HEADS=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(width // 2),
            num_warps=2,
        )


def gelu_and_gradient(x: Tensor, by_gelu: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x) once more, and the gradient by x: two tensors like x."""
    activated, by_x = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        _gelu_and_gradient[(triton.cdiv(x.numel(), ELEMENTS),)](
            x, by_gelu, activated, by_x, x.numel(), BLOCK=ELEMENTS, num_warps=8
        )
    return activated, by_x


@triton.jit
def _normalize_rows(x, rows, normed, rstd, width, eps, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + target).to(tl.int64) if GATHER else target
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    values = tl.load(x + source * width + lane, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    tl.store(normed + target * width + lane, (centred * factor).to(normed.dtype.element_ty), mask=inside)
    tl.store(rstd + target, factor)


@triton.jit
def _normalize_rows_backward(
    gradient, by_normed, normed, rstd, place, result, width, ADD: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    total = tl.zeros((BLOCK,), tl.float32)
    if ADD:
        total = tl.load(gradient + row * width + lane, mask=inside, other=0.0).to(tl.float32)
    here = tl.load(place + row).to(tl.int64) if SOME else row
    if here >= 0:
        by = tl.load(by_normed + here * width + lane, mask=inside, other=0.0).to(tl.float32)
        seen = tl.load(normed + here * width + lane, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(by * seen, axis=0) / width
        mean = tl.sum(by, axis=0) / width
        total += (by - mean - seen * along) * tl.load(rstd + here)
    tl.store(result + row * width + lane, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _add_branch(x, branch, place, scale, result, width, SOME: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    total = tl.load(x + row * width + lane, mask=inside, other=0.0).to(tl.float32)
    here = tl.load(place + row).to(tl.int64) if SOME else row
    if here >= 0:
        added = tl.load(branch + here * width + lane, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            added *= tl.load(scale + here)
        total += added
    tl.store(result + row * width + lane, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _gather_scaled(x, rows, scale, result, width, GATHER: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + target).to(tl.int64) if GATHER else target
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    values = tl.load(x + source * width + lane, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        values *= tl.load(scale + target)
    tl.store(result + target * width + lane, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_in_place(qkv, cosines, sines, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (lane < half)
    # Both halves of the table are alike.
    cosine = tl.load(cosines + token * 2 * half + lane, mask=lane < half, other=0.0)
    sine = tl.load(sines + token * 2 * half + lane, mask=lane < half, other=0.0)
    first = qkv + (token * 3 + part) * heads * 2 * half + head * 2 * half + lane
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (a * cosine - b * sine).to(qkv.dtype.element_ty), mask=inside)
    tl.store(first + half, (b * cosine + a * sine).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _join_turned_back(by_q, by_k, by_v, cosines, sines, joined, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (lane < half)
    cosine = tl.load(cosines + token * 2 * half + lane, mask=lane < half, other=0.0)
    sine = tl.load(sines + token * 2 * half + lane, mask=lane < half, other=0.0)
    source = token * heads * 2 * half + head * 2 * half + lane
    target = joined + (token * 3 + part) * heads * 2 * half + head * 2 * half + lane
    kind = joined.dtype.element_ty
    if part == 2:
        tl.store(target, tl.load(by_v + source, mask=inside, other=0.0), mask=inside)
        tl.store(target + half, tl.load(by_v + source + half, mask=inside, other=0.0), mask=inside)
    else:
        if part == 0:
            a = tl.load(by_q + source, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(by_q + source + half, mask=inside, other=0.0).to(tl.float32)
        else:
            a = tl.load(by_k + source, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(by_k + source + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (a * cosine + b * sine).to(kind), mask=inside)
        tl.store(target + half, (b * cosine - a * sine).to(kind), mask=inside)


@triton.jit
def _gelu_and_gradient(x, by_gelu, activated, by_x, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(by_gelu + place, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
    tl.store(activated + place, (value * below).to(activated.dtype.element_ty), mask=inside)
    tl.store(by_x + place, (gradient * (below + value * density)).to(by_x.dtype.element_ty), mask=inside)
