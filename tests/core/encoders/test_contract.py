"""What holds for every encoder: shapes, determinism, places of tokens, identities."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from braindino.encoders import intensity
from braindino.encoders.contract import Identity, TokenGrid, VolumeEncoder, layer_blocks
from braindino.volume import Volume


def encode(encoder: VolumeEncoder, volume: Volume, **options):
    [features] = encoder.encode([encoder.prepare(volume, sequence="T1")], **options)
    return features


def test_features_have_the_shapes_of_the_contract(encoder: VolumeEncoder, volume: Volume):
    features = encode(encoder, volume)
    assert features.global_.shape == (encoder.dim,)
    assert all(layer.ndim == 1 for layer in features.layers)
    assert features.tokens is not None and features.tokens.features.ndim == 4
    assert features.tokens.features.shape[:3] == tuple(len(centres) for centres in features.tokens.centres)
    for tensor in (features.global_, *features.layers, features.tokens.features):
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and torch.isfinite(tensor).all()
        assert not tensor.requires_grad
    if features.slices is not None:
        assert features.slices.cls.shape == (features.tokens.features.shape[2], encoder.dim)
        torch.testing.assert_close(features.slices.cls.mean(dim=0), features.global_)
        # The floor's mean patch token would be one number; its features stand in its place.
        of_floor = encoder.identity.name == intensity.NAME
        means = features.slices.cls if of_floor else features.tokens.features.mean(dim=(0, 1))
        torch.testing.assert_close(features.slices.patches, means)
    without = encode(encoder, volume, with_tokens=False)
    assert without.tokens is None and torch.equal(without.global_, features.global_)


def test_features_are_the_same_in_every_call_and_do_not_depend_on_other_volumes(
    encoder: VolumeEncoder, volume: Volume, bright_volume
):
    assert encoder.network is None or not any(module.training for module in encoder.network.modules())
    assert encoder.network is None or not any(each.requires_grad for each in encoder.network.parameters())
    before = copy.deepcopy(encoder.network.state_dict()) if encoder.network is not None else {}
    first, second = encode(encoder, volume), encode(encoder, volume)
    assert torch.equal(first.global_, second.global_)
    prepared = [encoder.prepare(each, sequence="T1") for each in (bright_volume((0.0, 40.0, 30.0)), volume)]
    together = encoder.encode(prepared, batch_size=2)
    torch.testing.assert_close(together[1].global_, first.global_, rtol=1e-4, atol=1e-5)
    assert not torch.equal(together[0].global_, first.global_)
    after = encoder.network.state_dict() if encoder.network is not None else {}
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "statistics of BatchNorm moved"


@pytest.mark.parametrize("point", [(-31.0, 50.0, 12.0), (15.0, 8.0, 40.0), (12.0, 52.0, 5.0)])
def test_a_bright_place_lights_the_token_that_holds_it(
    encoder: VolumeEncoder, volume: Volume, bright_volume, point: tuple[float, float, float]
):
    """Relative to the middle of the brain the three places are (-23, 20, -13), (23, -22, 15) and (20, 22, -20) mm:
    any flip, and any swap of two axes, would light another token for one of them."""
    plain, bright = encode(encoder, volume).tokens, encode(encoder, bright_volume(point)).tokens
    assert plain is not None and bright is not None
    change = (bright.features - plain.features).norm(dim=-1)
    lit = np.array(np.unravel_index(int(change.argmax()), change.shape))
    # The ball may lie across a border; its token is the one whose centre is nearest, or that one's neighbour.
    size = plain.token_to_world(np.array([1, 1, 1])) - plain.token_to_world(np.array([0, 0, 0]))
    distance = np.abs(plain.token_to_world(lit) - point) / size
    assert (distance < 0.5 + 7 / size).all(), (lit, plain.world_to_token(np.array(point)), distance)


def test_places_go_from_voxels_to_tokens_and_back(encoder: VolumeEncoder, volume: Volume):
    tokens = encode(encoder, volume).tokens
    assert tokens is not None
    shape = tokens.features.shape[:3]
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    np.testing.assert_array_equal(tokens.world_to_token(tokens.token_to_world(index)), index)
    np.testing.assert_array_equal(tokens.voxel_to_token(tokens.token_to_voxel(index)), index)
    voxel = np.array([50, 60, 30])
    world = volume.affine[:3, :3] @ voxel + volume.affine[:3, 3]
    np.testing.assert_array_equal(tokens.voxel_to_token(voxel), tokens.world_to_token(world))
    assert tokens.world_to_token(np.array([500.0, 0.0, 0.0])).tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match="outside the grid"):
        tokens.token_to_world(np.array([0, 0, shape[2]]))


def test_a_token_of_a_worked_grid_is_where_it_was_put():
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = (10.0, 0.0, -5.0)
    volume_affine = np.diag([1.0, 1.0, 1.0, 1.0])
    centres = (np.array([1.5, 5.5]), np.array([0.5, 2.5, 4.5]), np.array([1.0, 3.0, 9.0]))
    grid = TokenGrid(torch.zeros(2, 3, 3, 1), centres, affine, volume_affine)
    assert grid.token_to_world(np.array([1, 2, 0])).tolist() == [21.0, 4.5, -4.0]
    # x edges in voxels -0.5, 3.5, 7.5 -> 9, 17, 25 mm; z edges 0, 2, 6, 12 -> -5, -3, 1, 7 mm.
    points = np.array([[9.0, 0.0, -5.0], [16.9, 3.4, 0.9], [17.1, 3.6, 1.1], [25.1, 0.0, 0.0], [10.0, 0.0, 7.1]])
    assert grid.world_to_token(points).tolist() == [[0, 0, 0], [0, 1, 1], [1, 2, 2], [-1] * 3, [-1] * 3]


def test_the_key_changes_with_weights_preparation_and_reading_only():
    identity = Identity("a", "1" * 64, {"fit": "crop"}, {"feature": "mean"})
    assert dataclasses.replace(identity, name="b").key == identity.key
    changed = [
        dataclasses.replace(identity, sha256="2" * 64),
        dataclasses.replace(identity, preparation={"fit": "resize"}),
        dataclasses.replace(identity, reading={"feature": "token0"}),
    ]
    assert len({identity.key, *(each.key for each in changed)}) == 4


def test_options_that_change_features_change_the_key(build):
    keys = [
        build("brainiac").identity.key,
        build("brainiac", feature="mean").identity.key,
        build("brainiac", inner_norm=False).identity.key,
        build("brainiac", fit="crop").identity.key,
        build("brainmvp").identity.key,
        build("brainmvp", stages=(1, 2, 3)).identity.key,
        build("slices").identity.key,
        build("slices", intensity="imagenet").identity.key,
        build("slices", image_size=224).identity.key,
    ]
    assert len(set(keys)) == len(keys)


def test_layers_are_the_papers_blocks_in_twelve_and_exist_in_any_depth():
    assert layer_blocks(12) == (2, 6, 11)
    assert layer_blocks(24) == (5, 12, 23)
    assert layer_blocks(1) == (0, 0, 0)
    with pytest.raises(ValueError, match="depth 0"):
        layer_blocks(0)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 12, 100])
def test_slices_of_two_volumes_may_share_a_pass_and_their_features_do_not_show_it(
    build, volume: Volume, bright_volume, batch_size: int
):
    """Eight slices a volume: passes of 3 and 12 run over the border of two volumes, one of 100 holds all three."""
    encoder = build("slices")
    volumes = (volume, bright_volume((0.0, 40.0, 30.0)), bright_volume((15.0, 8.0, 40.0)))
    prepared = [encoder.prepare(each) for each in volumes]
    passes = []
    intermediate = encoder.network.intermediate
    encoder.network.intermediate = lambda slices, *more, **options: (
        passes.append(len(slices)) or intermediate(slices, *more, **options)
    )
    together = encoder.encode(prepared, batch_size=batch_size)
    assert sum(passes) == 24 and set(passes[:-1]) <= {batch_size} and passes[-1] <= batch_size
    for each, features in zip(prepared, together, strict=True):
        [alone] = encoder.encode([each], batch_size=8)
        assert alone.slices is not None and features.slices is not None
        assert alone.tokens is not None and features.tokens is not None
        pairs = [
            (features.global_, alone.global_),
            *zip(features.layers, alone.layers, strict=True),
            *zip(features.slices, alone.slices, strict=True),
            (features.tokens.features, alone.tokens.features),
        ]
        for found, expected in pairs:
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)
