"""What an encoder holds to be alike within one slice: reference-point similarity and PCA maps of its patch tokens
(paper sec. 4.6).

Functions of arrays; reading scans and writing pictures is done elsewhere. A patch grid is (rows, columns), the
slice's own frame: row 0 anterior, column 0 patient right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from braindino.vision_transformer import VisionTransformer

FOREGROUND_SHARE = 0.9


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
