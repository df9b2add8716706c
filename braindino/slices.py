"""Axial slices of a standardised volume, and which of them are drawn (paper sec. 4.1.2 and 4.3)."""

import hashlib
from collections.abc import Sequence

import numpy as np

from braindino.volume import Volume

NUM_SLICES = 128
DEPTH = 256
GAUSSIAN_MEAN, GAUSSIAN_SIGMA = 128.0, 50.0
SLICE_ORIENTATION = "axial; row 0 anterior, column 0 patient right (LPS storage order)"


def axial_slices(volume: Volume, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n, rows, columns) float32: the axial slices at ``indices``, counted from the bottom (inferior) upwards.

    Row 0 is anterior and column 0 is the patient's right, the radiological view. It is the order in which ITK, and
    so nnU-Net, sees the slices of a file stored in LPS, such as BraTS: one orientation for pretraining, features
    and segmentation.
    """
    picked = volume.data[::-1, ::-1, :][:, :, np.asarray(indices)]
    return np.ascontiguousarray(picked.transpose(2, 1, 0), dtype=np.float32)


def gaussian_indices(
    num: int = NUM_SLICES,
    depth: int = DEPTH,
    *,
    mu: float = GAUSSIAN_MEAN,
    sigma: float = GAUSSIAN_SIGMA,
    rng: np.random.Generator,
) -> np.ndarray:
    """(num,) sorted slice indices in [0, depth), drawn from N(mu, sigma) without repeats (paper sec. 4.1.2).

    Drawing one by one with the probabilities of the remaining slices is the same as drawing from the normal
    distribution and rejecting whatever was drawn before or lies outside the volume.
    """
    if not 0 < num <= depth:
        raise ValueError(f"num: found {num}; expected 1 to {depth}, the number of slices, since none is drawn twice")
    weights = np.exp(-0.5 * ((np.arange(depth) - mu) / sigma) ** 2)
    return np.sort(rng.choice(depth, size=num, replace=False, p=weights / weights.sum()))


def uniform_indices(num: int = NUM_SLICES, depth: int = DEPTH) -> np.ndarray:
    """(num,) equally spaced slice indices: the middles of ``num`` equal parts of the volume (paper sec. 4.3)."""
    if not 0 < num <= depth:
        raise ValueError(f"num: found {num}; expected 1 to {depth}, the number of slices")
    return ((np.arange(num) + 0.5) * depth / num).astype(np.intp)


def scan_generator(seed: int, scan_id: str) -> np.random.Generator:
    """The random generator of one scan: depends on the seed and the scan's identity, not on the order of work."""
    digest = hashlib.sha256(scan_id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
