"""A residual branch of a transformer block on a GPU: x + scale * branch(norm(x)), of all tokens or of some.

The same function as the plain one of ``vision_transformer.Block``, arranged so that tokens are passed over as rarely as
can be (``token_kernels``). Weight and bias of the norm are folded into the linear map behind it, so that what lies
between is the normalised tokens alone: in half precision, kept once, and enough for the norm's backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from braindino.lean_linear import gradients_of_weights, plain_linear, product_dtype


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


class Following(NamedTuple):
    """The branch after this one."""

    subset: Rows | None
    """Of which tokens it is; None for all."""
    eps: float
    """Of its norm."""


def add_branch(
    x: Tensor,
    normed: Tensor,
    branch: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    *,
    subset: Rows | None,
    eps: float,
    following: Following | None,
    recompute: bool,
) -> tuple[Tensor, Tensor | None]:
    """The sum (T, D), a new tensor in the dtype of x, and of it the normalised tokens that the following branch sees.

    Args:
        x: packed tokens.
        normed: (T', D) those of them that the branch sees, normalised: :func:`normalize`, or what came before.
        branch: of the normalised tokens, in the precision of matrix products; draws no random number.
        parameters: all that the branch uses and that may want a gradient.
        subset: the tokens that have a branch; None for all.
        eps: of the norm before the branch.
        following: the branch that comes next; None to make nothing for it.
        recompute: forget what is inside the branch and compute it again in the backward pass.
    """
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, normed, *parameters))
    made = _AddBranch.apply(x, normed, branch, subset, eps, following, wanted, recompute, *parameters)
    return (made, None) if following is None else made


def normalize(x: Tensor, rows: Tensor | None, *, eps: float) -> Tensor:
    """Rows of x (T, D), normalised without weight and bias, in the precision of matrix products: (T', D).

    rows: (T',) which, no row twice; None for all.
    """
    result: Tensor = _Normalize.apply(x, rows, eps)
    return result


def turned_qkv(
    normed: Tensor, weight: Tensor, bias: Tensor, rope: Tensor, *, num_heads: int, groups: Sequence[tuple[int, int]]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q and k, turned by their angles, and v, all views of one tensor: for each of the groups (batch, tokens), which
    follow each other on the token axis, three of (batch, heads, tokens, head_dim)."""
    flat = _TurnedQkv.apply(normed, weight, bias, rope, num_heads, tuple(groups))
    return [flat[start : start + 3] for start in range(0, len(flat), 3)]


def mlp_of_normed(normed: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Linear, GELU, linear of (T, D); each map a weight and a bias."""
    result: Tensor = _Mlp.apply(normed, *first, *second)
    return result


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
    """What comes back through the following norm is added here, in the pass that gathers the gradient of the branch."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        normed: Tensor,
        branch: Callable[[Tensor], Tensor],
        subset: Rows | None,
        eps: float,
        following: Following | None,
        wanted: bool,
        recompute: bool,
        *parameters: Tensor,
    ) -> Any:
        from braindino.token_kernels import add_and_normalize

        graph = wanted and not recompute
        seen = normed.detach().requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            made = branch(seen)
        result, following_normed, rstd = add_and_normalize(
            x,
            made.detach(),
            _branch(subset, x),
            None if following is None else _branch(following.subset, x),
            eps=0.0 if following is None else following.eps,
            dtype=normed.dtype,
        )
        ctx.graph = None
        if graph:
            # The edge keeps the graph of the branch, but not its output.
            ctx.graph = seen, get_gradient_edge(made)
            ctx.save_for_backward(following_normed, rstd)
        elif wanted:
            ctx.save_for_backward(x, result)
        ctx.branch, ctx.subset, ctx.eps, ctx.following, ctx.recompute = branch, subset, eps, following, recompute
        ctx.autocast = torch.is_autocast_enabled(x.device.type)
        ctx.dtype, ctx.made_dtype = normed.dtype, made.dtype
        ctx.parameters = parameters
        return result if following is None else (result, following_normed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, by_following: Tensor | None = None) -> tuple[Tensor | None, ...]:
        from braindino.token_kernels import add_and_normalize_backward, normalize_rows

        following = ctx.following
        if ctx.recompute:
            x, result = ctx.saved_tensors
            seen, _ = normalize_rows(x, ctx.subset and ctx.subset.rows, eps=ctx.eps, dtype=ctx.dtype)
            with torch.enable_grad(), torch.autocast(gradient.device.type, dtype=ctx.dtype, enabled=ctx.autocast):
                edge = get_gradient_edge(ctx.branch(seen.requires_grad_()))
            following_normed = rstd = None
            if following is not None:
                rows = following.subset and following.subset.rows
                following_normed, rstd = normalize_rows(result, rows, eps=following.eps, dtype=ctx.dtype)
        elif ctx.graph is None:
            raise RuntimeError("a fused branch can be differentiated once: its graph is gone")
        else:
            following_normed, rstd = ctx.saved_tensors
            (seen, edge), ctx.graph = ctx.graph, None
        by_x, by_made = add_and_normalize_backward(
            gradient,
            by_following,
            following_normed,
            rstd,
            _branch(ctx.subset, gradient),
            None if following is None else _branch(following.subset, gradient),
            dtype=ctx.made_dtype,
        )
        used = [parameter for parameter in ctx.parameters if parameter.requires_grad]
        by_normed, *by_used = torch.autograd.grad([edge], [seen, *used], [by_made])
        found = iter(by_used)
        return (
            by_x,
            by_normed,
            *[None] * 6,
            *(next(found) if parameter.requires_grad else None for parameter in ctx.parameters),
        )


def _branch(subset: Rows | None, x: Tensor) -> Any:
    from braindino.token_kernels import Branch

    return Branch(len(x), None) if subset is None else Branch(len(subset.rows), subset.place, subset.scale)


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
        return normalize_rows_backward(gradient, normed, rstd, place, like=like), None, None


class _TurnedQkv(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        normed: Tensor,
        weight: Tensor,
        bias: Tensor,
        rope: Tensor,
        num_heads: int,
        groups: tuple[tuple[int, int], ...],
    ) -> tuple[Tensor, ...]:
        from braindino.token_kernels import rotate_in_place

        qkv = plain_linear(normed, weight, bias).unflatten(-1, (3, num_heads, -1))
        rotate_in_place(qkv, rope)
        ctx.save_for_backward(normed, weight, rope)
        ctx.groups, ctx.num_heads = groups, num_heads
        parts = qkv.split([batch * tokens for batch, tokens in groups])
        return tuple(
            part[:, index].unflatten(0, group).transpose(1, 2)
            for part, group in zip(parts, groups, strict=True)
            for index in range(3)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from braindino.token_kernels import join_turned_back

        normed, weight, rope = ctx.saved_tensors
        joined = gradients[0].new_empty(len(normed), 3, ctx.num_heads, gradients[0].shape[-1])
        start = 0
        for number, (batch, tokens) in enumerate(ctx.groups):
            stop = start + batch * tokens
            by_q, by_k, by_v = gradients[3 * number : 3 * number + 3]
            join_turned_back(by_q, by_k, by_v, rope[:, start:stop], joined[start:stop])
            start = stop
        joined = joined.flatten(1)
        by_weight, by_bias = gradients_of_weights(ctx.needs_input_grad[1:3], joined, normed, weight)
        by_normed = None
        if ctx.needs_input_grad[0]:
            by_normed = plain_linear(joined, weight.to(joined.dtype).T, None).to(normed.dtype)
        return by_normed, by_weight, by_bias, None, None, None


class _Mlp(torch.autograd.Function):
    """Keeps what goes into the GELU; what comes out is computed again, together with its gradient and the sums that the
    first bias wants."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, normed: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
    ) -> Tensor:
        hidden = plain_linear(normed, weight1, bias1)
        ctx.save_for_backward(normed, hidden, weight1, weight2)
        return plain_linear(F.gelu(hidden), weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from braindino.token_kernels import gelu_and_gradient

        normed, hidden, weight1, weight2 = ctx.saved_tensors
        for_normed, for_weight1, for_bias1, for_weight2, for_bias2 = ctx.needs_input_grad
        by_activated = plain_linear(gradient, weight2.to(gradient.dtype).T, None)
        activated, by_hidden, sums = gelu_and_gradient(hidden, by_activated)
        by_weight2, by_bias2 = gradients_of_weights((for_weight2, for_bias2), gradient, activated, weight2)
        by_weight1, _ = gradients_of_weights((for_weight1, False), by_hidden, normed, weight1)
        by_normed = None
        if for_normed:
            by_normed = plain_linear(by_hidden, weight1.to(by_hidden.dtype).T, None).to(normed.dtype)
        by_bias1 = sums.sum(dim=0).to(weight1.dtype) if for_bias1 else None
        return by_normed, by_weight1, by_bias1, by_weight2, by_bias2
