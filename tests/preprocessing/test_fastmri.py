"""fastMRI: the sequence by the exact token, the geometry declared and said so, a reason for every file that is left."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from braindino.preprocessing.cohort_table import load_cohort
from braindino.preprocessing.conversion import Conversion, convert, converted_name
from braindino.preprocessing.discovery import find_candidates
from braindino.preprocessing.fastmri import read_reconstruction
from braindino.volume import VolumeError, load_volume

GEOMETRY = {"axes": "SAL", "slice_mm": 5.0, "pixel_mm": 0.7}
HEADER = (
    '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>'
    "<encodedSpace><matrixSize><x>48</x><y>12</y><z>1</z></matrixSize></encodedSpace><reconSpace>"
    "<matrixSize><x>24</x><y>20</y><z>1</z></matrixSize>"
    "<fieldOfView_mm><x>36</x><y>40</y><z>6.5</z></fieldOfView_mm></reconSpace></encoding></ismrmrdHeader>"
)


def images(shape=(9, 24, 20)) -> np.ndarray:
    return np.random.default_rng(3).random(shape).astype(np.float32)


def write(path: Path, *, data: np.ndarray | None = None, header: str = HEADER, acquisition: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["kspace"] = np.zeros((2, 2), np.complex64)
        if data is not None:
            file["reconstruction_rss"] = data
        if header:
            file["ismrmrd_header"] = header
        if acquisition:
            file.attrs["acquisition"] = acquisition
    return path


def test_the_sequence_is_the_exact_token_and_everything_else_is_left_with_a_reason(tmp_path):
    tokens = {"AXT1": "T1", "AXT1PRE": "T1", "AXT1POST": "T1c", "AXT2": "T2", "AXFLAIR": "FLAIR"}
    for number, token in enumerate(tokens):
        write(
            tmp_path / f"in/multicoil_train/file_brain_{token}_202_200000{number}.h5", data=images(), acquisition=token
        )
    left = {
        "in/multicoil_test/file_brain_AXT2_200_6000001.h5": "no_reconstruction",
        "in/multicoil_val/file_brain_AXT2_200_6000002.h5": "contradiction",
        "in/multicoil_val/file_brain_AXPD_200_6000003.h5": "other_modality",
        "in/knee/file1000001.h5": "unrecognised",
    }
    for name in left:
        write(tmp_path / name, data=None if "test" in name else images(), acquisition="AXT1" if "02.h5" in name else "")
    (tmp_path / "in/multicoil_val/file_brain_AXT2_200_6000004.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    found = find_candidates([str(tmp_path / "in")], out_dir=tmp_path / "out", cohort=load_cohort("fastmri-brain"))
    taken = {candidate.scan.subject: candidate for candidate in found if candidate.scan.status == "done"}
    assert {name: c.scan.sequence for name, c in taken.items() if not name.endswith("6000004")} == {
        f"file_brain_{token}_202_200000{number}": sequence for number, (token, sequence) in enumerate(tokens.items())
    }
    reasons = {c.scan.path: c.scan.reason.partition(":")[0] for c in found if c.scan.status == "skipped"}
    assert reasons == {str(tmp_path / name): code for name, code in left.items()}
    assert len(found) == 10

    one = taken["file_brain_AXT1POST_202_2000002"]
    assert one.scan.source.endswith("file_brain_AXT1POST_202_2000002.h5")
    notes = convert(one.conversion, Path(one.scan.source), Path(one.scan.path))
    assert notes == ("declared_orientation", "declared_slice_distance=6.5mm")
    assert load_volume(one.scan.path).shape == (20, 24, 9)

    broken = taken["file_brain_AXT2_200_6000004"]
    with pytest.raises(VolumeError, match="not HDF5, or damaged") as caught:
        convert(broken.conversion, Path(broken.scan.source), Path(broken.scan.path))
    assert caught.value.code == "unreadable"


def test_voxels_lie_where_the_row_declares_them_with_the_size_that_the_header_states(tmp_path):
    data = images()
    source, path = write(tmp_path / "a.h5", data=data), tmp_path / converted_name("fastmri", "a")
    conversion = Conversion(kind="fastmri", parameters=tuple(sorted(GEOMETRY.items())))
    assert convert(conversion, source, path) == ("declared_orientation", "declared_slice_distance=6.5mm")
    volume = load_volume(path)
    assert volume.spacing == pytest.approx((40 / 20, 36 / 24, 6.5))
    # Slices upwards, rows forwards, columns to the left: RAS+ has the columns reversed.
    np.testing.assert_array_equal(volume.data, data.transpose(2, 1, 0)[::-1])


def test_without_a_header_the_declared_size_holds_and_is_said(tmp_path):
    image = read_reconstruction(write(tmp_path / "a.h5", data=images(), header=""), {**GEOMETRY, "axes": "IPR"})
    assert image.notes == ("declared_orientation", "declared_spacing")
    np.testing.assert_allclose(image.affine[:3, :3], [[0, 0, 0.7], [0, -0.7, 0], [-5, 0, 0]])


@pytest.mark.parametrize(
    "header",
    [
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + HEADER.replace("<x>24</x>", "<x>&a;</x>"),
        '<!DOCTYPE x [<!ENTITY a "24">]>' + HEADER.partition("?>")[2].replace("<x>24</x>", "<x>&a;</x>"),
        HEADER[:-20],
        HEADER.replace("<x>36</x>", "<x>wide</x>"),
        HEADER.replace("<x>24</x>", "<x>0</x>"),
        HEADER.replace("<x>24</x>", "<x>nan</x>"),
        "x" * (2 << 20),
    ],
)
def test_a_header_with_entities_or_without_sense_is_as_good_as_none(tmp_path, header):
    image = read_reconstruction(write(tmp_path / "a.h5", data=images(), header=header), GEOMETRY)
    assert image.notes == ("declared_orientation", "declared_spacing")


def test_what_is_no_volume_is_refused(tmp_path):
    for data, code in ((None, "no_reconstruction"), (images((24, 20)), "two_dimensional")):
        with pytest.raises(VolumeError) as caught:
            read_reconstruction(write(tmp_path / "a.h5", data=data), GEOMETRY)
        assert caught.value.code == code
    truncated = write(tmp_path / "b.h5", data=images())
    truncated.write_bytes(truncated.read_bytes()[:3000])
    with pytest.raises(VolumeError, match="damaged") as caught:
        read_reconstruction(truncated, GEOMETRY)
    assert caught.value.code == "unreadable"


@pytest.mark.parametrize("wrong", [{"axes": "SAA"}, {"axes": "SA"}, {"axes": None}, {"slice_mm": 0}, {"pixel_mm": "1"}])
def test_a_row_that_declares_no_geometry_is_an_error(tmp_path, wrong):
    path = write(tmp_path / "a.h5", data=images())
    with pytest.raises(ValueError, match=re.escape("expected three letters such as SPL")):
        read_reconstruction(path, {**GEOMETRY, **wrong})
