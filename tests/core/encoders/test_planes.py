"""Tokens of one axial plane: which, where, and the maps that are made of them, for every kind of encoder."""

import dataclasses

import numpy as np
import pytest
import torch

from braindino.encoders.contract import TokenGrid, TokenPlane, VolumeEncoder
from braindino.patch_maps import (
    SIMILARITY_RANGE,
    AxialSlice,
    SlicePoint,
    height_offset,
    on_slice,
    similarity_on_slice,
    similarity_panels,
    tissue_tokens,
    upsample,
)
from braindino.slices import axial_slices
from braindino.transforms import standardize
from braindino.volume import Volume

MIDDLE = np.array([-8.0, 30.0, 25.0])
"""Of the volume's brain, mm."""


def plane_of(encoder: VolumeEncoder, volume: Volume, point: np.ndarray, **options) -> TokenPlane:
    plane = encoder.encode_plane(encoder.prepare_planes(volume, sequence="T1"), point, **options)
    assert plane is not None
    return plane


def test_a_plane_is_that_of_the_grid_of_tokens(encoder: VolumeEncoder, volume: Volume):
    prepared = encoder.prepare(volume, sequence="T1")
    [features] = encoder.encode([prepared])
    grid = features.tokens
    assert grid is not None
    for level in (0, grid.features.shape[2] - 1):
        point = grid.token_to_world(np.array([1, 1, level]))
        plane = encoder.encode_plane(prepared, point)
        assert plane is not None
        torch.testing.assert_close(plane.features, grid.features[:, :, level], rtol=1e-4, atol=1e-5)
        assert plane.features.dtype == torch.float32 and not plane.features.requires_grad
        assert [each.tolist() for each in plane.centres] == [each.tolist() for each in grid.centres[:2]]
        assert plane.height == pytest.approx(grid.centres[2][level])
        np.testing.assert_array_equal(plane.world_to_token(point), [1, 1])
        assert height_offset(plane, point) == pytest.approx(0, abs=1e-9)


def test_every_one_of_the_256_slices_can_be_asked_for(build, volume: Volume):
    encoder = build("slices")
    prepared, cube = encoder.prepare_planes(volume), standardize(volume)
    np.testing.assert_array_equal(prepared.data[:, 0].numpy(), axial_slices(cube, range(256)))
    for index in (0, 100, 101, 255):
        axial = AxialSlice.of(cube, index)
        plane = encoder.encode_plane(prepared, axial.to_world(np.array([127.5, 127.5])))
        assert plane is not None and plane.height == index
    # Of 8 slices, those at 16, 48, 80..., 64 lies between two: the lower.
    few = encoder.encode_plane(encoder.prepare(volume), AxialSlice.of(cube, 64).to_world(np.zeros(2)))
    assert few is not None and few.height == 48


def test_a_height_that_the_encoder_does_not_see_has_no_plane(encoder: VolumeEncoder, volume: Volume):
    prepared = encoder.prepare_planes(volume, sequence="T1")
    assert encoder.encode_plane(prepared, MIDDLE + 200) is None
    assert encoder.encode_plane(prepared, MIDDLE - 200) is None


def test_a_block_that_is_not_there_is_refused(encoder: VolumeEncoder, volume: Volume):
    prepared = encoder.prepare_planes(volume, sequence="T1")
    last = encoder.num_blocks - 1
    with pytest.raises(ValueError, match=f"found {last + 1}; this encoder has blocks 0 to {last}"):
        encoder.encode_plane(prepared, MIDDLE, block=last + 1)
    with pytest.raises(ValueError, match="found -1"):
        encoder.encode_plane(prepared, MIDDLE, block=-1)


def test_the_blocks_of_the_three_depths_are_those_of_the_layers(encoder: VolumeEncoder, volume: Volume):
    early, mid, late = encoder.depth_blocks
    assert 0 <= early <= mid <= late == encoder.num_blocks - 1
    if encoder.identity.name.startswith("brainmvp"):
        [features] = encoder.encode([encoder.prepare(volume)])
        planes = [plane_of(encoder, volume, MIDDLE, block=block) for block in range(4)]
        assert [plane.features.shape[0] for plane in planes] == [32, 16, 8, 4]
        for block, layer in zip((early, mid, late), features.layers, strict=True):
            assert planes[block].features.shape[-1] == len(layer)


def test_tokens_of_a_block_come_with_the_final_norm_or_without(build, volume: Volume):
    for kind in ("slices", "bm-mae", "brainiac", "timm"):
        encoder = build(kind)
        plain = plane_of(encoder, volume, MIDDLE, block=1, norm=False)
        normed = plane_of(encoder, volume, MIDDLE, block=1)
        torch.testing.assert_close(encoder.network.norm(plain.features), normed.features, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain.features, normed.features)
    encoder = build("slices")
    axial = AxialSlice.of(standardize(volume), 100)
    plain = plane_of(encoder, volume, axial.to_world(np.zeros(2)), block=1, norm=False)
    [tokens] = encoder.network.intermediate(torch.from_numpy(axial.image)[None, None], (1,), norm=False)
    grid = tokens.patches[0].unflatten(0, (16, 16))  # rows to the back, columns to the left
    torch.testing.assert_close(plain.features, grid.flip(0, 1).transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_the_final_norm_of_brainmvp_fits_its_last_map_only(build, volume: Volume):
    encoder = build("brainmvp")
    plain = plane_of(encoder, volume, MIDDLE, norm=False).features
    norm = encoder.network.norm
    scaled = (plain - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias
    torch.testing.assert_close(scaled, plane_of(encoder, volume, MIDDLE).features, rtol=1e-4, atol=1e-5)
    third = [plane_of(encoder, volume, MIDDLE, block=2, norm=each).features for each in (True, False)]
    assert torch.equal(*third)


@pytest.mark.parametrize(
    ("point", "standard"),
    [((-31.0, 50.0, 12.0), False), ((24.0, 12.0, 36.0), False), ((12.0, 52.0, 5.0), False), ((24.0, 12.0, 36.0), True)],
)
def test_what_is_put_in_one_place_of_the_volume_is_found_at_its_pixel(
    encoder: VolumeEncoder, volume: Volume, bright_volume, point: tuple[float, float, float], standard: bool
):
    """The places are off the middle along all three axes, to either side: any flip and any swap of axes would move them
    or leave their plane dark, as would a crop or a resize that was not undone."""
    at = np.array(point)
    axial = AxialSlice.through(standardize(volume) if standard else volume, at)
    plain, bright = plane_of(encoder, volume, at), plane_of(encoder, bright_volume(point), at)
    change = (bright.features - plain.features).norm(dim=-1).numpy()
    found = on_slice(change, plain, axial)
    place = np.array(np.unravel_index(np.nanargmax(found), found.shape))
    wanted = axial.to_pixels(at)
    token_mm = np.array([each[1] - each[0] for each in plain.centres]) * np.diag(plain.affine)[:2]
    off_mm = np.abs(axial.to_world(place) - axial.to_world(wanted))[:2]
    # Half a token from its centre, and the ball of 7 mm may be mostly in the next.
    assert (off_mm < token_mm / 2 + 7).all(), (place, wanted, off_mm, token_mm)


def test_the_reference_point_is_as_similar_as_can_be_to_itself(encoder: VolumeEncoder, volume: Volume):
    axial = AxialSlice.through(volume, MIDDLE)
    plane = plane_of(encoder, volume, MIDDLE)
    x, y = plane.world_to_token(MIDDLE)
    centre = np.array([plane.centres[0][x], plane.centres[1][y], plane.height, 1.0])
    row, column = axial.to_pixels((plane.affine @ centre)[:3])
    found = similarity_on_slice(plane, axial, SlicePoint("centre of a token", row, column))
    low, high = SIMILARITY_RANGE
    assert found.shape == axial.image.shape and low <= np.nanmin(found) <= np.nanmax(found) <= high + 1e-6
    tokens = plane.features.double()
    expected = torch.nn.functional.cosine_similarity(tokens, tokens[x, y].expand_as(tokens), dim=-1)
    np.testing.assert_allclose(found, on_slice(expected.numpy(), plane, axial), atol=1e-6)


def test_on_an_encoders_own_slice_maps_are_resized_as_pictures_are(build, volume: Volume):
    encoder, cube = build("slices"), standardize(volume)
    axial = AxialSlice.of(cube, 130)
    plane = plane_of(encoder, volume, axial.to_world(np.zeros(2)))
    values = np.random.default_rng(0).random((16, 16))  # rows, columns
    on_axes = values[::-1, ::-1].T  # x, y
    np.testing.assert_allclose(on_slice(on_axes, plane, axial), upsample(values, (256, 256)), atol=1e-5)


def test_beside_the_field_of_view_there_is_nothing(build, volume: Volume):
    encoder = build("bm-mae", fit="crop")  # the middle 64 mm of a brain of 90 x 112 mm
    axial = AxialSlice.through(volume, MIDDLE)
    plane = plane_of(encoder, volume, MIDDLE)
    found = on_slice(np.ones(plane.features.shape[:2]), plane, axial)
    rows, columns = np.nonzero(~np.isnan(found))
    # 64 mm around the middle of the box of non-zero voxels, pixels of 1 mm.
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (64, 64)
    middle = axial.to_pixels(MIDDLE)
    np.testing.assert_allclose([rows.mean(), columns.mean()], middle, atol=1)
    outside = SlicePoint("outside", middle[0] - 40, middle[1])
    assert axial.image[round(outside.row), round(outside.column)] != 0
    assert np.isnan(similarity_on_slice(plane, axial, outside)).all()


def test_panels_are_the_maps_of_every_encoder_on_one_slice(build, volume: Volume):
    encoders = {"slices": build("slices"), "volumes": build("brainiac"), "cropped": build("bm-mae", fit="crop")}
    axial = AxialSlice.through(volume, MIDDLE)
    row, column = axial.to_pixels(MIDDLE)
    points = [SlicePoint("middle", row, column), SlicePoint("front", row - 45, column)]
    panels = similarity_panels(encoders, volume, axial, points, sequence="T1", depth="mid")
    through = axial.to_world(np.array([60.0, 60.0]))
    assert panels.maps.shape == (3, 2, *axial.image.shape) and panels.colours.shape == (3, *axial.image.shape, 3)
    assert panels.encoders == ("slices", "volumes", "cropped") and panels.points == tuple(points)
    for number, encoder in enumerate(encoders.values()):
        plane = plane_of(encoder, volume, through, block=encoder.depth_blocks[1])
        for place, point in enumerate(points):
            expected = similarity_on_slice(plane, axial, point)
            np.testing.assert_array_equal(panels.maps[number, place], expected)
        assert panels.offsets[number] == pytest.approx(height_offset(plane, through))
        assert abs(panels.offsets[number]) <= 8
    assert np.isnan(panels.maps[2, 1]).all() and not np.isnan(panels.maps[:2, 1]).all()
    above = AxialSlice.of(volume, 59)
    high = similarity_panels({"cropped": encoders["cropped"]}, volume, above, points, sequence="T1")
    assert np.isnan(high.maps).all() and np.isnan(high.colours).all() and np.isnan(high.offsets).all()


def test_tokens_hold_tissue_where_the_slice_does(build, volume: Volume):
    cube = standardize(volume)
    axial = AxialSlice.of(cube, 130)
    plane = plane_of(build("slices"), volume, axial.to_world(np.zeros(2)))
    tissue = (axial.image != 0).reshape(16, 16, 16, 16).mean(axis=(1, 3)) >= 0.9
    assert tissue.any() and not tissue.all()
    np.testing.assert_array_equal(tissue_tokens(plane, axial), tissue[::-1, ::-1].T)


def test_places_on_a_worked_plane():
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = (10.0, 0.0, -5.0)
    centres = (np.array([1.5, 5.5]), np.array([0.5, 2.5, 4.5]))
    plane = TokenPlane(torch.zeros(2, 3, 1), centres, 4.0, affine)
    # x edges 9, 17, 25 mm, centres 13 and 21; y edges -0.5, 1.5, 3.5, 5.5 mm.
    points = np.array([[13.0, 0.5, 0.0], [17.0, 1.0, 99.0], [9.5, 5.4, 0.0], [25.1, 1.0, 0.0], [13.0, -0.6, 0.0]])
    assert plane.world_to_token(points).tolist() == [[0, 0], [1, 0], [0, 2], [-1, -1], [-1, -1]]
    expected = [[0.0, 0.0], [0.5, 0.25], [0.0, 2.0], [np.nan] * 2, [np.nan] * 2]
    np.testing.assert_allclose(plane.world_to_place(points), expected)
    # The plane is at 4 voxels of 3 mm above -5: 7 mm.
    assert height_offset(plane, np.array([0.0, 0.0, 5.0])) == pytest.approx(2.0)


def test_values_that_are_coordinates_come_back_as_coordinates():
    """Bilinear values of a linear function are exact between the outermost centres, through any affine."""
    turn = np.array([[0.9, -0.2, 0.1], [0.1, 1.1, -0.3], [0.0, 0.2, 1.4]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn, (-20.0, 5.0, 3.0)
    volume = Volume(np.random.default_rng(0).random((30, 40, 20)).astype(np.float32), affine)
    axial = AxialSlice.of(volume, 7)
    cube_affine = affine.copy()  # a crop by (4, 6, 2) at spacing 1.5, 2, 1 voxels
    cube_affine[:3, 3] += turn @ (4, 6, 2)
    cube_affine[:3, :3] = turn @ np.diag([1.5, 2.0, 1.0])
    centres = (np.array([1.0, 5.0, 9.0, 13.0]), np.array([0.5, 4.5, 8.5, 12.5]))
    x, y = np.meshgrid(*centres, indexing="ij")
    plane = TokenPlane(torch.zeros(4, 4, 1), centres, 5.0, cube_affine)
    found = on_slice(np.stack([x, y], axis=-1), plane, axial)
    rows, columns = np.indices(axial.image.shape)
    voxel_x, voxel_y = (29 - columns - 4) / 1.5, (39 - rows - 6) / 2.0
    within = (voxel_x >= 1) & (voxel_x <= 13) & (voxel_y >= 0.5) & (voxel_y <= 12.5)
    assert within.sum() > 100
    np.testing.assert_allclose(found[within], np.stack([voxel_x, voxel_y], axis=-1)[within], atol=1e-5)
    # How far beyond the middle of the tokens, at 7 and 6.5; they reach 8 on either side, where a pixel may round.
    beyond = np.maximum(np.abs(voxel_x - 7), np.abs(voxel_y - 6.5)) - 8
    assert np.isnan(found[beyond > 1e-6]).all() and not np.isnan(found[beyond < -1e-6]).any()


def test_the_plane_of_a_grid_is_the_nearest_in_height():
    centres = (np.array([0.5, 2.5]), np.array([0.5, 2.5]), np.array([1.0, 3.0, 9.0]))
    features = torch.arange(12.0).reshape(2, 2, 3, 1)
    grid = TokenGrid(features, centres, np.diag([1.0, 1.0, 2.0, 1.0]), np.eye(4))
    for height, level in ((0.1, 0), (3.9, 0), (4.1, 1), (11.9, 1), (12.1, 2), (23.9, 2)):
        plane = grid.axial_plane(np.array([0.0, 0.0, height]))
        assert plane is not None and plane.height == centres[2][level], height
        assert torch.equal(plane.features, features[:, :, level])
    assert grid.axial_plane(np.array([0.0, 0.0, -0.1])) is None
    assert grid.axial_plane(np.array([0.0, 0.0, 24.1])) is None


def test_preparing_for_planes_leaves_the_encoders_identity_alone(build, volume: Volume):
    encoder = build("slices")
    before = dataclasses.asdict(encoder.identity)
    encoder.prepare_planes(volume)
    assert dataclasses.asdict(encoder.identity) == before and encoder.preparation.num_slices == 8
