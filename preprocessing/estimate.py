"""What a run will cost, told from a few scans that are prepared for trial."""

import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braindino.manifest import mask_path
from braindino.preprocessing.cases import Case
from braindino.preprocessing.discovery import Candidate
from braindino.preprocessing.preparation import ScanPreparer
from braindino.progress import track

GIGA = 1e9


class Estimate(NamedTuple):
    """The cost of preparing some scans.

    Attributes:
        num_tried: scans it was learnt from.
        slices: that will be in the store.
        num_bytes: of slices, masks and converted files.
        seconds: of one process.
        num_failed: of the scans tried, those that would be quarantined.
    """

    num_tried: int
    slices: float
    num_bytes: float
    seconds: float
    num_failed: int

    def lines(self, *, jobs: int, free_bytes: int) -> list[str]:
        """What to tell the user."""
        hours = self.seconds / max(1, jobs) / 3600
        lines = [
            f"estimate, from {self.num_tried} of them: {self.slices:,.0f} slices, {self.num_bytes / GIGA:.3g} GB, "
            f"{hours:.2g} hours with {max(1, jobs)} process{'es' if jobs > 1 else ''} "
            f"({self.seconds / 3600:.2g} hours of one)"
        ]
        if self.num_failed:
            lines.append(f"  {self.num_failed} of the {self.num_tried} tried would be quarantined")
        if self.num_bytes > free_bytes:
            lines.append(f"  WARNING: only {free_bytes / GIGA:.3g} GB are free there")
        return lines


def estimate(todo: Sequence[Candidate], preparer: ScanPreparer, *, num_probes: int) -> Estimate:
    """The cost of ``todo``, from ``num_probes`` of its scans, spread over its cohorts and sequences.

    Each is prepared as it will be, in a temporary folder; its outcome stands for the scans of its cohort and
    sequence, or, where those had no turn, for all others.
    """
    chosen = spread(todo, num_probes)
    measured: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    num_failed = 0
    with tempfile.TemporaryDirectory(prefix="braindino-") as folder:
        trial = ScanPreparer(Path(folder), preparer.settings, device=preparer.device, num_threads=preparer.num_threads)
        trial.warm_up()
        for number, candidate in enumerate(track(chosen, desc="estimate")):
            start = time.perf_counter()
            case = trial(trial_candidate(candidate, Path(folder), number))
            seconds = time.perf_counter() - start
            num_failed += case.scan.status != "done"
            measured[_group(candidate)].append((case.scan.num_slices, _bytes_of(case, Path(folder)), seconds))
            shutil.rmtree(folder, ignore_errors=True)
    mean_of_all = np.mean([row for rows in measured.values() for row in rows], axis=0)
    total = np.zeros(3)
    for candidate in todo:
        total += np.mean(measured[_group(candidate)], axis=0) if _group(candidate) in measured else mean_of_all
    slices, num_bytes, seconds = total.tolist()
    return Estimate(len(chosen), slices, num_bytes, seconds, num_failed)


def spread(todo: Sequence[Candidate], number: int) -> list[Candidate]:
    """Up to ``number`` of the candidates: in turn from each cohort and sequence, evenly over each."""
    groups: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
    for candidate in todo:
        groups[_group(candidate)].append(candidate)
    rounds = zip_longest(*(_spaced(groups[name], number) for name in sorted(groups)))
    return [candidate for turn in rounds for candidate in turn if candidate is not None][:number]


def trial_candidate(candidate: Candidate, folder: Path, number: int) -> Candidate:
    """The candidate, with a converted file, if it needs one, in ``folder``."""
    if candidate.conversion is None:
        return candidate
    path = folder / "converted" / f"{number:016x}.nii.gz"
    return replace(candidate, scan=replace(candidate.scan, path=str(path)))


def free_bytes(folder: Path) -> int:
    """Free space where ``folder`` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _spaced(group: Sequence[Candidate], number: int) -> Iterable[Candidate]:
    number = min(number, len(group))
    return [group[(2 * turn + 1) * len(group) // (2 * number)] for turn in range(number)]


def _group(candidate: Candidate) -> tuple[str, str]:
    return candidate.scan.cohort, candidate.scan.sequence


def _bytes_of(case: Case, folder: Path) -> int:
    kept = [*(folder / "store").rglob("*"), mask_path(folder, case.scan), *(folder / "converted").glob("*")]
    return sum(path.stat().st_size for path in kept if path.is_file())
