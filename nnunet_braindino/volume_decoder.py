"""One decoder for frozen 3D encoders: from feature maps at several scales, and the images, to logits.

The form is UNETR's (Hatamizadeh et al. 2022): what an encoder gives at one scale only is enlarged on the way to each
level; a pyramid goes in as it is.
"""

from collections.abc import Sequence

import torch
from torch import nn

HE_NEGATIVE_SLOPE = 1e-2
WIDTHS = (16, 32, 64, 128, 256)
"""Channels at full resolution and at 1/2, 1/4, 1/8, 1/16."""
LEVELS = len(WIDTHS) - 1


class VolumeDecoder(nn.Module):
    """Logits (B, num_classes, X, Y, Z) from images (B, C, X, Y, Z) and four maps, the one for 1/2 of the resolution
    first, the one for 1/16 last.

    ``dims``: channels of the maps; ``scales``: how many times each map is smaller than the images, at least as much as
    its level: (2, 4, 8, 16) for a pyramid, (16, 16, 16, 16) for a ViT with patches of 16 voxels.
    """

    def __init__(
        self, *, num_input_channels: int, num_classes: int, dims: Sequence[int], scales: Sequence[int]
    ) -> None:
        super().__init__()
        self.image = DoubleConvolution(num_input_channels, WIDTHS[0])
        self.lifts = nn.ModuleList(
            _lift(dim, width, scale // 2**level)
            for level, (dim, width, scale) in enumerate(zip(dims, WIDTHS[1:], scales, strict=True), start=1)
        )
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose3d(WIDTHS[level + 1], WIDTHS[level], kernel_size=2, stride=2) for level in range(LEVELS)
        )
        self.merge = nn.ModuleList(DoubleConvolution(2 * WIDTHS[level], WIDTHS[level]) for level in range(LEVELS))
        self.to_logits = nn.Conv3d(WIDTHS[0], num_classes, kernel_size=1)
        self.apply(_initialize)

    def forward(self, images: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        skips = [self.image(images), *(lift(each) for lift, each in zip(self.lifts, maps, strict=True))]
        x = skips[LEVELS]
        for level in reversed(range(LEVELS)):
            x = self.merge[level](torch.cat([self.enlarge[level](x), skips[level]], dim=1))
        return self.to_logits(x)


class DoubleConvolution(nn.Sequential):
    """Twice: 3^3 convolution, InstanceNorm, leaky ReLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(*_convolution(before, after, 3), *_convolution(after, after, 3))


def _lift(dim: int, width: int, factor: int) -> nn.Sequential:
    """A map of ``dim`` channels to ``width`` and ``factor`` times the resolution, a power of 2."""
    layers: list[nn.Module] = _convolution(dim, width, 1)
    while factor > 1:
        layers += [nn.ConvTranspose3d(width, width, kernel_size=2, stride=2), *_convolution(width, width, 3)]
        factor //= 2
    return nn.Sequential(*layers)


def _convolution(before: int, after: int, kernel_size: int) -> list[nn.Module]:
    return [
        nn.Conv3d(before, after, kernel_size, padding=kernel_size // 2, bias=False),
        nn.InstanceNorm3d(after, affine=True),
        nn.LeakyReLU(HE_NEGATIVE_SLOPE, inplace=True),
    ]


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=HE_NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
