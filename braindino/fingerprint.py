"""Two fingerprints of a scan, by which copies of it are found under any name: one of its voxels, one of its looks."""

import hashlib
from functools import cache

import numpy as np

from braindino.transforms import CUBE_SHAPE
from braindino.volume import Volume

APPEARANCE_BITS = 512
# Between the farthest variant of one scan and the nearest pair of different subjects: docs/decisions.md.
MAX_APPEARANCE_DISTANCE = 128

_CONTENT_BYTES = 16
_BLOCK = 8
_HALF_GRID = (CUBE_SHAPE[0] // _BLOCK // 2, CUBE_SHAPE[1] // _BLOCK, CUBE_SHAPE[2] // _BLOCK)
_STEPS_PER_DEVIATION = 64
_MAX_DEVIATIONS = 32
_HASH_LANES = 1 << 14
_SEED = b"braindino appearance hash 1"


def content_hash(volume: Volume) -> str:
    """32 hexadecimal digits that are equal for equal voxels in RAS+, and for those only.

    The hash depends on the shape and the float32 values in the order of the RAS+ axes. It does not depend on the
    file's name, its compression, the type or byte order of storage (as long as the values are the same), the
    orientation of the stored axes, nor on position, spacing or obliquity in the affine. Any resampling, cropping or
    rescaling changes it: that is for :func:`appearance_hash`.
    """
    # The first axis runs fastest, as in NIfTI files: a volume that was only flipped is copied without a transpose.
    # Adding 0 makes -0.0 into 0.0, which is the same value.
    voxels = np.add(volume.data.T, np.float32(0), dtype="<f4", order="C")
    digest = hashlib.sha256(np.array(volume.shape, dtype="<i8").tobytes())
    digest.update(voxels)
    return digest.hexdigest()[: 2 * _CONTENT_BYTES]


def appearance_hash(cube: np.ndarray) -> str:
    """128 hexadecimal digits, 512 bits, of what a brain looks like; empty for a cube that equals its mirror image.

    Brains placed in their box look much alike, but in how their left half differs from their right half they are
    individuals, and that difference keeps its sign under changes of contrast. So: means of left minus right over
    blocks of 8 x 8 x 8 voxels, 16,384 numbers, and the signs of 512 random projections of them. The share of bits in
    which two hashes differ is the angle between two such patterns over 180 degrees: near one half for two subjects,
    small for the same scan after resampling, another strip, rescaled intensities or a crop by a voxel or two. Not
    for the same scan after a rotation by several degrees, and not for another sequence of the same head.

    Deterministic: voxels are rounded to 1/64 of a deviation, and from there on all sums are of whole numbers small
    enough to be exact, in whatever order a machine adds them.

    Args:
        cube: (256, 256, 256) float32, standardised by ``braindino.transforms.standardize``; x from left to right.

    Raises:
        ValueError: another shape.
    """
    if cube.shape != CUBE_SHAPE:
        raise ValueError(f"cube: found shape {cube.shape}; expected {CUBE_SHAPE}, as transforms.standardize makes it")
    lanes = _left_minus_right(cube).ravel() * _signs()
    if not lanes.any():
        return ""
    return np.packbits(_walsh_hadamard(lanes)[_rows()] > 0).tobytes().hex()


def hamming(a: str, b: str) -> int:
    """Number of bits, of 512, in which two appearance hashes differ.

    Raises:
        ValueError: one of them is no appearance hash.
    """
    return (int.from_bytes(_bytes(a), "big") ^ int.from_bytes(_bytes(b), "big")).bit_count()


def pack_appearance(hashes: list[str]) -> np.ndarray:
    """(n, 8) uint64 of n appearance hashes, for counting differing bits in bulk.

    Raises:
        ValueError: one of them is no appearance hash.
    """
    words = np.frombuffer(b"".join(_bytes(text) for text in hashes), dtype=np.uint64)
    return words.reshape(len(hashes), APPEARANCE_BITS // 64)


def _bytes(text: str) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != APPEARANCE_BITS // 8:
        raise ValueError(f"appearance hash: found {text!r}; expected {APPEARANCE_BITS // 4} hexadecimal digits")
    return raw


def _left_minus_right(cube: np.ndarray) -> np.ndarray:
    """(16, 32, 32) int64 sums over blocks of the left half minus the mirrored right half, in 1/64 deviations."""
    half, (_, y, z) = CUBE_SHAPE[0] // 2, _HALF_GRID
    sums = np.empty(_HALF_GRID, dtype=np.float32)
    limit = np.float32(_MAX_DEVIATIONS * _STEPS_PER_DEVIATION)
    # Slab by slab, so that the intermediate arrays stay in the cache.
    for index, start in enumerate(range(0, half, _BLOCK)):
        left = cube[start : start + _BLOCK]
        right = cube[::-1][start : start + _BLOCK]
        difference = np.subtract(left, right, dtype=np.float32)
        difference *= _STEPS_PER_DEVIATION
        np.rint(difference, out=difference)
        np.clip(difference, -limit, limit, out=difference)
        # Sums of whole numbers below 512 * 2048 = 2^20: exact in float32.
        plane = difference.sum(axis=0).reshape(y, _BLOCK, z * _BLOCK).sum(axis=1)
        sums[index] = plane.reshape(y, z, _BLOCK).sum(axis=2)
    return sums.astype(np.int64)


def _walsh_hadamard(values: np.ndarray) -> np.ndarray:
    """All projections of (2^k,) integers on the rows of the Hadamard matrix of that size: exact, and n log n."""
    result, width = values, 1
    while width < len(values):
        pairs = result.reshape(-1, 2, width)
        result = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        width *= 2
    return result.ravel()


@cache
def _signs() -> np.ndarray:
    """(16384,) of -1 and 1, the same everywhere: a Hadamard matrix with these columns flipped projects at random."""
    bits = np.frombuffer(hashlib.shake_256(_SEED + b" signs").digest(_HASH_LANES // 8), dtype=np.uint8)
    return np.unpackbits(bits).astype(np.int64) * 2 - 1


@cache
def _rows() -> np.ndarray:
    """(512,) which of the 16,384 projections are kept, the same everywhere."""
    draws = np.frombuffer(hashlib.shake_256(_SEED + b" rows").digest(8 * APPEARANCE_BITS), dtype="<u2") % _HASH_LANES
    return np.array(list(dict.fromkeys(draws.tolist()))[:APPEARANCE_BITS])
