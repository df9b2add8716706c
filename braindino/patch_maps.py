"""What an encoder holds to be alike within one slice: reference-point similarity and PCA maps of its patch tokens
(paper sec. 4.6).

Functions of arrays; reading scans and writing pictures is done elsewhere. A patch grid is (rows, columns), the
slice's own frame: row 0 anterior, column 0 patient right.

For any encoder of the contract, of slices or of volumes: an ``AxialSlice`` says where its pixels lie in mm, a
``TokenPlane`` where the tokens do, and maps come back at the pixels of the slice. What an encoder crops, resizes or
turns on the way to its tokens is undone by that. ``similarity_panels`` does it all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from braindino.encoders.contract import TokenPlane, VolumeEncoder
from braindino.feature_table import DEPTHS, Depth
from braindino.slices import axial_slices
from braindino.vision_transformer import VisionTransformer
from braindino.volume import Volume

FOREGROUND_SHARE = 0.9
SIMILARITY_RANGE = (-1.0, 1.0)
"""The colour scale of every similarity map, whichever the encoder."""


class ReferencePoint(NamedTuple):
    """A patch whose token the others are compared with.

    Attributes:
        name: what lies there, or how it was found: ``tumour``, ``darkest``, ``brightest`` or ``centre``.
        row: patch row.
        column: patch column.
    """

    name: str
    row: int
    column: int


class SlicePoint(NamedTuple):
    """A place on a slice, for encoders whose tokens differ in size.

    Attributes:
        name: what lies there.
        row: pixel row; the middle of a pixel is a whole number.
        column: pixel column.
    """

    name: str
    row: float
    column: float


@dataclass(frozen=True, eq=False)
class AxialSlice:
    """One axial slice of a volume, and where its pixels lie.

    Attributes:
        image: (rows, columns) float32; row 0 anterior, column 0 patient right, as ``braindino.slices.axial_slices``.
        index: of the slice in its volume, from the bottom.
        affine: (4, 4) row, column and slice index to mm.
    """

    image: np.ndarray
    index: int
    affine: np.ndarray

    @classmethod
    def of(cls, volume: Volume, index: int) -> "AxialSlice":
        """Slice ``index`` of a volume: the canonical one, or what ``transforms.standardize`` makes of it.

        Raises:
            ValueError: no such slice.
        """
        if not 0 <= index < volume.shape[2]:
            raise ValueError(f"slice: found {index}; expected 0 to {volume.shape[2] - 1}, from the bottom")
        # Row r is voxel y = Y - 1 - r, and column c is x = X - 1 - c.
        turn = np.array([[0, -1, 0, volume.shape[0] - 1], [-1, 0, 0, volume.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
        return cls(axial_slices(volume, [index])[0], index, volume.affine @ turn)

    @classmethod
    def through(cls, volume: Volume, point: np.ndarray) -> "AxialSlice":
        """The slice of a volume nearest to a point (3,) in mm.

        Raises:
            ValueError: the point lies below or above the volume.
        """
        height = (np.linalg.inv(volume.affine) @ (*point, 1.0))[2]
        return cls.of(volume, int(np.floor(height + 0.5)))

    def to_world(self, pixels: np.ndarray) -> np.ndarray:
        """(..., 3) mm of (..., 2) rows and columns."""
        pixels = np.asarray(pixels, dtype=np.float64)
        return pixels @ self.affine[:3, :2].T + self.affine[:3, 2] * self.index + self.affine[:3, 3]

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) rows and columns, not rounded, of points (..., 3) in mm; their height over the slice is dropped."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(points, dtype=np.float64) @ inverse[:2, :3].T + inverse[:2, 3]


@dataclass(frozen=True, eq=False)
class SimilarityPanels:
    """One slice through the eyes of E encoders, from P reference points: the panels of the paper's Fig. 6a.

    Attributes:
        axial: the slice.
        points: the reference points, on the slice.
        encoders: names, in order.
        maps: (E, P, rows, columns) float32 similarity with the token that holds the point, for the one scale
            ``SIMILARITY_RANGE``; NaN where the encoder does not see, and everywhere if it does not see the point.
        colours: (E, rows, columns, 3) float32 in 0 to 1, principal components of the tokens that hold tissue; each
            encoder has its own, so shapes can be compared and colours cannot. NaN where the encoder does not see.
        offsets: (E,) mm from the slice to the plane of the tokens, upwards; NaN where there is none.
    """

    axial: AxialSlice
    points: tuple[SlicePoint, ...]
    encoders: tuple[str, ...]
    maps: np.ndarray
    colours: np.ndarray
    offsets: np.ndarray


def similarity_panels(
    encoders: Mapping[str, VolumeEncoder],
    volume: Volume,
    axial: AxialSlice,
    points: Sequence[SlicePoint],
    *,
    sequence: str | None = None,
    depth: Depth | None = None,
    norm: bool = True,
) -> SimilarityPanels:
    """Similarity and PCA maps of one slice for every encoder, at the slice's pixels.

    Args:
        encoders: by name; one after the other is given the volume.
        volume: canonical, as ``VolumeEncoder.prepare`` takes it.
        axial: a slice of ``volume``, or of it standardised.
        points: on the slice; of each encoder the token that holds the point is the reference.
        sequence: of the scan, for encoders that must be told.
        depth: at which the tokens are taken, ``early``, ``mid`` or ``late`` as for CKA; None for each encoder's last.
        norm: whether its final norm is applied; see ``VolumeEncoder.encode_plane``.

    Raises:
        ValueError: an encoder has no use for this scan.
    """
    shape = axial.image.shape
    maps = np.full((len(encoders), len(points), *shape), np.nan, dtype=np.float32)
    colours = np.full((len(encoders), *shape, 3), np.nan, dtype=np.float32)
    offsets = np.full(len(encoders), np.nan)
    middle = axial.to_world(np.array([(extent - 1) / 2 for extent in shape]))
    for number, encoder in enumerate(encoders.values()):
        prepared = encoder.prepare_planes(volume, sequence=sequence)
        block = None if depth is None else encoder.depth_blocks[DEPTHS.index(depth)]
        plane = encoder.encode_plane(prepared, middle, block=block, norm=norm)
        if plane is None:
            continue
        offsets[number] = height_offset(plane, middle)
        colours[number] = pca_on_slice(plane, axial)
        for place, point in enumerate(points):
            maps[number, place] = similarity_on_slice(plane, axial, point)
    return SimilarityPanels(axial, tuple(points), tuple(encoders), maps, colours, offsets)


def similarity_on_slice(plane: TokenPlane, axial: AxialSlice, point: SlicePoint) -> np.ndarray:
    """(rows, columns) float32 similarity of the tokens with the one that holds ``point``, bilinear between the centres
    of the tokens; NaN beside all tokens, and everywhere if no token holds the point.
    """
    x, y = plane.world_to_token(axial.to_world(np.array([point.row, point.column])))
    if x < 0:
        return np.full(axial.image.shape, np.nan, dtype=np.float32)
    # In float64 the similarity of a token with itself is 1 to the last digit that float32 keeps.
    tokens = plane.features.numpy().astype(np.float64)
    return on_slice(similarity_map(tokens, tokens[x, y]), plane, axial)


def pca_on_slice(plane: TokenPlane, axial: AxialSlice) -> np.ndarray:
    """(rows, columns, 3) float32: ``pca_map`` of the tokens that hold tissue, bilinear between their centres; NaN
    beside all tokens.
    """
    return on_slice(pca_map(plane.features.numpy(), tissue_tokens(plane, axial)), plane, axial)


def on_slice(values: np.ndarray, plane: TokenPlane, axial: AxialSlice) -> np.ndarray:
    """(rows, columns) or (rows, columns, C) float32: values (X, Y) or (X, Y, C) of the tokens of a plane at the pixels
    of a slice. Bilinear between the centres of the tokens, held beyond the outermost, NaN beside all tokens.

    On an encoder's own slice this is ``upsample``.
    """
    place = plane.world_to_place(axial.to_world(_pixels(axial.image.shape)))
    beside = np.isnan(place).any(axis=-1)
    place[beside] = 0
    lower = np.minimum(place.astype(np.intp), np.array(values.shape[:2]) - 2)
    x, y = lower[..., 0], lower[..., 1]
    along_x, along_y = ((place - lower)[..., axis].reshape(*x.shape, *[1] * (values.ndim - 2)) for axis in (0, 1))
    back = values[x, y] * (1 - along_x) + values[x + 1, y] * along_x
    front = values[x, y + 1] * (1 - along_x) + values[x + 1, y + 1] * along_x
    found = back * (1 - along_y) + front * along_y
    found[beside] = np.nan
    return found.astype(np.float32)


def tissue_tokens(plane: TokenPlane, axial: AxialSlice) -> np.ndarray:
    """(X, Y) bool: the tokens whose pixels of the slice are tissue, i.e. not exactly 0, to at least 90 %. A token
    without a pixel on the slice holds none.
    """
    counts = [len(centres) for centres in plane.centres]
    index = plane.world_to_token(axial.to_world(_pixels(axial.image.shape)))
    inside = index[..., 0] >= 0
    cells = index[inside] @ np.array([counts[1], 1])
    pixels = np.bincount(cells, minlength=counts[0] * counts[1])
    tissue = np.bincount(cells, weights=axial.image[inside] != 0, minlength=counts[0] * counts[1])
    return ((tissue >= FOREGROUND_SHARE * pixels) & (pixels > 0)).reshape(counts)


def height_offset(plane: TokenPlane, point: np.ndarray) -> float:
    """mm from a point (3,) in mm up to the plane, along the plane's own axis."""
    height = (np.linalg.inv(plane.affine) @ (*point, 1.0))[2]
    return float((plane.height - height) * np.linalg.norm(plane.affine[:3, 2]))


def shared_range(maps: np.ndarray, within: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest similarity of all panels over the pixels ``within``: one scale for all of them,
    where -1 to 1 would show little.

    Args:
        maps: (..., rows, columns), NaN where there is nothing.
        within: (rows, columns) bool.

    Raises:
        ValueError: there is no value.
    """
    values = maps[..., within]
    values = values[~np.isnan(values)]
    if not values.size:
        raise ValueError("similarity maps: no encoder sees any of the pixels; there is no range to show")
    return float(values.min()), float(values.max())


def points_of_patches(points: Sequence[ReferencePoint], patch_size: int) -> tuple[SlicePoint, ...]:
    """The middles of patches as places on the slice."""
    half = (patch_size - 1) / 2
    return tuple(SlicePoint(p.name, p.row * patch_size + half, p.column * patch_size + half) for p in points)


def points_in_labels(labels: np.ndarray, names: Mapping[str, Sequence[int]]) -> tuple[SlicePoint, ...]:
    """The innermost pixel of each of some tissues, so that the token around it holds as much of it as any can.

    Innermost: what is left last when the tissue's edge is taken off again and again; of several pixels the one nearest
    to their mean, of those equally near the first in reading order.

    Args:
        labels: (rows, columns) int, of a segmentation; see ``axial_labels``.
        names: name of a tissue -> its labels.

    Raises:
        ValueError: a tissue is not on this slice.
    """
    points = []
    for name, members in names.items():
        inner = np.isin(labels, list(members))
        if not inner.any():
            found = ", ".join(str(label) for label in np.unique(labels))
            raise ValueError(
                f"{name}: no pixel of this slice has label {', '.join(map(str, members))}; found {found}; choose "
                "another slice"
            )
        while (smaller := inner & ~edge(inner)).any():
            inner = smaller
        rows, columns = np.nonzero(inner)
        nearest = int(((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2).argmin())
        points.append(SlicePoint(name, float(rows[nearest]), float(columns[nearest])))
    return tuple(points)


def encode_patches(encoder: VisionTransformer, image: np.ndarray) -> np.ndarray:
    """(rows, columns, D) float32: the patch tokens, after the final norm, of a (height, width) slice."""
    rows, columns = (extent // encoder.patch_size for extent in image.shape)
    device = next(encoder.parameters()).device
    with torch.inference_mode():
        tokens = encoder(torch.as_tensor(image, dtype=torch.float32, device=device)[None, None])
    return tokens.patches[0].float().cpu().numpy().reshape(rows, columns, -1)


def similarity_map(patches: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(...) cosine similarity, -1 to 1, of every token of ``patches`` (..., D) with ``reference`` (D,): Eq. 12.

    A token of norm 0 has no direction; its similarity is 0.
    """
    return _unit(patches) @ _unit(reference)


def upsample(grid: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The (rows, columns) or (rows, columns, channels) map at slice resolution, bilinear between patch centres."""
    values = torch.as_tensor(np.ascontiguousarray(grid), dtype=torch.float32)
    planes = values.reshape(*grid.shape[:2], -1).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, size=shape, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).numpy().reshape(*shape, *grid.shape[2:])


def pca_map(patches: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """(rows, columns, 3) in 0 to 1: the first three principal components of the foreground tokens, for red, green
    and blue.

    Each component runs from 0 to 1 over the foreground; the background is 0. Signs, which PCA leaves open, are set
    so that the weight of largest magnitude is positive. With fewer than four foreground tokens there is nothing to
    decompose: all 0.

    Args:
        patches: (rows, columns, D) tokens.
        foreground: (rows, columns) bool, the patches that hold tissue.
    """
    coloured = np.zeros((*foreground.shape, 3))
    tokens = np.asarray(patches, dtype=np.float64)[foreground]
    if len(tokens) < 4:
        return coloured
    tokens = tokens - tokens.mean(axis=0)
    weights = np.linalg.svd(tokens, full_matrices=False)[2][:3]
    weights *= np.sign(np.take_along_axis(weights, np.abs(weights).argmax(axis=1, keepdims=True), axis=1))
    scores = tokens @ weights.T
    low, high = scores.min(axis=0), scores.max(axis=0)
    coloured[foreground] = (scores - low) / np.where(high > low, high - low, 1)
    return coloured


def foreground_patches(image: np.ndarray, patch_size: int) -> np.ndarray:
    """(rows, columns) bool: the patches of which at least 90 % of the pixels are tissue, i.e. not exactly 0."""
    return _patch_means(image != 0, patch_size) >= FOREGROUND_SHARE


def edge(mask: np.ndarray) -> np.ndarray:
    """The members of ``mask`` with a neighbour above, below, left or right that is not one."""
    padded = np.pad(mask, 1)
    return mask & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def reference_points(
    image: np.ndarray, patch_size: int, tumour: np.ndarray | None = None
) -> tuple[ReferencePoint, ...]:
    """Three reference patches of a standardised slice, by rule: the same image gives the same points for every encoder.

    Only foreground patches count (``foreground_patches``). With a tumour, the patch that holds the most of it, of
    equals the one nearest to its centre; without, the patch nearest to the middle of the slice. Then, among the other
    patches without tumour and with foreground on all four sides (at the edge of the brain everything is dark), those
    of lowest and of highest mean intensity: CSF and white matter on a T1-weighted scan. Ties go to the first patch in
    reading order.

    Args:
        image: (height, width) slice, background exactly 0.
        patch_size: pixels along the side of a patch.
        tumour: (height, width) bool, if the tumour is known.

    Raises:
        ValueError: fewer than three patches of that kind.
    """
    foreground = foreground_patches(image, patch_size)
    if not foreground.any():
        raise ValueError(f"slice of shape {image.shape}: no patch holds tissue; expected a slice through the brain")
    share = np.zeros(foreground.shape) if tumour is None else _patch_means(tumour, patch_size)
    if (share * foreground).max() > 0:
        rows, columns = np.indices(share.shape)
        centre = (rows * share).sum() / share.sum(), (columns * share).sum() / share.sum()
        fullest = foreground & (share == share[foreground].max())
        first = _point("tumour", -_squared_distance(share.shape, centre), fullest)
    else:
        middle = (share.shape[0] - 1) / 2, (share.shape[1] - 1) / 2
        first = _point("centre", -_squared_distance(share.shape, middle), foreground)
    others = foreground & (share == 0) & ~edge(foreground)
    others[first.row, first.column] = False
    if others.sum() < 2:
        raise ValueError(
            f"slice of shape {image.shape}: {others.sum()} patches lie inside the tissue and outside the tumour; "
            "expected 2 or more to compare with"
        )
    means = _patch_means(image, patch_size)
    return first, _point("darkest", -means, others), _point("brightest", means, others)


def tumour_slice(tumour: np.ndarray, tumour_affine: np.ndarray, cube_affine: np.ndarray, depth: int) -> int:
    """The axial slice of a standardised volume on which the tumour is largest (of equals, the lowest).

    Args:
        tumour: (X, Y, Z) bool in RAS+, on any grid.
        tumour_affine: (4, 4) its voxel indices to millimetres.
        cube_affine: (4, 4) the same for the standardised volume.
        depth: number of axial slices.
    """
    to_cube = np.linalg.inv(cube_affine) @ tumour_affine
    heights = np.argwhere(tumour) @ to_cube[2, :3] + to_cube[2, 3]
    return int(np.bincount(np.clip(np.rint(heights).astype(np.intp), 0, depth - 1), minlength=depth).argmax())


def axial_labels(
    labels: np.ndarray, label_affine: np.ndarray, cube_affine: np.ndarray, index: int, shape: Sequence[int]
) -> np.ndarray:
    """(rows, columns) labels on one axial slice of a standardised volume, nearest neighbour through both affines; 0
    outside.

    Same frame as ``braindino.slices.axial_slices``: row 0 anterior, column 0 patient right.

    Args:
        labels: (X, Y, Z) int in RAS+, on any grid.
        label_affine: (4, 4) its voxel indices to millimetres.
        cube_affine: (4, 4) the same for the standardised volume.
        index: axial slice, counted from the bottom.
        shape: (X, Y, Z) of the standardised volume.
    """
    right = np.arange(shape[0])[::-1]
    anterior = np.arange(shape[1])[::-1]
    y, x = np.meshgrid(anterior, right, indexing="ij")
    voxels = np.stack([x, y, np.full_like(x, index), np.ones_like(x)], axis=-1)
    found = np.rint(voxels @ (np.linalg.inv(label_affine) @ cube_affine).T[:, :3]).astype(np.intp)
    inside = ((found >= 0) & (found < labels.shape)).all(axis=-1)
    plane = np.zeros(inside.shape, dtype=labels.dtype)
    plane[inside] = labels[tuple(found[inside].T)]
    return plane


def _pixels(shape: tuple[int, ...]) -> np.ndarray:
    """(rows, columns, 2): the row and the column of every pixel."""
    return np.stack(np.meshgrid(*(np.arange(extent) for extent in shape), indexing="ij"), axis=-1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _patch_means(image: np.ndarray, patch_size: int) -> np.ndarray:
    rows, columns = (extent // patch_size for extent in image.shape)
    return image.reshape(rows, patch_size, columns, patch_size).mean(axis=(1, 3), dtype=np.float64)


def _squared_distance(shape: tuple[int, ...], place: tuple[float, float]) -> np.ndarray:
    rows, columns = np.indices(shape)
    return (rows - place[0]) ** 2 + (columns - place[1]) ** 2


def _point(name: str, score: np.ndarray, allowed: np.ndarray) -> ReferencePoint:
    row, column = np.unravel_index(np.where(allowed, score, -np.inf).argmax(), score.shape)
    return ReferencePoint(name, int(row), int(column))
