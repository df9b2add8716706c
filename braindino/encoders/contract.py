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
        return _cells(self.centres, _transform(np.linalg.inv(self.affine), points))

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

    def axial_plane(self, point: np.ndarray) -> "TokenPlane | None":
        """The plane of tokens nearest in height to a point (3,) in mm; None where the tokens do not reach that high, or
        low.
        """
        x, y, z = self.centres
        height = float(_transform(np.linalg.inv(self.affine), point)[2])
        [level] = _cells((z,), np.array([height]))
        if level < 0:
            return None
        return TokenPlane(self.features[:, :, int(level)], (x, y), float(z[level]), self.affine)

    def voxel_to_token(self, voxels: np.ndarray) -> np.ndarray:
        """As ``world_to_token``, for voxels (..., 3) of the canonical volume."""
        return self.world_to_token(_transform(self.volume_affine, voxels))

    def token_to_voxel(self, index: np.ndarray) -> np.ndarray:
        """As ``token_to_world``, in voxels of the canonical volume (not rounded)."""
        return _transform(np.linalg.inv(self.volume_affine), self.token_to_world(index))


@dataclass(frozen=True, eq=False)
class TokenPlane:
    """The tokens of one axial plane, and where they lie in the canonical volume.

    Attributes:
        features: (X, Y, D) float32; x to the right, y to the front.
        centres: for x and y the centres of the tokens, in voxels of the prepared cube.
        height: z of the plane, in voxels of the prepared cube.
        affine: (4, 4) voxels of the prepared cube to mm.
    """

    features: Tensor
    centres: tuple[np.ndarray, np.ndarray]
    height: float
    affine: np.ndarray

    def world_to_token(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) indices of the tokens that points (..., 3) in mm lie in, whatever their height; -1, -1 for a point
        beside them all. How far a token reaches is the same as in ``TokenGrid``.
        """
        return _cells(self.centres, self._places(points))

    def world_to_place(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) places of points (..., 3) in mm between the centres of the tokens: 0 at that of the first, 1 at that
        of the second; held at the outermost. NaN for a point beside all tokens.
        """
        voxels = self._places(points)
        place = np.stack(
            [np.interp(voxels[..., axis], each, np.arange(len(each))) for axis, each in enumerate(self.centres)],
            axis=-1,
        )
        place[(_cells(self.centres, voxels) < 0).any(axis=-1)] = np.nan
        return place

    def _places(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) x and y in voxels of the prepared cube."""
        return _transform(np.linalg.inv(self.affine), points)[..., :2]


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
    @abstractmethod
    def num_blocks(self) -> int:
        """How many depths ``encode_plane`` can read: the blocks of a transformer, the four stages of BrainMVP, the
        levels of a timm model."""

    @property
    @abstractmethod
    def depth_blocks(self) -> tuple[int, int, int]:
        """The blocks, as ``encode_plane`` counts them, that ``Features.layers`` are read at."""

    def prepare_planes(self, volume: Volume, *, sequence: str | None = None) -> Prepared:
        """As ``prepare``, for ``encode_plane``: an encoder of slices keeps all 256, 64 MB, and not only those that its
        feature of the volume is made of.
        """
        return self.prepare(volume, sequence=sequence)

    @abstractmethod
    def encode_plane(
        self, prepared: Prepared, point: np.ndarray, *, block: int | None = None, norm: bool = True
    ) -> TokenPlane | None:
        """The tokens of the axial plane nearest to a point (paper sec. 4.6, similarity maps): for an encoder of slices
        those of the one slice, and for an encoder of volumes the nearest plane of its grid. None where the encoder does
        not see that height.

        Args:
            prepared: of ``prepare_planes`` (or of ``prepare``, with the slices that are there).
            point: (3,) mm.
            block: after which block, from 0 to ``num_blocks`` - 1; None for the last.
            norm: whether the network's final norm is applied, as it is to the tokens of ``encode``. Where it fits the
                last map only (BrainMVP, convolutional models of timm), the maps before that stay without.

        Raises:
            ValueError: no such block.
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


def block_number(block: int | None, num_blocks: int) -> int:
    """``block``, or the last where it is None.

    Raises:
        ValueError: there is no such block.
    """
    if block is None:
        return num_blocks - 1
    if not 0 <= block < num_blocks:
        raise ValueError(f"block: found {block}; this encoder has blocks 0 to {num_blocks - 1}")
    return block


def even_centres(size: int, num: int) -> np.ndarray:
    """(num,) centres of ``num`` equal parts of ``size`` voxels, in voxel indices."""
    return (np.arange(num) + 0.5) * (size / num) - 0.5


def _cells(centres: Sequence[np.ndarray], voxels: np.ndarray) -> np.ndarray:
    """(..., k) indices of the cells around ``centres`` of k axes that hold ``voxels`` (..., k); -1 on every axis where
    one of them is outside.
    """
    index = np.empty(voxels.shape, dtype=np.intp)
    inside = np.ones(voxels.shape[:-1], dtype=bool)
    for axis, each in enumerate(centres):
        index[..., axis] = np.searchsorted(_edges(each), voxels[..., axis], side="right") - 1
        inside &= (index[..., axis] >= 0) & (index[..., axis] < len(each))
    index[~inside] = -1
    return index


def _edges(centres: np.ndarray) -> np.ndarray:
    """(n + 1,) borders of cells around n ascending centres."""
    if len(centres) == 1:
        raise ValueError("a token grid needs at least two tokens along each axis")
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def _transform(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.asarray(points, dtype=np.float64) @ affine[:3, :3].T + affine[:3, 3]
