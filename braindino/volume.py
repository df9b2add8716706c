"""Volumes from and to NIfTI files. The only module that touches nibabel.

Every volume in memory is in one frame, RAS+: the first axis runs from left to right, the second from posterior to
anterior, the third from inferior to superior. The affine maps voxel indices to millimetres in that frame.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError
from nibabel.wrapstruct import WrapStructError

from braindino.atomic import replace_file

MAX_NONFINITE_FRACTION = 1e-3
SPACING_RANGE_MM = (0.05, 25.0)
NIFTI1_HEADER_BYTES, NIFTI2_HEADER_BYTES = 348, 540
SUFFIXES = (".nii", ".nii.gz")

_RAS = np.array([[0, 1], [1, 1], [2, 1]])


class VolumeError(ValueError):
    """A file that cannot be used as a scan.

    Attributes:
        code: short reason: ``unreadable``, ``not_nifti``, ``two_dimensional``, ``four_dimensional``,
            ``non_finite``, ``constant``, ``label_map`` or ``bad_geometry``.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple:
        # Exceptions cross process borders in worker pools; the default would call __init__ with one argument.
        return type(self), (self.code, self.message)


@dataclass(frozen=True, eq=False)
class Volume:
    """A scalar 3D image in RAS+.

    Attributes:
        data: (X, Y, Z) float32; x to the right, y to the front, z upwards.
        affine: (4, 4) float64, voxel indices to millimetres.
        notes: what had to be mended on the way in, e.g. ``singleton_squeezed`` or ``nonfinite_replaced=12``.
    """

    data: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.data.shape
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along x, y, z."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return float(x), float(y), float(z)


def load_volume(path: str | Path) -> Volume:
    """The scan at ``path`` in RAS+, as float32.

    The whole file is read, and the checksum of a gzip file is verified. A singleton fourth axis is squeezed; up to
    0.1 % of non-finite voxels become 0; both are recorded in ``notes``. Axes are permuted and flipped, never
    resampled: an oblique scan keeps its obliquity in the affine.

    Raises:
        FileNotFoundError: there is no such file.
        VolumeError: the file cannot be used; ``code`` says why.
    """
    image = _read(path)
    affine = _checked_affine(image, path)
    data, notes = _scalar_data(image, path)
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        notes.append("no_orientation_code")

    finite = np.isfinite(data)
    num_bad = data.size - int(np.count_nonzero(finite))
    if num_bad > MAX_NONFINITE_FRACTION * data.size:
        raise VolumeError(
            "non_finite",
            f"{path}: {num_bad} of {data.size} voxels are NaN or infinite, more than {MAX_NONFINITE_FRACTION:.1%}; "
            "export the scan again",
        )
    if num_bad:
        data = np.where(finite, data, np.float32(0))
        notes.append(f"nonfinite_replaced={num_bad}")
    if data.min() == data.max():
        raise VolumeError("constant", f"{path}: every voxel is {data.flat[0]:g}; expected an image")
    return Volume(*_to_ras(data, affine), notes=tuple(notes))


def load_mask(path: str | Path) -> np.ndarray:
    """The binary mask at ``path``: (X, Y, Z) bool in RAS+, true where the file is above one half."""
    return load_labels(path)[0] > 0


def load_labels(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The label map at ``path``: (X, Y, Z) int16 in RAS+, and its (4, 4) affine. An empty map is legal.

    Raises:
        VolumeError: the file cannot be read, or holds values that are not whole numbers.
    """
    image = _read(path)
    affine = _checked_affine(image, path)
    data, _ = _scalar_data(image, path)
    labels = np.rint(data)
    # Some releases store masks as floats with values such as 0.9999.
    if not np.isfinite(data).all() or np.abs(data - labels).max() > 1e-2:
        raise VolumeError("not_labels", f"{path}: holds values that are not whole numbers; expected a label map")
    return _to_ras(labels.astype(np.int16), affine)


def save_volume(volume: Volume, path: str | Path) -> None:
    """Write ``volume`` as float32 NIfTI in RAS+, atomically."""
    save_array(volume.data, volume.affine, path, dtype=np.float32)


def save_array(data: np.ndarray, affine: np.ndarray, path: str | Path, *, dtype: np.typing.DTypeLike) -> None:
    """Write an array with its affine as they are, in whatever orientation that is, atomically.

    Args:
        data: (X, Y, Z) values, cast to ``dtype``.
        affine: (4, 4) voxel indices to millimetres in the RAS+ world.
        path: ``.nii`` or ``.nii.gz``.
        dtype: storage type, e.g. ``np.int16`` as scanners write, ``np.uint8`` for labels.
    """
    image = nib.Nifti1Image(np.asarray(data, dtype=dtype), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units(xyz="mm")
    _write(image, path)


def save_mask_like(mask: np.ndarray, reference_path: str | Path, path: str | Path) -> None:
    """Write a mask made on ``load_volume(reference_path)`` on that file's own grid: its axes, its affine, its
    header codes.

    Args:
        mask: (X, Y, Z) bool in RAS+.
        reference_path: the scan that the mask belongs to.
        path: where the uint8 mask goes.
    """
    reference = _read(reference_path)
    to_native = nib.orientations.ornt_transform(_RAS, nib.orientations.io_orientation(reference.affine))
    native = nib.orientations.apply_orientation(np.asarray(mask, dtype=np.uint8), to_native)
    if native.shape != reference.shape[:3]:
        raise ValueError(
            f"mask of shape {mask.shape} (RAS+) does not fit {reference_path}, whose grid is {reference.shape[:3]}; "
            "it must be made on load_volume of that file"
        )
    image = nib.Nifti1Image(native, reference.affine)
    image.set_sform(reference.affine, code=int(reference.header["sform_code"]) or 1)
    image.set_qform(reference.affine, code=int(reference.header["qform_code"]) or 1)
    image.header.set_xyzt_units(xyz="mm")
    _write(image, path)


def _read(path: str | Path) -> nib.Nifti1Image:
    """The image with its bytes in memory, gzip checksum verified (nibabel stops reading before it)."""
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise VolumeError("not_nifti", f"{path}: expected a file name ending in .nii or .nii.gz")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise VolumeError(
                "unreadable", f"{path}: truncated or damaged gzip stream ({error}); copy it again"
            ) from error
    try:
        size = int.from_bytes(raw[:4], "little")
        two = NIFTI2_HEADER_BYTES in (size, int.from_bytes(raw[:4], "big"))
        return (nib.Nifti2Image if two else nib.Nifti1Image).from_bytes(raw)
    except (ImageFileError, nib.spatialimages.HeaderDataError, WrapStructError, ValueError, EOFError) as error:
        raise VolumeError(
            "not_nifti", f"{path}: not a NIfTI file ({error}); found {raw[:16]!r} at its start"
        ) from error


def _checked_affine(image: nib.Nifti1Image, path: str | Path) -> np.ndarray:
    affine = np.asarray(image.affine, dtype=np.float64)
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    low, high = SPACING_RANGE_MM
    if (
        not np.isfinite(affine).all()
        or np.linalg.matrix_rank(affine[:3, :3]) < 3
        or not ((low < spacing) & (spacing < high)).all()
    ):
        raise VolumeError(
            "bad_geometry",
            f"{path}: voxel size {np.round(spacing, 4).tolist()} mm or a singular orientation; "
            f"expected three axes with {low} to {high} mm per voxel",
        )
    return affine


def _scalar_data(image: nib.Nifti1Image, path: str | Path) -> tuple[np.ndarray, list[str]]:
    """(X, Y, Z) float32 on the file's own axes, and notes."""
    notes: list[str] = []
    shape = image.shape
    if image.header.get_data_dtype().kind not in "iuf":
        raise VolumeError(
            "unreadable", f"{path}: voxels of type {image.header.get_data_dtype()}; expected real numbers"
        )
    if len(shape) > 3 and all(extent == 1 for extent in shape[3:]):
        notes.append("singleton_squeezed")
        shape = shape[:3]
    if len(shape) > 3:
        raise VolumeError(
            "four_dimensional", f"{path}: shape {shape} is a series; expected one 3D volume: split it first"
        )
    if len(shape) < 3 or min(shape) < 2:
        raise VolumeError(
            "two_dimensional", f"{path}: shape {shape}; expected a 3D volume of at least 2 voxels per axis"
        )
    try:
        data = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (OSError, ValueError, EOFError) as error:
        raise VolumeError(
            "unreadable", f"{path}: voxel data are truncated or damaged ({error}); copy it again"
        ) from error
    return data.reshape(shape, order="A"), notes


def _to_ras(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        orientation = nib.orientations.io_orientation(affine)
    except OrientationError as error:  # cannot happen after _checked_affine; said as ours if it does
        raise AssertionError(f"orientation of a checked affine {affine.tolist()}") from error
    ras = nib.orientations.apply_orientation(data, orientation)
    return ras, affine @ nib.orientations.inv_ornt_aff(orientation, data.shape)


def _write(image: nib.Nifti1Image, path: str | Path) -> None:
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: expected a file name ending in .nii or .nii.gz")
    with replace_file(path) as temporary:
        nib.save(image, temporary)
