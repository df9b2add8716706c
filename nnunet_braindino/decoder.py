"""The Primus-style decoder, from a grid of patch features to logits at full resolution by four doublings, and a linear
floor to compare it with.

A transposed convolution 2x2 with stride 2 maps every pixel to four pixels of its own; norm, GELU and the final 1x1
convolution see one pixel at a time. So no pixel ever meets its neighbour, and the pixels may lie in any order: here
in that of a quadtree, in which each doubling is a plain matrix product, (N, C) -> (N, 4 C') = (4 N, C'), without a
copy. Only the logits are put in the order of the image.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from braindino.lean_linear import product_dtype
from braindino.own_kernels import own_kernels

HE_NEGATIVE_SLOPE = 1e-2  # nnU-Net initialises its Primus decoder for a leaky ReLU of this slope
LAYER_NORM_EPS = 1e-6
NUM_STAGES = 4
CHUNK_VALUES = {"cpu": 2**20}
"""How many values of a map are normed at a time, by device: on a CPU what its caches hold."""
OTHER_CHUNK_VALUES = 2**28
MIN_CHUNK_ROWS = 4096


class PatchDecoder(nn.Module):
    """Logits (B, num_classes, 16 h, 16 w) from features (B, h, w, 4 D) of a ViT with patches of 16 pixels.

    Four times: transposed convolution 2x2 with stride 2, LayerNorm over channels, GELU; the channels go 4D -> 2D -> D
    -> D/2 -> D/4, then a 1x1 convolution gives the classes (paper sec. 4.3.1: 25.07 M trained parameters for ViT-B
    with three regions, the 4 -> 3 input fusion included). The parameters are those of these layers, by torch's names.
    """

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        if embed_dim % 4:
            raise ValueError(
                f"PatchDecoder: embed_dim must be a multiple of 4 to be halved four times from 4D, found {embed_dim}"
            )
        channels = [4 * embed_dim // 2**k for k in range(NUM_STAGES + 1)]
        self.stages = nn.ModuleList(DoublingStage(before, after) for before, after in pairwise(channels))
        self.to_logits = nn.Conv2d(channels[-1], num_classes, kernel_size=1)
        self.apply(_initialize)

    @staticmethod
    def blocks_read(depth: int) -> tuple[int, ...]:
        """The blocks of an encoder with ``depth`` blocks whose tokens make up the features."""
        return decoder_blocks(depth)

    def forward(self, features: Tensor) -> Tensor:
        batch, height, width, _ = features.shape
        stages = [stage for stage in self.stages if isinstance(stage, DoublingStage)]
        assert self.to_logits.bias is not None
        # torch.compile (2.11) trips over a list that grows here.
        maps = [*(stage.as_matrix() for stage in stages), (self.to_logits.weight.flatten(1), self.to_logits.bias)]
        rows = F.linear(features.flatten(0, 2), *maps[0])
        for stage, (weight, bias) in zip(stages, maps[1:], strict=True):
            rows = norm_gelu_linear(rows.view(-1, stage.num_channels), stage.norm, weight, bias)
        return _from_quadtree(rows, batch, height, width)


class DoublingStage(nn.Sequential):
    """Transposed convolution 2x2 with stride 2, LayerNorm over channels, GELU: their parameters, by the names that they
    have in a plain sequence. The decoder computes them in other pieces."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(before, after, kernel_size=2, stride=2), nn.LayerNorm(after, eps=LAYER_NORM_EPS)
        )
        self.num_channels = after

    @property
    def norm(self) -> nn.LayerNorm:
        """The norm behind the convolution."""
        norm = self[1]
        assert isinstance(norm, nn.LayerNorm)
        return norm

    def as_matrix(self) -> tuple[Tensor, Tensor]:
        """(4 C', C) and (4 C',): the convolution as a linear map of one pixel to its four, row by row."""
        convolution = self[0]
        assert isinstance(convolution, nn.ConvTranspose2d) and convolution.bias is not None
        return convolution.weight.permute(2, 3, 1, 0).flatten(0, 2), convolution.bias.repeat(4)


class LinearDecoder(nn.Module):
    """Logits (B, num_classes, 16 h, 16 w) from features (B, h, w, D): one linear layer, bilinearly enlarged.

    What the tokens of the last block say by themselves; a floor for every decoder.
    """

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.to_logits = nn.Linear(embed_dim, num_classes)
        nn.init.normal_(self.to_logits.weight, std=0.01)
        nn.init.zeros_(self.to_logits.bias)

    @staticmethod
    def blocks_read(depth: int) -> tuple[int, ...]:
        """The last block."""
        return (depth - 1,)

    def forward(self, features: Tensor) -> Tensor:
        coarse = self.to_logits(features).movedim(-1, 1)
        return F.interpolate(coarse, scale_factor=16, mode="bilinear", align_corners=False)


def decoder_blocks(depth: int) -> tuple[int, int, int, int]:
    """The last block of each quarter of the encoder: (2, 5, 8, 11) for the paper's twelve blocks."""
    if depth < 4:
        raise ValueError(f"decoder_blocks: the decoder reads four blocks, the encoder has {depth}")
    first, second, third, fourth = (depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4))
    return first, second, third, fourth


def norm_gelu_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear(F.gelu(norm(x)), weight, bias)`` of rows x (N, C), some rows at a time.

    Only x is kept for the backward pass; norm and GELU are computed again there. At full resolution they would be the
    largest tensors of the network, several times over.
    """
    return _NormGeluLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias)


class _NormGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:
        dtype = product_dtype(x)
        ctx.save_for_backward(x, scale, shift, weight)
        ctx.eps = eps
        out = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = weight.to(dtype), bias.to(dtype)
            for rows, part in zip(_chunks(x), _chunks(x, of=out), strict=True):
                if own_kernels(x):
                    from nnunet_braindino.decoder_kernels import norm_gelu

                    torch.addmm(bias, norm_gelu(rows, scale, shift, eps=eps, dtype=dtype), weight.T, out=part)
                    continue
                normed = F.layer_norm(rows.to(scale.dtype), scale.shape, scale, shift, eps)
                part.copy_(F.linear(F.gelu(normed).to(dtype), weight, bias))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight = ctx.saved_tensors
        by_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        by_scale, by_shift = torch.zeros_like(scale), torch.zeros_like(shift)
        by_weight = torch.zeros_like(weight)
        low_weight = weight.to(gradient.dtype)
        for rows, outer, inner in zip(_chunks(x), _chunks(x, of=gradient), _chunks(x, of=by_x), strict=True):
            if own_kernels(x):
                from nnunet_braindino.decoder_kernels import norm_gelu_backward

                activated, more_scale, more_shift = norm_gelu_backward(
                    rows, outer @ low_weight, scale, shift, inner, eps=ctx.eps
                )
                by_weight += outer.T @ activated
                by_scale += more_scale
                by_shift += more_shift
                continue
            wide = rows.to(scale.dtype)
            normed, mean, rstd = torch.native_layer_norm(wide, scale.shape, scale, shift, ctx.eps)
            by_weight += outer.T @ F.gelu(normed).to(outer.dtype)
            by_normed = torch.ops.aten.gelu_backward((outer @ low_weight).to(normed.dtype), normed)
            by_rows, more_scale, more_shift = torch.ops.aten.native_layer_norm_backward(
                by_normed, wide, scale.shape, mean, rstd, scale, shift, [True, True, True]
            )
            inner.copy_(by_rows)
            by_scale += more_scale
            by_shift += more_shift
        return by_x, by_scale, by_shift, None, by_weight, gradient.sum(dim=0, dtype=weight.dtype)


def _chunks(x: Tensor, of: Tensor | None = None) -> tuple[Tensor, ...]:
    """``of`` (x itself by default) in runs of rows that hold so many values of x."""
    values = CHUNK_VALUES.get(x.device.type, OTHER_CHUNK_VALUES)
    return (x if of is None else of).split(max(MIN_CHUNK_ROWS, values // x.shape[1]))


def _from_quadtree(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    """(B, K, 16 h, 16 w) from (B h w 256, K): undo the order that four doublings have left the pixels in."""
    grid = rows.view(batch, height, width, *[2, 2] * NUM_STAGES, -1)
    row_axes = [1, *range(3, 3 + 2 * NUM_STAGES, 2)]
    column_axes = [2, *range(4, 4 + 2 * NUM_STAGES, 2)]
    ordered = grid.permute(0, grid.ndim - 1, *row_axes, *column_axes)
    return ordered.reshape(batch, -1, height * 2**NUM_STAGES, width * 2**NUM_STAGES)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight, a=HE_NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
