"""Lean linear maps against the plain functions: values, gradients, and what autograd keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braindino.lean_linear import gelu_linear, norm_linear
from braindino.lean_linear import linear as lean_linear

ROWS, WIDTH, OUT = 7, 12, 5


def parts(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, nn.LayerNorm, nn.Linear]:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(WIDTH).to(dtype), nn.Linear(WIDTH, OUT).to(dtype)
    with torch.no_grad():
        norm.weight.add_(torch.randn(WIDTH, dtype=dtype))
        norm.bias.add_(torch.randn(WIDTH, dtype=dtype))
    return torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True), norm, linear


def compare(found: torch.Tensor, expected: torch.Tensor, leaves: list[torch.Tensor], tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    factor = torch.randn_like(expected)
    for ours, plain in zip(
        torch.autograd.grad((found * factor).sum(), leaves),
        torch.autograd.grad((expected * factor).sum(), leaves),
        strict=True,
    ):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_functions(with_bias: bool) -> None:
    x, norm, linear = parts()
    bias = linear.bias if with_bias else None
    own = [x, linear.weight, *([linear.bias] if with_bias else [])]
    compare(
        norm_linear(x, norm, linear.weight, bias),
        F.linear(norm(x), linear.weight, bias),
        [*own, norm.weight, norm.bias],
        1e-12,
    )
    compare(gelu_linear(x, linear.weight, bias), F.linear(F.gelu(x), linear.weight, bias), own, 1e-12)
    compare(lean_linear(x, linear.weight, bias), F.linear(x, linear.weight, bias), own, 1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
def test_float32_products_agree_with_torchs_whichever_library_makes_them(with_bias: bool) -> None:
    x, norm, linear = parts(torch.float32)
    bias = linear.bias if with_bias else None
    own = [x, linear.weight, *([linear.bias] if with_bias else [])]
    compare(lean_linear(x, linear.weight, bias), F.linear(x, linear.weight, bias), own, 1e-5)
    compare(norm_linear(x, norm, linear.weight, bias), F.linear(norm(x), linear.weight, bias), own, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(lean_linear(x, linear.weight, bias), F.linear(x, linear.weight, bias))
    strided = torch.randn(OUT, ROWS).T
    torch.testing.assert_close(lean_linear(strided, linear.weight.T), strided @ linear.weight)


def test_autocast_gives_half_precision_products_and_full_precision_gradients() -> None:
    x, norm, linear = parts(torch.float32)
    leaves = [x, norm.weight, norm.bias, linear.weight, linear.bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = norm_linear(x, norm, linear.weight, linear.bias), linear(norm(x))
        assert found.dtype == expected.dtype == torch.bfloat16
    compare(found, expected, leaves, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = gelu_linear(x, linear.weight, linear.bias), linear(F.gelu(x))
    compare(found, expected, [x, linear.weight, linear.bias], 0.05)


def test_frozen_weights_still_let_gradients_through() -> None:
    x, norm, linear = parts()
    norm.requires_grad_(False)
    linear.requires_grad_(False)
    compare(norm_linear(x, norm, linear.weight, linear.bias), linear(norm(x)), [x], 1e-12)
    compare(gelu_linear(x, linear.weight, linear.bias), linear(F.gelu(x)), [x], 1e-12)


def test_the_output_of_the_norm_and_of_the_gelu_is_not_kept() -> None:
    x, norm, linear = parts()
    kept: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        norm_linear(x, norm, linear.weight, linear.bias)
        assert kept.count((ROWS, WIDTH)) == 1
        kept.clear()
        gelu_linear(x, linear.weight, linear.bias)
        assert kept.count((ROWS, WIDTH)) == 1
