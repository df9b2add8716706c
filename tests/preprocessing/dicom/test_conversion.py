"""Series to NIfTI with the real dcm2niix: every voxel where it was, and a reason for every series that cannot be."""

import gzip
import pickle
import shutil
import stat

import numpy as np
import pytest

from braindino.preprocessing import conversion as conversion_module
from braindino.preprocessing.conversion import Conversion, conversion_version, convert, converted_name
from braindino.volume import VolumeError, load_volume

DICOM = Conversion(kind="dicom")


def run(source, tmp_path, conversion=DICOM):
    path = tmp_path / "out" / "converted" / converted_name("dicom", "c/1.2.3")
    notes = convert(conversion, source, path)
    return load_volume(path), notes


def refused(source, tmp_path, conversion=DICOM):
    with pytest.raises(VolumeError) as caught:
        run(source, tmp_path, conversion)
    assert not list((tmp_path / "out").rglob("*.nii.gz")), "nothing is left of a scan that was refused"
    return caught.value


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_every_voxel_lands_where_the_dicom_standard_puts_it(tmp_path, series, voxels, world, plane, order):
    series(tmp_path / "s", plane=plane, order=order)
    volume, notes = run(tmp_path / "s", tmp_path)
    assert notes == ()
    to_index = np.linalg.inv(volume.affine)
    assert sorted(volume.shape) == sorted(voxels.shape)
    for row, column, index in np.ndindex(voxels.shape):
        place = to_index @ [*world(plane, row, column, index), 1]
        nearest = tuple(int(round(value)) for value in place[:3])
        assert np.abs(place[:3] - nearest).max() < 1e-3
        assert volume.data[nearest] == voxels[row, column, index]
