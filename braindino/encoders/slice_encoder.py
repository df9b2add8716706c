"""What the encoders of slices share: equally spaced axial slices of the standard cube, and means over them (paper
sec. 4.3).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braindino.encoders.contract import (
    Features,
    Identity,
    Layers,
    Prepared,
    SliceFeatures,
    TokenGrid,
    VolumeEncoder,
    even_centres,
)
from braindino.slices import NUM_SLICES, SLICE_ORIENTATION, axial_slices, uniform_indices
from braindino.transforms import CLIP_PERCENTILES, CUBE_SHAPE, crop_to_foreground, normalize_intensity, resize
from braindino.volume import Volume, VolumeError

INTENSITIES = ("zscore", "imagenet")
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class SlicePreparation:
    """How a volume becomes slices; the defaults are the pipeline of the paper."""

    num_slices: int = NUM_SLICES
    """Equally spaced over the 256 axial slices of the standard cube."""
    image_size: int = CUBE_SHAPE[0]
    """Rows and columns; the paper's analysis of layers (sec. 4.6) has 224."""
    intensity: str = "zscore"
    """``zscore``: as in pretraining. ``imagenet``: the 0.5-99.5 percentile range becomes 0 to 1, then the channels get
    the mean and deviation of ImageNet; what encoders of natural images were trained with, which the paper leaves
    open."""

    def __post_init__(self) -> None:
        if self.intensity not in INTENSITIES:
            raise ValueError(f"intensity: found {self.intensity!r}; expected one of {', '.join(INTENSITIES)}")
        if self.image_size < 1:
            raise ValueError(f"image_size: found {self.image_size}; expected more than 0")
        uniform_indices(self.num_slices)

    def describe(self) -> dict[str, Any]:
        """JSON values that say what happens to the volume."""
        return {"cube": list(CUBE_SHAPE), "orientation": SLICE_ORIENTATION, **asdict(self)}

    def apply(self, volume: Volume, *, sequence: str | None) -> Prepared:
        """Slices (num_slices, 1, image_size, image_size), lowest first.

        Raises:
            VolumeError: code ``constant``: no foreground, or no contrast.
        """
        cube = resize(crop_to_foreground(volume))
        cube = normalize_intensity(cube) if self.intensity == "zscore" else _scale_to_one(cube)
        slices = torch.from_numpy(axial_slices(cube, uniform_indices(self.num_slices)))[:, None]
        if self.image_size != CUBE_SHAPE[0]:
            slices = F.interpolate(slices, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return Prepared(slices, sequence, cube.affine, volume.affine)

    def channels(self, slices: Tensor) -> Tensor:
        """What the network is given for slices (B, 1, H, W): the same, or (B, 3, H, W) on ImageNet's scale."""
        if self.intensity == "zscore":
            return slices
        mean, deviation = (slices.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        return (slices - mean) / deviation


class BatchFeatures(NamedTuple):
    """Features of B slices."""

    global_: Tensor
    """(B, D)."""
    layers: Layers
    """(B, D) each, D by depth."""
    maps: Tensor
    """(B, D, rows, columns) tokens of the last layer."""


class SliceEncoder(VolumeEncoder):
    """A network of slices behind the contract: every feature of a volume is the mean over its slices."""

    def __init__(
        self,
        network: nn.Module | None,
        *,
        name: str,
        sha256: str,
        dim: int,
        preparation: SlicePreparation,
        reading: dict[str, Any],
    ) -> None:
        """Freezes ``network`` and puts it into ``eval()``."""
        self.network = None if network is None else network.eval().requires_grad_(False)
        self.dim = dim
        self.preparation = preparation
        self.identity = Identity(name, sha256, preparation.describe(), reading)

    def prepare(self, volume: Volume, *, sequence: str | None = None) -> Prepared:
        return self.preparation.apply(volume, sequence=sequence)

    def encode(
        self, prepared: Sequence[Prepared], *, batch_size: int | None = None, with_tokens: bool = True
    ) -> list[Features]:
        """See ``VolumeEncoder``; 32 slices in a pass unless ``batch_size`` says otherwise, never of two volumes."""
        return [self._encode_volume(each, batch_size or BATCH_SIZE, with_tokens) for each in prepared]

    def _encode_volume(self, prepared: Prepared, batch_size: int, with_tokens: bool) -> Features:
        slice_features, patch_means, maps = [], [], []
        layers: list[list[Tensor]] = [[], [], []]
        with torch.inference_mode():
            for batch in prepared.data.split(batch_size):
                result = self._features(self.preparation.channels(batch.to(self.device)))
                slice_features.append(result.global_.float().cpu())
                patch_means.append(result.maps.float().mean(dim=(2, 3)).cpu())
                for kept, layer in zip(layers, result.layers, strict=True):
                    kept.append(layer.float().cpu())
                if with_tokens:
                    maps.append(result.maps.float().cpu())
        slices = SliceFeatures(torch.cat(slice_features), torch.cat(patch_means))
        early, mid, late = (torch.cat(kept).mean(dim=0) for kept in layers)
        tokens = _token_grid(torch.cat(maps), prepared) if with_tokens else None
        return Features(slices.cls.mean(dim=0), Layers(early, mid, late), tokens, slices)

    @abstractmethod
    def _features(self, slices: Tensor) -> BatchFeatures:
        """The features of slices (B, 1 or 3, H, W)."""


def _token_grid(maps: Tensor, prepared: Prepared) -> TokenGrid:
    """(slices, D, rows, columns) on the axes of the volume: rows run backwards along y, columns along x."""
    features = maps.flip(2, 3).permute(3, 2, 0, 1).contiguous()
    x, y = (even_centres(size, num) for size, num in zip(CUBE_SHAPE, features.shape[:2], strict=False))
    z = uniform_indices(len(maps)).astype(np.float64)
    return TokenGrid(features, (x, y, z), prepared.affine, prepared.volume_affine)


def _scale_to_one(volume: Volume) -> Volume:
    low, high = np.percentile(volume.data, CLIP_PERCENTILES).astype(np.float32)
    if not high > low:
        raise VolumeError("constant", "no contrast is left between the 0.5 and 99.5 percentile; expected an image")
    return Volume(np.clip((volume.data - low) / (high - low), 0, 1), volume.affine, volume.notes)
