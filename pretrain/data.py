"""Which slices an iteration sees, and reading them.

The batch of iteration i is a function of the seed and of i alone: resuming means starting to count at another i, and
the number of reading processes makes no difference.
"""

import hashlib
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from braindino.manifest import Scan
from braindino.pretrain.masking import batch_masks
from braindino.pretrain.randomness import numpy_generator
from braindino.slice_store import SliceStore
from braindino.splits import read_subjects


class Exclusion(NamedTuple):
    """Subjects kept out of a run."""

    subjects: frozenset[str]
    sha256: str
    """Of the file they were read from."""


class Batch(NamedTuple):
    """What one iteration sees, on the CPU."""

    slices: Tensor
    """(B, 256, 256) float16."""
    masks: Tensor
    """(2B, N) bool, the first B for the first global crop of each slice; True = hidden from the student."""


class SliceSampler:
    """Slices of each iteration: the store is walked through in random order, epoch after epoch.

    Within an epoch the slices of one scan are spread evenly, so that a batch holds neighbours as rarely as the store
    allows (KoLeo would push them apart). Every slice is seen once per epoch; a batch may reach into the next epoch.
    """

    def __init__(self, scan_index: np.ndarray, *, batch_size: int, seed: int, usable: np.ndarray | None = None) -> None:
        """scan_index (num_slices,): row of each slice's scan. usable: indices of slices to draw from; None = all."""
        self.indices = np.arange(len(scan_index)) if usable is None else np.asarray(usable)
        if len(self.indices) < batch_size:
            raise ValueError(
                f"a batch of {batch_size} slices cannot be drawn from {len(self.indices)} usable slices; "
                "prepare more scans or lower --batch-size"
            )
        self.batch_size = batch_size
        self.seed = seed
        self._scans = np.asarray(scan_index)[self.indices]
        self._order = (-1, self.indices)

    def indices_of(self, iteration: int) -> np.ndarray:
        """(B,) store indices of the batch of an iteration (counted from 0)."""
        positions = np.arange(iteration * self.batch_size, (iteration + 1) * self.batch_size)
        epochs = positions // len(self.indices)
        return np.concatenate(
            [self.epoch_order(epoch)[positions[epochs == epoch] % len(self.indices)] for epoch in np.unique(epochs)]
        )

    def epoch_order(self, epoch: int) -> np.ndarray:
        """All usable store indices in the order of an epoch."""
        if self._order[0] != epoch:
            rng = numpy_generator(self.seed, int(epoch), "slices")
            # Slice number j of the n of its scan, in random order, goes to a random place in the j-th part of n.
            shuffled = rng.permutation(len(self.indices))
            by_scan = shuffled[np.argsort(self._scans[shuffled], kind="stable")]
            _, first, counts = np.unique(self._scans[by_scan], return_index=True, return_counts=True)
            number = np.arange(len(by_scan)) - np.repeat(first, counts)
            place = (number + rng.random(len(by_scan))) / np.repeat(counts, counts)
            self._order = (int(epoch), self.indices[by_scan[np.argsort(place, kind="stable")]])
        return self._order[1]


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
    ) -> None:
        """grids: patch grid of the global crops for each pair of crop sizes; pairs (iterations,): the pair of each."""
        self.store = store
        self.sampler = sampler
        self.grids = grids
        self.pairs = pairs
        self.mask_probability = mask_probability
        self.mask_ratios = mask_ratios

    def __getitem__(self, iteration: int) -> Batch:
        indices = self.sampler.indices_of(iteration)
        masks = batch_masks(
            2 * self.sampler.batch_size,
            self.grids[self.pairs[iteration]],
            probability=self.mask_probability,
            ratios=self.mask_ratios,
            rng=numpy_generator(self.sampler.seed, iteration, "masks"),
        )
        slices = np.stack([self.store.read_float16(int(index)) for index in indices])
        return Batch(torch.from_numpy(slices), torch.from_numpy(masks))

    def scans_of(self, iteration: int) -> list[Scan]:
        """The scans that the batch of an iteration comes from, in its order, for error messages."""
        return [self.store.scan_of(int(index)) for index in self.sampler.indices_of(iteration)]


def build_loader(reader: BatchReader, iterations: range, *, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Batches of the given iterations in order; with workers, read ahead of time by other processes."""
    return DataLoader(
        reader,
        sampler=iterations,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),
    )


def read_exclusion(path: Path, scans: list[Scan]) -> Exclusion:
    """The subjects of a list (`braindino split` writes one), and the hash of what they are.

    Raises:
        ValueError: a line is no `cohort/subject`, or none of the subjects is among the scans (so that a list with
            misspelt names cannot pass for an exclusion).
    """
    subjects = read_subjects(path)
    known = {scan.subject_key for scan in scans}
    if subjects and not known.intersection(subjects):
        raise ValueError(
            f"{path}: none of its {len(subjects)} subjects is in the store (first: {subjects[0]!r}; the store has "
            f"{sorted(known)[:3]}...); check the cohort names"
        )
    return Exclusion(frozenset(subjects), hashlib.sha256("\n".join(sorted(subjects)).encode()).hexdigest())


def usable_slices(store: SliceStore, excluded: frozenset[str]) -> np.ndarray:
    """Indices of the store's slices whose subject is not excluded."""
    keep = np.array([scan.subject_key not in excluded for scan in store.scans], dtype=bool)
    return np.flatnonzero(keep[store.scan_index])


def crop_pair_of_each_iteration(iterations: int, ratios: tuple[float, ...], *, seed: int) -> np.ndarray:
    """(iterations,) index of the pair of crop sizes used in each iteration, drawn with the given probabilities."""
    return numpy_generator(seed, 0, "crop pairs").choice(len(ratios), size=iterations, p=np.divide(ratios, sum(ratios)))


def _ignore_signals(_worker: int) -> None:
    # A scheduler signals the whole process group; the main process still needs its readers to finish the step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
