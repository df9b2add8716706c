"""From a canonical volume to the cube that a 3D encoder takes: spacing, crop or resize, intensity."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from braindino.encoders.contract import Prepared
from braindino.transforms import crop_to_foreground, resize
from braindino.volume import Volume, VolumeError

FITS = ("crop", "resize")
INTENSITIES = ("zscore", "percentiles")
ORIENTATIONS = ("RAS", "LPS")
PERCENTILES = (5.0, 95.0)


@dataclass(frozen=True, kw_only=True)
class CubePreparation:
    """How a volume becomes a cube. All start from the box of non-zero voxels, since the fields of view of canonical
    volumes differ.
    """

    size: int
    """Edge of the cube in voxels."""
    fit: str
    """``crop``: resampled to ``spacing``, then the middle of the brain's box, padded with 0 where the brain ends before
    it. ``resize``: the brain's box onto the cube, whatever its proportions; the size of the brain is lost."""
    intensity: str
    """``zscore``: over the non-zero voxels of the cube, background 0. ``percentiles``: the 5 and 95 percentile of the
    brain's box become 0 and 1, and values are clipped to that."""
    orientation: str
    """The directions of the axes that the encoder was trained with: RAS, or LPS as BraTS files are stored."""
    spacing: float = 1.0
    """mm, for ``crop``."""

    def __post_init__(self) -> None:
        for name, choices in (("fit", FITS), ("intensity", INTENSITIES), ("orientation", ORIENTATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: found {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.size < 1 or not self.spacing > 0:
            raise ValueError(f"size {self.size} and spacing {self.spacing}: expected more than 0")

    def describe(self) -> dict[str, Any]:
        """JSON values that say what happens to the volume."""
        facts = asdict(self)
        if self.fit == "resize":
            del facts["spacing"]
        return {"field": "box of non-zero voxels", **facts}

    def apply(self, volume: Volume, *, sequence: str | None) -> Prepared:
        """The cube (1, size, size, size) in RAS+; the encoder turns it to its own orientation.

        Raises:
            VolumeError: code ``constant``: no foreground, or no contrast.
        """
        box = crop_to_foreground(volume)
        shape = (self.size, self.size, self.size)
        if self.fit == "resize":
            box = resize(box, shape)
        else:
            extents = np.array(box.shape) * np.array(box.spacing)
            x, y, z = (max(1, round(extent / self.spacing)) for extent in extents)
            box = resize(box, (x, y, z))
        if self.intensity == "percentiles":
            cube = _middle(_scale_percentiles(box), self.size)
        else:
            cube = _standardize(_middle(box, self.size))
        return Prepared(torch.from_numpy(np.ascontiguousarray(cube.data))[None], sequence, cube.affine, volume.affine)


def turn(images: torch.Tensor, orientation: str) -> torch.Tensor:
    """RAS+ images (..., X, Y, Z) to ``orientation``, or back: the same flips."""
    return images if orientation == "RAS" else images.flip(-3, -2)


def _middle(volume: Volume, size: int) -> Volume:
    """The middle ``size`` voxels along each axis, with 0 where there are none."""
    start = [(extent - size) // 2 for extent in volume.shape]
    kept = volume.data[tuple(slice(max(begin, 0), max(begin, 0) + size) for begin in start)]
    before = [max(-begin, 0) for begin in start]
    after = [size - extent - pad for extent, pad in zip(kept.shape, before, strict=True)]
    cube = np.pad(kept, list(zip(before, after, strict=True)))
    affine = volume.affine.copy()
    affine[:3, 3] += volume.affine[:3, :3] @ np.array(start, dtype=np.float64)
    return Volume(cube, affine, volume.notes)


def _scale_percentiles(volume: Volume) -> Volume:
    low, high = np.percentile(volume.data, PERCENTILES).astype(np.float32)
    if not high > low:
        raise VolumeError("constant", "no contrast is left between the 5 and 95 percentile; expected an image")
    return Volume(np.clip((volume.data - low) / (high - low), 0, 1), volume.affine, volume.notes)


def _standardize(volume: Volume) -> Volume:
    """z-score over the non-zero voxels; background stays 0."""
    foreground = volume.data != 0
    values = volume.data[foreground]
    # float64 accumulators: two million float32 additions lose digits.
    mean, deviation = (values.mean(dtype=np.float64), values.std(dtype=np.float64)) if values.size else (0.0, 0.0)
    if not deviation > 0:
        raise VolumeError("constant", "the cube has no contrast over its non-zero voxels; expected an image")
    scaled = (volume.data - np.float32(mean)) / np.float32(deviation)
    scaled *= foreground
    return Volume(scaled, volume.affine, volume.notes)
