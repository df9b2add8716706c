"""A residual branch a few images at a time against the branch on everything."""

import pytest
import torch
from torch import nn

from braindino import pieces as module
from braindino.pieces import Piece, add_in_pieces, divide

GROUPS = [(3, 4), (5, 2)]  # 12 and 10 tokens
WIDTH = 6


def test_pieces_hold_whole_images_of_one_size_up_to_so_many_tokens(monkeypatch) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 8)
    assert divide(GROUPS, [1.5, 1.0]) == [
        Piece(slice(0, 8), (2, 4), 1.5),
        Piece(slice(8, 12), (1, 4), 1.5),
        Piece(slice(12, 20), (4, 2), 1.0),
        Piece(slice(20, 22), (1, 2), 1.0),
    ]
    monkeypatch.setattr(module, "PIECE_TOKENS", 1)
    assert [piece.group for piece in divide([(2, 4)], [1.0])] == [(1, 4), (1, 4)]


def branch_of(layer: nn.Linear):
    """Mixes the tokens of an image, so that a piece that cuts one would show."""

    def branch(tokens: torch.Tensor, piece: Piece) -> torch.Tensor:
        images = layer(tokens).unflatten(0, piece.group)
        return (images + images.mean(dim=1, keepdim=True)).tanh().flatten(0, 1)

    return branch


@pytest.mark.parametrize("some_rows", [False, True])
@pytest.mark.parametrize("frozen_bias", [False, True])
def test_values_and_gradients_are_those_of_the_branch_on_everything(
    monkeypatch, some_rows: bool, frozen_bias: bool
) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 8)
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH).double()
    layer.bias.requires_grad_(not frozen_bias)
    scales = [1.5, 1.25]
    kept = sum(batch * tokens for batch, tokens in GROUPS)
    x = torch.randn(kept + 5 * some_rows, WIDTH, dtype=torch.float64, requires_grad=True)
    rows = torch.randperm(len(x))[:kept] if some_rows else None
    found = add_in_pieces(x, branch_of(layer), list(layer.parameters()), divide(GROUPS, scales), rows=rows)

    where = torch.arange(kept) if rows is None else rows
    made, start = [], 0
    for group, scale in zip(GROUPS, scales, strict=True):
        end = start + group[0] * group[1]
        made.append(scale * branch_of(layer)(x[where[start:end]], Piece(slice(start, end), group, scale)))
        start = end
    expected = x.index_add(0, where, torch.cat(made))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    factor = torch.randn_like(x)
    for ours, plain in zip(
        torch.autograd.grad((found * factor).sum(), wanted),
        torch.autograd.grad((expected * factor).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_without_gradients_no_graph_is_made() -> None:
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(22, WIDTH)
    seen = []

    def branch(tokens: torch.Tensor, _piece: Piece) -> torch.Tensor:
        seen.append(torch.is_grad_enabled() or tokens.requires_grad)
        return layer(tokens)

    with torch.no_grad():
        found = add_in_pieces(x, branch, list(layer.parameters()), divide(GROUPS, [1.0, 1.0]), rows=None)
    torch.testing.assert_close(found, (x + layer(x)).detach())
    assert seen == [False] * 2 and not found.requires_grad
