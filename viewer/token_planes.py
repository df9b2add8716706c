"""Patch tokens of the planes that were looked at, kept for the next click, and the similarity map of a point (paper
sec. 4.6, Eq. 12).

A point is a voxel of the scan in RAS+, a map lies on one axial layer of it. What encoders see, a cropped and resized
brain, is related to that by affines alone: see ``braindino.patch_maps``, whose functions these are.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from braindino.encoders.contract import Prepared, TokenGrid, TokenPlane, VolumeEncoder
from braindino.encoders.cube_encoder import CubeEncoder
from braindino.encoders.slice_encoder import SliceEncoder
from braindino.encoders.slice_transformer import SliceTransformer
from braindino.manifest import UNKNOWN_SEQUENCE
from braindino.patch_maps import AxialSlice, on_slice, similarity_map
from braindino.slices import DEPTH
from braindino.viewer.bounded_cache import BoundedCache
from braindino.viewer.scans import OpenScan

MAX_TOKEN_BYTES = 1 << 29
MAX_INPUT_BYTES = 1 << 28
OUTSIDE = -2.0
"""In place of a similarity, outside the brain and outside the encoder's field of view."""


@dataclass(frozen=True, eq=False)
class LoadedEncoder:
    """An encoder that the page offers.

    Attributes:
        key: by which the page asks for it.
        name: for people.
        encoder: the network behind its contract.
        sequence: of the scans, where none is known of them and the encoder must be told.
    """

    key: str
    name: str
    encoder: VolumeEncoder
    sequence: str | None = None

    @property
    def sees_slices(self) -> bool:
        """Whether it sees one axial slice at a time, or the whole volume."""
        return isinstance(self.encoder, SliceEncoder)


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane of tokens and which one it is.

    Attributes:
        tokens: with their places.
        index: the axial slice of the standard cube, or the layer of an encoder's grid; from the bottom.
        count: how many there are.
    """

    tokens: TokenPlane
    index: int
    count: int


class EncodedSlice(NamedTuple):
    """One slice after every block of a transformer."""

    planes: tuple[TokenPlane, ...]
    cls: np.ndarray
    """(D,) its CLS token after the last block."""

    @property
    def num_bytes(self) -> int:
        """Of all tokens."""
        return sum(plane.features.nbytes for plane in self.planes)


@dataclass(frozen=True, eq=False)
class SimilarityMap:
    """How alike the tokens of a plane are to one token.

    Attributes:
        grid: (x, y) float32 cosine similarities of the plane's tokens.
        values: (X, Y) float32 the same at the voxels of the scan's layer; ``OUTSIDE`` where there is nothing to see.
        cells: which token holds each column x (X,) and each row y (Y,) of the layer; -1 beside all of them.
        reference: the token compared with, on ``grid``'s axes.
        reference_index: which plane it is of.
        index: which plane the map is of.
        count: how many planes there are.
        encode_seconds: spent on the way to the tokens.
        map_seconds: spent on similarities and on the way to the scan's voxels.
    """

    grid: np.ndarray
    values: np.ndarray
    cells: tuple[np.ndarray, np.ndarray]
    reference: tuple[int, int]
    reference_index: int
    index: int
    count: int
    encode_seconds: float
    map_seconds: float


class OutsideError(ValueError):
    """The encoder sees nothing there: no fault of anybody's, and nothing to show."""


class TokenPlanes:
    """The encoders, and the planes that they were last asked for."""

    def __init__(self, encoders: Sequence[LoadedEncoder], *, max_bytes: int = MAX_TOKEN_BYTES) -> None:
        """``max_bytes``: of tokens kept; of encoders of slices and of volumes each."""
        self.encoders = {each.key: each for each in encoders}
        self._inputs: BoundedCache[Prepared] = BoundedCache(MAX_INPUT_BYTES, lambda each: each.data.nbytes)
        self._slices: BoundedCache[EncodedSlice] = BoundedCache(max_bytes, lambda each: each.num_bytes)
        self._planes: BoundedCache[TokenPlane] = BoundedCache(max_bytes, lambda each: each.features.nbytes)
        self._grids: BoundedCache[TokenGrid] = BoundedCache(max_bytes, lambda each: each.features.nbytes)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._preparing: Future[Prepared] | None = None

    def prepare(self, opened: OpenScan) -> None:
        """Begin with what the first click on a scan would wait for: what the first encoder is shown of it.

        Returns at once; a click in the meantime waits for the rest. What goes wrong is told to who clicks.
        """
        if self._preparing is not None:
            self._preparing.cancel()
        for loaded in list(self.encoders.values())[:1]:
            self._preparing = self._ahead.submit(self._input, loaded, opened)

    def similarity(
        self,
        loaded: LoadedEncoder,
        opened: OpenScan,
        *,
        block: int,
        voxel: Sequence[int],
        layer: int,
        smooth: bool,
    ) -> SimilarityMap:
        """The similarity of a layer's tokens with the token that holds a voxel.

        Where the layer is not the voxel's own, its token is compared with tokens of another slice: for looking around;
        the maps of the paper lie within one slice.

        Args:
            loaded: of ``encoders``.
            opened: the scan.
            block: depth, from 0; the final norm is applied at every depth where it fits.
            voxel: x, y, z in the scan (RAS+): the reference.
            layer: index along z of the layer that the map is for.
            smooth: bilinear between the centres of the tokens, as in the paper; else each voxel has the value of its
                token.

        Raises:
            OutsideError: the voxel, or the layer, is not within what the encoder sees.
            ValueError: the encoder has no use for this scan; no such block, voxel or layer.
        """
        shape, affine = opened.volume.shape, opened.volume.affine
        if not all(0 <= place < extent for place, extent in zip((*voxel, layer), (*shape, shape[2]), strict=True)):
            raise ValueError(f"voxel {list(voxel)}, layer {layer}: outside the scan, whose shape is {list(shape)}")
        start = time.perf_counter()
        reference = self._plane(loaded, opened, block, voxel[2])
        x, y = reference.tokens.world_to_token(affine[:3, :3] @ np.array(voxel) + affine[:3, 3]).tolist()
        if x < 0:
            raise OutsideError(f"This point lies outside what {loaded.name} sees: the box around the brain.")
        plane = self._plane(loaded, opened, block, layer)
        encoded = time.perf_counter()
        # In float64 a token's similarity with itself is 1 to the last digit that float32 keeps.
        features = plane.tokens.features.numpy().astype(np.float64)
        grid = similarity_map(features, reference.tokens.features[x, y].numpy().astype(np.float64))
        cells = _cells(plane.tokens, opened, voxel, layer)
        if smooth:
            # Row 0 of a slice is anterior, column 0 the patient's right.
            values = on_slice(grid, plane.tokens, AxialSlice.of(opened.brain, layer))[::-1, ::-1].T
        else:
            values = grid[cells[0][:, None], cells[1][None, :]].astype(np.float32)
        beside = (cells[0] < 0)[:, None] | (cells[1] < 0)[None, :]
        values = np.where(beside | (opened.brain.data[:, :, layer] == 0), np.float32(OUTSIDE), values)
        return SimilarityMap(
            grid=grid.astype(np.float32),
            values=values,
            cells=cells,
            reference=(x, y),
            reference_index=reference.index,
            index=plane.index,
            count=plane.count,
            encode_seconds=encoded - start,
            map_seconds=time.perf_counter() - encoded,
        )

    def slice_feature(self, loaded: LoadedEncoder, opened: OpenScan, layer: int) -> np.ndarray:
        """(D,) the feature of the slice of the standard cube that lies at a layer of the scan, as in a feature table.

        Raises:
            OutsideError: the layer holds no brain.
        """
        encoder = loaded.encoder
        assert isinstance(encoder, SliceEncoder), "tables of slices are of encoders of slices"
        inputs = self._input(loaded, opened)
        level = _level(loaded, encoder, inputs, _middle(opened, layer))
        if isinstance(encoder, SliceTransformer):
            return self._encoded(loaded, encoder, opened, inputs, level).cls
        [features] = encoder.encode([replace(inputs, data=inputs.data[level : level + 1])], with_tokens=False)
        assert features.slices is not None, "of encoders of slices"
        return features.slices.cls[0].numpy()

    def _plane(self, loaded: LoadedEncoder, opened: OpenScan, block: int, layer: int) -> Plane:
        """The plane nearest to a layer of the scan."""
        encoder, inputs = loaded.encoder, self._input(loaded, opened)
        if not 0 <= block < encoder.num_blocks:
            raise ValueError(f"block {block} of {loaded.name}: expected 0 to {encoder.num_blocks - 1}")
        middle, key = _middle(opened, layer), (opened.source.key, loaded.key)
        if isinstance(encoder, CubeEncoder):
            grid = self._grids.get((*key, block), lambda: encoder.encode_grid(inputs, block=block))
            tokens = grid.axial_plane(middle)
            if tokens is None:
                raise _above_or_below(loaded)
            heights = grid.centres[2]
            return Plane(tokens, int(np.abs(heights - tokens.height).argmin()), len(heights))
        assert isinstance(encoder, SliceEncoder), "of slices or of volumes"
        level = _level(loaded, encoder, inputs, middle)
        if isinstance(encoder, SliceTransformer):
            return Plane(self._encoded(loaded, encoder, opened, inputs, level).planes[block], level, DEPTH)

        def encode() -> TokenPlane:
            found = encoder.encode_plane(inputs, middle, block=block)
            assert found is not None, "_level has looked"
            return found

        return Plane(self._planes.get((*key, block, level), encode), level, DEPTH)

    def _encoded(
        self, loaded: LoadedEncoder, encoder: SliceTransformer, opened: OpenScan, inputs: Prepared, level: int
    ) -> EncodedSlice:
        # All blocks come of one pass: another block then costs nothing.
        return self._slices.get(
            (opened.source.key, loaded.key, level), lambda: encode_every_block(encoder, inputs, level)
        )

    def _input(self, loaded: LoadedEncoder, opened: OpenScan) -> Prepared:
        sequence = opened.source.scan.sequence
        told = loaded.sequence if sequence == UNKNOWN_SEQUENCE else sequence
        # Encoders that are shown the same share it.
        preparation = getattr(loaded.encoder, "preparation", loaded.key)
        return self._inputs.get(
            (opened.source.key, preparation), lambda: loaded.encoder.prepare_planes(opened.brain, sequence=told)
        )


def encode_every_block(encoder: SliceTransformer, prepared: Prepared, level: int) -> EncodedSlice:
    """Slice ``level`` of ``prepare_planes`` after every block."""
    planes, cls = encoder.encode_blocks(prepared, level)
    return EncodedSlice(planes, cls.numpy())


def _level(loaded: LoadedEncoder, encoder: SliceEncoder, inputs: Prepared, point: np.ndarray) -> int:
    """The slice of ``prepare_planes`` nearest to a point in mm."""
    level = encoder.nearest_slice(inputs, point)
    if level is None:
        raise _above_or_below(loaded)
    return level


def _above_or_below(loaded: LoadedEncoder) -> OutsideError:
    return OutsideError(f"This slice lies above or below what {loaded.name} sees: the box around the brain.")


def _middle(opened: OpenScan, layer: int) -> np.ndarray:
    """(3,) mm: the middle of a layer. One point for all questions about it, so that all see the same slice."""
    x, y, _ = opened.volume.shape
    return opened.volume.affine[:3] @ np.array([(x - 1) / 2, (y - 1) / 2, layer, 1.0])


def _cells(tokens: TokenPlane, opened: OpenScan, voxel: Sequence[int], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Which token holds each column x (X,) and each row y (Y,) of a layer; -1 beside all.

    Cropping and resizing keep the axes of the scan, oblique or not, so that each depends on one index; the other is
    that of ``voxel``, which lies inside.
    """
    lines = []
    for axis in (0, 1):
        voxels = np.tile(np.array([*voxel[:2], layer], dtype=np.float64), (opened.volume.shape[axis], 1))
        voxels[:, axis] = np.arange(opened.volume.shape[axis])
        points = voxels @ opened.volume.affine[:3, :3].T + opened.volume.affine[:3, 3]
        lines.append(tokens.world_to_token(points)[:, axis])
    return lines[0], lines[1]
