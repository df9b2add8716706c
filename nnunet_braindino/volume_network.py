"""Segmentation networks on frozen 3D encoders: BrainMVP, BM-MAE and BrainIAC (paper sec. 4.3.1)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from braindino.encoders import bm_mae, brainiac, brainmvp
from braindino.encoders.catalogue import load_volume_encoder
from braindino.encoders.cube_encoder import CubeEncoder, CubeNetwork, as_map
from braindino.encoders.uniformer import STRIDE, UniFormer
from braindino.encoders.volume_transformer import PATCH, BMMAETransformer, BrainIACTransformer
from nnunet_braindino.decoder import decoder_blocks
from nnunet_braindino.encoder_checkpoint import EncoderNetwork
from nnunet_braindino.volume_decoder import VolumeDecoder

SCALES = (2, 4, 8, 16)


class Kind(NamedTuple):
    """What segmentation must know of a kind of encoder."""

    build: Callable[..., CubeNetwork]
    orientation: str
    """Directions of the axes (x, y, z) that it was trained with."""


# The names are those of ``load_volume_encoder``.
KINDS = {
    brainmvp.NAME: Kind(UniFormer, "RAS"),
    bm_mae.NAME: Kind(BMMAETransformer, "LPS"),
    brainiac.NAME: Kind(BrainIACTransformer, "RAS"),
}


def read_volume_network(name: str) -> CubeNetwork:
    """The network of the encoder that ``load_volume_encoder`` knows by ``name``, with its ``name`` and ``sha256``.

    Raises:
        ValueError: it is no encoder of cubes, or what the readers say of a file.
    """
    encoder = load_volume_encoder(name)
    if not isinstance(encoder, CubeEncoder):
        raise ValueError(
            f"{name}: an encoder of slices, while this trainer needs one of volumes: brainmvp:PATH, bm-mae:PATH or "
            "brainiac:PATH, or untrained: and one of the three names"
        )
    return encoder.network


def kind_of(network: nn.Module) -> str:
    """Its name in ``KINDS``."""
    return next(name for name, kind in KINDS.items() if type(network) is kind.build)


def volume_identity(network: CubeNetwork) -> dict[str, Any]:
    """What the plans keep of an encoder: enough to build it again and to recognise its weights."""
    return {
        "name": network.name,
        "sha256": network.sha256,
        "kind": kind_of(network),
        "architecture": network.architecture,
    }


def build_encoder(identity: dict[str, Any]) -> CubeNetwork:
    """The network that ``volume_identity`` describes, with other weights.

    Raises:
        ValueError: the identity is that of another kind of encoder.
    """
    if identity.get("kind") not in KINDS:
        raise ValueError(
            f"the plans hold an encoder of kind {identity.get('kind')!r}; expected one of {', '.join(KINDS)}: were "
            "they written by a trainer for slices?"
        )
    network = KINDS[identity["kind"]].build(**identity["architecture"])
    network.name, network.sha256 = identity["name"], identity["sha256"]
    return network


class FrozenVolumeSegmenter(EncoderNetwork):
    """Logits (B, num_classes, *patch) from images (B, num_input_channels, *patch), cubes of the encoder's size.

    The encoder is frozen: no parameter needs a gradient, it stays in ``eval()`` whatever ``train()`` is called with
    (its BatchNorm keeps the published statistics), and nothing is kept for a backward pass. Its embedding of one
    channel is repeated over the input channels and divided by their number, which for a frozen embedding is the same
    as averaging them; the decoder sees the channels one by one. The decoder reads the four stages of BrainMVP, or the
    patch tokens of four evenly spaced blocks ({2, 5, 8, 11} for twelve) after the final norm.

    nnU-Net's arrays run z, y, x in the storage order of the files, and then through ``transpose_forward``. The encoder
    is given x, y, z in the directions that it was trained with; files are taken to be stored in LPS.
    """

    read_encoder = staticmethod(read_volume_network)

    def __init__(
        self,
        encoder: CubeNetwork,
        *,
        num_input_channels: int,
        num_classes: int,
        transpose_forward: Sequence[int] = (0, 1, 2),
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.turned = KINDS[kind_of(encoder)].orientation == "RAS"
        self.axes = [list(transpose_forward).index(stored) for stored in (2, 1, 0)]
        if isinstance(encoder, UniFormer):
            dims, scales = encoder.dims, SCALES
        else:
            self.blocks = decoder_blocks(len(encoder.blocks))
            dims, scales = (encoder.norm.normalized_shape[0],) * 4, (PATCH,) * 4
        self.decoder = VolumeDecoder(
            num_input_channels=num_input_channels, num_classes=num_classes, dims=dims, scales=scales
        )
        self.train()

    def train(self, mode: bool = True) -> "FrozenVolumeSegmenter":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decoder(images, self.encode(images))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The maps that the decoder reads, on the axes of the images."""
        cubes = images.permute(0, 1, *(2 + axis for axis in self.axes))
        maps = self._maps(cubes.flip(2, 3) if self.turned else cubes)
        back = [2 + self.axes.index(axis) for axis in range(3)]
        return [(each.flip(2, 3) if self.turned else each).permute(0, 1, *back) for each in maps]

    def _maps(self, cubes: torch.Tensor) -> list[torch.Tensor]:
        encoder = self.encoder
        if isinstance(encoder, UniFormer):
            return encoder(cubes)[1:]
        if isinstance(encoder, BMMAETransformer):
            # All channels go through one tokenizer, as the paper's repeated embedding does.
            tokenizer = next(iter(encoder.tokenizers))
            outputs = encoder.intermediate(encoder.tokenize({tokenizer: cubes}), self.blocks)
        else:
            outputs = encoder.intermediate(cubes, self.blocks)
        return [as_map(encoder.norm(output.patches)) for output in outputs]


def cube_edge(network: CubeNetwork, *, default: int) -> int:
    """Voxels along an edge of the cubes that a network takes; ``default`` for one that takes any multiple of 16."""
    if isinstance(network, UniFormer):
        assert default % STRIDE == 0, f"{default} is no multiple of {STRIDE}"
        return default
    return network.architecture["grid"] * PATCH
