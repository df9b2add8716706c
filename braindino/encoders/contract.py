"""What every volume encoder does: ``prepare`` one canonical volume, ``encode`` it into features.

The canonical input is a ``braindino.volume.Volume``: RAS+, skull-stripped (background exactly 0), float32. Whatever an
encoder does to it (spacing, crop or resize, intensity, its own order of axes) happens behind this contract: features
of all encoders are float32 on the CPU, and every token grid runs along x (to the right), y (to the front) and z
(upwards), with its place in the canonical volume.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from braindino.volume import Volume


@dataclass(frozen=True)
class Identity:
    """What decides the features of an encoder.

    Attributes:
        name: for people and file names.
        sha256: of the weights; for the intensity floor of its definition.
        preparation: how a volume becomes the encoder's input, JSON values.
        reading: which feature is taken from the encoder, JSON values.
    """

    name: str
    sha256: str
    preparation: dict[str, Any]
    reading: dict[str, Any]

    @property
    def key(self) -> str:
        """64 hexadecimal digits that change with weights, preparation and reading, and with nothing else."""
        facts = [self.sha256, self.preparation, self.reading]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Prepared:
    """The input of one encoder, made of one volume.

    Attributes:
        data: (C, X, Y, Z) in RAS+ for a volume encoder; (slices, 1, rows, columns) for a slice encoder, in the
            orientation of ``braindino.slices``.
        sequence: of the scan (``braindino.manifest.SEQUENCES``), None where it was not told.
        affine: (4, 4) voxels of the prepared cube to mm.
        volume_affine: (4, 4) voxels of the canonical volume to mm.
    """

    data: Tensor
    sequence: str | None
    affine: np.ndarray
    volume_affine: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Tokens on their grid, and where they lie in the canonical volume.

    Attributes:
        features: (X, Y, Z, D) float32; x to the right, y to the front, z upwards.
        centres: for x, y and z the centres of the tokens, in voxels of the prepared cube.
        affine: (4, 4) voxels of the prepared cube to mm.
        volume_affine: (4, 4) voxels of the canonical volume to mm.
    """

    features: Tensor
    centres: tuple[np.ndarray, np.ndarray, np.ndarray]
    affine: np.ndarray
    volume_affine: np.ndarray

    def world_to_token(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) indices of the tokens that hold points (..., 3) in mm; -1, -1, -1 for a point in no token.

        A token reaches half-way to its neighbours, the outermost ones as far outwards as inwards.
        """
        voxels = _transform(np.linalg.inv(self.affine), points)
        index = np.empty(voxels.shape, dtype=np.intp)
        inside = np.ones(voxels.shape[:-1], dtype=bool)
        for axis, centres in enumerate(self.centres):
            edges = _edges(centres)
            index[..., axis] = np.searchsorted(edges, voxels[..., axis], side="right") - 1
            inside &= (index[..., axis] >= 0) & (index[..., axis] < len(centres))
        index[~inside] = -1
        return index

    def token_to_world(self, index: np.ndarray) -> np.ndarray:
        """(..., 3) centres in mm of the tokens at ``index`` (..., 3).

        Raises:
            ValueError: there is no such token.
        """
        index = np.asarray(index)
        shape = [len(centres) for centres in self.centres]
        if ((index < 0) | (index >= shape)).any():
            raise ValueError(f"token_to_world: index {index.tolist()} outside the grid of {shape} tokens (x, y, z)")
        voxels = np.stack([centres[index[..., axis]] for axis, centres in enumerate(self.centres)], axis=-1)
        return _transform(self.affine, voxels)

    def voxel_to_token(self, voxels: np.ndarray) -> np.ndarray:
        """As ``world_to_token``, for voxels (..., 3) of the canonical volume."""
        return self.world_to_token(_transform(self.volume_affine, voxels))

    def token_to_voxel(self, index: np.ndarray) -> np.ndarray:
        """As ``token_to_world``, in voxels of the canonical volume (not rounded)."""
        return _transform(np.linalg.inv(self.volume_affine), self.token_to_world(index))


class Layers(NamedTuple):
    """The volume's feature at three depths (paper sec. 4.6); widths may differ."""

    early: Tensor
    mid: Tensor
    late: Tensor


class SliceFeatures(NamedTuple):
    """What a slice encoder says of each slice, from the lowest to the highest."""

    cls: Tensor
    """(slices, D) the slices' own feature: the CLS token, or the pooled feature of a network without one."""
    patches: Tensor
    """(slices, D) mean of the patch tokens."""


class Features(NamedTuple):
    """What an encoder makes of one volume."""

    global_: Tensor
    """(D,) the feature of the volume."""
    layers: Layers
    tokens: TokenGrid | None
    """Tokens of the last layer; None when they were not asked for."""
    slices: SliceFeatures | None
    """None for an encoder of volumes."""


class VolumeEncoder(ABC):
    """A frozen encoder. ``encode([prepare(volume)])`` gives the features of a volume.

    Attributes:
        identity: keys caches; see ``Identity``.
        network: what holds the weights, in ``eval()`` and without gradients; None for the intensity floor.
        dim: length of the global feature.
    """

    identity: Identity
    network: nn.Module | None
    dim: int

    @abstractmethod
    def prepare(self, volume: Volume, *, sequence: str | None = None) -> Prepared:
        """The encoder's input. ``sequence`` (``braindino.manifest.SEQUENCES``) is needed by BM-MAE only.

        Raises:
            VolumeError: nothing is left of the volume, or it has no contrast.
            ValueError: the encoder has no use for this sequence.
        """

    @abstractmethod
    def encode(
        self, prepared: Sequence[Prepared], *, batch_size: int | None = None, with_tokens: bool = True
    ) -> list[Features]:
        """The features of volumes, in their order; a volume's features depend on no other volume.

        Args:
            prepared: what ``prepare`` made.
            batch_size: volumes (slices, for a slice encoder) in one pass; None for the encoder's own choice.
            with_tokens: whether to keep the token grid, the largest part by far: 100 MB per volume for 128 slices of
                ViT-B.
        """

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        parameter = None if self.network is None else next(self.network.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device


def layer_blocks(depth: int) -> tuple[int, int, int]:
    """The early, mid and late block, counted from 0: 2, 6 and 11 of twelve (paper sec. 4.6), as deep in others."""
    if depth < 1:
        raise ValueError(f"layer_blocks: found depth {depth}; expected at least one block")
    return max(depth // 4 - 1, 0), depth // 2, depth - 1


def even_centres(size: int, num: int) -> np.ndarray:
    """(num,) centres of ``num`` equal parts of ``size`` voxels, in voxel indices."""
    return (np.arange(num) + 0.5) * (size / num) - 0.5


def _edges(centres: np.ndarray) -> np.ndarray:
    """(n + 1,) borders of cells around n ascending centres."""
    if len(centres) == 1:
        raise ValueError("a token grid needs at least two tokens along each axis")
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def _transform(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.asarray(points, dtype=np.float64) @ affine[:3, :3].T + affine[:3, 3]
