"""Cubes and slices: spacing, middle, intensity, place."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from braindino.encoders.cube import CubePreparation, turn
from braindino.encoders.slice_encoder import IMAGENET_DEVIATION, IMAGENET_MEAN, SlicePreparation
from braindino.slices import axial_slices, uniform_indices
from braindino.transforms import crop_to_foreground, resize, standardize
from braindino.volume import Volume, VolumeError


def cube_of(volume: Volume, **options):
    settings = {"size": 64, "fit": "crop", "intensity": "zscore", "orientation": "RAS", **options}
    return CubePreparation(**settings).apply(volume, sequence="T1")


def world(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    return index @ affine[:3, :3].T + affine[:3, 3]


def test_a_crop_has_voxels_of_one_millimetre_around_the_middle_of_the_brain(volume: Volume):
    prepared = cube_of(volume)
    assert prepared.data.shape == (1, 64, 64, 64) and prepared.data.dtype == torch.float32
    np.testing.assert_allclose(np.linalg.norm(prepared.affine[:3, :3], axis=0), 1.0, atol=0.005)
    middle = world(prepared.affine, np.array([31.5, 31.5, 31.5]))
    np.testing.assert_allclose(middle, (-8.0, 30.0, 25.0), atol=1.1)


def test_a_crop_of_unit_voxels_is_the_voxels_themselves():
    data = np.zeros((20, 20, 20), dtype=np.float32)
    data[2:14, 3:19, 5:15] = np.arange(12 * 16 * 10).reshape(12, 16, 10) + 1
    prepared = cube_of(Volume(data, np.eye(4)), size=8)
    # Boxes of 12, 16 and 10 voxels: the crop begins 2, 4 and 1 voxels into them.
    expected = data[4:12, 7:15, 6:14]
    expected = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(prepared.data[0].numpy(), expected, rtol=1e-4, atol=1e-4)
    assert world(prepared.affine, np.array([0, 0, 0])).tolist() == [4, 7, 6]


def test_a_brain_smaller_than_the_cube_is_padded_with_background_on_both_sides():
    data = np.zeros((16, 16, 16), dtype=np.float32)
    data[3:8, 2:14, 4:10] = np.random.default_rng(0).uniform(1, 2, size=(5, 12, 6))
    prepared = cube_of(Volume(data, np.eye(4)), size=8)
    cube = prepared.data[0].numpy()
    assert np.flatnonzero(cube.any(axis=(1, 2))).tolist() == [2, 3, 4, 5, 6]
    assert np.flatnonzero(cube.any(axis=(0, 2))).tolist() == list(range(8))
    assert np.flatnonzero(cube.any(axis=(0, 1))).tolist() == [1, 2, 3, 4, 5, 6]
    assert world(prepared.affine, np.array([2, 0, 1])).tolist() == [3, 4, 4]


def test_resize_fills_the_cube_with_the_brains_box_and_keeps_its_place(volume: Volume):
    prepared = cube_of(volume, fit="resize")
    expected = resize(crop_to_foreground(volume), (64, 64, 64))
    foreground = expected.data != 0
    values = expected.data[foreground].astype(np.float64)
    scaled = np.where(foreground, (expected.data - values.mean()) / values.std(), 0)
    np.testing.assert_allclose(prepared.data[0].numpy(), scaled, atol=1e-4)
    np.testing.assert_array_equal(prepared.affine, expected.affine)


def test_the_zscore_is_over_nonzero_voxels_and_background_stays_zero(volume: Volume):
    data = cube_of(volume, fit="resize").data
    values = data[data != 0]
    assert float(values.mean()) == pytest.approx(0, abs=1e-4)
    assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert int((data == 0).sum()) > 0.3 * data.numel()


def test_percentiles_of_the_whole_box_become_zero_and_one():
    data = np.arange(1.0, 1001.0, dtype=np.float32).reshape(10, 10, 10)
    prepared = cube_of(Volume(data, np.eye(4)), size=4, intensity="percentiles")
    low, high = np.percentile(data, (5, 95))
    # The crop holds the middle 4 of 10 voxels; the percentiles are those of all 1000.
    expected = np.clip((data[3:7, 3:7, 3:7] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(prepared.data[0].numpy(), expected, atol=1e-6)
    whole = cube_of(Volume(data, np.eye(4)), size=10, intensity="percentiles").data
    assert (float(whole.min()), float(whole.max())) == (0.0, 1.0)


def test_lps_turns_the_first_two_axes_and_turning_twice_is_nothing():
    cube = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert turn(cube, "LPS")[0, 0, 0].tolist() == cube[0, 1, 2].tolist()
    assert torch.equal(turn(turn(cube, "LPS"), "LPS"), cube)
    assert torch.equal(turn(cube, "RAS"), cube)


@pytest.mark.parametrize("intensity", ["zscore", "percentiles"])
def test_volumes_without_brain_or_contrast_are_refused(intensity: str):
    empty, flat = np.zeros((8, 8, 8), np.float32), np.full((8, 8, 8), 3, np.float32)
    with pytest.raises(VolumeError, match="no non-zero voxel"):
        cube_of(Volume(empty, np.eye(4)), size=8, intensity=intensity)
    with pytest.raises(VolumeError, match="contrast"):
        cube_of(Volume(flat, np.eye(4)), size=8, intensity=intensity)


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="fit: found 'pad'; expected one of crop, resize"):
        CubePreparation(size=8, fit="pad", intensity="zscore", orientation="RAS")
    with pytest.raises(ValueError, match="intensity: found 'minmax'"):
        CubePreparation(size=8, fit="crop", intensity="minmax", orientation="RAS")
    with pytest.raises(ValueError, match="expected more than 0"):
        CubePreparation(size=8, fit="crop", intensity="zscore", orientation="RAS", spacing=0.0)
    with pytest.raises(ValueError, match="intensity: found 'percentiles'"):
        SlicePreparation(intensity="percentiles")


def test_slices_are_those_of_the_papers_pipeline(volume: Volume):
    prepared = SlicePreparation(num_slices=8).apply(volume, sequence=None)
    expected = axial_slices(standardize(volume), uniform_indices(8))
    np.testing.assert_array_equal(prepared.data[:, 0].numpy(), expected)
    small = SlicePreparation(num_slices=8, image_size=224).apply(volume, sequence=None)
    resized = F.interpolate(torch.from_numpy(expected)[:, None], (224, 224), mode="bilinear", antialias=True)
    torch.testing.assert_close(small.data, resized)
    assert SlicePreparation().apply(volume, sequence=None).data.shape == (128, 1, 256, 256)


def test_imagenet_slices_go_from_zero_to_one_and_then_to_the_means_of_its_channels(volume: Volume):
    preparation = SlicePreparation(num_slices=4, intensity="imagenet")
    slices = preparation.apply(volume, sequence=None).data
    assert slices.shape[1] == 1 and float(slices.min()) == 0.0 and float(slices.max()) <= 1.0
    channels = preparation.channels(slices)
    assert channels.shape[1] == 3
    for number in range(3):
        expected = (slices[:, 0] - IMAGENET_MEAN[number]) / IMAGENET_DEVIATION[number]
        torch.testing.assert_close(channels[:, number], expected)
    assert torch.equal(SlicePreparation().channels(slices), slices)
