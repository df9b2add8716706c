"""Prototype scores turned into the loss without ever holding them all (paper sec. 4.2, Eq. 1-2).

With 65,536 prototypes the scores of one batch are the largest tensors of a training step: 5 GB for the masked patches
of 256 slices in float32, several times over for softmax, targets and gradients. Here the last linear map of both heads,
the centring of the teacher and the cross-entropy are one function. It goes through the rows in pieces, and forms the
gradient in the forward pass, while the scores of a piece are still there:

    logits of a piece = features @ prototypes.T        student and teacher
    q = softmax(teacher logits / T_t + offset)         the teacher's centred distribution
    loss += w (logsumexp(s) - q . s),  s = student logits / T_s
    gradient of the student's logits = w (softmax(s) - q) / T_s      then two matrix products and the piece is dropped

All centring is in ``offset``, a vector over the prototypes: Sinkhorn-Knopp's scaling of the columns (the scaling of the
rows is the softmax), or minus a moving average of the teacher's logits. ``losses`` states the same formulas plainly;
the two agree to 1e-5 in value and gradient (tests/pretrain/test_prototypes.py).
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from braindino.lean_linear import linear, product_dtype
from braindino.own_kernels import own_kernels

# Scores of one piece, student's and teacher's together: the products of a piece must fill the device, and each reads
# all prototypes anew.
PIECE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}

# What is made of the scores is made of a strip of a piece at a time: on a CPU of what its cache holds.
STRIP_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}

# Scores of all rows in the precision of the products, held while the teacher is centred and nothing else is.
KEPT_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}

AllReduce = Callable[[Tensor], Tensor]


class Teacher(NamedTuple):
    """What the teacher's distributions are made from.

    Attributes:
        features: (V, N, b) unit vectors in the bottleneck, V views of N rows.
        prototypes: (K, b).
        offset: (K,) float32, added to ``features @ prototypes.T / temperature`` before the softmax.
        temperature: of the softmax.
    """

    features: Tensor
    prototypes: Tensor
    offset: Tensor
    temperature: float


class PrototypeLoss(NamedTuple):
    """
    Attributes:
        loss: sum over the student's rows of weight times cross-entropy, nats; differentiable.
        rows: (S, N) cross-entropy of each row, nats, detached.
        entropy: (V, N) of the teacher's distributions, nats.
        usage: (K,) mean of the teacher's distributions over all V * N rows; None where it was not asked for.
    """

    loss: Tensor
    rows: Tensor
    entropy: Tensor
    usage: Tensor | None


@torch.no_grad()
def sinkhorn_offset(
    features: Tensor,
    prototypes: Tensor,
    *,
    temperature: float,
    iterations: int = 3,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """(K,) float32: log of Sinkhorn-Knopp's scaling of the prototypes, so that the rows use all of them evenly.

    Args:
        features: (N, b) of all rows that are centred together.
        prototypes: (K, b).
        temperature: of the teacher.
        iterations: of scaling columns, then rows.
        all_reduce: log-sum-exp of its argument over all processes; None for one process.
    """
    # Sinkhorn's column scaling r is exp(offset), see losses.sinkhorn_knopp. A softmax over the prototypes scales the
    # rows; the columns of its result then say by how much r falls short. From the second iteration on no column
    # vanishes: after the first, z = logits + offset has exp(z) summing to 1 over each column, so that every column has
    # an exp(z) of 1 / N or more and no row sums to more than K.
    offset: Tensor | None = None
    weight = _as_computed(prototypes)
    # Nothing of the student is held yet, so there is room to keep the products of the first iteration for the others.
    room = KEPT_BYTES.get(features.device.type, 0)
    keep = iterations > 1 and weight.element_size() * len(features) * len(prototypes) <= room
    kept: dict[int, Tensor] = {}
    for _ in range(iterations):
        total = torch.full((len(prototypes),), -torch.inf, device=features.device)
        for piece in _pieces(len(features), len(prototypes) * weight.element_size(), features.device):
            products = kept[piece.start] if piece.start in kept else linear(features[piece].to(weight.dtype), weight)
            if keep:
                kept[piece.start] = products
            total = torch.logaddexp(total, _column_sums(products, offset, temperature))
        offset = -(all_reduce(total) if all_reduce is not None else total)
    assert offset is not None, "one iteration or more"
    return offset


def _column_sums(products: Tensor, offset: Tensor | None, temperature: float) -> Tensor:
    """(K,) logarithms of the sums over the rows (N, K) of exp(products / temperature), the rows scaled to sum to 1
    together with the offset; without one they are not scaled."""
    if own_kernels(products):
        from braindino.pretrain.prototype_kernels import column_logsumexp, row_statistics

        norms = None if offset is None else row_statistics(products, offset, scale=1 / temperature)[0]
        return column_logsumexp(products, norms, scale=1 / temperature)
    num_rows, num_prototypes = products.shape
    total = torch.zeros(num_prototypes, device=products.device)
    if offset is None:
        for columns in _strips(num_prototypes, num_rows, products.device):
            total[columns] = torch.logsumexp(products[:, columns].float() / temperature, dim=0)
        return total
    for strip in _strips(num_rows, num_prototypes, products.device):
        logits = torch.add(offset, products[strip].float(), alpha=1 / temperature)
        total += torch.softmax(logits, dim=1).sum(dim=0)
    return total.log() - offset


@torch.no_grad()
def mean_logits(features: Tensor, prototypes: Tensor) -> Tensor:
    """(K,) float32 mean over the rows (N, b) of ``features @ prototypes.T``: what a moving centre averages."""
    return prototypes.float() @ features.float().mean(dim=0)


def prototype_loss(
    student: Tensor,
    prototypes: Tensor,
    teacher: Teacher,
    *,
    targets: tuple[tuple[float, ...], ...],
    weights: Tensor,
    temperature: float,
    with_usage: bool = True,
) -> PrototypeLoss:
    """Cross-entropy between the teacher's distributions and the student's.

    Args:
        student: (S, N, b) unit vectors in the bottleneck.
        prototypes: (K, b) of the student.
        teacher: of the same N rows, V views of them.
        targets: S rows of V shares: what mixture of the teacher's views each of the student's is compared with.
            Neighbours with equal shares are computed together.
        weights: (S, N) weight of each row in the loss.
        temperature: of the student.
        with_usage: whether ``usage`` is wanted.
    """
    usage = torch.zeros(len(prototypes), device=student.device) if with_usage else None
    loss, rows, entropy = _PrototypeLoss.apply(student, prototypes, teacher, targets, weights, temperature, usage)
    return PrototypeLoss(loss, rows, entropy, usage)


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, prototypes, teacher, targets, weights, temperature, usage):  # noqa: PLR0917
        features = teacher.features
        with torch.no_grad():
            num_rows, num_prototypes = student.shape[1], len(prototypes)
            weight, teacher_weight = _as_computed(prototypes), _as_computed(teacher.prototypes)
            wanted = student.requires_grad or prototypes.requires_grad
            student_gradient = torch.zeros(student.shape, device=student.device)
            weight_gradient = torch.zeros(prototypes.shape, device=student.device) if wanted else None
            rows = torch.empty(student.shape[:2], device=student.device)
            entropy = torch.empty(features.shape[:2], device=student.device)
            per_row = num_prototypes * (len(student) + len(features))
            for piece in _pieces(num_rows, per_row * weight.element_size(), student.device):
                scores = _products(student[:, piece], weight)
                teacher_scores = _products(features[:, piece], teacher_weight)
                compare = _compare_in_kernels if own_kernels(student) else _compare_in_strips
                rows[:, piece], entropy[:, piece] = compare(
                    scores, teacher_scores, teacher, targets, weights[:, piece], temperature, usage
                )
                if weight_gradient is None:
                    continue
                student_gradient[:, piece] = (scores @ weight).float()
                flat, seen = scores.flatten(0, 1), student[:, piece].flatten(0, 1).to(weight.dtype)
                if weight.dtype == torch.float32:
                    weight_gradient.addmm_(flat.T, seen)
                else:
                    weight_gradient += flat.T @ seen
            if usage is not None:
                usage /= features.shape[0] * num_rows
            loss = (rows * weights).sum()
        ctx.save_for_backward(student_gradient, weight_gradient)
        ctx.dtypes = student.dtype, prototypes.dtype
        ctx.mark_non_differentiable(rows, entropy)
        return loss, rows, entropy

    @staticmethod
    def backward(ctx, gradient, *_):
        student_gradient, weight_gradient = ctx.saved_tensors
        student_dtype, weight_dtype = ctx.dtypes
        return (
            (student_gradient * gradient).to(student_dtype),
            (weight_gradient * gradient).to(weight_dtype),
            *[None] * 5,
        )


def _compare_in_strips(  # noqa: PLR0917
    scores: Tensor,
    teacher_scores: Tensor,
    teacher: Teacher,
    targets: tuple[tuple[float, ...], ...],
    weights: Tensor,
    temperature: float,
    usage: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies (S, n) of some rows and the teacher's entropies (V, n). ``scores`` (S, n, K) become the gradient
    of the weighted sum, and the teacher's distributions are added to ``usage``, if there is one."""
    num_student, num_rows, num_prototypes = scores.shape
    rows = torch.empty(num_student, num_rows, device=scores.device)
    entropy = torch.empty(len(teacher_scores), num_rows, device=scores.device)
    for here in _strips(num_rows, num_prototypes * (num_student + len(teacher_scores)), scores.device):
        z = torch.add(teacher.offset, teacher_scores[:, here].float(), alpha=1 / teacher.temperature)
        log_norm = torch.logsumexp(z, dim=-1, keepdim=True)
        # Entropy of softmax(z): logsumexp(z) - sum p z.
        p = torch.exp(z - log_norm)
        entropy[:, here] = log_norm[..., 0] - torch.linalg.vecdot(p, z)
        if usage is not None:
            usage += p.sum(dim=(0, 1))
        for group, shares in _groups(targets):
            target = _mixture(p, shares)
            s = scores[group, here].float() / temperature
            norm = torch.logsumexp(s, dim=-1, keepdim=True)
            rows[group, here] = norm[..., 0] - torch.linalg.vecdot(s, target.expand_as(s))
            # The scores are not read again: the gradient of the logits takes their place.
            gradient = s.sub_(norm).exp_().sub_(target).mul_(weights[group, here, None] / temperature)
            scores[group, here] = gradient
    return rows, entropy


def _compare_in_kernels(  # noqa: PLR0917
    scores: Tensor,
    teacher_scores: Tensor,
    teacher: Teacher,
    targets: tuple[tuple[float, ...], ...],
    weights: Tensor,
    temperature: float,
    usage: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`_compare_in_strips`, on a GPU."""
    from braindino.pretrain.prototype_kernels import column_logsumexp, cross_entropy_in_place, row_statistics

    views, scale = teacher_scores.shape[:2], 1 / teacher.temperature
    flat = teacher_scores.flatten(0, 1)
    teacher_norm, mean = row_statistics(flat, teacher.offset, scale=scale)
    if usage is not None:
        usage += torch.exp(column_logsumexp(flat, teacher_norm, scale=scale) + teacher.offset)
    norm, _ = row_statistics(scores.flatten(0, 1), None, scale=1 / temperature)
    rows = cross_entropy_in_place(
        scores,
        teacher_scores,
        teacher.offset,
        log_norm=norm.unflatten(0, scores.shape[:2]),
        teacher_log_norm=teacher_norm.unflatten(0, views),
        shares=_shares_on(scores.device, targets),
        weights=weights,
        scale=1 / temperature,
        teacher_scale=scale,
    )
    return rows, (teacher_norm - mean).unflatten(0, views)


@functools.lru_cache(maxsize=32)
def _shares_on(device: torch.device, targets: tuple[tuple[float, ...], ...]) -> Tensor:
    """(S, V); kept, since a copy to the device at every step would have the host wait."""
    return torch.tensor(targets, dtype=torch.float32, device=device)


def _products(features: Tensor, weight: Tensor) -> Tensor:
    """(..., K) of (..., b) and the prototypes (K, b)."""
    return linear(features.to(weight.dtype).flatten(0, -2), weight).unflatten(0, features.shape[:-1])


def _as_computed(prototypes: Tensor) -> Tensor:
    """The prototypes in the precision of matrix products: autocast does not reach into an autograd function."""
    return prototypes.detach().to(product_dtype(prototypes))


def _pieces(num_rows: int, bytes_per_row: int, device: torch.device) -> Iterator[slice]:
    """Slices of the rows, of equal size, each with scores of at most PIECE_BYTES."""
    most = max(1, PIECE_BYTES.get(device.type, PIECE_BYTES["cpu"]) // bytes_per_row)
    count = max(1, -(-num_rows // most))
    size = max(1, -(-num_rows // count))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _strips(length: int, per_row: int, device: torch.device) -> Iterator[slice]:
    """Slices of so many rows (or columns), each with scores of about STRIP_BYTES."""
    size = max(1, STRIP_BYTES.get(device.type, STRIP_BYTES["cpu"]) // (4 * per_row))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _groups(targets: tuple[tuple[float, ...], ...]) -> Iterator[tuple[slice, tuple[float, ...]]]:
    """Runs of student views that are compared with the same mixture."""
    start = 0
    for end in range(1, len(targets) + 1):
        if end == len(targets) or targets[end] != targets[start]:
            yield slice(start, end), targets[start]
            start = end


def _mixture(p: Tensor, shares: tuple[float, ...]) -> Tensor:
    """(n, K) from (V, n, K)."""
    used = [(view, share) for view, share in enumerate(shares) if share]
    first, share = used[0]
    result = p[first] if share == 1 else p[first] * share
    for view, share in used[1:]:
        result = torch.add(result, p[view], alpha=share)
    return result
