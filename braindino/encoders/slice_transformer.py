"""BrainDINO and DINOv3 behind the contract: class tokens of equally spaced slices (paper sec. 4.3)."""

from typing import Any

from torch import Tensor

from braindino.encoders.contract import Layers, layer_blocks
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
        rows, columns = (size // self.network.patch_size for size in slices.shape[-2:])
        outputs = self.network.intermediate(slices, self.blocks, norm=False)
        norm = self.network.norm
        early, mid, late = (norm(output.cls) if self.inner_norm else output.cls for output in outputs)
        maps = norm(outputs[-1].patches).transpose(1, 2).unflatten(2, (rows, columns))
        return BatchFeatures(norm(outputs[-1].cls), Layers(early, mid, late), maps)

    def _maps(self, slices: Tensor, block: int, *, norm: bool) -> Tensor:
        rows, columns = (size // self.network.patch_size for size in slices.shape[-2:])
        [tokens] = self.network.intermediate(slices, (block,), norm=norm)
        return tokens.patches.transpose(1, 2).unflatten(2, (rows, columns))
