"""Volumes: left stays left, nothing is half read, every refusal has its code."""

import gzip
import itertools
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from braindino.volume import (
    Volume,
    VolumeError,
    check_field_of_view,
    load_labels,
    load_mask,
    load_volume,
    obliqueness,
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
@pytest.mark.fault
def test_every_storage_orientation_loads_to_the_same_brain(codes: str, tmp_path: Path) -> None:
    write_as(codes, tmp_path / "scan.nii.gz")
    volume = load_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(volume.data, ASYMMETRIC)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.spacing == pytest.approx((1.0, 1.5, 2.0))


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_mask_goes_back_onto_the_grid_it_came_from(codes: str, tmp_path: Path) -> None:
    write_as(codes, tmp_path / "scan.nii")
    mask = load_volume(tmp_path / "scan.nii").data == 10.0
    save_mask_like(mask, tmp_path / "scan.nii", tmp_path / "mask.nii")
    scan, written = nib.load(tmp_path / "scan.nii"), nib.load(tmp_path / "mask.nii")
    np.testing.assert_array_equal(np.asarray(written.dataobj) == 1, np.asarray(scan.dataobj) == 10.0)
    np.testing.assert_allclose(written.affine, scan.affine, atol=1e-5)
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.nii"), mask)


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.fault
def test_left_and_right_stay_where_they_are_in_every_orientation_of_an_oblique_scan(codes: str, tmp_path: Path) -> None:
    tilted = AFFINE.copy()
    tilted[:3, :3] = nib.eulerangles.euler2mat(0.15, 0.1, -0.2) @ AFFINE[:3, :3]
    # Index arithmetic in place of nibabel: axis i of the file is axis order[i] of RAS, backwards where flipped.
    order = ["RLAPSI".index(code) // 2 for code in codes]
    flips = [code in "LPI" for code in codes]
    stored = ASYMMETRIC.transpose(order)
    stored = stored[tuple(slice(None, None, -1 if flip else None) for flip in flips)]
    affine = np.eye(4)
    affine[:3, 3] = tilted[:3, 3]
    for axis, (source, flip) in enumerate(zip(order, flips, strict=True)):
        affine[:3, axis] = tilted[:3, source] * (-1 if flip else 1)
        affine[:3, 3] += tilted[:3, source] * ((ASYMMETRIC.shape[source] - 1) if flip else 0)
    save_array(stored, affine, tmp_path / "scan.nii", dtype=np.float32)
    volume = load_volume(tmp_path / "scan.nii")
    np.testing.assert_array_equal(volume.data, ASYMMETRIC)
    for value in (10.0, 20.0, 30.0):
        world = volume.affine @ [*np.argwhere(volume.data == value)[0], 1]
        np.testing.assert_allclose(world, tilted @ [*np.argwhere(value == ASYMMETRIC)[0], 1], atol=1e-4)


def test_a_mask_of_another_grid_is_refused(tmp_path: Path) -> None:
    write_as("LPS", tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match=r"voxels of shape \(7, 9, 10\).*does not fit"):
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


@pytest.mark.fault
def test_a_singleton_fourth_axis_is_squeezed_and_recorded(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(ASYMMETRIC[..., None], AFFINE), tmp_path / "single.nii.gz")
    volume = load_volume(tmp_path / "single.nii.gz")
    assert volume.shape == (7, 9, 11)
    assert "singleton_squeezed" in volume.notes


def refusal(path: Path, message: str | None = None) -> str:
    with pytest.raises(VolumeError, match=message) as error:
        load_volume(path)
    assert path.name in str(error.value)
    return error.value.code


def write(path: Path, data: np.ndarray = ASYMMETRIC, affine: np.ndarray = AFFINE) -> Path:
    """A NIfTI written with nibabel alone, without orientation codes beyond its default (sform 2)."""
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.mark.fault
def test_a_file_that_ends_early_is_truncated(tmp_path: Path) -> None:
    whole = write(tmp_path / "good.nii.gz").read_bytes()
    raw = gzip.decompress(whole)
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert refusal(tmp_path / "cut.nii.gz", "the gzip stream breaks off.*copy it again") == "truncated"
    (tmp_path / "no_checksum.nii.gz").write_bytes(whole[:-8])
    assert refusal(tmp_path / "no_checksum.nii.gz") == "truncated"
    (tmp_path / "short.nii").write_bytes(raw[:-100])
    assert refusal(tmp_path / "short.nii", rf"{len(raw) - 100} bytes; .* promises {len(raw)}") == "truncated"
    (tmp_path / "cut_before_gzip.nii.gz").write_bytes(gzip.compress(raw[:-1]))
    assert refusal(tmp_path / "cut_before_gzip.nii.gz", "promises") == "truncated"
    (tmp_path / "header_only.nii").write_bytes(raw[:200])
    assert refusal(tmp_path / "header_only.nii", "less than a header") == "truncated"
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    assert refusal(tmp_path / "empty.nii.gz", "empty") == "truncated"


@pytest.mark.fault
def test_flipped_bits_in_a_gzip_stream_are_damage(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 4000, (20, 20, 20), dtype=np.int16)
    whole = write(tmp_path / "good.nii.gz", noise).read_bytes()
    for position in (len(whole) - 6, len(whole) - 2, len(whole) // 2, len(whole) // 3):
        flipped = bytearray(whole)
        flipped[position] ^= 0x10  # checksum, length, and voxels: the last still decode
        (tmp_path / "flipped.nii.gz").write_bytes(flipped)
        assert refusal(tmp_path / "flipped.nii.gz", "damaged.*copy it again") == "damaged"


@pytest.mark.fault
def test_a_flipped_bit_anywhere_in_a_header_is_a_volume_error_or_a_volume(tmp_path: Path) -> None:
    save_array(ASYMMETRIC, AFFINE, tmp_path / "good.nii", dtype=np.float32)
    raw = (tmp_path / "good.nii").read_bytes()
    codes = set()
    for position in range(348):
        for bit in (0x40, 0x80):
            flipped = bytearray(raw)
            flipped[position] ^= bit
            (tmp_path / "flipped.nii").write_bytes(flipped)
            try:
                volume = load_volume(tmp_path / "flipped.nii")
            except VolumeError as error:
                codes.add(error.code)
            else:
                assert np.isfinite(volume.affine).all() and np.isfinite(volume.data).all()
    assert {"not_nifti", "truncated", "bad_geometry"} <= codes, codes


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"this is no image", "text, 'this is no image'"),
        (b"<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        (b"/annex/objects/MD5E-s1--0", "a git-annex pointer"),
        (bytes(400), "zero bytes"),
        (bytes(128) + b"DICM" + bytes(300), "a DICOM file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(300), "an HDF5 file"),
        (b"CDF\x01" + bytes(300), "a netCDF file"),
        (b"\x00\x00\x00\x01\x00\x00\x01\x00" + bytes(300), "a FreeSurfer MGH file"),
        (b"NRRD0004\n" + bytes(300), "an NRRD file"),
        (b"\x89PNG\r\n" + bytes(300), "a PNG picture"),
        ((348).to_bytes(4, "little") + bytes(400), "an Analyze 7.5 header"),
        ((348).to_bytes(4, "big") + bytes(340) + b"ni1\0" + bytes(10), "the header of a NIfTI pair"),
        (b"\x01\x02\xff\xfe" * 100, "something that begins with b'.x01"),
    ],
)
def test_other_things_under_the_name_of_a_nifti_file_are_named(content: bytes, found: str, tmp_path: Path) -> None:
    for name, stored in [("scan.nii", content), ("scan.nii.gz", gzip.compress(content))]:
        (tmp_path / name).write_bytes(stored)
        assert refusal(tmp_path / name, f"not a NIfTI file but {found}") == "not_nifti"


def test_a_zip_archive_and_another_suffix_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "scan.nii.gz", "w") as archive:
        archive.writestr("scan.nii", b"")
    assert refusal(tmp_path / "scan.nii.gz", "a zip archive") == "not_nifti"
    (tmp_path / "image.png").write_bytes(write(tmp_path / "good.nii").read_bytes())
    assert refusal(tmp_path / "image.png", "expected a file name ending in .nii or .nii.gz") == "not_nifti"


def test_a_wrong_extension_is_read_by_content_and_noted(tmp_path: Path) -> None:
    plain, packed = write(tmp_path / "a.nii").read_bytes(), write(tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "packed.nii").write_bytes(packed)
    for name in ("plain.nii.gz", "packed.nii"):
        volume = load_volume(tmp_path / name)
        assert volume.notes == ("wrong_extension",)
        np.testing.assert_array_equal(volume.data, ASYMMETRIC)
    assert load_volume(tmp_path / "a.nii").notes == load_volume(tmp_path / "b.nii.gz").notes == ()


@pytest.mark.fault
def test_files_that_are_not_one_real_volume_are_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "series.nii.gz", np.stack([ASYMMETRIC] * 3, -1)), "a series") == "four_dimensional"
    assert refusal(write(tmp_path / "flat.nii.gz", ASYMMETRIC[:, :, 5])) == "two_dimensional"
    assert refusal(write(tmp_path / "thin.nii.gz", ASYMMETRIC[:, :, 5:6])) == "two_dimensional"
    assert refusal(write(tmp_path / "zeros.nii.gz", np.zeros_like(ASYMMETRIC)), "every voxel is 0") == "constant"
    colour = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert refusal(write(tmp_path / "colour.nii.gz", colour), "expected real numbers") == "unsupported_type"
    assert (
        refusal(write(tmp_path / "complex.nii.gz", ASYMMETRIC.astype(np.complex64)), "complex64") == "unsupported_type"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.fault
def test_a_few_non_finite_voxels_become_background_and_many_are_refused(bad: float, tmp_path: Path) -> None:
    data = 1 + np.arange(20**3, dtype=np.float32).reshape(20, 20, 20)
    data.flat[:8] = bad  # a thousandth
    volume = load_volume(write(tmp_path / "few.nii", data, np.eye(4)))
    assert volume.notes == ("nonfinite_replaced=8",)
    assert not volume.data.flat[:8].any() and volume.data.flat[8] == 9
    data.flat[8] = bad
    assert refusal(write(tmp_path / "many.nii", data, np.eye(4)), "9 of 8000 voxels are NaN or inf") == "non_finite"
    constant = np.zeros((20, 20, 20), dtype=np.float32)
    constant[0, 0, 0] = bad
    assert refusal(write(tmp_path / "constant.nii", constant, np.eye(4))) == "constant"


def test_voxels_of_no_scan_are_refused_and_thick_clinical_slices_are_not(tmp_path: Path) -> None:
    for size in (400.0, 20.0, 0.05, 1e-3):  # 1e-3: a header in metres
        path = write(tmp_path / "scan.nii", affine=np.diag([size, 1, 1, 1]))
        assert refusal(path, "expected 0.1 to 15.0 mm along") == "absurd_spacing"
    for slices in (5.5, 7.0 + 1.4, 10.0 + 2.5):
        assert load_volume(write(tmp_path / "scan.nii", affine=np.diag([0.4, 0.4, slices, 1]))).spacing[
            2
        ] == pytest.approx(slices)
    singular = np.eye(4)
    singular[:3, 2] = singular[:3, 1]
    path = write(tmp_path / "singular.nii")
    raw = bytearray(path.read_bytes())
    raw[280:328] = singular[:3].astype("<f4").tobytes()
    path.write_bytes(raw)
    assert refusal(path, "singular") == "bad_geometry"


def test_a_field_of_view_of_no_head_is_refused() -> None:
    def volume(*extents: float) -> Volume:
        return Volume(np.zeros((10, 10, 10), np.float32), np.diag([*(extent / 10 for extent in extents), 1.0]))

    check_field_of_view(volume(240, 240, 130))
    check_field_of_view(volume(150, 190, 60))  # a slab across the temporal lobes
    check_field_of_view(volume(512, 512, 256))
    for extents in [(240, 240, 45), (700, 240, 240)]:
        with pytest.raises(VolumeError, match=r"240 x 45 mm|700 x 240 x 240 mm") as caught:
            check_field_of_view(volume(*extents))
        assert caught.value.code == "absurd_field_of_view"


def turned(degrees: float, *, about: tuple[float, float, float] = (1, 0, 0)) -> np.ndarray:
    affine = AFFINE.copy()
    axis = np.array(about) / np.linalg.norm(about)
    affine[:3, :3] = nib.quaternions.angle_axis2mat(np.radians(degrees), axis) @ AFFINE[:3, :3]
    return affine


@pytest.mark.parametrize("about", [(1, 0, 0), (0, 1, 0), (1, 1, 0), (1, -2, 3)])
@pytest.mark.parametrize("degrees", [0.0, 3.0, 12.3, 35.0])
def test_obliqueness_is_the_largest_angle_to_the_nearest_axis(degrees, about) -> None:
    affine = turned(degrees, about=about)
    assert obliqueness(affine) == pytest.approx(np.degrees(nib.affines.obliquity(affine)).max(), abs=1e-5)
    if about[1:] == (0, 0):
        assert obliqueness(affine) == pytest.approx(degrees, abs=1e-5)
    assert obliqueness(affine @ np.diag([-2, 3, -1, 1])) == pytest.approx(obliqueness(affine))


@pytest.mark.fault
def test_oblique_scans_are_noted_and_refused_where_axes_lose_their_names(tmp_path: Path) -> None:
    assert load_volume(write(tmp_path / "straight.nii", affine=turned(4.0))).notes == ()
    assert load_volume(write(tmp_path / "tilted.nii", affine=turned(12.3))).notes == ("oblique=12.3deg",)
    assert load_volume(write(tmp_path / "steep.nii", affine=turned(39.5))).notes == ("oblique=39.5deg",)
    assert refusal(write(tmp_path / "lost.nii", affine=turned(44.0)), "44.0 degrees.*at most 40") == "oblique"


def two_forms(path: Path, qform: np.ndarray, sform: np.ndarray, *, codes: tuple[int, int] = (1, 1)) -> Path:
    header = nib.Nifti1Header()
    header.set_data_shape(ASYMMETRIC.shape)
    header.set_data_dtype(np.float32)
    header.set_qform(qform, code=codes[0])
    header.set_sform(sform, code=codes[1])
    nib.save(nib.Nifti1Image(ASYMMETRIC, None, header), path)
    return path


@pytest.mark.fault
def test_a_qform_that_names_other_axes_than_the_sform_is_a_conflict(tmp_path: Path) -> None:
    mirrored = AFFINE @ np.diag([-1, 1, 1, 1])
    swapped = AFFINE[:, [0, 2, 1, 3]]
    path = two_forms(tmp_path / "mirrored.nii", mirrored, AFFINE)
    assert refusal(path, r"towards LAS by the qform \(code 1\) and towards RAS by the sform") == "orientation_conflict"
    assert refusal(two_forms(tmp_path / "swapped.nii", swapped, AFFINE), "RSA.*RAS") == "orientation_conflict"
    # What has no code says nothing.
    for codes, right in [((0, 1), 10.0), ((1, 0), 10.0)]:
        volume = load_volume(two_forms(tmp_path / "one.nii", mirrored, AFFINE, codes=codes))
        place = volume.affine @ [*np.argwhere(volume.data == right)[0], 1]
        truth = (AFFINE if codes[1] else mirrored) @ [6, 4, 5, 1]
        np.testing.assert_allclose(place, truth, atol=1e-4)
        assert volume.notes == ()


@pytest.mark.fault
def test_a_small_difference_of_qform_and_sform_is_noted_and_the_sform_counts(tmp_path: Path) -> None:
    moved = turned(2.0)
    moved[:3, 3] += (3.0, 0, 4.0)
    volume = load_volume(two_forms(tmp_path / "moved.nii", moved, AFFINE))
    corners = np.array([[x, y, z, 1] for x in (0, 6) for y in (0, 8) for z in (0, 10)])
    farthest = max(np.linalg.norm((moved - AFFINE) @ corner) for corner in corners)
    assert volume.notes == (f"qform_sform_differ=2.0deg,{farthest:.1f}mm",)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert load_volume(two_forms(tmp_path / "same.nii", turned(0.1), AFFINE)).notes == ()


def test_a_scan_without_orientation_codes_is_noted(tmp_path: Path) -> None:
    assert load_volume(two_forms(tmp_path / "none.nii", AFFINE, AFFINE, codes=(0, 0))).notes == ("no_orientation_code",)


def test_nifti_2_and_big_endian_files_are_read(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(ASYMMETRIC, AFFINE), tmp_path / "two.nii.gz")
    swapped = nib.Nifti1Image(ASYMMETRIC, AFFINE, header=nib.Nifti1Header(endianness=">"))
    nib.save(swapped, tmp_path / "big.nii")
    assert (tmp_path / "big.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
    for name in ("two.nii.gz", "big.nii"):
        np.testing.assert_array_equal(load_volume(tmp_path / name).data, ASYMMETRIC)


def test_a_volume_error_crosses_process_borders_with_its_code() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(VolumeError("oblique", "words")))
    assert (error.code, error.message) == ("oblique", "words")


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
