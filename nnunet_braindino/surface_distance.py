"""Agreement of two masks: Dice, and how far apart their surfaces are in millimetres."""

import math

import numpy as np
from scipy import ndimage

HD95_DEFINITION = (
    "HD95 in mm: surface voxels have a neighbour across a face that is outside the mask or the image; distances from "
    "the centre of every surface voxel of one mask to the nearest of the other; the larger of the two directions' "
    "95th percentiles (linear interpolation), as MONAI has it"
)

_FACES = ndimage.generate_binary_structure(3, 1)


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of two masks; NaN when both are empty, 0 when one is."""
    size = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2 * int(np.count_nonzero(prediction & reference)) / size if size else math.nan


def hd95(prediction: np.ndarray, reference: np.ndarray, *, spacing: tuple[float, float, float]) -> float:
    """The 95th percentile of the Hausdorff distance in mm (``HD95_DEFINITION``); NaN when a mask is empty.

    Args:
        prediction: (X, Y, Z) bool.
        reference: (X, Y, Z) bool.
        spacing: voxel size in mm along x, y, z.
    """
    if not prediction.any() or not reference.any():
        return math.nan
    # Both surfaces lie within the box around both masks, so nothing outside can be nearest.
    box = ndimage.find_objects((prediction | reference).astype(np.uint8))[0]
    surfaces = [surface(mask[box]) for mask in (prediction, reference)]
    return max(
        float(np.percentile(ndimage.distance_transform_edt(~there, sampling=spacing)[here], 95))
        for here, there in (surfaces, surfaces[::-1])
    )


def surface(mask: np.ndarray) -> np.ndarray:
    """(X, Y, Z) bool: voxels of the mask with a neighbour across a face that is outside it, or beyond the array."""
    return mask & ~ndimage.binary_erosion(mask, _FACES)


def diagonal_mm(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> float:
    """The diagonal of a field of view in mm: 373.13 for BraTS (240 x 240 x 155 voxels of 1 mm)."""
    return math.hypot(*(extent * size for extent, size in zip(shape, spacing, strict=True)))
