"""Reading the slices of an iteration and drawing its masks, here or in other processes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from braindino.manifest import Scan
from braindino.pretrain.masking import batch_masks
from braindino.pretrain.randomness import numpy_generator
from braindino.pretrain.sampling import SliceSampler
from braindino.slice_store import SLICE_SHAPE, SliceStore

# Batches that each reading process holds ready.
PREFETCH_FACTOR = 4


class Batch(NamedTuple):
    """What one iteration sees, on the CPU."""

    slices: Tensor
    """(B, 256, 256) float16."""
    masks: Tensor
    """(2B, N) bool, the first B for the first global crop of each slice; True = hidden from the student."""


class BatchReader(Dataset[Batch]):
    """`reader[i]` is the batch of iteration i, slices read and masks drawn. Picklable for spawned processes."""

    def __init__(
        self,
        store: SliceStore,
        sampler: SliceSampler,
        *,
        grids: list[tuple[int, int]],
        pairs: np.ndarray,
        mask_probability: float,
        mask_ratios: tuple[float, float],
        part: slice | None = None,
    ) -> None:
        """grids: patch grid of the global crops for each pair of crop sizes; pairs (iterations,): the pair of each.

        part: which of the sampler's slices to read, the share of one process; None = all.
        """
        self.store = store
        self.sampler = sampler
        self.grids = grids
        self.pairs = pairs
        self.mask_probability = mask_probability
        self.mask_ratios = mask_ratios
        self.part = part or slice(0, sampler.batch_size)

    def __getitem__(self, iteration: int) -> Batch:
        places = range(self.sampler.batch_size)[self.part]
        masks = batch_masks(
            2 * self.sampler.batch_size,
            self.grids[self.pairs[iteration]],
            probability=self.mask_probability,
            ratios=self.mask_ratios,
            rng=numpy_generator(self.sampler.seed, iteration, "masks"),
            images=[*places, *(self.sampler.batch_size + place for place in places)],
        )
        slices = np.empty((len(places), *SLICE_SHAPE), dtype=np.float16)
        for row, index in zip(slices, self.sampler.indices_of(iteration)[self.part], strict=True):
            self.store.read_float16(int(index), out=row)
        return Batch(torch.from_numpy(slices), torch.from_numpy(masks))

    def slices_of(self, iteration: int) -> Iterator[np.ndarray]:
        """The slices (256, 256) float16 of the whole batch of an iteration, in its order."""
        for index in self.sampler.indices_of(iteration):
            yield self.store.read_float16(int(index))

    def scans_of(self, iteration: int) -> list[Scan]:
        """The scans that the batch of an iteration comes from, in its order, for error messages."""
        return [self.store.scan_of(int(index)) for index in self.sampler.indices_of(iteration)]


def split_batch(batch: Batch, number: int) -> list[Batch]:
    """A batch in so many contiguous parts of equal size."""
    slices, masks = batch.slices.chunk(number), batch.masks.unflatten(0, (2, -1)).chunk(number, dim=1)
    return [Batch(part, mask.flatten(0, 1)) for part, mask in zip(slices, masks, strict=True)]


def build_loader(reader: BatchReader, iterations: range, *, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Batches of the given iterations in order; with workers, read ahead of time by other processes."""
    return DataLoader(
        reader,
        sampler=iterations,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),
    )


@contextmanager
def reading(loader: DataLoader[Batch]) -> Iterator[Iterator[Batch]]:
    """The loader's batches; at the end of the block its readers are gone.

    They ignore signals, and a daemon that does cannot be ended when Python exits: it would wait for them for ever.
    """
    batches = iter(loader)
    try:
        yield batches
    finally:
        # Without readers there is nothing to end. Torch has no other name for it, and waits for its collector.
        end = getattr(batches, "_shutdown_workers", None)
        if end is not None:
            end()


def _ignore_signals(_worker: int) -> None:
    # A scheduler signals the whole process group; the main process still needs its readers to finish the step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
