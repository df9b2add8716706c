"""A residual branch of a transformer block on a GPU: x + scale * branch(norm(x)), of all tokens or of some.

The same function as the plain one of ``vision_transformer.Block``, arranged so that tokens are passed over as rarely as
can be (``token_kernels``). Weight and bias of the norm are folded into the linear map behind it, so that what lies
between is the normalised tokens alone: in half precision, kept once, and enough for the norm's backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from braindino.lean_linear import gradients_of_weights, plain_linear


class Rows(NamedTuple):
    """Some of T tokens."""

    rows: Tensor
    """(T',) which, no row twice."""
    place: Tensor | None
    """(T,) int32: where among them a token is, -1 for one that is not; None where no kernel asks."""
    scale: Tensor
    """(T',) float32, what their branch is multiplied by."""


def fold_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear map with the norm's weight and bias in it: (D', D) and (D',), in the precision of
    matrix products; computed in that of the parameters."""
    weight, bias = _FoldNorm.apply(linear.weight, linear.bias, norm.weight, norm.bias)
    return weight, bias


def fold_scale(linear: nn.Linear, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear map with LayerScale behind it: as :func:`fold_norm`."""
    weight, bias = _FoldScale.apply(linear.weight, linear.bias, gamma)
    return weight, bias


def add_branch_of_normed(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    *,
    subset: Rows | None,
    eps: float,
    recompute: bool,
) -> Tensor:
    """(T, D), a new tensor in the dtype of x.

    Args:
        x: packed tokens.
        branch: of the normalised tokens (T', D), in the precision of matrix products; draws no random number.
        parameters: all that the branch uses and that may want a gradient.
        subset: the tokens that have a branch; None for all.
        eps: of the norm.
        recompute: forget what is inside the branch and compute it again in the backward pass.
    """
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
    result: Tensor = _AddBranch.apply(x, branch, subset, eps, wanted, recompute, *parameters)
    return result


def normalize(x: Tensor, rows: Tensor | None, *, eps: float) -> Tensor:
    """Rows of x (T, D), normalised without weight and bias, in the precision of matrix products: (T', D).

    rows: (T',) which, no row twice; None for all.
    """
    result: Tensor = _Normalize.apply(x, rows, eps)
    return result


def turned_qkv(
    normed: Tensor, weight: Tensor, bias: Tensor, rope: Tensor, *, num_heads: int, sizes: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q and k, turned by their angles, and v, all views of one tensor; for each of the parts of the token axis, of
    these sizes, three of (size, heads, head_dim)."""
    flat = _TurnedQkv.apply(normed, weight, bias, rope, num_heads, tuple(sizes))
    return [flat[start : start + 3] for start in range(0, len(flat), 3)]


def product_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products of x are computed: autocast's precision where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _FoldNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, scale, shift)
        dtype = product_dtype(weight)
        # Autocast would round the product.
        with torch.autocast(weight.device.type, enabled=False):
            moved = torch.mv(weight, shift) if bias is None else torch.addmv(bias, weight, shift)
        return (weight * scale).to(dtype), moved.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_folded: Tensor, by_moved: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, shift = ctx.saved_tensors
        by_folded, by_moved = by_folded.to(weight.dtype), by_moved.to(weight.dtype)
        for_weight, for_bias, for_scale, for_shift = ctx.needs_input_grad
        return (
            (by_folded * scale).addr_(by_moved, shift) if for_weight else None,
            by_moved if for_bias else None,
            torch.linalg.vecdot(by_folded, weight, dim=0) if for_scale else None,
            torch.mv(weight.T, by_moved) if for_shift else None,
        )


class _FoldScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, bias, gamma)
        dtype = product_dtype(weight)
        return (weight * gamma[:, None]).to(dtype), (bias * gamma).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_folded: Tensor, by_bias: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, gamma = ctx.saved_tensors
        by_folded, by_bias = by_folded.to(weight.dtype), by_bias.to(weight.dtype)
        for_weight, for_bias, for_gamma = ctx.needs_input_grad
        return (
            by_folded * gamma[:, None] if for_weight else None,
            by_bias * gamma if for_bias else None,
            torch.linalg.vecdot(by_folded, weight, dim=1).addcmul_(by_bias, bias) if for_gamma else None,
        )


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        branch: Callable[[Tensor], Tensor],
        subset: Rows | None,
        eps: float,
        wanted: bool,
        recompute: bool,
        *parameters: Tensor,
    ) -> Tensor:
        from braindino.token_kernels import add_branch, normalize_rows

        rows, place, scale = subset or (None, None, None)
        dtype = product_dtype(x)
        normed, rstd = normalize_rows(x, rows, eps=eps, dtype=dtype)
        graph = wanted and not recompute
        with torch.set_grad_enabled(graph):
            made = branch(normed.requires_grad_(graph))
        if graph:
            # The edge keeps the graph of the branch, but not its output.
            ctx.graph = normed, rstd, get_gradient_edge(made)
        elif wanted:
            ctx.save_for_backward(x)
        ctx.subset, ctx.eps, ctx.branch, ctx.recompute = subset, eps, branch, recompute
        ctx.autocast = torch.is_autocast_enabled(x.device.type)
        ctx.dtype, ctx.made_dtype = dtype, made.dtype
        ctx.parameters = parameters
        return add_branch(x, made.detach(), place, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from braindino.token_kernels import gather_scaled, normalize_rows, normalize_rows_backward

        rows, place, scale = ctx.subset or (None, None, None)
        if ctx.recompute:
            (x,) = ctx.saved_tensors
            normed, rstd = normalize_rows(x, rows, eps=ctx.eps, dtype=ctx.dtype)
            device = gradient.device.type
            with torch.enable_grad(), torch.autocast(device, dtype=ctx.dtype, enabled=ctx.autocast):
                edge = get_gradient_edge(ctx.branch(normed.requires_grad_()))
        elif ctx.graph is None:
            raise RuntimeError("a fused branch can be differentiated once: its graph is gone")
        else:
            (normed, rstd, edge), ctx.graph = ctx.graph, None
        used = [parameter for parameter in ctx.parameters if parameter.requires_grad]
        of_made = gather_scaled(gradient, rows, scale, dtype=ctx.made_dtype)
        by_normed, *by_used = torch.autograd.grad([edge], [normed, *used], [of_made])
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = normalize_rows_backward(gradient, by_normed, normed.detach(), rstd, place, like=gradient)
        found = iter(by_used)
        return by_x, *[None] * 5, *(next(found) if parameter.requires_grad else None for parameter in ctx.parameters)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor | None, eps: float) -> Tensor:
        from braindino.token_kernels import normalize_rows

        normed, rstd = normalize_rows(x, rows, eps=eps, dtype=product_dtype(x))
        ctx.save_for_backward(normed, rstd, rows)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from braindino.token_kernels import normalize_rows_backward

        normed, rstd, rows = ctx.saved_tensors
        like = gradient.new_empty(ctx.shape, dtype=ctx.dtype)
        place = None
        if rows is not None:
            place = torch.full(ctx.shape[:1], -1, dtype=torch.int32, device=rows.device)
            place[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        return normalize_rows_backward(None, gradient, normed, rstd, place, like=like), None, None


class _TurnedQkv(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        normed: Tensor,
        weight: Tensor,
        bias: Tensor,
        rope: Tensor,
        num_heads: int,
        sizes: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        from braindino.token_kernels import rotate_in_place

        qkv = plain_linear(normed, weight, bias).unflatten(-1, (3, num_heads, -1))
        rotate_in_place(qkv, rope)
        ctx.save_for_backward(normed, weight, rope)
        ctx.sizes = sizes
        return tuple(part[:, index] for part in qkv.split(sizes) for index in range(3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from braindino.token_kernels import join_turned_back

        normed, weight, rope = ctx.saved_tensors
        heads, head_dim = gradients[0].shape[1:]
        joined = gradients[0].new_empty(len(normed), 3, heads, head_dim)
        start = 0
        for number, size in enumerate(ctx.sizes):
            of_part = gradients[3 * number : 3 * number + 3]
            join_turned_back(*of_part, rope[:, start : start + size], joined[start : start + size])
            start += size
        joined = joined.flatten(1)
        by_weight, by_bias = gradients_of_weights(ctx.needs_input_grad[1:3], joined, normed, weight)
        by_normed = None
        if ctx.needs_input_grad[0]:
            by_normed = plain_linear(joined, weight.to(joined.dtype).T, None).to(normed.dtype)
        return by_normed, by_weight, by_bias, None, None, None
