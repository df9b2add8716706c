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
    """Weight and bias of the linear map with the norm's weight and bias in it: (D', D) and (D',)."""
    bias = (linear.weight * norm.bias).sum(dim=1)
    return linear.weight * norm.weight, bias if linear.bias is None else bias + linear.bias


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
    normed: Tensor, weight: Tensor, bias: Tensor | None, rope: Tensor, *, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, turned by their angles, and v, (T, heads, head_dim) each: three views of one tensor."""
    q, k, v = _TurnedQkv.apply(normed, weight, bias, rope, num_heads)
    return q, k, v


def product_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products of x are computed: autocast's precision where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


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
        ctx: Any, normed: Tensor, weight: Tensor, bias: Tensor | None, rope: Tensor, num_heads: int
    ) -> tuple[Tensor, ...]:
        from braindino.token_kernels import rotate_in_place

        qkv = plain_linear(normed, weight, bias).unflatten(-1, (3, num_heads, -1))
        rotate_in_place(qkv, rope)
        ctx.save_for_backward(normed, weight, rope)
        return qkv[:, 0], qkv[:, 1], qkv[:, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from braindino.token_kernels import join_turned_back

        normed, weight, rope = ctx.saved_tensors
        joined = join_turned_back(*gradients, rope).flatten(1)
        by_weight, by_bias = gradients_of_weights(ctx.needs_input_grad[1:3], joined, normed, weight)
        by_normed = None
        if ctx.needs_input_grad[0]:
            by_normed = plain_linear(joined, weight.to(joined.dtype).T, None).to(normed.dtype)
        return by_normed, by_weight, by_bias, None, None
