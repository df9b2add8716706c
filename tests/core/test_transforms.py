"""The standard cube, against scipy and hand-worked numbers."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from braindino.transforms import CUBE_SHAPE, crop_to_foreground, normalize_intensity, resize, standardize
from braindino.volume import Volume, VolumeError

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def phantom(shape: tuple[int, int, int] = (20, 24, 17), seed: int = 0) -> Volume:
    data = np.random.default_rng(seed).gamma(2.0, 50.0, shape).astype(np.float32)
    data[:3], data[:, :5], data[..., -2:] = 0, 0, 0
    return Volume(data, AFFINE)


def test_cropping_keeps_every_nonzero_voxel_and_its_place_in_the_world() -> None:
    volume = phantom()
    cropped = crop_to_foreground(volume)
    assert cropped.shape == (17, 19, 15)
    assert np.count_nonzero(cropped.data) == np.count_nonzero(volume.data)
    np.testing.assert_allclose(cropped.affine @ [0, 0, 0, 1], volume.affine @ [3, 5, 0, 1])


def test_negative_voxels_are_foreground() -> None:
    data = np.zeros((5, 5, 5), dtype=np.float32)
    data[1, 2, 3], data[3, 3, 3] = -7.0, 4.0
    assert crop_to_foreground(Volume(data, AFFINE)).shape == (3, 2, 1)


def test_an_empty_volume_cannot_be_cropped() -> None:
    with pytest.raises(VolumeError, match="no non-zero voxel") as error:
        crop_to_foreground(Volume(np.zeros((4, 4, 4), np.float32), AFFINE))
    assert error.value.code == "constant"


@pytest.mark.parametrize("shape", [(40, 31, 50), (7, 24, 9), (20, 24, 17), (1, 3, 2)])
def test_resizing_equals_scipy_zoom_and_torch_interpolate(shape: tuple[int, int, int]) -> None:
    volume = phantom()
    ours = resize(volume, shape).data
    by_scipy = scipy.ndimage.zoom(volume.data, np.array(shape) / volume.shape, order=1, grid_mode=True, mode="nearest")
    by_torch = torch.nn.functional.interpolate(
        torch.from_numpy(volume.data)[None, None], size=shape, mode="trilinear", align_corners=False
    )[0, 0].numpy()
    np.testing.assert_allclose(ours, by_scipy, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(ours, by_torch, rtol=1e-5, atol=1e-3)


def test_resizing_a_single_slice_axis_repeats_it() -> None:
    volume = Volume(np.arange(6, dtype=np.float32).reshape(2, 3, 1), AFFINE)
    np.testing.assert_array_equal(resize(volume, (2, 3, 4)).data, np.repeat(volume.data, 4, axis=2))


def test_resizing_keeps_the_field_of_view_in_the_world() -> None:
    volume = phantom()
    resized = resize(volume, (40, 12, 51))
    for corner in ((-0.5, -0.5, -0.5), (1.0, 1.0, 1.0)):
        before = [c * n - 0.5 if c > 0 else c for c, n in zip(corner, volume.shape, strict=True)]
        after = [c * n - 0.5 if c > 0 else c for c, n in zip(corner, resized.shape, strict=True)]
        np.testing.assert_allclose(volume.affine @ [*before, 1], resized.affine @ [*after, 1])


def test_intensities_follow_the_paper_in_float64() -> None:
    volume = phantom((30, 30, 30))
    data = volume.data.astype(np.float64)
    low, high = np.percentile(data, [0.5, 99.5])
    clipped = np.clip(data, low, high)
    foreground = data != 0
    expected = np.where(foreground, (clipped - clipped[foreground].mean()) / clipped[foreground].std(), 0)
    np.testing.assert_allclose(normalize_intensity(volume).data, expected, atol=2e-5)


def test_background_stays_zero_and_foreground_has_mean_zero_and_deviation_one() -> None:
    volume = phantom((30, 30, 30))
    result = normalize_intensity(volume).data
    assert (result[volume.data == 0] == 0).all()
    inside = result[volume.data != 0].astype(np.float64)
    assert inside.mean() == pytest.approx(0, abs=1e-4)
    assert inside.std() == pytest.approx(1, abs=1e-4)


def test_standardizing_does_not_care_about_units_of_intensity() -> None:
    volume = phantom((30, 30, 30))
    scaled = Volume(volume.data * 37.5, volume.affine)
    a, b = standardize(volume), standardize(scaled)
    assert a.shape == CUBE_SHAPE and a.data.dtype == np.float32
    np.testing.assert_allclose(a.data, b.data, atol=1e-3)


def test_a_flat_foreground_is_refused() -> None:
    data = np.zeros((6, 6, 6), np.float32)
    data[2:4, 2:4, 2:4] = 5
    with pytest.raises(VolumeError, match="no contrast"):
        normalize_intensity(crop_to_foreground(Volume(data, AFFINE)))
