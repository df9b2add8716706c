"""BrainMVP: a UniFormer of one sequence at a time, averaged over its last map (paper sec. 4.3.1 and 4.6)."""

from collections.abc import Sequence

from torch import Tensor

from braindino.encoders.contract import Layers
from braindino.encoders.cube import CubePreparation
from braindino.encoders.cube_encoder import CubeEncoder, CubeFeatures
from braindino.encoders.uniformer import STRIDE, UniFormer

NAME = "brainmvp"
SIZE = 128
STAGES = (2, 3, 4)
"""Early, middle and late stage of four; the paper does not say which three. Blocks 2, 6 and 11 of twelve lie at 1/4,
7/12 and all of the depth; the same fractions of BrainMVP's 18 blocks lie in its second, third and fourth stage."""


class BrainMVP(CubeEncoder):
    """The global feature is the mean of the last map (512); layers are the means of three stages."""

    network: UniFormer

    def __init__(
        self,
        network: UniFormer,
        *,
        name: str = NAME,
        fit: str = "crop",
        size: int = SIZE,
        stages: tuple[int, int, int] = STAGES,
    ) -> None:
        """``fit`` and ``size`` (voxels) as in ``CubePreparation``; ``stages`` (1 to 4) are the three depths.

        Its authors train on crops of 96 at 1 mm and test on crops; the paper uses 128.
        """
        if size % STRIDE:
            raise ValueError(f"size: found {size}; BrainMVP takes cubes whose edge is a multiple of {STRIDE}")
        if len(stages) != 3 or not set(stages) <= {1, 2, 3, 4}:
            raise ValueError(f"stages: found {stages}; expected three of 1, 2, 3, 4: early, mid, late")
        in_channels = network.patch_embed1.proj.in_channels
        if in_channels != 1:
            raise ValueError(f"BrainMVP with {in_channels} input channels; expected 1, as its authors publish it")
        self.stages = stages
        super().__init__(
            network,
            name=name,
            dim=network.dims[-1],
            preparation=CubePreparation(size=size, fit=fit, intensity="percentiles", orientation="RAS"),
            reading={"feature": "mean of the last map", "layers": [f"mean of stage {stage}" for stage in stages]},
        )

    @property
    def num_blocks(self) -> int:
        return len(self.network.dims)

    @property
    def depth_blocks(self) -> tuple[int, int, int]:
        early, mid, late = self.stages
        return early - 1, mid - 1, late - 1

    def _features(self, images: Tensor, sequences: Sequence[str | None]) -> CubeFeatures:
        maps = self.network(images)
        early, mid, late = (maps[stage].mean(dim=(2, 3, 4)) for stage in self.stages)
        return CubeFeatures(maps[-1].mean(dim=(2, 3, 4)), Layers(early, mid, late), maps[-1])

    def _maps(self, images: Tensor, sequences: Sequence[str | None], block: int, *, norm: bool) -> Tensor:
        stages: Tensor = self.network(images, norm=norm)[1 + block]
        return stages
