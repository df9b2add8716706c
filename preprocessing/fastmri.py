"""fastMRI brain files (HDF5): which sequence, and the root-sum-of-squares reconstruction as a volume.

The files hold no patient frame. Which way slices, rows and columns run, and the voxel size where the scan's own header
lacks it, are declared by the cohort's row and recorded in the notes.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import h5py
import numpy as np

from braindino.manifest import UNKNOWN_SEQUENCE
from braindino.preprocessing.cohort_table import CohortRow
from braindino.preprocessing.conversion import Conversion, Image
from braindino.preprocessing.discovery import Candidate, SourceFolder, convert_to, describe, reason_to_leave
from braindino.volume import VolumeError

RECONSTRUCTION, HEADER = "reconstruction_rss", "ismrmrd_header"
#: Token of the file name and of the attribute ``acquisition`` -> sequence. Whole tokens: AXT1 is in AXT1POST.
SEQUENCE_OF_ACQUISITION = {"AXT1": "T1", "AXT1PRE": "T1", "AXT1POST": "T1c", "AXT2": "T2", "AXFLAIR": "FLAIR"}
DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
MAX_HEADER_BYTES = 1 << 20

_NAME = re.compile(r"file_brain_(?P<acquisition>[A-Z0-9]+)_(?P<site>\d+)_(?P<scan>\d+)\.h5")


def read_candidates(folders: Sequence[SourceFolder], *, cohort: CohortRow, out_dir: Path) -> list[Candidate]:
    """One candidate for every HDF5 file below the sources; one open each, of its table of contents only."""
    return [
        _read_candidate(f"{folder.path}/{name}", folder.root, cohort=cohort, out_dir=out_dir)
        for folder in folders
        for name in folder.names
        if name.lower().endswith((".h5", ".hdf5"))
    ]


def _read_candidate(path: str, root: str, *, cohort: CohortRow, out_dir: Path) -> Candidate:
    name = _NAME.fullmatch(Path(path).name)
    acquisition = name["acquisition"] if name else ""
    reason = reason_to_leave(path, root, cohort=cohort)
    if not name:
        reason = reason or "unrecognised: no fastMRI brain file; expected file_brain_AXT1_202_2020109.h5 and the like"
    elif acquisition not in SEQUENCE_OF_ACQUISITION:
        reason = reason or f"other_modality: {acquisition} is none of {', '.join(SEQUENCE_OF_ACQUISITION)}"
    else:
        reason = reason or _reason_inside(Path(path), acquisition)
    sequence = SEQUENCE_OF_ACQUISITION.get(acquisition, UNKNOWN_SEQUENCE)
    # The attribute patient_id may repeat or be absent; the file is what the publishers call a volume.
    found = {"subject": Path(path).stem if name else None, "session": "", "description": acquisition}
    candidate = describe(path, found, cohort=cohort, sequence=sequence, reason=reason)
    return convert_to(out_dir, candidate, Conversion(kind="fastmri", parameters=cohort.geometry), Path(path).name)


def _reason_inside(path: Path, acquisition: str) -> str:
    """Why a file is left by its contents; empty for one to take. An unreadable one is taken: its conversion says why
    it cannot be used."""
    try:
        with h5py.File(path, "r") as file:
            stated = _text(file.attrs.get("acquisition", acquisition))
            if RECONSTRUCTION not in file:
                return f"no_reconstruction: holds no {RECONSTRUCTION}, as the files of the test and challenge parts"
    except (OSError, RuntimeError, KeyError, ValueError):
        return ""
    if stated != acquisition:
        return f"contradiction: the name says {acquisition}, its attribute acquisition {stated!r}"
    return ""


def read_reconstruction(path: Path, parameters: Mapping[str, object]) -> Image:
    """The root-sum-of-squares images of a file as one volume, axes (slice, row, column).

    Args:
        path: the ``.h5``.
        parameters: the row's ``geometry``: ``axes``, three letters of R, L, A, P, S and I for where slices, rows and
            columns run (``SPL``: upwards, backwards, to the left); ``slice_mm``, the distance of slices; ``pixel_mm``,
            used only where the scan's own header lacks it.

    Raises:
        VolumeError: ``unreadable`` (not HDF5, or damaged), ``no_reconstruction`` or ``two_dimensional``.
        ValueError: ``parameters`` do not declare the geometry.
    """
    try:
        with h5py.File(path, "r") as file:
            if RECONSTRUCTION not in file:
                raise VolumeError("no_reconstruction", f"{path}: holds {sorted(file)}; expected {RECONSTRUCTION}")
            data = np.asarray(file[RECONSTRUCTION][()], dtype=np.float32)
            header = file[HEADER][()] if HEADER in file else b""
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, VolumeError):
            raise
        raise VolumeError("unreadable", f"{path}: not HDF5, or damaged ({error}); copy it again") from error
    if data.ndim != 3 or min(data.shape) < 2:
        raise VolumeError("two_dimensional", f"{path}: {RECONSTRUCTION} of shape {data.shape}; expected (slices, h, w)")
    spacing = _spacing(header)
    directions, declared = _declared(parameters)
    slice_mm, row_mm, column_mm = declared[0], declared[1], declared[1]
    notes = ["declared_orientation"]
    if spacing is None:
        notes.append("declared_spacing")
    else:
        # The header tells the slices' thickness but not their distance; they do not overlap.
        slice_mm, row_mm, column_mm = max(slice_mm, spacing.thickness), spacing.row, spacing.column
        notes.append(f"declared_slice_distance={slice_mm:g}mm")
    affine = np.eye(4)
    affine[:3, :3] = directions.T * [slice_mm, row_mm, column_mm]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(data.shape) - 1) / 2)
    return Image(data, affine, tuple(notes))


class _Spacing(NamedTuple):
    row: float
    column: float
    thickness: float


def _spacing(header: bytes | str) -> _Spacing | None:
    """Voxel size in mm from the ISMRMRD header's reconstructed space; None where it does not say."""
    root = _parse_header(header)
    if root is None:
        return None
    values = {}
    for group in ("matrixSize", "fieldOfView_mm"):
        for axis in "xyz":
            text = root.findtext(f"{{*}}encoding/{{*}}reconSpace/{{*}}{group}/{{*}}{axis}", "")
            try:
                values[group, axis] = float(text)
            except ValueError:
                return None
    if not all(np.isfinite(value) and value > 0 for value in values.values()):
        return None
    # x is the read-out, which lies along the rows' index; images are cropped to the matrix, never resampled.
    row, column = (values["fieldOfView_mm", axis] / values["matrixSize", axis] for axis in "xy")
    return _Spacing(row, column, values["fieldOfView_mm", "z"] / values["matrixSize", "z"])


def _parse_header(header: bytes | str) -> ElementTree.Element | None:
    text = header.encode() if isinstance(header, str) else bytes(header)
    # No ISMRMRD header declares a document type; one that does might be an attack by entities.
    if not text or len(text) > MAX_HEADER_BYTES or b"<!" in text:
        return None
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None


def _declared(parameters: Mapping[str, object]) -> tuple[np.ndarray, tuple[float, float]]:
    """(3, 3) unit directions of slices, rows and columns in RAS+; distance of slices and size of pixels in mm."""
    axes, slice_mm, pixel_mm = (parameters.get(name) for name in ("axes", "slice_mm", "pixel_mm"))
    directions = np.array([DIRECTIONS.get(letter, (0, 0, 0)) for letter in str(axes)])
    if (
        directions.shape != (3, 3)
        or abs(np.linalg.det(directions)) != 1
        or not isinstance(slice_mm, (int, float))
        or not isinstance(pixel_mm, (int, float))
        or min(slice_mm, pixel_mm) <= 0
    ):
        raise ValueError(
            f"geometry of fastMRI files: found axes {axes!r}, slice_mm {slice_mm!r}, pixel_mm {pixel_mm!r}; expected "
            "three letters such as SPL and two sizes in mm"
        )
    return directions, (float(slice_mm), float(pixel_mm))


def _text(value: object) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
