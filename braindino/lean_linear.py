"""Linear maps behind a layer norm or a GELU that keep less for the backward pass.

Autograd keeps the input of the norm (or GELU) and its output, the input of the linear map. The output is cheap to
compute again from the input, and in a transformer block these outputs, 6 of 19 values per feature, are the largest part
that can be spared: so here only the input is kept. Values and gradients are those of the plain functions; a matrix
product is never done twice, which is what activation checkpointing does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products of x are computed: autocast's precision where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of rows x (T, D)."""
    if not torch.is_grad_enabled():
        return plain_linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def norm_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(norm(x), weight, bias)`` of rows x (T, D)."""
    if not torch.is_grad_enabled():
        return plain_linear(norm(x), weight, bias)
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(F.gelu(x), weight, bias)`` of rows x (T, D)."""
    if not torch.is_grad_enabled():
        return plain_linear(F.gelu(x), weight, bias)
    return _GeluLinear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        return plain_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_weight, by_bias = gradients_of_weights(ctx.needs_input_grad[1:], gradient, x, weight)
        outer = None
        if ctx.needs_input_grad[0]:
            outer = plain_linear(gradient, weight.to(gradient.dtype).T, None).to(x.dtype)
        return outer, by_weight, by_bias


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, scale.shape, scale, shift, eps)
        ctx.save_for_backward(x, mean, rstd, scale, shift, weight)
        ctx.eps = eps
        return plain_linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift, weight = ctx.saved_tensors
        normed = torch.native_layer_norm(x, scale.shape, scale, shift, ctx.eps)[0]
        by_weight, by_bias = gradients_of_weights(ctx.needs_input_grad[4:], gradient, normed, weight)
        outer = plain_linear(gradient, weight.to(gradient.dtype).T, None).to(x.dtype)
        inner = torch.ops.aten.native_layer_norm_backward(
            outer, x, scale.shape, mean, rstd, scale, shift, list(ctx.needs_input_grad[:3])
        )
        return *inner, None, by_weight, by_bias


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        return plain_linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_weight, by_bias = gradients_of_weights(ctx.needs_input_grad[1:], gradient, F.gelu(x), weight)
        outer = None
        if ctx.needs_input_grad[0]:
            by_activated = plain_linear(gradient, weight.to(gradient.dtype).T, None).to(x.dtype)
            outer = torch.ops.aten.gelu_backward(by_activated, x)
        return outer, by_weight, by_bias


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``. In float32 on a CPU torch gives it to MKL, which on AMD's processors takes a quarter longer than
    oneDNN, the library that torch's compiler and its half-precision products use (benchmarks/RESULTS.md)."""
    in_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    # The compiler chooses for itself.
    if _ONEDNN and x.device.type == "cpu" and in_float32 and not torch.compiler.is_compiling():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def gradients_of_weights(
    needed: tuple[bool, ...], gradient: Tensor, seen: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias of a linear map that has seen ``seen``; the product in the precision of the forward
    pass, as autocast does it."""
    for_weight, for_bias = needed
    by_weight = (gradient.T @ seen.to(gradient.dtype)).to(weight.dtype) if for_weight else None
    by_bias = gradient.sum(dim=0, dtype=weight.dtype) if for_bias else None
    return by_weight, by_bias
