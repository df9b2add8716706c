"""Residual branches of a transformer block, a few images at a time.

On a CPU what a branch makes between its input and its output, up to four times the tokens, is too large for the caches
and comes from fresh pages of the system, which cost more than the arithmetic on them. For a thousand or two of tokens
it stays in the cache, in memory that the piece before has left. The result is that of all images at once; gradients of
parameters are summed in another order. On a GPU large launches are what is wanted, and nothing is divided.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

PIECE_TOKENS = 2048


class Piece(NamedTuple):
    """Whole images of one size."""

    rows: slice
    """Their tokens on the packed axis."""
    group: tuple[int, int]
    """(images, tokens of each)."""
    scale: float
    """What the branch is multiplied by."""


def divide(groups: Sequence[tuple[int, int]], scales: Sequence[float]) -> list[Piece]:
    """Pieces of about PIECE_TOKENS tokens, at least one image each, of the groups (batch, tokens) in their order.

    scales: of each group, what a branch is multiplied by.
    """
    pieces = []
    start = 0
    for (batch, tokens), scale in zip(groups, scales, strict=True):
        most = max(1, PIECE_TOKENS // tokens)
        for first in range(0, batch, most):
            images = min(most, batch - first)
            pieces.append(Piece(slice(start, start + images * tokens), (images, tokens), scale))
            start += images * tokens
    return pieces


def add_in_pieces(
    x: Tensor,
    branch: Callable[[Tensor, Piece], Tensor],
    parameters: Sequence[Tensor],
    pieces: Sequence[Piece],
    *,
    rows: Tensor | None,
) -> Tensor:
    """``x + scale * branch(x)``, (T, D), or with ``rows`` (T_kept,) those rows of x in place of all.

    Args:
        x: packed tokens.
        branch: of the tokens of a piece and the piece; draws no random number.
        parameters: all that the branch uses and that may want a gradient.
        pieces: of all T, or of the T_kept rows.
        rows: no row twice.
    """
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
    return _AddInPieces.apply(x, branch, pieces, rows, wanted, *parameters)


class _AddInPieces(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        branch: Callable[[Tensor, Piece], Tensor],
        pieces: Sequence[Piece],
        rows: Tensor | None,
        wanted: bool,
        *parameters: Tensor,
    ) -> Tensor:
        result = x.clone()
        graphs = []
        for piece in pieces:
            seen = (x[piece.rows] if rows is None else x[rows[piece.rows]]).detach()
            with torch.set_grad_enabled(wanted):
                made = branch(seen.requires_grad_(wanted), piece)
            if wanted:
                # The edge keeps the graph of the piece, but not its output.
                graphs.append((seen, get_gradient_edge(made), made.dtype))
            made = made.detach().to(x.dtype)
            if rows is None:
                result[piece.rows].add_(made, alpha=piece.scale)
            else:
                result.index_add_(0, rows[piece.rows], made, alpha=piece.scale)
        ctx.pieces, ctx.rows, ctx.graphs = pieces, rows, graphs
        ctx.parameters = parameters
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.graphs:
            raise RuntimeError("a block that works in pieces can be differentiated once: its graph is gone")
        rows = ctx.rows
        by_x = gradient.clone()
        used = [parameter for parameter in ctx.parameters if parameter.requires_grad]
        sums: list[Tensor] = []
        for piece in reversed(ctx.pieces):
            seen, edge, dtype = ctx.graphs.pop()
            of_piece = gradient[piece.rows] if rows is None else gradient[rows[piece.rows]]
            if piece.scale != 1:
                of_piece = of_piece * piece.scale
            by_seen, *by_used = torch.autograd.grad([edge], [seen, *used], [of_piece.to(dtype)])
            if rows is None:
                by_x[piece.rows] += by_seen
            else:
                by_x.index_add_(0, rows[piece.rows], by_seen)
            if sums:
                torch._foreach_add_(sums, by_used)
            else:
                sums = list(by_used)
        found = iter(sums)
        return by_x, *[None] * 4, *(next(found) if parameter.requires_grad else None for parameter in ctx.parameters)
