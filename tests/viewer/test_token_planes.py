"""Similarity maps of a scan whose frame is easily got wrong, against the functions of arrays and the affines alone."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from braindino import patch_maps
from braindino.encoders.catalogue import load_volume_encoder
from braindino.slices import axial_slices
from braindino.transforms import standardize
from braindino.viewer.bounded_cache import BoundedCache
from braindino.viewer.scans import OpenScan, draw_slice, given_source, open_scan
from braindino.viewer.token_planes import (
    OUTSIDE,
    LoadedEncoder,
    OutsideError,
    TokenPlanes,
    encode_every_block,
)
from braindino.volume import load_volume
from tests.viewer.conftest import AFFINE, MARK_IN_FILE, MARK_INTENSITY


@pytest.fixture(scope="module")
def opened(phantom) -> OpenScan:
    return open_scan(given_source(phantom.scan, mask=None, segmentation=phantom.segmentation))


@pytest.fixture(scope="module")
def planes(tiny_encoder) -> TokenPlanes:
    return TokenPlanes([tiny_encoder])


def test_the_phantom_is_stored_to_the_left_and_its_mark_lies_where_it_should(phantom) -> None:
    image = nib.load(phantom.scan)
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    assert image.get_fdata()[MARK_IN_FILE] == MARK_INTENSITY
    volume = load_volume(phantom.scan)
    assert volume.data[phantom.voxel] == MARK_INTENSITY
    np.testing.assert_allclose(volume.affine @ [*phantom.voxel, 1], AFFINE @ [*MARK_IN_FILE, 1])


def test_the_reference_is_the_patch_in_which_the_encoder_sees_the_point(opened, planes, tiny_encoder, phantom) -> None:
    x, y, z = phantom.voxel
    found = planes.similarity(tiny_encoder, opened, block=3, voxel=phantom.voxel, layer=z, smooth=False)
    # Where the mark lies in the slice that the encoder sees, found without any affine.
    image = axial_slices(standardize(opened.brain), [found.index])[0]
    row, column = (int(pixels.mean() // 16) for pixels in np.nonzero(image > 0.9 * image.max()))
    assert found.reference == (15 - column, 15 - row), "rows run to the back, columns to the left"
    # Its slice is the middle one of those that hold the mark.
    cube = standardize(opened.brain).data
    marked = np.flatnonzero((cube > 0.9 * cube.max()).any(axis=(0, 1)))
    assert 40 < len(marked) < 70 and abs(found.index - marked.mean()) < 3
    assert found.grid[found.reference] == 1.0
    assert found.values[x, y] == 1.0
    assert (found.grid <= 1.0).all() and (found.grid < 1.0).sum() > 240, "patches within the mark are equal"


def test_a_map_is_eq_12_of_the_paper_at_every_voxel(opened, planes, tiny_encoder, phantom) -> None:
    voxel = (30, 22, 9)
    found = planes.similarity(tiny_encoder, opened, block=3, voxel=voxel, layer=9, smooth=True)
    cube = standardize(opened.brain)
    image = axial_slices(cube, [found.index])[0]
    patches = patch_maps.encode_patches(tiny_encoder.encoder.network, image).astype(np.float64)
    right, front = found.reference
    similar = patch_maps.similarity_map(patches, patches[15 - front, 15 - right])
    np.testing.assert_allclose(found.grid, similar[::-1, ::-1].T, atol=2e-5)
    upsampled = patch_maps.upsample(similar, (256, 256))
    to_cube = np.linalg.inv(cube.affine) @ opened.volume.affine
    checked = 0
    for x in range(opened.volume.shape[0]):
        for y in range(opened.volume.shape[1]):
            if opened.brain.data[x, y, 9] == 0:
                assert found.values[x, y] == OUTSIDE
                continue
            right, front, up, _ = to_cube @ [x, y, 9, 1]
            assert abs(up - found.index) <= 0.5 + 1e-9
            # Between the pixels of the slice, bilinear again: exact inside a cell of the patch grid's centres.
            row, column = 255 - front, 255 - right
            top, left = int(np.clip(row, 0, 254)), int(np.clip(column, 0, 254))
            down, along = np.clip(row - top, 0, 1), np.clip(column - left, 0, 1)
            corners = upsampled[top : top + 2, left : left + 2]
            expected = np.array([1 - down, down]) @ corners @ np.array([1 - along, along])
            assert found.values[x, y] == pytest.approx(expected, abs=0.02)
            checked += 1
    assert checked > 500


def test_every_block_of_one_pass_is_that_of_a_pass_of_its_own(opened, planes, tiny_encoder) -> None:
    encoder = tiny_encoder.encoder
    prepared = encoder.prepare_planes(opened.brain)
    encoded = encode_every_block(encoder, prepared, 77)
    point = (prepared.affine @ [100.0, 90.0, 77.0, 1.0])[:3]
    for block in range(4):
        plane = encoder.encode_plane(prepared, point, block=block)
        np.testing.assert_allclose(encoded.planes[block].features, plane.features, atol=2e-5)
        assert (encoded.planes[block].height, plane.height) == (77.0, 77.0)
        for ours, theirs in zip(encoded.planes[block].centres, plane.centres, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    [features] = encoder.encode([replace(prepared, data=prepared.data[77:78])], with_tokens=False)
    np.testing.assert_allclose(encoded.cls, features.slices.cls[0], atol=2e-5)


def test_blocks_differ_and_cost_one_pass(opened, tiny_encoder, monkeypatch) -> None:
    fresh = TokenPlanes([tiny_encoder])
    network, passes = tiny_encoder.encoder.network, []
    intermediate = network.intermediate
    monkeypatch.setattr(network, "intermediate", lambda *a, **b: passes.append(1) or intermediate(*a, **b))
    maps = [
        fresh.similarity(tiny_encoder, opened, block=block, voxel=(22, 30, 12), layer=12, smooth=True)
        for block in (0, 2, 3)
    ]
    again = fresh.similarity(tiny_encoder, opened, block=3, voxel=(25, 20, 12), layer=12, smooth=True)
    assert len(passes) == 1
    assert np.abs(maps[0].grid - maps[2].grid).max() > 0.01
    assert np.abs(maps[1].grid - maps[2].grid).max() > 0.01
    assert again.reference != maps[0].reference
    fresh.similarity(tiny_encoder, opened, block=3, voxel=(25, 20, 13), layer=13, smooth=True)
    assert len(passes) == 2, "another slice is another pass"


def test_the_point_of_one_slice_can_be_compared_with_another(opened, planes, tiny_encoder) -> None:
    here = planes.similarity(tiny_encoder, opened, block=3, voxel=(22, 30, 12), layer=12, smooth=True)
    there = planes.similarity(tiny_encoder, opened, block=3, voxel=(22, 30, 12), layer=15, smooth=True)
    assert there.reference_index == here.index != there.index
    assert there.reference == here.reference
    assert there.grid.max() < 1.0


@pytest.mark.parametrize(
    ("voxel", "layer"),
    [((0, 30, 12), 12), ((22, 59, 12), 12), ((22, 30, 0), 0), ((22, 30, 12), 25), ((22, 30, 25), 12)],
)
def test_beside_the_brain_there_is_nothing_to_see(opened, planes, tiny_encoder, voxel, layer) -> None:
    with pytest.raises(OutsideError, match=r"lies (outside|above or below)"):
        planes.similarity(tiny_encoder, opened, block=3, voxel=voxel, layer=layer, smooth=True)


def test_an_encoder_of_volumes_shows_the_plane_nearest_to_the_layer(opened, phantom) -> None:
    encoder = load_volume_encoder("untrained:brainiac")
    loaded = LoadedEncoder("volume", "BrainIAC", encoder)
    planes = TokenPlanes([loaded])
    x, y, z = phantom.voxel
    found = planes.similarity(loaded, opened, block=encoder.num_blocks - 1, voxel=phantom.voxel, layer=z, smooth=False)
    [features] = encoder.encode([encoder.prepare(opened.brain)])
    tokens = features.tokens
    i, j, k = tokens.voxel_to_token(np.array(phantom.voxel)).tolist()
    assert (found.reference, found.index, found.count) == ((i, j), k, tokens.features.shape[2])
    plane = tokens.features[:, :, k].numpy().astype(np.float64)
    expected = patch_maps.similarity_map(plane, plane[i, j])
    np.testing.assert_allclose(found.grid, expected, atol=2e-5)
    assert found.values[x, y] == 1.0
    with pytest.raises(ValueError, match=f"expected 0 to {encoder.num_blocks - 1}"):
        planes.similarity(loaded, opened, block=99, voxel=phantom.voxel, layer=z, smooth=True)


def test_an_encoder_of_slices_that_is_no_vit_of_ours_is_read_level_by_level(opened, phantom) -> None:
    encoder = load_volume_encoder("untrained:timm:resnet10t", image_size=64)
    loaded = LoadedEncoder("timm", "resnet", encoder)
    planes = TokenPlanes([loaded])
    z = phantom.voxel[2]
    grids = [
        planes.similarity(loaded, opened, block=block, voxel=phantom.voxel, layer=z, smooth=False).grid
        for block in range(encoder.num_blocks)
    ]
    assert [grid.shape[0] for grid in grids] == [32, 16, 8, 4, 2]
    assert planes.slice_feature(loaded, opened, z).shape == (encoder.dim,)


def test_the_feature_of_a_slice_is_that_of_a_table(opened, planes, tiny_encoder) -> None:
    found = planes.similarity(tiny_encoder, opened, block=3, voxel=(22, 30, 14), layer=14, smooth=True)
    feature = planes.slice_feature(tiny_encoder, opened, 14)
    encoder = tiny_encoder.encoder
    slices = encoder.prepare_planes(opened.brain).data[found.index : found.index + 1]
    expected = encoder.network(slices).cls[0].numpy()
    np.testing.assert_allclose(feature, expected, atol=2e-5)


def test_what_was_used_last_is_kept_within_the_bytes_allowed() -> None:
    made: list[str] = []

    def make(key: str) -> np.ndarray:
        made.append(key)
        return np.zeros(10, dtype=np.uint8)

    cache: BoundedCache[np.ndarray] = BoundedCache(30, lambda value: value.nbytes)
    for key in "abcadeaf":
        cache.get(key, lambda key=key: make(key))
    assert made == ["a", "b", "c", "d", "e", "f"], "a was used again and stayed"
    assert (len(cache), cache.num_bytes) == (3, 30)
    assert "a" in cache and "e" in cache and "f" in cache and "b" not in cache
    big: BoundedCache[np.ndarray] = BoundedCache(5, lambda value: value.nbytes)
    assert big.get("x", lambda: make("x")) is big.get("x", lambda: make("x"))
    big.get("y", lambda: make("y"))
    assert (len(big), big.num_bytes) == (1, 10), "the newest is kept whatever its size"
    with pytest.raises(ZeroDivisionError):
        big.get("z", lambda: 1 / 0)
    assert "z" not in big


def test_tokens_are_kept_within_the_bytes_allowed(opened, tiny_encoder) -> None:
    one = 4 * 16 * 16 * 192 * 4
    planes = TokenPlanes([tiny_encoder], max_bytes=2 * one)
    for layer in (10, 11, 12, 13):
        planes.similarity(tiny_encoder, opened, block=3, voxel=(22, 30, layer), layer=layer, smooth=True)
    assert planes._slices.num_bytes == 2 * one


def test_a_thumbnail_is_the_slice_that_the_encoder_sees(opened) -> None:
    cube = standardize(opened.brain)
    for index in (60, 128, 200):
        drawn = draw_slice(opened.brain, index).astype(float)
        # The brain is 66 mm wide and 70.5 mm long in this scan; the cube is as wide as it is long.
        assert max(drawn.shape) == 96 and drawn.shape[0] > drawn.shape[1]
        image = axial_slices(cube, [index])[0]
        rows = ((np.arange(drawn.shape[0]) + 0.5) * 256 / drawn.shape[0]).astype(int)
        columns = ((np.arange(drawn.shape[1]) + 0.5) * 256 / drawn.shape[1]).astype(int)
        sampled = image[np.ix_(rows, columns)]
        both = (drawn > 0) & (sampled != 0)
        assert both.mean() > 0.3
        assert np.corrcoef(drawn[both], sampled[both])[0, 1] > 0.9
