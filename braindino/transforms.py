"""From a brain volume to the standard cube that every encoder here sees (paper sec. 4.1.2). Pure: Volume -> Volume.

The order is the paper's: crop to the box of non-zero voxels, resize to 256 x 256 x 256, clip to the 0.5-99.5
percentile, z-score.
"""

import numpy as np

from braindino.volume import Volume, VolumeError

CUBE_SHAPE = (256, 256, 256)
CLIP_PERCENTILES = (0.5, 99.5)


def crop_to_foreground(volume: Volume) -> Volume:
    """The smallest box that holds every non-zero voxel; world coordinates are kept.

    Raises:
        VolumeError: code ``constant`` when there is no such voxel.
    """
    foreground = volume.data != 0
    slices = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        indices = np.flatnonzero(foreground.any(axis=others))
        if indices.size == 0:
            raise VolumeError("constant", "no non-zero voxel is left; expected a brain (was the skull-strip empty?)")
        slices.append(slice(int(indices[0]), int(indices[-1]) + 1))
    start = np.array([part.start for part in slices], dtype=np.float64)
    affine = volume.affine.copy()
    affine[:3, 3] += volume.affine[:3, :3] @ start
    return Volume(volume.data[tuple(slices)], affine, volume.notes)


def resize(volume: Volume, shape: tuple[int, int, int] = CUBE_SHAPE) -> Volume:
    """Trilinear resampling of the same field of view onto ``shape`` voxels; spacing becomes anisotropic where the
    box was.

    Voxel centres lie at half-integer positions of the field of view, and values outside the outermost centres are
    those of the nearest voxel: the convention of ``scipy.ndimage.zoom(order=1, grid_mode=True, mode="nearest")``
    and of ``torch.nn.functional.interpolate(align_corners=False)``. Linear interpolation is separable, so each axis
    is done once, with two gathers, smallest growth first.
    """
    data = np.ascontiguousarray(volume.data, dtype=np.float32)
    for axis in sorted(range(3), key=lambda axis: shape[axis] / data.shape[axis]):
        data = _resize_axis(data, axis, shape[axis])
    scale = np.array(volume.shape, dtype=np.float64) / np.array(shape)
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, :3] * scale
    affine[:3, 3] += volume.affine[:3, :3] @ (0.5 * scale - 0.5)
    return Volume(data, affine, volume.notes)


def normalize_intensity(volume: Volume) -> Volume:
    """Clip to the 0.5-99.5 percentile of the volume, then z-score over its non-zero voxels.

    Background (voxels that are exactly 0) stays 0. Why: the mean of the foreground is the one value that says
    "nothing known here" to a network fed with z-scores; it is what nnU-Net's masked z-score and zero padding give,
    so pretraining, features and segmentation see the same background; and the literal alternative, minus mean over
    deviation, differs from scan to scan and would tell the encoder which scanner it looks at. See
    docs/decisions.md.

    Raises:
        VolumeError: code ``constant`` when the foreground has no contrast after clipping.
    """
    foreground = volume.data != 0
    low, high = np.percentile(volume.data, CLIP_PERCENTILES).astype(np.float32)
    clipped = np.clip(volume.data, low, high)
    values = clipped[foreground]
    # float64 accumulators: sixteen million float32 additions lose the third digit.
    mean, deviation = (values.mean(dtype=np.float64), values.std(dtype=np.float64)) if values.size else (0.0, 0.0)
    if not deviation > 0:
        raise VolumeError("constant", "no contrast is left between the 0.5 and 99.5 percentile; expected an image")
    scaled = (clipped - np.float32(mean)) / np.float32(deviation)
    scaled *= foreground
    return Volume(scaled, volume.affine, volume.notes)


def standardize(volume: Volume) -> Volume:
    """The brain volume as every encoder sees it: cropped, 256 x 256 x 256, z-scored; the one pipeline used anywhere."""
    return normalize_intensity(resize(crop_to_foreground(volume)))


def _resize_axis(data: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear interpolation along one axis at half-pixel centres, edges held."""
    length = data.shape[axis]
    if length == size:
        return data
    if length == 1:
        return np.repeat(data, size, axis=axis)
    position = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    lower = np.minimum(position.astype(np.intp), length - 2)
    weight = (position - lower).astype(np.float32).reshape([size if a == axis else 1 for a in range(3)])
    below = np.take(data, lower, axis=axis)
    result = np.take(data, lower + 1, axis=axis)
    result -= below
    result *= weight
    result += below
    return result
