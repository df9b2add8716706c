"""Fingerprints: the same scan is the same under any name and storage, and another subject is another."""

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.linalg import hadamard

from braindino.fingerprint import (
    APPEARANCE_BITS,
    MAX_APPEARANCE_DISTANCE,
    _walsh_hadamard,
    appearance_hash,
    content_hash,
    hamming,
    pack_appearance,
)
from braindino.transforms import CUBE_SHAPE, standardize
from braindino.volume import Volume, load_volume, save_array, save_volume


def brain(seed: int, *, shape: tuple[int, int, int] = (70, 84, 66), scale: float = 5.0) -> Volume:
    """A head-like ellipsoid with a bright rim, common to all, and an inside of its own."""
    grids = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(grid**2 for grid in grids))
    own = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), scale)
    data = np.where(radius < 0.95, 500 + 300 * radius + 60 * own / own.std(), 0)
    return Volume(np.rint(data).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))


def looks(volume: Volume) -> str:
    return appearance_hash(standardize(volume).data)


def test_all_48_orientations_of_a_file_have_one_content_hash(tmp_path: Path) -> None:
    data = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    save_array(data, affine, tmp_path / "ras.nii.gz", dtype=np.int16)
    expected = content_hash(load_volume(tmp_path / "ras.nii.gz"))
    hashes = set()
    for number, (axes, signs) in enumerate(
        itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
    ):
        stored = data.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]
        to_stored = np.zeros((4, 4))
        to_stored[3, 3] = 1
        for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
            to_stored[axis, column] = sign
            to_stored[axis, 3] = 0 if sign > 0 else data.shape[axis] - 1
        save_array(stored, affine @ to_stored, tmp_path / f"{number}.nii", dtype=np.int16)
        hashes.add(content_hash(load_volume(tmp_path / f"{number}.nii")))
    assert number == 47 and hashes == {expected}
    # A left-right flip of the voxels under the same affine is another image.
    save_array(data[::-1], affine, tmp_path / "flipped.nii", dtype=np.int16)
    assert content_hash(load_volume(tmp_path / "flipped.nii")) != expected


def test_name_compression_storage_type_and_place_in_the_scanner_do_not_change_the_content_hash(tmp_path: Path) -> None:
    volume = brain(0, shape=(12, 14, 10), scale=1.0)
    save_array(volume.data, volume.affine, tmp_path / "a.nii", dtype=np.int16)
    (tmp_path / "other name.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes(), compresslevel=1))
    moved = volume.affine.copy()
    moved[:3, 3] = -12.5, 3, 99
    save_array(volume.data, moved, tmp_path / "float.nii", dtype=np.float64)
    hashes = {content_hash(load_volume(tmp_path / name)) for name in ("a.nii", "other name.nii.gz", "float.nii")}
    assert hashes == {content_hash(volume)}
    assert len(content_hash(volume)) == 32 and int(content_hash(volume), 16)


def test_one_voxel_or_the_shape_changes_the_content_hash_and_the_sign_of_zero_does_not() -> None:
    volume = brain(0, shape=(12, 14, 10), scale=1.0)
    changed = volume.data.copy()
    changed[3, 4, 5] += 1
    assert content_hash(Volume(changed, volume.affine)) != content_hash(volume)
    flat = np.arange(24, dtype=np.float32)
    # The same bytes in the order of the hash, under two shapes.
    as_234 = Volume(flat.reshape(2, 3, 4, order="F"), np.eye(4))
    as_432 = Volume(flat.reshape(4, 3, 2, order="F"), np.eye(4))
    assert content_hash(as_234) != content_hash(as_432)
    negative = Volume(np.where(volume.data == 0, np.float32(-0.0), volume.data), volume.affine)
    assert np.signbit(negative.data).any() and content_hash(negative) == content_hash(volume)


def test_the_same_brain_is_near_after_resampling_stripping_cropping_and_rescaling_and_another_is_far() -> None:
    volume = brain(1)
    reference = looks(volume)
    inside = volume.data != 0
    rng = np.random.default_rng(0)
    zoomed = ndimage.zoom(volume.data, 0.8, order=1) * (ndimage.zoom(inside.astype(np.float32), 0.8, order=1) > 0.5)
    variants = {
        "resampled": zoomed,
        "stripped tighter": np.where(ndimage.binary_erosion(inside), volume.data, 0),
        "cropped": volume.data[2:-3, 2:, 2:],
        "gamma": (volume.data / 1000) ** 1.3,
        "rescaled": volume.data * 7 + 11 * inside,
        "noisy": np.where(inside, volume.data + rng.normal(0, 30, volume.shape), 0),
        "rounded": np.rint(volume.data / 16) * 16,
    }
    near = {name: hamming(reference, looks(Volume(d.astype(np.float32), np.eye(4)))) for name, d in variants.items()}
    assert max(near.values()) <= MAX_APPEARANCE_DISTANCE, near
    # A crop moves everything; nothing else comes near the limit.
    assert max(distance for name, distance in near.items() if name != "cropped") < MAX_APPEARANCE_DISTANCE / 2, near
    far = [hamming(reference, looks(brain(seed))) for seed in (2, 3, 4)]
    assert min(far) > 200 and max(far) < APPEARANCE_BITS - 200, far


def test_the_appearance_hash_is_the_same_on_every_machine() -> None:
    # Whole multiples of 1/64 from integer arithmetic alone.
    x, y, z = np.ogrid[:256, :256, :256]
    cube = (((x * 7 + y * 13 + z * 29 + (x // 16) * (y // 16) * 5 + (z // 16) * (x // 64)) % 257) / 64).astype(
        np.float32
    )
    digits = appearance_hash(cube)
    assert len(digits) == 128
    assert digits == appearance_hash(np.asfortranarray(cube))
    assert digits.startswith("38b113799f2726dafd37f52666f12f20b76220aa3063983900b10eb3f69fc576")


def test_projections_are_those_of_the_hadamard_matrix() -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, 64)
    np.testing.assert_array_equal(_walsh_hadamard(values), hadamard(64) @ values)


def test_a_cube_without_a_difference_between_left_and_right_has_no_appearance() -> None:
    assert appearance_hash(np.zeros(CUBE_SHAPE, np.float32)) == ""
    with pytest.raises(ValueError, match=r"found shape \(2, 2, 2\); expected \(256, 256, 256\)"):
        appearance_hash(np.zeros((2, 2, 2), np.float32))


def test_distances_count_bits() -> None:
    zero, one, full = "0" * 128, "0" * 127 + "1", "f" * 128
    assert (hamming(zero, zero), hamming(zero, one), hamming(zero, full), hamming(one, full)) == (0, 1, 512, 511)
    packed = pack_appearance([zero, one, full])
    assert packed.shape == (3, 8) and packed.dtype == np.uint64
    assert sum(int(word).bit_count() for word in packed[1] ^ packed[2]) == 511
    with pytest.raises(ValueError, match="found 'abc'; expected 128 hexadecimal digits"):
        hamming("abc", zero)


def test_a_volume_read_back_from_its_own_file_keeps_both_fingerprints(tmp_path: Path) -> None:
    volume = brain(5)
    save_volume(volume, tmp_path / "v.nii.gz")
    again = load_volume(tmp_path / "v.nii.gz")
    assert content_hash(again) == content_hash(volume) and looks(again) == looks(volume)
