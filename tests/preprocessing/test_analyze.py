"""Analyze pairs: the voxels of the file, the orientation of the row, whatever the header hints at."""

import struct
from pathlib import Path

import numpy as np
import pytest

from braindino.preprocessing.analyze import read_analyze
from braindino.preprocessing.cohort_table import load_cohort
from braindino.preprocessing.conversion import Conversion, convert, converted_name
from braindino.volume import VolumeError, load_volume

# OASIS-1's SUBJ_111: the first axis runs forwards, the second upwards, the third to the left.
AFFINE = ((0, 0, -1, 80), (1, 0, 0, -128), (0, 1, 0, -128))
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"}


def write(path: Path, data: np.ndarray, *, order: str = ">", code: int = 4, dim: tuple[int, ...] = ()) -> Path:
    """A pair as OASIS-1 has them: big-endian, a fourth axis of 1, a header whose orientation (coronal) is wrong."""
    header = bytearray(348)
    dim = dim or (4, *data.shape, 1)
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}{len(dim)}h", header, 40, *dim)
    struct.pack_into(f"{order}2h", header, 70, code, 8 * np.dtype(TYPES.get(code, "i2")).itemsize)
    struct.pack_into(f"{order}4f", header, 76, 0, 1, 1, 1)
    header[252] = 1
    path.with_suffix(".hdr").write_bytes(header)
    path.write_bytes(data.astype(order + TYPES.get(code, "i2")).tobytes(order="F"))
    return path


def head(shape=(12, 10, 8)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3000, shape)


def test_the_row_of_oasis_1_puts_left_and_right_where_they_belong(tmp_path):
    row = dict(load_cohort("oasis-1").geometry)
    assert row == {"affine": AFFINE, "shape": (256, 256, 160)}
    data = head((256, 256, 160)).astype(np.int16)
    source = write(tmp_path / "OAS1_0001_MR1_mpr_n4_anon_sbj_111.img", data)
    path = tmp_path / converted_name("analyze", "x")
    notes = convert(Conversion(kind="analyze", parameters=tuple(sorted(row.items()))), source, path)
    assert notes == ("declared_orientation", "singleton_squeezed")
    volume = load_volume(path)
    assert volume.shape == (160, 256, 256) and volume.spacing == (1, 1, 1)
    # File axes (forwards, upwards, to the left) to (right, forwards, upwards).
    np.testing.assert_array_equal(volume.data, data.transpose(2, 0, 1)[::-1])
    np.testing.assert_allclose(volume.affine, [[1, 0, 0, -79], [0, 1, 0, -128], [0, 0, 1, -128], [0, 0, 0, 1]])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("code", sorted(TYPES))
def test_every_number_type_and_byte_order_is_read(tmp_path, order, code):
    data = head() % 200
    image = read_analyze(write(tmp_path / "a.img", data, order=order, code=code), {"affine": AFFINE})
    np.testing.assert_array_equal(image.data, data)
    np.testing.assert_array_equal(image.affine, [*AFFINE, (0, 0, 0, 1)])


@pytest.mark.parametrize(
    ("dim", "code", "found"),
    [
        ((4, 12, 10, 4, 2), "four_dimensional", r"\(12, 10, 4, 2\) is a series"),
        ((2, 12, 80), "two_dimensional", r"\(12, 80\)"),
        ((3, 12, 10, 9), "unreadable", r"1920 bytes of voxels; expected 2160"),
        ((3, 12, 10, 7), "unreadable", r"1920 bytes of voxels; expected 1680"),
        ((3, 12, -10, 8), "unreadable", "expected 3 positive ones"),
        ((0, 0, 0, 0), "unreadable", "expected 3 positive ones"),
    ],
)
def test_dimensions_that_make_no_volume_are_refused(tmp_path, dim, code, found):
    with pytest.raises(VolumeError, match=found) as caught:
        read_analyze(write(tmp_path / "a.img", head(), dim=dim), {"affine": AFFINE})
    assert caught.value.code == code


def test_another_grid_than_the_affine_was_declared_for_is_refused(tmp_path):
    with pytest.raises(VolumeError, match=r"shape \(12, 10, 8\); the row declares its affine for \(256") as caught:
        read_analyze(write(tmp_path / "a.img", head()), {"affine": AFFINE, "shape": (256, 256, 160)})
    assert caught.value.code == "wrong_shape"


def test_damaged_and_missing_files_are_unreadable(tmp_path):
    path = write(tmp_path / "a.img", head())
    header = path.with_suffix(".hdr")
    for content, found in ((bytes(348), "expected Analyze's 348"), (header.read_bytes()[:100], "has 100 bytes")):
        header.write_bytes(content)
        with pytest.raises(VolumeError, match=found):
            read_analyze(path, {"affine": AFFINE})
    write(path, head(), code=1792)
    with pytest.raises(VolumeError, match="number type 1792"):
        read_analyze(path, {"affine": AFFINE})
    header.unlink()
    with pytest.raises(VolumeError, match="No such file") as caught:
        read_analyze(path, {"affine": AFFINE})
    assert caught.value.code == "unreadable"


@pytest.mark.parametrize("affine", [None, "RAS", ((1, 0, 0), (0, 1, 0), (0, 0, 1)), ((0, 0, 0, 0),) * 3])
def test_a_row_without_an_affine_is_an_error(tmp_path, affine):
    with pytest.raises(ValueError, match="expected 3 rows of 4 numbers"):
        read_analyze(write(tmp_path / "a.img", head()), {"affine": affine})
