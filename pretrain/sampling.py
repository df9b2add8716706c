"""Which slices and which crop sizes an iteration sees.

The batch of iteration i is a function of the seed and of i alone: resuming means starting to count at another i, and
the number of reading processes makes no difference.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from braindino.manifest import Scan
from braindino.pretrain.randomness import numpy_generator

# Fractional part of the golden ratio: multiples of it, modulo 1, leave no gap wider than 2/n after n of them.
GOLDEN_STEP = (5**0.5 - 1) / 2
# Phases are multiples of 2^-20, so that adding one to a count of up to 2^32 slices is exact in float64.
PHASE_STEPS = 2**20


class SliceSampler:
    """Slices of each iteration: the store is walked through in random order, epoch after epoch.

    Within an epoch the slices of one scan are spread evenly, so that a batch holds neighbours as rarely as the store
    allows (KoLeo would push them apart). An epoch has as many draws as there are slices of weight > 0; a batch may
    reach into the next epoch.

    With equal weights every slice is drawn once per epoch. Otherwise a slice of weight w is expected c = w / (mean
    weight) times an epoch: it is drawn floor(c) or ceil(c) times, and a slice with c < 1 at least once in any 2/c + 1
    epochs, so that nothing of weight > 0 is left out for long. A slice that is drawn several times in an epoch comes
    again after the other slices of its scan.
    """

    def __init__(
        self, scan_index: np.ndarray, *, batch_size: int, seed: int, scan_weights: np.ndarray | None = None
    ) -> None:
        """
        Args:
            scan_index: (num_slices,) row of each slice's scan.
            batch_size: slices per iteration.
            seed: of the run.
            scan_weights: (num_scans,) weight of the slices of each scan, 0 = never drawn; None = all equal.

        Raises:
            ValueError: fewer slices of weight > 0 than a batch has.
        """
        scan_index = np.asarray(scan_index)
        weights = np.ones(scan_index.max(initial=0) + 1) if scan_weights is None else np.asarray(scan_weights, float)
        self.indices = np.flatnonzero(weights[scan_index] > 0)
        """(n,) store indices of the slices that are drawn from."""
        if len(self.indices) < batch_size:
            raise ValueError(
                f"a batch of {batch_size} slices cannot be drawn from {len(self.indices)} usable slices; "
                "prepare more scans, or lower --batch-size"
            )
        self.batch_size = batch_size
        self.seed = seed
        self._scans = scan_index[self.indices].astype(np.int32)
        self._weights = weights
        self._phase = numpy_generator(seed, 0, "sampling phase").random()
        self._order = (-1, self.indices)

    def indices_of(self, iteration: int) -> np.ndarray:
        """(B,) store indices of the batch of an iteration (counted from 0)."""
        positions = np.arange(iteration * self.batch_size, (iteration + 1) * self.batch_size)
        epochs = positions // len(self.indices)
        return np.concatenate(
            [self.epoch_order(epoch)[positions[epochs == epoch] % len(self.indices)] for epoch in np.unique(epochs)]
        )

    def epoch_order(self, epoch: int) -> np.ndarray:
        """(n,) store indices in the order of an epoch."""
        if self._order[0] != epoch:
            rng = numpy_generator(self.seed, int(epoch), "slices")
            positions, again = self._draws(int(epoch))
            scans = self._scans[positions]
            # Draw number j of the n of its scan, in random order, goes to a random place in the j-th part of n; the
            # first draws of all its slices come before the second ones.
            shuffled = rng.permutation(len(scans))
            rounds = int(again.max()) + 1
            # The smallest integers that hold the key: up to 65,536 scans are then sorted by radix.
            key = (scans.astype(np.int64) * rounds + again).astype(np.min_scalar_type(len(self._weights) * rounds))
            by_scan = shuffled[np.argsort(key[shuffled], kind="stable")]
            counts = np.bincount(scans)
            number = np.arange(len(scans)) - np.repeat(np.cumsum(counts) - counts, counts)
            place = (number + rng.random(len(scans))) / np.repeat(counts, counts)
            self._order = (int(epoch), self.indices[positions[by_scan[np.argsort(place, kind="stable")]]])
        return self._order[1]

    def _draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Position in `indices` of each of the n draws of an epoch, rising, and which draw of that slice it is."""
        n = len(self.indices)
        weights = self._weights[self._scans]
        if (weights == weights[0]).all():
            return np.arange(n), np.zeros(1, dtype=np.int8)
        # Systematic sampling: n marks at distance 1, shifted by the phase, on a line where each slice is c long.
        line = np.cumsum(weights)
        line *= n / line[-1]
        line[-1] = n
        phase = int((self._phase + epoch * GOLDEN_STEP) % 1 * PHASE_STEPS) / PHASE_STEPS
        draws: np.ndarray = np.diff(np.floor(line + phase).astype(np.int64), prepend=0)
        again = np.arange(n) - np.repeat(np.cumsum(draws) - draws, draws)
        return np.repeat(np.arange(n), draws), again


def scan_weights(
    scans: Sequence[Scan],
    *,
    by_cohort: Mapping[str, float],
    by_sequence: Mapping[str, float],
    excluded: frozenset[str] = frozenset(),
) -> np.ndarray:
    """(num_scans,) weight of each scan's slices: that of its cohort times that of its sequence, 1 where none is given.

    The expected share of a group of slices in the batches is proportional to weight times number of slices. Scans of
    `excluded` subjects (`cohort/subject`) weigh 0.

    Raises:
        ValueError: a cohort or sequence that no scan has; names those that there are.
    """
    for kind, given, names in (
        ("cohort", by_cohort, {scan.cohort for scan in scans}),
        ("sequence", by_sequence, {scan.sequence for scan in scans}),
    ):
        unknown = sorted(set(given) - names)
        if unknown:
            raise ValueError(
                f"sampling.{kind}_weights: no {kind} {unknown[0]!r} in the store; it has "
                f"{', '.join(repr(name) for name in sorted(names))}"
            )
    return np.array(
        [
            0.0
            if scan.subject_key in excluded
            else by_cohort.get(scan.cohort, 1.0) * by_sequence.get(scan.sequence, 1.0)
            for scan in scans
        ]
    )


def expected_shares(
    scans: Sequence[Scan], scan_index: np.ndarray, weights: np.ndarray
) -> dict[tuple[str, str], tuple[int, float]]:
    """(cohort, sequence) -> number of its slices and its expected share of the draws; shares sum to 1.

    Args:
        scans: of the store.
        scan_index: (num_slices,) row of each slice's scan.
        weights: (num_scans,) from `scan_weights`.
    """
    num_slices = np.bincount(scan_index, minlength=len(scans))
    mass = num_slices * weights
    shares: dict[tuple[str, str], tuple[int, float]] = {}
    for scan, number, part in zip(scans, num_slices.tolist(), (mass / mass.sum()).tolist(), strict=True):
        slices, share = shares.get((scan.cohort, scan.sequence), (0, 0.0))
        shares[scan.cohort, scan.sequence] = (slices + number, share + part)
    return dict(sorted(shares.items()))


def share_lines(shares: Mapping[tuple[str, str], tuple[int, float]], *, draws: int) -> list[str]:
    """The expected shares as text, a line each; `draws` is the number of slices that the whole run draws."""
    return [
        f"  {cohort} {sequence}: {slices} slices, {share:.1%} of the draws"
        + (f", each {share * draws / slices:.3g} times in the run" if share else " (left out)")
        for (cohort, sequence), (slices, share) in shares.items()
    ]


def crop_pair_of_each_iteration(iterations: int, ratios: tuple[float, ...], *, seed: int) -> np.ndarray:
    """(iterations,) index of the pair of crop sizes used in each iteration, drawn with the given probabilities."""
    return numpy_generator(seed, 0, "crop pairs").choice(len(ratios), size=iterations, p=np.divide(ratios, sum(ratios)))
