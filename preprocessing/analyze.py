"""Analyze 7.5 pairs (``.hdr`` and ``.img``) with the orientation that their cohort declares.

The format cannot state an orientation, and what headers hint at is wrong in OASIS-1. Only the dimensions, the number
type and the byte order are read from the header; the affine is the row's.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from braindino.preprocessing.conversion import Image
from braindino.volume import VolumeError

HEADER_BYTES = 348
#: Analyze's code of the number type -> numpy's, without byte order; the last four are NIfTI's, used by some writers.
NUMBER_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}

_DIM_AT, _TYPE_AT, _OFFSET_AT = 40, 70, 108


def read_analyze(path: Path, parameters: Mapping[str, object]) -> Image:
    """The image of the pair that ``path`` belongs to; a singleton fourth axis is squeezed.

    Args:
        path: ``.img``, with its ``.hdr`` beside it.
        parameters: ``affine``, the 3 or 4 rows of the affine from the file's axes to the RAS+ world in mm; and, where
            that belongs to one grid only, its ``shape``.

    Raises:
        VolumeError: ``unreadable`` (a file is missing, cut short, or no Analyze file), ``two_dimensional``,
            ``four_dimensional``, or ``wrong_shape`` (another grid than the affine is declared for).
        ValueError: ``parameters`` declare no affine.
    """
    affine = declared_affine(parameters)
    header_path = header_beside(path)
    header = _read(header_path)
    if len(header) < HEADER_BYTES:
        raise VolumeError(
            "unreadable", f"{path}: {header_path.name} has {len(header)} bytes; expected {HEADER_BYTES}; copy it again"
        )
    order = next((order for order in "<>" if struct.unpack_from(f"{order}i", header)[0] == HEADER_BYTES), None)
    if order is None:
        raise VolumeError(
            "unreadable", f"{path}: {header_path.name} begins with {header[:4]!r}; expected Analyze's 348"
        )
    dim = struct.unpack_from(f"{order}8h", header, _DIM_AT)
    (code,) = struct.unpack_from(f"{order}h", header, _TYPE_AT)
    (offset,) = struct.unpack_from(f"{order}f", header, _OFFSET_AT)
    shape = dim[1 : 1 + dim[0]] if 1 <= dim[0] <= 7 else ()
    if code not in NUMBER_TYPES or not shape or min(shape) < 1 or not 0 <= offset < 1 << 20:
        raise VolumeError(
            "unreadable",
            f"{path}: {header_path.name} says dimensions {dim}, number type {code}, offset {offset:g}; expected 3 "
            f"positive ones and a type of {sorted(NUMBER_TYPES)}",
        )
    if any(extent > 1 for extent in shape[3:]):
        raise VolumeError("four_dimensional", f"{path}: shape {shape} is a series; expected one 3D volume")
    notes = ["declared_orientation", *(["singleton_squeezed"] if len(shape) > 3 else [])]
    grid = shape[:3]
    if len(grid) < 3 or min(grid) < 2:
        raise VolumeError("two_dimensional", f"{path}: shape {shape}; expected a 3D volume")
    wanted = parameters.get("shape")
    if wanted is not None and tuple(grid) != wanted:
        raise VolumeError("wrong_shape", f"{path}: shape {grid}; the row declares its affine for {wanted}")
    number_type = np.dtype(order + NUMBER_TYPES[code])
    raw, needed = _read(path)[int(offset) :], int(np.prod(grid)) * number_type.itemsize
    if len(raw) != needed:
        raise VolumeError(
            "unreadable", f"{path}: {len(raw)} bytes of voxels; expected {needed} for {grid} {number_type.name}"
        )
    # The first axis varies fastest.
    return Image(np.frombuffer(raw, number_type).reshape(grid, order="F"), affine, tuple(notes))


def header_beside(path: Path) -> Path:
    """The header that belongs to the ``.img`` at ``path``, in the same spelling."""
    return path.with_suffix(".HDR" if path.suffix.isupper() else ".hdr")


def declared_affine(parameters: Mapping[str, object]) -> np.ndarray:
    """The (4, 4) affine that ``parameters`` declare.

    Raises:
        ValueError: there is none, or it is no invertible affine.
    """
    declared = parameters.get("affine")
    try:
        rows = np.array(declared, dtype=np.float64)
    except (TypeError, ValueError):
        rows = np.empty(0)
    if rows.shape == (3, 4):
        rows = np.vstack([rows, [0, 0, 0, 1]])
    if rows.shape != (4, 4) or not np.isfinite(rows).all() or np.linalg.matrix_rank(rows) < 4:
        raise ValueError(f"geometry of Analyze files: found affine {declared!r}; expected 3 rows of 4 numbers")
    return rows


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise VolumeError("unreadable", f"{path}: {error.strerror or error}") from error
