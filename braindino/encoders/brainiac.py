"""BrainIAC: a ViT of cubes of 96 voxels that was published without a class token."""

from collections.abc import Sequence

from torch import Tensor

from braindino.encoders.contract import Layers, layer_blocks
from braindino.encoders.cube import CubePreparation
from braindino.encoders.cube_encoder import CubeEncoder, CubeFeatures, as_map
from braindino.encoders.volume_transformer import PATCH, BrainIACTransformer

NAME = "brainiac"
FEATURES = ("token0", "mean")


class BrainIAC(CubeEncoder):
    """The global feature is one of two. ``token0``: the first patch token, an ordinary one in the corner at the left,
    the back and the bottom; what its authors take, and the paper with them. ``mean``: over all patch tokens.
    """

    network: BrainIACTransformer

    def __init__(
        self,
        network: BrainIACTransformer,
        *,
        name: str = NAME,
        feature: str = "token0",
        fit: str = "resize",
        inner_norm: bool = True,
    ) -> None:
        """``fit`` as in ``CubePreparation``; the authors resize. ``inner_norm``: as for BM-MAE."""
        if feature not in FEATURES:
            raise ValueError(f"feature: found {feature!r}; expected one of {', '.join(FEATURES)}")
        architecture = network.architecture
        self.blocks, self.inner_norm, self.feature = layer_blocks(architecture["depth"]), inner_norm, feature
        size = architecture["grid"] * PATCH
        super().__init__(
            network,
            name=f"{name}-{feature}",
            dim=architecture["width"],
            preparation=CubePreparation(size=size, fit=fit, intensity="zscore", orientation="RAS"),
            reading={"feature": feature, "layers": list(self.blocks), "inner_norm": inner_norm},
        )

    @property
    def num_blocks(self) -> int:
        return len(self.network.blocks)

    @property
    def depth_blocks(self) -> tuple[int, int, int]:
        return self.blocks

    def _features(self, images: Tensor, sequences: Sequence[str | None]) -> CubeFeatures:
        outputs = [output.patches for output in self.network.intermediate(images, self.blocks)]
        last = self.network.norm(outputs[-1])
        early, mid, late = (self._pool(self.network.norm(output) if self.inner_norm else output) for output in outputs)
        return CubeFeatures(self._pool(last), Layers(early, mid, late), as_map(last))

    def _maps(self, images: Tensor, sequences: Sequence[str | None], block: int, *, norm: bool) -> Tensor:
        [output] = self.network.intermediate(images, (block,))
        return as_map(self.network.norm(output.patches) if norm else output.patches)

    def _pool(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.feature == "token0" else tokens.mean(dim=1)
