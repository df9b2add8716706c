"""Small encoders and one asymmetric volume, made here."""

import numpy as np
import pytest

from braindino.encoders.bm_mae import BMMAE
from braindino.encoders.brainiac import BrainIAC
from braindino.encoders.brainmvp import BrainMVP
from braindino.encoders.catalogue import draw_weights
from braindino.encoders.contract import VolumeEncoder
from braindino.encoders.intensity import IntensityFloor
from braindino.encoders.slice_transformer import SliceTransformer
from braindino.encoders.timm_encoder import TimmEncoder, build_timm
from braindino.encoders.uniformer import UniFormer
from braindino.encoders.volume_transformer import BMMAETransformer, BrainIACTransformer
from braindino.vision_transformer import VisionTransformer
from braindino.volume import Volume


def make_volume(*, bright_at: tuple[float, float, float] | None = None) -> Volume:
    """An ellipsoid "brain" of 90 x 112 x 80 mm in voxels of 1 x 1 x 2 mm, off the middle of its field of view; a ball
    of 7 mm radius around a point in mm may be brighter.
    """
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[:3, 3] = (-70.0, -40.0, -30.0)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in (120, 130, 60)), indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    radii = np.linalg.norm((world - (-8.0, 30.0, 25.0)) / (45.0, 56.0, 40.0), axis=-1)
    noise = np.random.default_rng(0).normal(scale=3, size=radii.shape)
    data = np.where(radii < 1, 100 + 0.3 * world[..., 0] + 0.2 * world[..., 1] + noise, 0.0)
    if bright_at is not None:
        data[(np.linalg.norm(world - bright_at, axis=-1) < 7) & (radii < 1)] += 40
    return Volume(data.astype(np.float32), affine)


def small_brainmvp(**options: object) -> BrainMVP:
    """64 features, one block per stage, cubes of 64 voxels."""
    network = draw_weights(lambda: UniFormer(dims=(64, 64, 64, 64), depths=(1, 1, 1, 1)))
    return BrainMVP(network, **{"size": 64, "fit": "resize", **options})


def small_bm_mae(**options: object) -> BMMAE:
    """192 features, 3 blocks, cubes of 64 voxels, two tokenizers."""
    network = draw_weights(lambda: BMMAETransformer(modalities=("t1", "flair"), width=192, depth=3, mlp_dim=96, grid=4))
    return BMMAE(network, **{"fit": "resize", **options})


def small_brainiac(**options: object) -> BrainIAC:
    """64 features, 3 blocks, cubes of 96 voxels."""
    return BrainIAC(draw_weights(lambda: BrainIACTransformer(width=64, depth=3, mlp_dim=96)), **options)


def small_slice_transformer(**options: object) -> SliceTransformer:
    """64 features, 3 blocks, 8 slices."""
    network = draw_weights(lambda: VisionTransformer(embed_dim=64, depth=3, num_heads=1, layer_scale_init=0.5))
    network.name, network.sha256 = "small", "0" * 64
    return SliceTransformer(network, **{"num_slices": 8, **options})


def small_timm(**options: object) -> TimmEncoder:
    """The smallest DINOv3 of timm, 8 slices."""
    network = draw_weights(lambda: build_timm("vit_small_patch16_dinov3", pretrained=False))
    return TimmEncoder(network, name="small-timm", **{"num_slices": 8, "image_size": 64, **options})


BUILDERS = {
    "brainmvp": small_brainmvp,
    "bm-mae": small_bm_mae,
    "brainiac": small_brainiac,
    "slices": small_slice_transformer,
    "timm": small_timm,
    "intensity": lambda: IntensityFloor(num_slices=8),
}


@pytest.fixture(params=list(BUILDERS))
def encoder(request: pytest.FixtureRequest) -> VolumeEncoder:
    """Each kind of encoder, small."""
    return BUILDERS[request.param]()


@pytest.fixture
def build():
    """Builders of small encoders by kind, with options."""
    return lambda kind, **options: BUILDERS[kind](**options)


@pytest.fixture
def volume() -> Volume:
    return make_volume()


@pytest.fixture
def bright_volume():
    """``make_volume`` with a bright ball somewhere."""
    return lambda point: make_volume(bright_at=point)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """In every test here."""
