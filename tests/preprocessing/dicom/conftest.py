"""Small DICOM series written with pydicom, as a scanner writes them: one file per slice, in the patient's frame."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

#: Of each plane: direction of columns' index (along a row), of rows' index, of slices; DICOM's frame (left, posterior,
#: superior).
PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "coronal": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
}
SPACING_MM = (2.0, 3.0, 4.0)  # along a row, along a column, between slices
ORIGIN_MM = (-20.0, -30.0, -10.0)
SHAPE = (24, 28, 12)  # rows, columns, slices


def phantom() -> np.ndarray:
    """(rows, columns, slices) uint16: no symmetry, every voxel its own value."""
    values = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)
    return np.random.default_rng(5).permutation(values.ravel()).reshape(SHAPE)


def write_series(
    folder: Path,
    *,
    plane: str = "axial",
    voxels: np.ndarray | None = None,
    uid: str = "",
    study: str = "1.2.826.0.1.1",
    first: int = 1,
    skip: Iterable[int] = (),
    name: str = "1-{number:03d}.dcm",
    order: int = 1,
    **tags: Any,
) -> str:
    """Write one series; its SeriesInstanceUID.

    Args:
        folder: where to.
        plane: of the slices.
        voxels: (rows, columns, slices) uint16.
        first: number of the first image.
        skip: slices not to write.
        name: of a file.
        order: -1 numbers the images from the far end.
        tags: further DICOM keywords; a callable gets the slice.
    """
    voxels = phantom() if voxels is None else voxels
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    along_row, along_column, normal = (np.array(direction, float) for direction in PLANES[plane])
    for index in range(voxels.shape[2]):
        if index in skip:
            continue
        number = first + (index if order == 1 else voxels.shape[2] - 1 - index)
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = MRImageStorage
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = generate_uid()
        image.SeriesInstanceUID, image.StudyInstanceUID, image.FrameOfReferenceUID = uid, study, study + ".9"
        image.PatientID, image.PatientName, image.Modality = "P1", "Doe^Jane", "MR"
        image.StudyDate, image.StudyTime, image.SeriesTime = "20010203", "101500", "102000"
        image.SeriesNumber, image.InstanceNumber, image.AcquisitionNumber = 3, number, 1
        image.SeriesDescription, image.Manufacturer = "AX T2", "GE MEDICAL SYSTEMS"
        image.ImageType, image.PatientPosition = ["ORIGINAL", "PRIMARY", "OTHER"], "HFS"
        image.ScanningSequence, image.MRAcquisitionType = "SE", "2D"
        image.RepetitionTime, image.EchoTime, image.EchoNumbers = 4000, 90, 1
        image.Rows, image.Columns = voxels.shape[:2]
        image.ImageOrientationPatient = [*along_row.tolist(), *along_column.tolist()]
        image.ImagePositionPatient = (np.array(ORIGIN_MM) + index * SPACING_MM[2] * normal).tolist()
        image.PixelSpacing = [SPACING_MM[1], SPACING_MM[0]]
        image.SliceThickness = image.SpacingBetweenSlices = SPACING_MM[2]
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 0
        image.PixelData = np.ascontiguousarray(voxels[:, :, index]).astype("<u2").tobytes()
        for keyword, value in tags.items():
            setattr(image, keyword, value(index) if callable(value) else value)
        image.save_as(folder / name.format(number=number), enforce_file_format=True)
    return uid


@pytest.fixture
def series() -> Callable[..., str]:
    """:func:`write_series`."""
    return write_series


@pytest.fixture
def voxels() -> np.ndarray:
    """:func:`phantom`."""
    return phantom()


def world_of(plane: str, row: int, column: int, index: int) -> np.ndarray:
    """(3,) mm in RAS+ of a voxel, by the DICOM standard's equation (PS3.3 C.7.6.2.1.1)."""
    along_row, along_column, normal = (np.array(direction, float) for direction in PLANES[plane])
    lps = (
        np.array(ORIGIN_MM)
        + column * SPACING_MM[0] * along_row
        + row * SPACING_MM[1] * along_column
        + index * SPACING_MM[2] * normal
    )
    return lps * [-1, -1, 1]


@pytest.fixture
def world() -> Callable[[str, int, int, int], np.ndarray]:
    """:func:`world_of`."""
    return world_of
