"""Masks: exact counts, block shape, determinism."""

import numpy as np
import pytest

from braindino.pretrain.masking import batch_masks, block_mask, mask_sizes


def test_256_slices_of_256_px_always_have_19610_masked_patches() -> None:
    for seed in range(2):
        masks = batch_masks(512, (16, 16), rng=np.random.default_rng(seed))
        assert masks.shape == (512, 256) and masks.dtype == bool
        assert masks.sum() == 19_610
        counts = masks.sum(axis=1)
        assert (counts > 0).sum() == 256
        assert counts[counts > 0].min() == 26 and counts.max() == 128


def test_high_resolution_batches_have_the_known_counts() -> None:
    sizes_512 = mask_sizes(112, 32 * 32, probability=0.5, ratios=(0.1, 0.5))
    sizes_768 = mask_sizes(112, 48 * 48, probability=0.5, ratios=(0.1, 0.5))
    assert sum(sizes_512) == 17_381 and sum(sizes_768) == 39_141


@pytest.mark.parametrize("size", [1, 3, 26, 77, 128, 200, 256])
def test_a_block_mask_has_exactly_the_patches_asked_for(size: int) -> None:
    assert block_mask((16, 16), size, rng=np.random.default_rng(size)).sum() == size


def test_masks_are_blocks_and_not_salt_and_pepper() -> None:
    rng = np.random.default_rng(0)

    def touching(mask: np.ndarray) -> float:
        return (mask[1:] & mask[:-1]).sum() / mask.sum()

    blocks = np.mean([touching(block_mask((16, 16), 64, rng=rng)) for _ in range(20)])
    scattered = np.mean([touching(rng.permutation(np.arange(256) < 64).reshape(16, 16)) for _ in range(20)])
    assert blocks > 0.6 and scattered < 0.35


def test_masked_images_are_dealt_over_both_views() -> None:
    masked = batch_masks(512, (16, 16), rng=np.random.default_rng(1)).any(axis=1)
    assert 100 < masked[:256].sum() < 156


def test_masks_repeat_with_their_generator() -> None:
    first = batch_masks(16, (6, 6), rng=np.random.default_rng(3))
    assert np.array_equal(first, batch_masks(16, (6, 6), rng=np.random.default_rng(3)))
    assert not np.array_equal(first, batch_masks(16, (6, 6), rng=np.random.default_rng(4)))


def test_probability_zero_masks_nothing() -> None:
    assert not batch_masks(8, (4, 4), probability=0.0, rng=np.random.default_rng(0)).any()
