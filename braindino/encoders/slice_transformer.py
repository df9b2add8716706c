"""BrainDINO and DINOv3 behind the contract: class tokens of equally spaced slices (paper sec. 4.3)."""

from typing import Any

import torch
from torch import Tensor

from braindino.encoders.contract import Layers, Prepared, TokenPlane, layer_blocks
from braindino.encoders.slice_encoder import BatchFeatures, SliceEncoder, SlicePreparation
from braindino.vision_transformer import VisionTransformer


class SliceTransformer(SliceEncoder):
    """The global feature is the mean of the slices' class tokens after the final norm."""

    network: VisionTransformer

    def __init__(self, network: VisionTransformer, *, inner_norm: bool = True, **preparation: Any) -> None:
        """``network`` comes from ``braindino.load_encoder``; ``preparation``: fields of ``SlicePreparation``.
        ``inner_norm``: whether the final norm is applied to the early and middle layer too, as DINO does; the paper
        does not say.
        """
        self.blocks, self.inner_norm = layer_blocks(network.depth), inner_norm
        prepared_as = SlicePreparation(**preparation)
        size, patch = prepared_as.image_size, network.patch_size
        if size % patch:
            raise ValueError(f"image_size: found {size}; expected a multiple of the patch size, {patch}")
        super().__init__(
            network,
            name=network.name,
            sha256=network.sha256,
            dim=network.embed_dim,
            preparation=prepared_as,
            reading={"feature": "class token, mean over slices", "layers": list(self.blocks), "inner_norm": inner_norm},
        )

    @property
    def num_blocks(self) -> int:
        return self.network.depth

    @property
    def depth_blocks(self) -> tuple[int, int, int]:
        return self.blocks

    def _features(self, slices: Tensor) -> BatchFeatures:
        outputs = self.network.intermediate(slices, self.blocks, norm=False)
        norm = self.network.norm
        early, mid, late = (norm(output.cls) if self.inner_norm else output.cls for output in outputs)
        maps = self._on_patches(norm(outputs[-1].patches), slices)
        return BatchFeatures(norm(outputs[-1].cls), Layers(early, mid, late), maps)

    def encode_blocks(self, prepared: Prepared, level: int) -> tuple[tuple[TokenPlane, ...], Tensor]:
        """What ``encode_plane`` says of slice ``level`` after every block, and (D,) its class token, in one pass."""
        with torch.inference_mode():
            slices = self._slice(prepared, level)
            outputs = self.network.intermediate(slices, range(self.network.depth), norm=True)
            maps = (self._on_patches(output.patches, slices) for output in outputs)
            planes = tuple(self._token_plane(each, prepared, level) for each in maps)
            return planes, outputs[-1].cls[0].float().cpu()

    def _maps(self, slices: Tensor, block: int, *, norm: bool) -> Tensor:
        [tokens] = self.network.intermediate(slices, (block,), norm=norm)
        return self._on_patches(tokens.patches, slices)

    def _on_patches(self, tokens: Tensor, slices: Tensor) -> Tensor:
        """(B, D, rows, columns) of patch tokens (B, N, D) of slices (B, C, H, W)."""
        rows, columns = (size // self.network.patch_size for size in slices.shape[-2:])
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))
