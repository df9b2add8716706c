"""The Primus-style decoder: from a grid of patch features to logits at full resolution, by four doublings."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

HE_NEGATIVE_SLOPE = 1e-2  # nnU-Net initialises its Primus decoder for a leaky ReLU of this slope
LAYER_NORM_EPS = 1e-6


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map, each pixel by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class PatchDecoder(nn.Module):
    """Logits (B, num_classes, 16 h, 16 w) from features (B, 4 D, h, w) of a ViT with patches of 16 pixels.

    Four times: transposed convolution 2x2 with stride 2, LayerNorm over channels, GELU; the channels go 4D -> 2D -> D
    -> D/2 -> D/4, then a 1x1 convolution gives the classes (paper sec. 4.3.1: 25.07 M trained parameters for ViT-B
    with three regions, the 4 -> 3 input fusion included).
    """

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        if embed_dim % 4:
            raise ValueError(
                f"PatchDecoder: embed_dim must be a multiple of 4 to be halved four times from 4D, found {embed_dim}"
            )
        channels = [4 * embed_dim // 2**k for k in range(5)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(before, after, kernel_size=2, stride=2),
                ChannelLayerNorm(after, eps=LAYER_NORM_EPS),
                nn.GELU(),
            )
            for before, after in pairwise(channels)
        )
        self.to_logits = nn.Conv2d(channels[-1], num_classes, kernel_size=1)
        self.apply(_initialize)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            features = stage(features)
        return self.to_logits(features)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight, a=HE_NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
