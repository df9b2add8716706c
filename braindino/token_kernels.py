"""The passes over tokens between a block's matrix products, on a GPU.

At 200,000 tokens these passes, not the products, are what a block would wait for: gathering the rows that drop path
leaves, normalising, rounding, turning q and k, scaling, adding. Each kernel reads its input once and writes its result
once, computes in float32 and allocates nothing else. Triton programs; in its interpreter they run on a CPU, slowly,
which is how they are compared with the plain formulation (tests/core/test_fused_branch.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

GELU_ROWS, GELU_COLUMNS = 64, 128  # of a program


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
    by_normed: Tensor, normed: Tensor, rstd: Tensor, place: Tensor | None, *, like: Tensor
) -> Tensor:
    """The gradient (T, D) by x of :func:`normalize_rows`, like ``like``.

    by_normed: (T', D). place: (T,) int32 where in T' a row is, -1 if nowhere; None if T' is T.
    """
    return _through_norm(None, by_normed, normed, rstd, place, like=like, branch=None)[0]


class Branch(NamedTuple):
    """Which rows of T a branch is of."""

    num_rows: int
    """T'."""
    place: Tensor | None
    """(T,) int32: where in T' a row is, -1 if nowhere; None if T' is T."""
    scale: Tensor | None = None
    """(T',) float32, what the branch is multiplied by; None for one."""


def add_and_normalize(
    x: Tensor, made: Tensor, branch: Branch, following: Branch | None, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (T, D) plus scale * made (T', D), a new tensor like x; and of its rows that the following branch is of, what
    :func:`normalize_rows` gives. The latter is None, None where nothing follows."""
    width = x.shape[1]
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = rstd = None
    if following is not None:
        normed = torch.empty(following.num_rows, width, device=x.device, dtype=dtype)
        rstd = torch.empty(following.num_rows, device=x.device)
    if len(x):
        place, scale = branch.place, branch.scale
        next_place = None if following is None else following.place
        _add_and_normalize[(len(x),)](
            x.contiguous(),
            made.contiguous(),
            result if place is None else place,
            result if scale is None else scale,
            result,
            result if next_place is None else next_place,
            result if normed is None else normed,
            result if rstd is None else rstd,
            width,
            eps,
            SOME=place is not None,
            SCALED=scale is not None,
            FOLLOWED=following is not None,
            SOME_NEXT=next_place is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4,
        )
    return result, normed, rstd


def add_and_normalize_backward(
    gradient: Tensor,
    by_normed: Tensor | None,
    normed: Tensor | None,
    rstd: Tensor | None,
    branch: Branch,
    following: Branch | None,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients by x (T, D), like ``gradient``, and by made (T', D), in ``dtype``, of :func:`add_and_normalize`.

    gradient: (T, D) by its first result. by_normed: by its second; None, as normed and rstd, where nothing follows.
    """
    place = None if following is None else following.place
    total, by_made = _through_norm(gradient, by_normed, normed, rstd, place, like=gradient, branch=branch, dtype=dtype)
    assert by_made is not None
    return total, by_made


def _through_norm(
    gradient: Tensor | None,
    by_normed: Tensor | None,
    normed: Tensor | None,
    rstd: Tensor | None,
    place: Tensor | None,
    *,
    like: Tensor,
    branch: Branch | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    width = like.shape[1]
    total = torch.empty_like(like, memory_format=torch.contiguous_format)
    by_made = None if branch is None else torch.empty(branch.num_rows, width, device=like.device, dtype=dtype)
    own_place, scale = (None, None) if branch is None else (branch.place, branch.scale)
    if len(like):
        _through_norm_kernel[(len(like),)](
            total if gradient is None else gradient.contiguous(),
            total if by_normed is None else by_normed.contiguous(),
            total if normed is None else normed,
            total if rstd is None else rstd,
            total if place is None else place,
            total,
            total if own_place is None else own_place,
            total if scale is None else scale,
            total if by_made is None else by_made,
            width,
            ADD=gradient is not None,
            NORM=by_normed is not None,
            SOME_NEXT=place is not None,
            GATHER=branch is not None,
            SOME=own_place is not None,
            SCALED=scale is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4,
        )
    return total, by_made


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
    """Fill (B * N, 3, heads, head_dim) with the gradients of turned q and k, turned back, and of v.

    by_q, by_k, by_v: (B, heads, N, head_dim), laid out as attention's backward pass likes it.
    rope: (2, B * N, 1, head_dim), its rows contiguous.
    """
    by_q, by_k, by_v = (part if part.stride(-1) == 1 else part.contiguous() for part in (by_q, by_k, by_v))
    batch, heads, tokens, width = by_v.shape
    if by_v.numel():
        _join_turned_back[(batch * tokens, 3)](
            by_q,
            by_k,
            by_v,
            *by_q.stride()[:3],
            *by_k.stride()[:3],
            *by_v.stride()[:3],
            rope[0],
            rope[1],
            joined,
            tokens,
            heads,
            width // 2,
            HEADS=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(width // 2),
            num_warps=2,
        )


def gelu_and_gradient(x: Tensor, by_gelu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(x) once more, the gradient by x, both like x (T, D), and the latter's sums over some rows each, (parts, D)
    float32."""
    x, by_gelu = x.contiguous(), by_gelu.contiguous()
    count, width = x.shape
    activated, by_x = torch.empty_like(x), torch.empty_like(x)
    parts = triton.cdiv(count, GELU_ROWS)
    sums = torch.empty(parts, width, device=x.device)
    if count:
        _gelu_and_gradient[(parts, triton.cdiv(width, GELU_COLUMNS))](
            x, by_gelu, activated, by_x, sums, count, width, ROWS=GELU_ROWS, COLUMNS=GELU_COLUMNS, num_warps=8
        )
    return activated, by_x, sums


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
def _add_and_normalize(
    x,
    made,
    place,
    scale,
    result,
    next_place,
    normed,
    rstd,
    width,
    eps,
    SOME: tl.constexpr,
    SCALED: tl.constexpr,
    FOLLOWED: tl.constexpr,
    SOME_NEXT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    total = tl.load(x + row * width + lane, mask=inside, other=0.0).to(tl.float32)
    here = tl.load(place + row).to(tl.int64) if SOME else row
    if here >= 0:
        added = tl.load(made + here * width + lane, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            added *= tl.load(scale + here)
        total += added
    rounded = total.to(result.dtype.element_ty)
    tl.store(result + row * width + lane, rounded, mask=inside)
    if FOLLOWED:
        target = tl.load(next_place + row).to(tl.int64) if SOME_NEXT else row
        if target >= 0:
            values = rounded.to(tl.float32)
            mean = tl.sum(values, axis=0) / width
            centred = tl.where(inside, values - mean, 0.0)
            factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
            tl.store(normed + target * width + lane, (centred * factor).to(normed.dtype.element_ty), mask=inside)
            tl.store(rstd + target, factor)


@triton.jit
def _through_norm_kernel(
    gradient,
    by_normed,
    normed,
    rstd,
    next_place,
    total,
    place,
    scale,
    by_made,
    width,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    SOME_NEXT: tl.constexpr,
    GATHER: tl.constexpr,
    SOME: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    values = tl.zeros((BLOCK,), tl.float32)
    if ADD:
        values = tl.load(gradient + row * width + lane, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        source = tl.load(next_place + row).to(tl.int64) if SOME_NEXT else row
        if source >= 0:
            by = tl.load(by_normed + source * width + lane, mask=inside, other=0.0).to(tl.float32)
            seen = tl.load(normed + source * width + lane, mask=inside, other=0.0).to(tl.float32)
            along = tl.sum(by * seen, axis=0) / width
            mean = tl.sum(by, axis=0) / width
            values += (by - mean - seen * along) * tl.load(rstd + source)
    tl.store(total + row * width + lane, values.to(total.dtype.element_ty), mask=inside)
    if GATHER:
        target = tl.load(place + row).to(tl.int64) if SOME else row
        if target >= 0:
            if SCALED:
                values *= tl.load(scale + target)
            tl.store(by_made + target * width + lane, values.to(by_made.dtype.element_ty), mask=inside)


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
def _join_turned_back(
    by_q,
    by_k,
    by_v,
    q_image,
    q_head,
    q_token,
    k_image,
    k_head,
    k_token,
    v_image,
    v_head,
    v_token,
    cosines,
    sines,
    joined,
    tokens,
    heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, token = row // tokens, row % tokens
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (lane < half)
    cosine = tl.load(cosines + row * 2 * half + lane, mask=lane < half, other=0.0)
    sine = tl.load(sines + row * 2 * half + lane, mask=lane < half, other=0.0)
    target = joined + (row * 3 + part) * heads * 2 * half + head * 2 * half + lane
    kind = joined.dtype.element_ty
    if part == 2:
        source = by_v + image * v_image + head * v_head + token * v_token + lane
        tl.store(target, tl.load(source, mask=inside, other=0.0), mask=inside)
        tl.store(target + half, tl.load(source + half, mask=inside, other=0.0), mask=inside)
    else:
        if part == 0:
            source = by_q + image * q_image + head * q_head + token * q_token + lane
        else:
            source = by_k + image * k_image + head * k_head + token * k_token + lane
        a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (a * cosine + b * sine).to(kind), mask=inside)
        tl.store(target + half, (b * cosine - a * sine).to(kind), mask=inside)


# The number of rows of the last block changes from step to step.
@triton.jit(do_not_specialize=["count"])
def _gelu_and_gradient(x, by_gelu, activated, by_x, sums, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    part = tl.program_id(0)
    row = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    lane = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = lane[None, :]
    inside = (row < count) & (column < width)
    place = row * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(by_gelu + place, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
    through = gradient * (below + value * density)
    tl.store(activated + place, (value * below).to(activated.dtype.element_ty), mask=inside)
    tl.store(by_x + place, through.to(by_x.dtype.element_ty), mask=inside)
    tl.store(sums + part * width + lane, tl.sum(through, axis=0), mask=lane < width)
