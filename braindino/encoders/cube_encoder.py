"""What the three encoders of cubes share: preparation, batches, turning to the encoder's orientation and back."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from braindino.encoders.contract import (
    Features,
    Identity,
    Layers,
    Prepared,
    TokenGrid,
    TokenPlane,
    VolumeEncoder,
    block_number,
    even_centres,
)
from braindino.encoders.cube import CubePreparation, turn
from braindino.encoders.uniformer import UniFormer
from braindino.encoders.volume_transformer import BMMAETransformer, BrainIACTransformer
from braindino.volume import Volume
from braindino.weights import hash_weights

CubeNetwork = UniFormer | BMMAETransformer | BrainIACTransformer


class CubeFeatures(NamedTuple):
    """Features of B cubes."""

    global_: Tensor
    """(B, D)."""
    layers: Layers
    """(B, D) each, D by depth."""
    maps: Tensor
    """(B, D, x, y, z) tokens of the last layer, in the orientation and the order of axes of the images."""


class CubeEncoder(VolumeEncoder):
    """A network of cubes (B, 1, X, Y, Z) behind the contract."""

    network: CubeNetwork

    def __init__(
        self, network: CubeNetwork, *, name: str, dim: int, preparation: CubePreparation, reading: dict[str, Any]
    ) -> None:
        """Freezes ``network`` and puts it into ``eval()``."""
        network.eval().requires_grad_(False)
        network.name, network.sha256 = name, hash_weights(network.state_dict())
        self.network = network
        self.dim = dim
        self.preparation = preparation
        self.identity = Identity(name, network.sha256, preparation.describe(), reading)

    def prepare(self, volume: Volume, *, sequence: str | None = None) -> Prepared:
        return self.preparation.apply(volume, sequence=sequence)

    def encode(
        self, prepared: Sequence[Prepared], *, batch_size: int | None = None, with_tokens: bool = True
    ) -> list[Features]:
        """See ``VolumeEncoder``; one volume in a pass unless ``batch_size`` says more."""
        features = []
        step = batch_size or 1
        with torch.inference_mode():
            for start in range(0, len(prepared), step):
                features += self._encode_batch(prepared[start : start + step], with_tokens)
        return features

    def _encode_batch(self, batch: Sequence[Prepared], with_tokens: bool) -> list[Features]:
        images = torch.stack([each.data for each in batch]).to(self.device)
        images = turn(images, self.preparation.orientation)
        result = self._features(images, [each.sequence for each in batch])
        features = []
        for index, each in enumerate(batch):
            early, mid, late = (layer[index].float().cpu() for layer in result.layers)
            tokens = None
            if with_tokens:
                tokens = self._token_grid(result.maps[index], each)
            global_ = result.global_[index].float().cpu()
            features.append(Features(global_, Layers(early, mid, late), tokens, None))
        return features

    def encode_plane(
        self, prepared: Prepared, point: np.ndarray, *, block: int | None = None, norm: bool = True
    ) -> TokenPlane | None:
        """See ``VolumeEncoder``; every plane costs a pass of the whole volume: for several, ``encode_grid``."""
        return self.encode_grid(prepared, block=block, norm=norm).axial_plane(point)

    def encode_grid(self, prepared: Prepared, *, block: int | None = None, norm: bool = True) -> TokenGrid:
        """All planes of ``encode_plane`` in one pass."""
        number = block_number(block, self.num_blocks)
        with torch.inference_mode():
            images = turn(prepared.data[None].to(self.device), self.preparation.orientation)
            [tokens] = self._maps(images, [prepared.sequence], number, norm=norm)
        return self._token_grid(tokens, prepared)

    def _token_grid(self, tokens: Tensor, prepared: Prepared) -> TokenGrid:
        """(D, x, y, z) tokens of one volume, in the orientation of the images, on its axes."""
        grid = turn(tokens, self.preparation.orientation).movedim(0, -1).float().cpu()
        x, y, z = (even_centres(self.preparation.size, num) for num in grid.shape[:3])
        return TokenGrid(grid.contiguous(), (x, y, z), prepared.affine, prepared.volume_affine)

    def volume_features(self, images: Tensor, sequences: Sequence[str | None]) -> Tensor:
        """The global features (B, D) that ``encode`` gives of cubes (B, 1, X, Y, Z) of ``prepare``, on the encoder's
        device, with gradients where its weights need them: for who trains the network.
        """
        return self._features(turn(images, self.preparation.orientation), sequences).global_

    @abstractmethod
    def _features(self, images: Tensor, sequences: Sequence[str | None]) -> CubeFeatures:
        """The features of images (B, 1, X, Y, Z) in the encoder's own orientation."""

    @abstractmethod
    def _maps(self, images: Tensor, sequences: Sequence[str | None], block: int, *, norm: bool) -> Tensor:
        """(B, D, x, y, z) tokens after a block, in the orientation and the order of axes of the images; ``norm`` as in
        ``encode_plane``.
        """


def as_map(tokens: Tensor) -> Tensor:
    """(B, N, D) tokens of a cubic grid, the last axis fastest -> (B, D, x, y, z)."""
    edge = round(tokens.shape[1] ** (1 / 3))
    return tokens.transpose(1, 2).unflatten(2, (edge, edge, edge))
