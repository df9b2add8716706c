"""The floor under every encoder: what raw intensities alone say.

Two parts per slice, side by side: the histogram of the brain's standardised intensities, and the slice itself averaged
down to a small grid. Both are linear in the slices, so their mean over slices is the histogram and the downsampled
mean slice of the volume. An encoder that does not beat these 288 numbers has learnt nothing that a histogram does not
know.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from braindino.encoders.contract import Layers
from braindino.encoders.slice_encoder import BatchFeatures, SliceEncoder, SlicePreparation

NAME = "intensity"
NUM_BINS = 32
LIMIT = 4.0
GRID = 16
DEFINITION = (
    f"density of {NUM_BINS} bins in [-{LIMIT:g}, {LIMIT:g}] over the slice; mean slice on {GRID}x{GRID}; version 2"
)
SHA256 = hashlib.sha256(DEFINITION.encode()).hexdigest()


class IntensityFloor(SliceEncoder):
    """288 numbers of a volume. There is one depth, so the three layers are equal; a token is the mean of its cell.

    Its mean patch token would be one number, which a head that begins with LayerNorm cannot see: the 288 stand in its
    place, so that the floor is one in tasks on patch tokens, too.
    """

    def __init__(self, *, num_slices: int | None = None) -> None:
        """``num_slices``: None for the paper's 128."""
        preparation = SlicePreparation() if num_slices is None else SlicePreparation(num_slices=num_slices)
        super().__init__(
            None,
            name=NAME,
            sha256=SHA256,
            dim=NUM_BINS + GRID * GRID,
            preparation=preparation,
            reading={"feature": DEFINITION},
        )

    @property
    def num_blocks(self) -> int:
        return 1

    @property
    def depth_blocks(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def _features(self, slices: Tensor) -> BatchFeatures:
        features = encode_intensity(slices)
        maps = features[:, NUM_BINS:].unflatten(1, (1, GRID, GRID))
        return BatchFeatures(features, Layers(features, features, features), maps, in_place_of_patches=features)

    def _maps(self, slices: Tensor, block: int, *, norm: bool) -> Tensor:
        return self._features(slices).maps


def encode_intensity(slices: Tensor) -> Tensor:
    """(B, 288) features of standardised slices (B, 1, H, W).

    The first 32 are the density of intensities over the bins, counted over the non-zero voxels (background is exactly
    0) and divided by the area of the slice and the width of a bin, so that they are of the size of the z-scores beside
    them; intensities beyond the limits count in the outermost bins. The other 256 are the means over a 16x16 grid, row
    by row.
    """
    batch = len(slices)
    flat = slices.reshape(batch, -1).float()
    width = 2 * LIMIT / NUM_BINS
    bins = ((flat + LIMIT) / width).floor().clamp(0, NUM_BINS - 1).long()
    histogram = torch.zeros(batch, NUM_BINS, device=slices.device)
    histogram.scatter_add_(1, bins, (flat != 0).float())
    density = histogram / (flat.shape[1] * width)
    grid = F.adaptive_avg_pool2d(slices.float(), GRID).reshape(batch, -1)
    return torch.cat([density, grid], dim=1)
