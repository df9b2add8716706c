"""Volumes: left stays left, nothing is half read, every refusal has its code."""

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from braindino.volume import (
    VolumeError,
    load_labels,
    load_mask,
    load_volume,
    save_array,
    save_mask_like,
    save_volume,
)

# One bright voxel block per anatomical direction, all different: any flip or permutation shows.
ASYMMETRIC = np.zeros((7, 9, 11), dtype=np.float32)
ASYMMETRIC[6, 4, 5], ASYMMETRIC[3, 8, 5], ASYMMETRIC[3, 4, 10] = 10.0, 20.0, 30.0  # right, anterior, superior
ASYMMETRIC[3, 4, 5] = 1.0
AFFINE = np.array([[1.0, 0, 0, -3], [0, 1.5, 0, -6], [0, 0, 2.0, -10], [0, 0, 0, 1]])

ORIENTATIONS = [
    "".join(axis[sign] for axis, sign in zip(order, signs, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product((0, 1), repeat=3)
]


def write_as(codes: str, path: Path) -> None:
    """The asymmetric phantom stored in orientation ``codes``, written with nibabel alone."""
    image = nib.Nifti1Image(ASYMMETRIC, AFFINE)
    start = nib.orientations.io_orientation(AFFINE)
    transform = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(transform), path)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_storage_orientation_loads_to_the_same_brain(codes: str, tmp_path: Path) -> None:
    write_as(codes, tmp_path / "scan.nii.gz")
    volume = load_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(volume.data, ASYMMETRIC)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.spacing == pytest.approx((1.0, 1.5, 2.0))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
def test_a_mask_goes_back_onto_the_grid_it_came_from(codes: str, tmp_path: Path) -> None:
    write_as(codes, tmp_path / "scan.nii.gz")
    mask = load_volume(tmp_path / "scan.nii.gz").data == 10.0
    save_mask_like(mask, tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
    scan, written = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj) == 1, np.asarray(scan.dataobj) == 10.0)
    np.testing.assert_allclose(written.affine, scan.affine, atol=1e-5)
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.nii.gz"), mask)


def test_a_mask_of_another_grid_is_refused(tmp_path: Path) -> None:
    write_as("LPS", tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match=r"mask of shape \(7, 9, 10\).*does not fit"):
        save_mask_like(np.ones((7, 9, 10), bool), tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
    assert not (tmp_path / "mask.nii.gz").exists()


def test_an_oblique_scan_keeps_its_world_coordinates(tmp_path: Path) -> None:
    turn = nib.eulerangles.euler2mat(0.2, 0.1, -0.15)
    oblique = AFFINE.copy()
    oblique[:3, :3] = turn @ AFFINE[:3, :3] @ np.diag([-1, -1, 1])
    nib.save(nib.Nifti1Image(ASYMMETRIC, oblique), tmp_path / "oblique.nii")
    volume = load_volume(tmp_path / "oblique.nii")
    before = oblique @ [6, 4, 5, 1]
    after = volume.affine @ [*np.argwhere(volume.data == 10.0)[0], 1]
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_integer_scans_are_scaled_as_their_header_says(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, 3.0)
    nib.save(image, tmp_path / "scaled.nii")
    stored = nib.load(tmp_path / "scaled.nii").get_fdata()
    np.testing.assert_allclose(load_volume(tmp_path / "scaled.nii").data, stored)


def test_a_singleton_fourth_axis_is_squeezed_and_recorded(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(ASYMMETRIC[..., None], AFFINE), tmp_path / "single.nii.gz")
    volume = load_volume(tmp_path / "single.nii.gz")
    assert volume.shape == (7, 9, 11)
    assert "singleton_squeezed" in volume.notes


def test_a_lone_nan_becomes_background_and_is_recorded(tmp_path: Path) -> None:
    data = np.ones((12, 12, 12), dtype=np.float32)
    data[0, 0, 0], data[1, 1, 1] = np.nan, 5.0
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "nan.nii.gz")
    volume = load_volume(tmp_path / "nan.nii.gz")
    assert volume.data[0, 0, 0] == 0.0
    assert "nonfinite_replaced=1" in volume.notes


def refusal(path: Path) -> str:
    with pytest.raises(VolumeError) as error:
        load_volume(path)
    assert path.name in str(error.value)
    return error.value.code


def test_every_unusable_file_is_refused_with_its_own_code(tmp_path: Path) -> None:
    save_array(ASYMMETRIC, AFFINE, tmp_path / "good.nii.gz", dtype=np.float32)
    whole = (tmp_path / "good.nii.gz").read_bytes()

    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert refusal(tmp_path / "cut.nii.gz") == "unreadable"

    flipped = bytearray(whole)
    flipped[-6] ^= 0xFF  # in the checksum: the voxels still decode
    (tmp_path / "flipped.nii.gz").write_bytes(flipped)
    assert refusal(tmp_path / "flipped.nii.gz") == "unreadable"

    raw = gzip.decompress(whole)
    (tmp_path / "short.nii").write_bytes(raw[:-100])
    assert refusal(tmp_path / "short.nii") == "unreadable"

    (tmp_path / "text.nii.gz").write_text("this is no image")
    assert refusal(tmp_path / "text.nii.gz") == "not_nifti"
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    assert refusal(tmp_path / "empty.nii.gz") == "not_nifti"
    (tmp_path / "image.png").write_bytes(raw)
    assert refusal(tmp_path / "image.png") == "not_nifti"

    nib.save(nib.Nifti1Image(np.stack([ASYMMETRIC] * 3, -1), AFFINE), tmp_path / "series.nii.gz")
    assert refusal(tmp_path / "series.nii.gz") == "four_dimensional"
    nib.save(nib.Nifti1Image(ASYMMETRIC[:, :, 5], AFFINE), tmp_path / "flat.nii.gz")
    assert refusal(tmp_path / "flat.nii.gz") == "two_dimensional"

    nib.save(nib.Nifti1Image(np.where(ASYMMETRIC > 0, ASYMMETRIC, np.nan), AFFINE), tmp_path / "nans.nii.gz")
    assert refusal(tmp_path / "nans.nii.gz") == "non_finite"
    nib.save(nib.Nifti1Image(np.zeros_like(ASYMMETRIC), AFFINE), tmp_path / "zeros.nii.gz")
    assert refusal(tmp_path / "zeros.nii.gz") == "constant"

    nib.save(nib.Nifti1Image(ASYMMETRIC, np.diag([400.0, 1, 1, 1])), tmp_path / "huge.nii.gz")
    assert refusal(tmp_path / "huge.nii.gz") == "bad_geometry"
    colour = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, AFFINE), tmp_path / "colour.nii.gz")
    assert refusal(tmp_path / "colour.nii.gz") == "unreadable"


def test_label_maps_keep_whole_numbers_and_refuse_others(tmp_path: Path) -> None:
    save_array(np.full((3, 3, 3), 0.9999), np.eye(4), tmp_path / "soft.nii.gz", dtype=np.float32)
    labels, _ = load_labels(tmp_path / "soft.nii.gz")
    assert labels.dtype == np.int16 and (labels == 1).all()
    save_array(np.full((3, 3, 3), 0.5), np.eye(4), tmp_path / "half.nii.gz", dtype=np.float32)
    with pytest.raises(VolumeError, match="whole numbers"):
        load_labels(tmp_path / "half.nii.gz")


def test_saved_volumes_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    write_as("PIR", tmp_path / "scan.nii.gz")
    volume = load_volume(tmp_path / "scan.nii.gz")
    save_volume(volume, tmp_path / "a.nii.gz")
    save_volume(volume, tmp_path / "b.nii.gz")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    again = load_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(again.data, volume.data)
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-5)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_volume(tmp_path / "nowhere.nii.gz")
