"""The passes over prototype scores on a GPU, each score read as often as it must be and never written in float32.

What ``prototypes`` does strip by strip with torch's operations costs about forty passes over the scores of a batch;
these kernels take about twelve, of half the bytes. They compute the same numbers: scores in the precision of the matrix
products, all else in float32. In Triton's interpreter they run on a CPU, slowly, which is how they are compared with
the plain formulas (tests/pretrain/test_prototypes.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a row that a program holds at a time, and rows and columns of a tile where columns are summed up.
ROW_BLOCK = 4096
TILE_ROWS, TILE_COLUMNS = 64, 64


def row_statistics(scores: Tensor, offset: Tensor | None, *, scale: float) -> tuple[Tensor, Tensor]:
    """For z = scale * scores + offset: logsumexp(z) of each row, and the mean of z under softmax(z).

    scores: (N, K), contiguous. offset: (K,) float32, None for zero. Returns two (N,) in float32.
    """
    num_rows, num_columns = scores.shape
    log_norm, mean = (torch.empty(num_rows, device=scores.device) for _ in range(2))
    if num_rows:
        _row_statistics[(num_rows,)](
            scores,
            log_norm if offset is None else offset,
            log_norm,
            mean,
            num_columns,
            scale,
            HAS_OFFSET=offset is not None,
            BLOCK=ROW_BLOCK,
            num_warps=8,
        )
    return log_norm, mean


def column_logsumexp(scores: Tensor, minus: Tensor | None, *, scale: float) -> Tensor:
    """logsumexp over the rows n of (scale * scores - minus_n).

    scores: (N, K), contiguous, N > 0. minus: (N,) float32, None for zero. Returns (K,) float32.
    """
    num_rows, num_columns = scores.shape
    result = torch.empty(num_columns, device=scores.device)
    _column_logsumexp[(triton.cdiv(num_columns, TILE_COLUMNS),)](
        scores,
        result if minus is None else minus,
        result,
        num_rows,
        num_columns,
        scale,
        HAS_MINUS=minus is not None,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        num_warps=4,
    )
    return result


def cross_entropy_in_place(
    scores: Tensor,
    teacher_scores: Tensor,
    offset: Tensor,
    *,
    log_norm: Tensor,
    teacher_log_norm: Tensor,
    shares: Tensor,
    weights: Tensor,
    scale: float,
    teacher_scale: float,
) -> Tensor:
    """Cross-entropies of the student's rows; their weighted sum's gradient by ``scores`` takes the place of ``scores``.

    Args:
        scores: (S, N, K) of the student, contiguous.
        teacher_scores: (V, N, K), contiguous.
        offset: (K,) float32 of the teacher.
        log_norm: (S, N) float32, logsumexp(scale * scores).
        teacher_log_norm: (V, N) float32, logsumexp(teacher_scale * teacher_scores + offset).
        shares: (S, V) float32: the target of view s is the sum over v of shares[s, v] times the teacher's softmax.
        weights: (S, N) float32.
        scale, teacher_scale: 1 / temperature.

    Returns:
        (S, N) float32, nats.
    """
    num_student, num_rows, num_columns = scores.shape
    result = torch.empty(num_student, num_rows, device=scores.device)
    if result.numel():
        _cross_entropy[(num_rows, num_student)](
            scores,
            teacher_scores,
            offset,
            log_norm.contiguous(),
            teacher_log_norm.contiguous(),
            shares,
            weights.contiguous(),
            result,
            num_rows,
            num_columns,
            scale,
            teacher_scale,
            VIEWS=teacher_scores.shape[0],
            BLOCK=ROW_BLOCK,
            num_warps=8,
        )
    return result


# Stands for minus infinity where there is no score: unlike it, it has differences.
_NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _row_statistics(scores, offset, log_norm, mean, num_columns, scale, HAS_OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    # One maximum for all lanes, which have a sum and a weighted sum each: one exponential a score.
    top = tl.full([], _NOTHING, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + lane
        inside = column < num_columns
        z = tl.load(scores + row * num_columns + column, mask=inside, other=0.0).to(tl.float32) * scale
        if HAS_OFFSET:
            z += tl.load(offset + column, mask=inside, other=0.0)
        z = tl.where(inside, z, _NOTHING)
        higher = tl.maximum(top, tl.max(z, axis=0))
        before, here = tl.exp(top - higher), tl.exp(z - higher)
        total = total * before + here
        weighted = weighted * before + here * z
        top = higher
    norm = tl.sum(total, axis=0)
    tl.store(log_norm + row, top + tl.log(norm))
    tl.store(mean + row, tl.sum(weighted, axis=0) / norm)


# The number of rows changes from step to step, and is not worth a compilation each time.
@triton.jit(do_not_specialize=["num_rows"])
def _column_logsumexp(
    scores,
    minus,
    result,
    num_rows,
    num_columns,
    scale,
    HAS_MINUS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.full((COLUMNS,), _NOTHING, tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
        z = tl.load(scores + place, mask=inside, other=0.0).to(tl.float32) * scale
        if HAS_MINUS:
            z -= tl.load(minus + row, mask=row < num_rows, other=0.0)[:, None]
        z = tl.where(inside, z, _NOTHING)
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher)[None, :] + tl.exp(z - higher[None, :])
        top = higher
    tl.store(result + column, top + tl.log(tl.sum(total, axis=0)), mask=column < num_columns)


@triton.jit(do_not_specialize=["num_rows"])
def _cross_entropy(
    scores,
    teacher_scores,
    offset,
    log_norm,
    teacher_log_norm,
    shares,
    weights,
    result,
    num_rows,
    num_columns,
    scale,
    teacher_scale,
    VIEWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, view = tl.program_id(0), tl.program_id(1)
    place = (view * num_rows + row).to(tl.int64)
    norm = tl.load(log_norm + place)
    weight = tl.load(weights + place) * scale
    lane = tl.arange(0, BLOCK)
    agreement = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + lane
        inside = column < num_columns
        shift = tl.load(offset + column, mask=inside, other=0.0)
        target = tl.zeros((BLOCK,), tl.float32)
        for teacher in tl.static_range(VIEWS):
            share = tl.load(shares + view * VIEWS + teacher)
            teacher_place = (teacher * num_rows + row).to(tl.int64)
            # Whole programs ask for this view or not, so that those that do not spare the reading.
            if share != 0.0:
                read = tl.load(teacher_scores + teacher_place * num_columns + column, mask=inside, other=0.0)
                z = read.to(tl.float32) * teacher_scale + shift
                target += share * tl.exp(z - tl.load(teacher_log_norm + teacher_place))
        s = tl.load(scores + place * num_columns + column, mask=inside, other=0.0).to(tl.float32) * scale
        agreement += tl.where(inside, target * s, 0.0)
        gradient = weight * (tl.exp(s - norm) - target)
        tl.store(scores + place * num_columns + column, gradient.to(scores.dtype.element_ty), mask=inside)
    tl.store(result + place, norm - tl.sum(agreement, axis=0))
