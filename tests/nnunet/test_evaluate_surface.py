"""Surface distances against brute force over all pairs of surface voxels, and values worked out by hand."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist, directed_hausdorff

from nnunet_braindino.surface_distance import diagonal_mm, dice, hd95, surface

SPACING = (0.8, 1.5, 3.0)


def blob(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """A ragged lump away from nothing: it may touch the border."""
    grid = np.stack(np.meshgrid(*(np.arange(extent) for extent in shape), indexing="ij"), axis=-1)
    centre, radius = rng.uniform(1, np.array(shape) - 1), rng.uniform(1.5, 4)
    return np.linalg.norm((grid - centre), axis=-1) + rng.normal(0, 0.6, shape) < radius


def surface_by_hand(mask: np.ndarray) -> np.ndarray:
    """(n, 3) voxels of the mask with a neighbour across a face that is not in it; outside the array nothing is."""
    padded = np.pad(mask, 1)
    found = []
    for voxel in np.argwhere(mask):
        neighbours = [tuple(voxel + 1 + step) for step in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)])]
        if not all(padded[neighbour] for neighbour in neighbours):
            found.append(voxel)
    return np.array(found)


def hd95_by_hand(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float]) -> float:
    points = [surface_by_hand(mask) * np.array(spacing) for mask in (prediction, reference)]
    distances = cdist(*points)
    return max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95))


@pytest.mark.parametrize("seed", range(25))
def test_hd95_equals_brute_force_on_ragged_masks_with_anisotropic_voxels(seed: int):
    rng = np.random.default_rng(seed)
    shape = (11, 9, 7)
    prediction, reference = blob(rng, shape), blob(rng, shape)
    spacing = SPACING if seed % 2 else (1.0, 1.0, 1.0)
    assert hd95(prediction, reference, spacing=spacing) == pytest.approx(hd95_by_hand(prediction, reference, spacing))
    np.testing.assert_array_equal(np.argwhere(surface(prediction)), surface_by_hand(prediction))


def test_the_hundredth_percentile_of_the_same_surfaces_is_scipys_hausdorff_distance():
    rng = np.random.default_rng(7)
    masks = [blob(rng, (12, 10, 8)) for _ in range(2)]
    points = [np.argwhere(surface(mask)) * np.array(SPACING) for mask in masks]
    largest = max(directed_hausdorff(*points)[0], directed_hausdorff(*points[::-1])[0])
    assert 0 < hd95(*masks, spacing=SPACING) <= largest


def test_a_shift_of_a_plate_is_the_shift_in_millimetres():
    plate, shifted = np.zeros((20, 20, 20), bool), np.zeros((20, 20, 20), bool)
    plate[2:18, 2:18, 5], shifted[2:18, 2:18, 9] = True, True
    assert hd95(plate, shifted, spacing=(1, 1, 3.0)) == pytest.approx(12.0)
    assert hd95(plate, plate, spacing=(1, 1, 3.0)) == 0.0
    assert hd95(plate.transpose(2, 1, 0), shifted.transpose(2, 1, 0), spacing=(1, 1, 3.0)) == pytest.approx(4.0)


def test_one_far_voxel_among_many_does_not_move_the_95th_percentile():
    reference = np.zeros((24, 24, 24), bool)
    reference[2:14, 2:14, 2:14] = True
    prediction = reference.copy()
    prediction[22, 22, 22] = True
    assert hd95(prediction, reference, spacing=(1, 1, 1)) == 0.0
    assert dice(prediction, reference) == pytest.approx(2 * 12**3 / (2 * 12**3 + 1))


def test_empty_masks_have_no_distance_and_the_diagonal_is_that_of_brats():
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    assert math.isnan(hd95(empty, full, spacing=(1, 1, 1))) and math.isnan(hd95(full, empty, spacing=(1, 1, 1)))
    assert math.isnan(dice(empty, empty)) and dice(empty, full) == 0
    assert diagonal_mm((240, 240, 155), (1.0, 1.0, 1.0)) == pytest.approx(373.13, abs=0.005)
    assert diagonal_mm((3, 4, 1), (2.0, 1.0, 0.0)) == pytest.approx(math.sqrt(52))
