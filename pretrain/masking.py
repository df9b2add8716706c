"""Block-wise masks for the iBOT objective (paper sec. 4.2: probability 0.5, ratio in [0.1, 0.5])."""

import math
from collections.abc import Sequence

import numpy as np

MIN_BLOCK_PATCHES = 4
BLOCK_ASPECT_RATIOS = (0.3, 1 / 0.3)
BLOCK_ATTEMPTS = 10


def batch_masks(
    num_images: int,
    grid: tuple[int, int],
    *,
    probability: float = 0.5,
    ratios: tuple[float, float] = (0.1, 0.5),
    rng: np.random.Generator,
    images: Sequence[int] | None = None,
) -> np.ndarray:
    """Masks of all global crops of a batch: (num_images, grid rows * columns) bool, True = hidden from the student.

    Exactly int(num_images * probability) images are masked, whichever they are. Their mask sizes form a fixed ladder
    from the lower to the upper ratio, dealt out at random, so that the ratio is uniform over the batch and the number
    of masked patches is the same in every iteration (19,610 for 512 crops of 16 x 16 patches).

    `images` asks for the rows of these images alone, as they stand in the masks of all: the share of one process. The
    number of masked patches then varies a little.
    """
    height, width = grid
    sizes = np.zeros(num_images, dtype=int)
    ladder = mask_sizes(num_images, height * width, probability=probability, ratios=ratios)
    sizes[rng.permutation(num_images)[: len(ladder)]] = ladder
    # A generator for each image: a process draws the masks of its own images and of no others.
    seed = int(rng.integers(2**63))
    images = range(num_images) if images is None else images
    masks = np.zeros((len(images), height * width), dtype=bool)
    for row, image in enumerate(images):
        if sizes[image]:
            masks[row] = block_mask(grid, int(sizes[image]), rng=np.random.default_rng((seed, image))).ravel()
    return masks


def mask_sizes(num_images: int, num_patches: int, *, probability: float, ratios: tuple[float, float]) -> list[int]:
    """Masked patches of each masked image: int(N * rung), over the upper ends of equal bins of the ratio range."""
    num_masked = int(num_images * probability)
    return [int(num_patches * ratio) for ratio in np.linspace(*ratios, num_masked + 1)[1:]]


def block_mask(grid: tuple[int, int], size: int, *, rng: np.random.Generator) -> np.ndarray:
    """A (height, width) bool mask of exactly `size` patches, made of random rectangles as in BEiT.

    A rectangle has 4 patches or more, at most half of the grid, and a log-uniform aspect ratio; single patches drawn at
    random fill what rectangles cannot.
    """
    height, width = grid
    mask = np.zeros((height, width), dtype=bool)
    missing = size
    while missing > 0:
        added = _add_block(mask, min(missing, height * width // 2), missing, rng)
        if added == 0:
            break
        missing -= added
    if missing > 0:
        mask.flat[rng.choice(np.flatnonzero(~mask), size=missing, replace=False)] = True
    return mask


def _add_block(mask: np.ndarray, max_area: int, missing: int, rng: np.random.Generator) -> int:
    """Mask one rectangle that adds between 1 and `missing` patches; the number added, 0 if no attempt succeeded."""
    height, width = mask.shape
    low, high = (math.log(aspect) for aspect in BLOCK_ASPECT_RATIOS)
    for area_draw, aspect_draw, top_draw, left_draw in rng.random((BLOCK_ATTEMPTS, 4)).tolist():
        area = MIN_BLOCK_PATCHES + (max_area - MIN_BLOCK_PATCHES) * area_draw
        aspect = math.exp(low + (high - low) * aspect_draw)
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < rows < height and 0 < columns < width):
            continue
        top, left = int((height - rows + 1) * top_draw), int((width - columns + 1) * left_draw)
        block = mask[top : top + rows, left : left + columns]
        added = block.size - int(block.sum())
        if 0 < added <= missing:
            block[...] = True
            return added
    return 0
