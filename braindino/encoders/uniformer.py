"""UniFormer for volumes, as BrainMVP uses it (Li et al. 2023; BrainMVP, Rui et al. 2025), with its parameter names.

Four stages, each halving the grid: two of convolutional blocks (BatchNorm, a depth-wise 5^3 convolution in place of
attention), two of attention blocks (LayerNorm, global self-attention), all with a depth-wise 3^3 convolution that
tells positions. There is no absolute position embedding: any size that is a multiple of 16 will do.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from braindino.encoders.patch_embedding import embed_patches

STRIDE = 16
HEAD_DIM = 64
MLP_RATIO = 4
DIMS, DEPTHS = (64, 128, 320, 512), (3, 4, 8, 3)
NORM_EPS = 1e-6


class UniFormer(nn.Module):
    """The feature pyramid of images (B, C, X, Y, Z), sizes multiples of 16; a network of one channel takes several,
    see ``braindino.encoders.patch_embedding``.

    The published network first moves the last image axis to the front and leaves its maps that way; here the maps come
    back in the order of the input's axes.
    """

    name: str = ""
    """Where the weights come from; set by ``load_volume_encoder``."""
    sha256: str = ""
    """Hash of the weights as loaded; set by ``load_volume_encoder``."""

    def __init__(self, *, in_channels: int = 1, dims: Sequence[int] = DIMS, depths: Sequence[int] = DEPTHS) -> None:
        super().__init__()
        first, second, third, fourth = dims
        self.dims = (first, second, third, fourth)
        self.architecture: dict[str, Any] = {"in_channels": in_channels, "dims": list(dims), "depths": list(depths)}
        self.patch_embed1 = Halving(in_channels, first)
        self.patch_embed2 = Halving(first, second)
        self.patch_embed3 = Halving(second, third)
        self.patch_embed4 = Halving(third, fourth)
        self.blocks1 = nn.ModuleList(ConvolutionBlock(first) for _ in range(depths[0]))
        self.blocks2 = nn.ModuleList(ConvolutionBlock(second) for _ in range(depths[1]))
        self.blocks3 = nn.ModuleList(AttentionBlock(third) for _ in range(depths[2]))
        self.blocks4 = nn.ModuleList(AttentionBlock(fourth) for _ in range(depths[3]))
        self.norm = nn.BatchNorm3d(fourth)
        self.apply(_initialize)

    def forward(self, images: Tensor, *, norm: bool = True) -> list[Tensor]:
        """Five maps from fine to coarse: the images and the stages (B, D, X / s, Y / s, Z / s), s = 2, 4, 8, 16; with
        ``norm`` the final norm is applied to the last.
        """
        if images.ndim != 5 or any(size % STRIDE or not size for size in images.shape[2:]):
            raise ValueError(
                f"UniFormer: found images of shape {tuple(images.shape)}; expected (B, C, X, Y, Z) with sizes that are "
                f"multiples of {STRIDE}; crop or pad them first"
            )
        maps = [images]
        x = images.permute(0, 1, 4, 2, 3)
        stages = (
            (self.patch_embed1, self.blocks1),
            (self.patch_embed2, self.blocks2),
            (self.patch_embed3, self.blocks3),
            (self.patch_embed4, self.blocks4),
        )
        for halving, blocks in stages:
            x = halving(x)
            for block in blocks:
                x = block(x)
            maps.append(x)
        if norm:
            maps[-1] = self.norm(x)
        return [images, *(stage.permute(0, 1, 3, 4, 2) for stage in maps[1:])]


class Halving(nn.Module):
    """Non-overlapping 2^3 patches, each mapped linearly, then LayerNorm over the channels."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(before, after, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(embed_patches(x, self.proj).movedim(1, -1)).movedim(-1, 1).contiguous()


class ConvolutionBlock(nn.Module):
    """x + position(x), then + local mixing, then + MLP, all convolutions on (B, D, x, y, z)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pos_embed = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.BatchNorm3d(dim)
        self.conv1 = nn.Conv3d(dim, dim, 1)
        self.conv2 = nn.Conv3d(dim, dim, 1)
        self.attn = nn.Conv3d(dim, dim, 5, padding=2, groups=dim)
        self.norm2 = nn.BatchNorm3d(dim)
        self.mlp = ConvolutionMlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class AttentionBlock(nn.Module):
    """x + position(x), then + self-attention over all tokens, then + MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pos_embed = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = SelfAttention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)


class SelfAttention(nn.Module):
    """Multi-head self-attention with heads of 64 features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = dim // HEAD_DIM
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, Linear on tokens (B, N, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvolutionMlp(nn.Module):
    """The same on maps (B, D, x, y, z)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(dim, MLP_RATIO * dim, 1)
        self.fc2 = nn.Conv3d(MLP_RATIO * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
