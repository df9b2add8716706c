"""Vision transformers on volumes, with the parameter names of MONAI 1.3: BrainIAC and BM-MAE.

Blocks are pre-norm, x + attn(norm1(x)), then x + mlp(norm2(x)). MONAI 1.4 and later keep cross-attention tensors in
every block that self-attention never reads; they have no place here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braindino.encoders.patch_embedding import embed_patches

PATCH = 16
HEAD_DIM = 64
SINCOS_TEMPERATURE = 10_000.0
INIT_STD = 0.02


class VolumeTokens(NamedTuple):
    """Tokens of B volumes after some block, not normed; D features per token."""

    cls: Tensor | None
    """(B, D); None for a network without a class token."""
    patches: Tensor
    """(B, N, D) patch tokens, the last axis of the grid fastest."""


class BrainIACTransformer(nn.Module):
    """ViT of cubes, without a class token; learned positions; no qkv bias.

    ``patch_embedding.*``, ``blocks.N.*``, ``norm.*``: 137 tensors as published.
    """

    name: str = ""
    """Where the weights come from; set by ``load_volume_encoder``."""
    sha256: str = ""
    """Hash of the weights as loaded; set by ``load_volume_encoder``."""

    def __init__(self, *, width: int = 768, depth: int = 12, mlp_dim: int = 3072, grid: int = 6) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "grid": grid}
        self.patch_embedding = PatchEmbedding3d(width, grid=grid)
        self.blocks = nn.ModuleList(Block(width, mlp_dim, qkv_bias=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.trunc_normal_(self.patch_embedding.position_embeddings, std=INIT_STD)

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[VolumeTokens]:
        """Tokens after each of ``blocks`` (from 0) of images (B, C, X, Y, Z), in the order asked for."""
        outputs = _run(self.blocks, self.patch_embedding(images), blocks)
        return [VolumeTokens(None, tokens) for tokens in outputs]


class BMMAETransformer(nn.Module):
    """ViT of cubes with a class token and a tokenizer for each modality; fixed sine-cosine positions; qkv bias.

    ``cls_token``, ``tokenizers.<modality>.patch_embedding.*``, ``blocks.N.*``, ``norm.*``: 150 tensors as published
    with one tokenizer, 159 with four. Tokens of several modalities follow one another in one sequence.
    """

    name: str = ""
    """Where the weights come from; set by ``load_volume_encoder``."""
    sha256: str = ""
    """Hash of the weights as loaded; set by ``load_volume_encoder``."""

    def __init__(
        self, *, modalities: Sequence[str], width: int = 768, depth: int = 12, mlp_dim: int = 1536, grid: int = 8
    ) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {
            "modalities": list(modalities),
            "width": width,
            "depth": depth,
            "mlp_dim": mlp_dim,
            "grid": grid,
        }
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.tokenizers = nn.ModuleDict({name: Tokenizer(width, grid) for name in modalities})
        self.blocks = nn.ModuleList(Block(width, mlp_dim, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)

    def tokenize(self, images: Mapping[str, Tensor]) -> Tensor:
        """(B, N, D) patch tokens of images (B, C, X, Y, Z) by modality, one modality after the other."""
        return torch.cat([self.tokenizers[name](image) for name, image in images.items()], dim=1)

    def intermediate(self, patches: Tensor, blocks: Sequence[int]) -> list[VolumeTokens]:
        """Tokens after each of ``blocks`` (from 0), in the order asked for, from those of ``tokenize``."""
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return [VolumeTokens(output[:, 0], output[:, 1:]) for output in _run(self.blocks, tokens, blocks)]


class Tokenizer(nn.Module):
    """Holds the patch embedding of one modality, under the name that checkpoints give it."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding3d(width, grid=grid)
        self.patch_embedding.position_embeddings.requires_grad_(False).copy_(sincos_positions(grid, width))
        nn.init.xavier_uniform_(self.patch_embedding.patch_embeddings.weight.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.patch_embedding(images)


class PatchEmbedding3d(nn.Module):
    """Non-overlapping 16^3 patches of a cube, each mapped linearly, plus its position; for one channel, and for several
    by ``braindino.encoders.patch_embedding``.
    """

    def __init__(self, width: int, *, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.position_embeddings = nn.Parameter(torch.empty(1, grid**3, width))
        self.patch_embeddings = nn.Conv3d(1, width, kernel_size=PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, N, D)."""
        if images.ndim != 5 or set(images.shape[2:]) != {self.grid * PATCH}:
            edge = self.grid * PATCH
            raise ValueError(
                f"found images of shape {tuple(images.shape)}; the positions of this encoder are those of cubes: "
                f"expected (B, C, {edge}, {edge}, {edge})"
            )
        patches = embed_patches(images, self.patch_embeddings)
        return patches.flatten(2).transpose(1, 2) + self.position_embeddings


class Block(nn.Module):
    """Pre-norm transformer block on tokens (B, N, D)."""

    def __init__(self, width: int, mlp_dim: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention with heads of 64 features."""

    def __init__(self, width: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = width // HEAD_DIM
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


def sincos_positions(grid: int, width: int) -> Tensor:
    """(1, grid^3, width) fixed positions of a cubic grid, the last axis fastest: sines and cosines of the second, the
    first and the third coordinate, in that order, at width / 6 frequencies each.

    Raises:
        ValueError: the width is no multiple of 6.
    """
    if width % 6:
        raise ValueError(f"sincos_positions: found width {width}; expected a multiple of 6")
    frequencies = SINCOS_TEMPERATURE ** -(torch.arange(width // 6, dtype=torch.float32) / (width // 6))
    steps = torch.arange(grid, dtype=torch.float32)
    first, second, third = (axis.flatten() for axis in torch.meshgrid(steps, steps, steps, indexing="ij"))
    angles = [coordinate[:, None] * frequencies for coordinate in (second, first, third)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None]


def _run(layers: nn.ModuleList, tokens: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    outside = [index for index in blocks if not 0 <= index < len(layers)]
    if outside:
        raise ValueError(f"blocks {outside} do not exist: this encoder has blocks 0 to {len(layers) - 1}")
    outputs: dict[int, Tensor] = {}
    for index in range(max(blocks) + 1):
        tokens = layers[index](tokens)
        if index in blocks:
            outputs[index] = tokens
    return [outputs[index] for index in blocks]
