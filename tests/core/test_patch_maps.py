"""Similarity and PCA maps against hand-worked values and independent references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from braindino.patch_maps import (
    AxialSlice,
    ReferencePoint,
    SlicePoint,
    axial_labels,
    encode_patches,
    foreground_patches,
    pca_map,
    points_in_labels,
    points_of_patches,
    reference_points,
    shared_range,
    similarity_map,
    tumour_slice,
    upsample,
)
from braindino.slices import axial_slices
from braindino.transforms import crop_to_foreground, resize
from braindino.vision_transformer import vit_tiny
from braindino.volume import Volume


def test_similarity_of_hand_worked_tokens():
    patches = np.array([[[3.0, 4.0], [-6.0, -8.0]], [[4.0, -3.0], [1.0, 0.0]]])
    np.testing.assert_allclose(similarity_map(patches, np.array([0.3, 0.4])), [[1, -1], [0, 0.6]], atol=1e-12)


def test_similarity_equals_torch_cosine_similarity():
    rng = np.random.default_rng(0)
    patches, reference = rng.normal(size=(5, 7, 48)), rng.normal(size=48)
    expected = F.cosine_similarity(torch.tensor(patches), torch.tensor(reference), dim=-1).numpy()
    np.testing.assert_allclose(similarity_map(patches, reference), expected, atol=1e-12)


def test_a_token_without_direction_is_similar_to_nothing():
    patches = np.array([[[0.0, 0.0], [2.0, 0.0]]])
    assert similarity_map(patches, np.array([1.0, 0.0])).tolist() == [[0.0, 1.0]]


def test_upsampling_keeps_patch_centres_where_they_are():
    assert upsample(np.array([[0.0, 1.0]]), (1, 4)).tolist() == [[0.0, 0.25, 0.75, 1.0]]


def test_upsampling_keeps_channels_apart():
    grid = np.random.default_rng(1).random((2, 3, 3))
    resized = upsample(grid, (8, 12))
    assert resized.shape == (8, 12, 3)
    for channel in range(3):
        np.testing.assert_array_equal(resized[..., channel], upsample(grid[..., channel], (8, 12)))


def test_pca_colours_are_the_coordinates_of_tokens_that_vary_along_three_axes():
    coordinates = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], dtype=float)
    tokens = np.zeros((2, 5, 6))
    foreground = np.ones((2, 5), dtype=bool)
    foreground[:, 4] = False
    tokens[foreground] = np.column_stack(
        [9 * coordinates[:, 0], 5 * coordinates[:, 1], 2 * coordinates[:, 2], np.ones((8, 3))]
    )
    tokens[:, 4] = 1000.0
    coloured = pca_map(tokens, foreground)
    np.testing.assert_allclose(coloured[foreground], coordinates, atol=1e-9)
    assert not coloured[:, 4].any()


def test_pca_of_too_few_tokens_is_black():
    assert not pca_map(np.ones((2, 2, 4)), np.array([[True, True], [True, False]])).any()


def test_encoded_patches_lie_on_the_grid_row_by_row():
    torch.manual_seed(0)
    encoder = vit_tiny().eval()
    image = np.random.default_rng(2).normal(size=(32, 64)).astype(np.float32)
    with torch.inference_mode():
        flat = encoder(torch.tensor(image)[None, None]).patches[0].numpy()
    grid = encode_patches(encoder, image)
    assert grid.shape == (2, 4, 192)
    np.testing.assert_array_equal(grid[1, 2], flat[6])


def test_reference_patches_follow_the_rule_without_a_tumour():
    assert reference_points(_image(), 16) == (
        ReferencePoint("centre", 3, 3),
        ReferencePoint("darkest", 2, 4),
        ReferencePoint("brightest", 4, 2),
    )


def test_reference_patches_avoid_the_tumour():
    tumour = np.zeros((112, 112), dtype=bool)
    tumour[64:80, 32:64] = True  # all of patches (4, 2), the brightest, and (4, 3)
    tumour[68:76, 64:68] = True  # a corner of (4, 4): the centre moves towards (4, 3)
    assert reference_points(_image(), 16, tumour) == (
        ReferencePoint("tumour", 4, 3),
        ReferencePoint("darkest", 2, 4),
        ReferencePoint("brightest", 2, 2),
    )


def test_a_patch_counts_as_tissue_from_ninety_percent_on():
    image = np.ones((16, 32))
    image[:, 16:][:2] = 0  # 32 of 256 pixels: 87.5 % left
    assert foreground_patches(image, 16).tolist() == [[True, False]]


def test_an_empty_slice_has_no_reference_patches():
    with pytest.raises(ValueError, match=r"no patch holds tissue; expected a slice through the brain"):
        reference_points(np.zeros((64, 64)), 16)


def test_a_sliver_of_tissue_has_no_reference_patches():
    image = np.zeros((64, 64))
    image[16:32] = 1
    with pytest.raises(ValueError, match=r"0 patches lie inside the tissue and outside the tumour; expected 2 or more"):
        reference_points(image, 16)


def test_labels_follow_the_volume_through_crop_and_resize():
    labels = np.zeros((20, 24, 28), dtype=np.int16)
    labels[3:9, 14:20, 16:22] = 1  # left, anterior, superior
    labels[5:7, 15:17, 16:22] = 3
    affine = np.array([[-1.5, 0, 0, 40], [0, 2, 0, -10], [0, 0, 1, 5], [0, 0, 0, 1]]) @ np.diag([-1.0, 1, 1, 1])
    data = labels.astype(np.float32) + 1
    data[:2] = data[-3:] = data[:, :1] = data[:, :, -4:] = 0
    cube = resize(crop_to_foreground(Volume(data, affine)), (30, 46, 48))
    index = tumour_slice(labels > 0, affine, cube.affine, 48)
    plane = axial_labels(labels, affine, cube.affine, index, cube.shape)
    doubled = labels[2:-3, 1:, :-4].repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(plane, axial_slices(Volume(doubled.astype(np.float32), cube.affine), [index])[0])
    assert set(np.unique(plane)) == {0, 1, 3}


def test_the_slice_is_the_one_with_the_largest_tumour():
    tumour = np.zeros((4, 4, 10), dtype=bool)
    tumour[0, 0, 2:9] = True
    tumour[1:3, 1:3, 6] = True
    assert tumour_slice(tumour, np.eye(4), np.eye(4), 10) == 6
    halved = np.diag([1, 1, 0.5, 1.0])
    halved[2, 3] = 1
    assert tumour_slice(tumour, np.eye(4), halved, 20) == 10


def _oblique() -> Volume:
    """Every voxel has a value of its own."""
    affine = np.eye(4)
    affine[:3] = [[0.9, -0.2, 0.1, -20], [0.1, 1.1, -0.3, 5], [0.0, 0.2, 1.4, 3]]
    return Volume(np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7), affine)


def test_a_pixel_of_a_slice_lies_where_its_voxel_does():
    volume = _oblique()
    axial = AxialSlice.of(volume, 3)
    pixels = np.stack(np.meshgrid(np.arange(6), np.arange(5), indexing="ij"), axis=-1)
    world = axial.to_world(pixels)
    voxels = np.rint((world - volume.affine[:3, 3]) @ np.linalg.inv(volume.affine[:3, :3]).T).astype(int)
    np.testing.assert_array_equal(volume.data[tuple(np.moveaxis(voxels, -1, 0))], axial.image)
    np.testing.assert_allclose(axial.to_pixels(world), pixels, atol=1e-9)
    above = world + 4 * volume.affine[:3, 2]
    np.testing.assert_allclose(axial.to_pixels(above), pixels, atol=1e-9)


def test_the_slice_through_a_point_is_the_nearest():
    volume = _oblique()
    for height, index in ((-0.4, 0), (2.4, 2), (2.6, 3), (6.4, 6)):
        point = volume.affine[:3, :3] @ (1.0, 2.0, height) + volume.affine[:3, 3]
        assert AxialSlice.through(volume, point).index == index
    with pytest.raises(ValueError, match=r"slice: found 7; expected 0 to 6, from the bottom"):
        AxialSlice.through(volume, volume.affine[:3, :3] @ (1.0, 2.0, 6.6) + volume.affine[:3, 3])
    with pytest.raises(ValueError, match=r"slice: found -1"):
        AxialSlice.of(volume, -1)


def test_the_middle_of_a_patch_is_between_its_pixels():
    points = points_of_patches([ReferencePoint("a", 0, 0), ReferencePoint("b", 2, 5)], 16)
    assert points == (SlicePoint("a", 7.5, 7.5), SlicePoint("b", 39.5, 87.5))


def test_the_point_of_a_tissue_is_its_innermost_pixel():
    labels = np.zeros((20, 30), dtype=int)
    labels[2:5, 2:25] = 1  # long and thin
    labels[8:17, 10:19] = 1  # the thickest part
    labels[4:9, 26:29] = 2
    labels[6, 27] = 4  # another label of the same tissue: no hole
    points = points_in_labels(labels, {"tumour": [1], "white matter": [2, 4]})
    # What is left last of the second is the column (5..7, 27).
    assert points == (SlicePoint("tumour", 12.0, 14.0), SlicePoint("white matter", 6.0, 27.0))
    # Touching the border of the slice, the tissue ends there.
    assert points_in_labels(np.ones((3, 5), dtype=int), {"all": [1]}) == (SlicePoint("all", 1.0, 2.0),)


def test_a_tissue_that_is_not_on_the_slice_is_named_with_what_is():
    with pytest.raises(ValueError, match=r"CSF: no pixel of this slice has label 1; found 0, 3; choose another slice"):
        points_in_labels(np.array([[0, 3]]), {"CSF": [1]})


def test_one_range_serves_all_panels():
    maps = np.array([[[0.1, -0.2], [0.3, 0.9]], [[np.nan, 0.4], [0.5, -0.9]]])
    within = np.array([[True, True], [True, False]])
    assert shared_range(maps, within) == (-0.2, 0.5)
    with pytest.raises(ValueError, match="no encoder sees any of the pixels"):
        shared_range(np.full((1, 2, 2), np.nan), within)


def _image() -> np.ndarray:
    """(112, 112): tissue in the inner 5 x 5 patches of 16 pixels.

    Of the nine inside it the darkest is (2, 4), the brightest (4, 2), then (2, 2); those at its
    edge are more extreme still.
    """
    values = np.zeros((7, 7))
    values[1:6, 1:6], values[1, 1:6] = -9, 9
    values[2:5, 2:5] = [[3.0, 0.5, -4.0], [0.2, 1.0, 0.3], [5.0, 0.1, 0.4]]
    return np.kron(values, np.ones((16, 16)))
