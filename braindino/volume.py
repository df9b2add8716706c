"""Volumes from and to NIfTI files. The only module that touches nibabel.

Every volume in memory is in one frame, RAS+: the first axis runs from left to right, the second from posterior to
anterior, the third from inferior to superior. The affine maps voxel indices to millimetres in that frame.
"""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError
from nibabel.wrapstruct import WrapStructError

from braindino.atomic import replace_file

MAX_NONFINITE_FRACTION = 1e-3
# The thickest clinical slices are 10 mm with a gap of a quarter of that; beyond come scouts of a few slices, and
# headers in another unit than mm. Whole heads in vivo are not scanned finer than 0.2 mm; 0.1 leaves room for zero fill.
SPACING_RANGE_MM = (0.1, 15.0)
# A brain measures about 140 x 170 x 130 mm, a newborn's 65 mm at its lowest; a slab of less than 50 mm holds none.
# Scanners reach 500 mm, padding to a square adds a little; more is a body, or a header in another unit.
FIELD_OF_VIEW_RANGE_MM = (50.0, 600.0)
# At 45 degrees two ways to name the axes are equally good and rounding decides; the steepest planes in use, across the
# hippocampus, lie at 25 to 35.
MAX_OBLIQUENESS_DEG = 40.0
# Heads lie in the coil with a few degrees of tilt anyway; more than that was chosen at the console.
NOTED_OBLIQUENESS_DEG = 5.0
# Quaternions and float32 matrices of one scan agree to a thousandth of a voxel.
NOTED_DISAGREEMENT_DEG, NOTED_DISAGREEMENT_MM = 0.5, 0.5
NIFTI1_HEADER_BYTES, NIFTI2_HEADER_BYTES = 348, 540
SUFFIXES = (".nii", ".nii.gz")

_RAS = np.array([[0, 1], [1, 1], [2, 1]])
_GZIP = b"\x1f\x8b"
# How other things begin that are found under the name of a NIfTI file: (offset, bytes, what it is).
_OTHER_FORMATS = (
    (128, b"DICM", "a DICOM file; prepare its folder as a DICOM series"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (fastMRI, MINC 2)"),
    (0, b"CDF", "a netCDF file (MINC 1)"),
    (0, b"\x00\x00\x00\x01\x00\x00", "a FreeSurfer MGH file; mri_convert makes a NIfTI of it"),
    (0, b"NRRD", "an NRRD file"),
    (0, b"ObjectType", "a MetaImage file"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"PK", "a zip archive; unpack it"),
    (0, b"BZh", "a bzip2 file; unpack it"),
    (0, b"\xfd7zXZ", "an xz file; unpack it"),
    (0, b"version https://git-lfs", "a git-lfs pointer; fetch the data (git lfs pull)"),
    (0, b"/annex/objects", "a git-annex pointer; fetch the data (git annex get)"),
    (0, b"../.git/annex", "a git-annex pointer; fetch the data (git annex get)"),
)


class VolumeError(ValueError):
    """A file that cannot be used as a scan.

    Attributes:
        code: short reason, one of

            - ``truncated``: the file ends before its data do;
            - ``damaged``: a gzip stream that does not decode, or whose checksum is wrong;
            - ``unreadable``: the file system, or a header that contradicts itself;
            - ``not_nifti``: something else under this name, or an Analyze or pair header without its image;
            - ``unsupported_type``: complex or colour voxels;
            - ``two_dimensional``, ``four_dimensional``: not one 3D volume;
            - ``bad_geometry``: an affine that is singular or not finite;
            - ``absurd_spacing``, ``absurd_field_of_view``: no scan of a head has such voxels, or such an extent;
            - ``oblique``: so oblique that its axes have no anatomical names;
            - ``orientation_conflict``: qform and sform name the axes differently;
            - ``non_finite``, ``constant``: many NaN or infinite voxels; one value everywhere;
            - ``not_labels``: a label map was expected, and the values are not whole numbers;

            and what the rooms add on the way: ``label_map``, ``suspicious_mask`` and the codes of conversion.
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
        notes: what was mended, or is worth knowing, e.g. ``singleton_squeezed``, ``nonfinite_replaced=12``,
            ``oblique=12.3deg``, ``qform_sform_differ=1.2deg,3.4mm``, ``no_orientation_code``, ``wrong_extension``.
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


class FileGrid(NamedTuple):
    """How the voxels of a file lie, on its own axes."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    """(4, 4) voxel indices to mm in the RAS+ world."""
    sform_code: int
    qform_code: int
    source: str
    """The file, for messages."""


def load_volume(path: str | Path) -> Volume:
    """The scan at ``path`` in RAS+, as float32.

    The whole file is read, and the checksum of a gzip file is verified; a flipped bit in the voxels of an uncompressed
    one cannot be told. Gzip or not is seen in the content. A singleton fourth axis is squeezed; up to 0.1 % of
    non-finite voxels become 0. What was mended is recorded in ``notes``. Axes are permuted and flipped, never
    resampled: an oblique scan keeps its obliquity in the affine. Where qform and sform are both coded, sform counts.

    Raises:
        FileNotFoundError: there is no such file.
        VolumeError: the file cannot be used; ``code`` says why.
    """
    image, notes = _read(path)
    data, data_notes = _scalar_data(image, path)
    affine, geometry_notes = _checked_affine(image, path)
    notes += data_notes + geometry_notes

    low, high = data.min(), data.max()  # one NaN makes both NaN, an infinity shows in one of them
    if not (np.isfinite(low) and np.isfinite(high)):
        finite = np.isfinite(data)
        num_bad = data.size - int(np.count_nonzero(finite))
        if num_bad > MAX_NONFINITE_FRACTION * data.size:
            raise VolumeError(
                "non_finite",
                f"{path}: {num_bad} of {data.size} voxels are NaN or infinite, more than {MAX_NONFINITE_FRACTION:.1%}; "
                "export the scan again",
            )
        data = np.where(finite, data, np.float32(0))
        notes.append(f"nonfinite_replaced={num_bad}")
        low, high = data.min(), data.max()
    if low == high:
        raise VolumeError("constant", f"{path}: every voxel is {low:g}; expected an image")
    return Volume(*_to_ras(data, affine), notes=tuple(notes))


def check_field_of_view(volume: Volume) -> None:
    """Refuse a volume whose extent along an axis is no scan's of a head.

    Raises:
        VolumeError: code ``absurd_field_of_view``.
    """
    extents = [count * size for count, size in zip(volume.shape, volume.spacing, strict=True)]
    low, high = FIELD_OF_VIEW_RANGE_MM
    if not all(low <= extent <= high for extent in extents):
        raise VolumeError(
            "absurd_field_of_view",
            f"the field of view is {' x '.join(f'{extent:.0f}' for extent in extents)} mm (right, anterior, superior); "
            f"expected {low:.0f} to {high:.0f} mm along each axis, as for a head",
        )


def obliqueness(affine: np.ndarray) -> float:
    """The largest angle, in degrees, between a voxel axis of ``affine`` (4, 4) and the anatomical axis nearest to it.

    0 for a scan along the axes of the world; 45 where one rotation leaves it undecided which axis is which.
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(np.abs(axes).max(axis=0).min(), 0.0, 1.0))))


def load_mask(path: str | Path) -> np.ndarray:
    """The binary mask at ``path``: (X, Y, Z) bool in RAS+, true where the file is above one half."""
    return load_labels(path)[0] > 0


def load_labels(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The label map at ``path``: (X, Y, Z) int16 in RAS+, and its (4, 4) affine. An empty map is legal.

    Raises:
        VolumeError: the file cannot be read, or holds values that are not whole numbers.
    """
    image, _ = _read(path)
    data, _ = _scalar_data(image, path)
    affine, _ = _checked_affine(image, path)
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
    _write(_plain_image(data, affine, dtype), path)


def encode_nifti(data: np.ndarray, affine: np.ndarray, *, dtype: np.typing.DTypeLike) -> bytes:
    """The bytes of the uncompressed file that ``save_array`` would write: for who sends a volume, not stores it."""
    return bytes(_plain_image(data, affine, dtype).to_bytes())


def save_mask_like(mask: np.ndarray, reference_path: str | Path, path: str | Path) -> None:
    """Write a mask made on ``load_volume(reference_path)`` on that file's own grid: its axes, its affine, its
    header codes.

    Args:
        mask: (X, Y, Z) bool in RAS+.
        reference_path: the scan that the mask belongs to.
        path: where the uint8 mask goes.
    """
    save_on_grid(mask, file_grid(reference_path), path, dtype=np.uint8)


def file_grid(path: str | Path) -> FileGrid:
    """The grid that the scan at ``path`` is stored on.

    Raises:
        VolumeError: the file cannot be read, or its geometry cannot be used.
    """
    image, _ = _read(path)
    affine, _ = _checked_affine(image, path)
    codes = int(image.header["sform_code"]) or 1, int(image.header["qform_code"]) or 1
    x, y, z = image.shape[:3]
    return FileGrid((x, y, z), affine, *codes, source=str(path))


def save_on_grid(data: np.ndarray, grid: FileGrid, path: str | Path, *, dtype: np.typing.DTypeLike) -> None:
    """Write values made on ``load_volume`` of a file on that file's own grid, atomically.

    Args:
        data: (X, Y, Z) in RAS+, cast to ``dtype``.
        grid: of that file.
        path: ``.nii`` or ``.nii.gz``.
        dtype: storage type.

    Raises:
        ValueError: ``data`` is not on that grid.
    """
    to_native = nib.orientations.ornt_transform(_RAS, nib.orientations.io_orientation(grid.affine))
    native = nib.orientations.apply_orientation(np.asarray(data, dtype=dtype), to_native)
    if native.shape != grid.shape:
        raise ValueError(
            f"voxels of shape {data.shape} (RAS+): does not fit {grid.source}, whose grid is {grid.shape}; they must "
            "be made on load_volume of that file"
        )
    image = nib.Nifti1Image(native, grid.affine)
    image.set_sform(grid.affine, code=grid.sform_code)
    image.set_qform(grid.affine, code=grid.qform_code)
    image.header.set_xyzt_units(xyz="mm")
    _write(image, path)


def _plain_image(data: np.ndarray, affine: np.ndarray, dtype: np.typing.DTypeLike) -> nib.Nifti1Image:
    """Values as ``dtype`` with one affine for both of a header's forms."""
    image = nib.Nifti1Image(np.asarray(data, dtype=dtype), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units(xyz="mm")
    return image


def _read(path: str | Path) -> tuple[nib.Nifti1Image, list[str]]:
    """The image with its bytes in memory, gzip checksum verified (nibabel stops reading before it), and notes."""
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise VolumeError("not_nifti", f"{path}: expected a file name ending in .nii or .nii.gz")
    raw = path.read_bytes()
    if not raw:
        raise VolumeError("truncated", f"{path}: the file is empty; copy it again")
    is_gzip = raw[:2] == _GZIP
    if is_gzip:
        try:
            raw = gzip.decompress(raw)
        except EOFError as error:
            raise VolumeError("truncated", f"{path}: the gzip stream breaks off ({error}); copy it again") from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise VolumeError("damaged", f"{path}: the gzip stream is damaged ({error}); copy it again") from error
    make = _image_class(raw, path)
    try:
        with np.errstate(all="ignore"):  # what is not finite in the affine is told by _checked_affine
            image = make.from_bytes(raw)
    except (ImageFileError, nib.spatialimages.HeaderDataError, WrapStructError, ValueError, EOFError) as error:
        raise VolumeError("unreadable", f"{path}: a damaged NIfTI header ({error}); export the scan again") from error
    _check_length(image, len(raw), path)
    return image, ["wrong_extension"] if is_gzip != path.name.endswith(".gz") else []


def _image_class(raw: bytes, path: Path) -> type[nib.Nifti1Image]:
    """NIfTI-1 or NIfTI-2, by the header's size and magic."""
    size = {int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")}
    if NIFTI2_HEADER_BYTES in size and raw[4:7] == b"n+2":
        return nib.Nifti2Image
    if NIFTI1_HEADER_BYTES in size and raw[344:347] == b"n+1":
        return nib.Nifti1Image
    if size & {NIFTI1_HEADER_BYTES, NIFTI2_HEADER_BYTES}:
        if len(raw) < NIFTI1_HEADER_BYTES:
            raise VolumeError("truncated", f"{path}: {len(raw)} bytes, less than a header; copy it again")
        found = (
            "the header of a NIfTI pair, whose image is in another file"
            if b"ni1" in raw[344:347] or b"ni2" in raw[4:7]
            else "an Analyze 7.5 header, or a NIfTI header whose magic is damaged"
        )
    else:
        found = _what_is_it(raw)
    raise VolumeError("not_nifti", f"{path}: not a NIfTI file but {found}")


def _what_is_it(raw: bytes) -> str:
    for offset, start, name in _OTHER_FORMATS:
        if raw[offset : offset + len(start)] == start:
            return name
    head = raw[:64]
    if not any(head):
        return "zero bytes: a copy that was never filled"
    if b"<html" in raw[:512].lower() or b"<!doctype html" in raw[:512].lower():
        return "a web page: the download asked for a login"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"text, {head[:32].decode('ascii')!r}"
    return f"something that begins with {raw[:16]!r}"


def _check_length(image: nib.Nifti1Image, num_bytes: int, path: Path) -> None:
    shape, item = image.shape, image.header.get_data_dtype().itemsize
    if min(shape, default=0) < 1:
        raise VolumeError("unreadable", f"{path}: a damaged NIfTI header (shape {shape}); export the scan again")
    proxy: Any = image.dataobj  # the header of a loaded image says 0: nibabel keeps the offset here alone
    expected = int(proxy.offset) + math.prod(int(extent) for extent in shape) * item
    if num_bytes < expected:
        raise VolumeError(
            "truncated",
            f"{path}: {num_bytes} bytes; its header (shape {shape}, {item} bytes per voxel) promises {expected}; "
            "copy it again",
        )


def _checked_affine(image: nib.Nifti1Image, path: str | Path) -> tuple[np.ndarray, list[str]]:
    """Voxel indices to mm, (4, 4) float64, after all that can be wrong with it; and notes."""
    header, notes = image.header, []
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise VolumeError(
            "bad_geometry", f"{path}: affine {affine.tolist()} is singular or not finite; export the scan again"
        )
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    low, high = SPACING_RANGE_MM
    if not ((low <= spacing) & (spacing <= high)).all():
        raise VolumeError(
            "absurd_spacing",
            f"{path}: voxels of {' x '.join(f'{size:.4g}' for size in spacing)} mm; expected {low} to {high} mm along "
            "each axis",
        )
    angle = obliqueness(affine)
    if angle > MAX_OBLIQUENESS_DEG:
        raise VolumeError(
            "oblique",
            f"{path}: its axes lie {angle:.1f} degrees from the nearest anatomical ones; expected at most "
            f"{MAX_OBLIQUENESS_DEG:.0f}, or left, front and top are a matter of rounding; rotate and resample it",
        )
    if angle >= NOTED_OBLIQUENESS_DEG:
        notes.append(f"oblique={angle:.1f}deg")
    if header["qform_code"] == 0 and header["sform_code"] == 0:
        notes.append("no_orientation_code")
    if header["qform_code"] > 0 and header["sform_code"] > 0:
        notes += _compared_forms(image, path)
    return affine, notes


def _compared_forms(image: nib.Nifti1Image, path: str | Path) -> list[str]:
    """A note where qform and sform, both coded, differ a little; an error where they name the axes differently."""
    try:
        with np.errstate(all="ignore"):
            qform, sform = image.header.get_qform(), image.header.get_sform()
    except ValueError as error:
        raise VolumeError(
            "bad_geometry", f"{path}: its qform is no rotation ({error}); export the scan again"
        ) from error
    if np.array_equal(qform, sform):
        return []
    if not np.isfinite(qform).all() or np.linalg.matrix_rank(qform[:3, :3]) < 3:
        raise VolumeError("bad_geometry", f"{path}: qform {qform.tolist()} is singular or not finite; write it again")
    axes = ["".join(nib.aff2axcodes(form)) for form in (qform, sform)]
    if axes[0] != axes[1]:
        raise VolumeError(
            "orientation_conflict",
            f"{path}: its axes run towards {axes[0]} by the qform (code {int(image.header['qform_code'])}) and towards "
            f"{axes[1]} by the sform (code {int(image.header['sform_code'])}); find out which is true and write both",
        )
    turns = [form[:3, :3] / np.linalg.norm(form[:3, :3], axis=0) for form in (qform, sform)]
    degrees = np.degrees(np.arccos(np.clip((turns[0] * turns[1]).sum(axis=0).min(), -1.0, 1.0)))
    extents = np.array(image.shape[:3]) - 1
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * np.append(extents, 1)
    millimetres = np.linalg.norm(corners @ (qform - sform)[:3].T, axis=1).max()
    if degrees < NOTED_DISAGREEMENT_DEG and millimetres < NOTED_DISAGREEMENT_MM:
        return []
    return [f"qform_sform_differ={degrees:.1f}deg,{millimetres:.1f}mm"]


def _scalar_data(image: nib.Nifti1Image, path: str | Path) -> tuple[np.ndarray, list[str]]:
    """(X, Y, Z) float32 on the file's own axes, and notes."""
    notes: list[str] = []
    shape = image.shape
    if image.header.get_data_dtype().kind not in "iuf":
        raise VolumeError(
            "unsupported_type", f"{path}: voxels of type {image.header.get_data_dtype()}; expected real numbers"
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
        raise VolumeError("unreadable", f"{path}: the voxels cannot be read ({error}); copy it again") from error
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
