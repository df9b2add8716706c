"""What a volume costs besides its image processing, in cohorts of 10 to 10,000, and how processes share the real work.

python benchmarks/cohort_scale.py FOLDER [SCAN.nii.gz]

The volumes are simulated, 16 voxels wide, in BIDS. In the first table one slice of noise stands for the image
processing; all else is real: discovery, hashes, case files, slice files synced to the disk, tables, index, duplicates,
montages. With a SCAN, the second table prepares 32 variants of it with 1, 2... processes, image processing included.
"""

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from braindino.preprocessing import preparation
from braindino.preprocessing.prepare import main as prepare
from braindino.volume import load_volume, save_array

SIZES = (10, 100, 1000, 10_000)
NUM_SCANS = 32


def write_cohort(folder: Path, number: int) -> None:
    """Volumes of noise, four to a subject: T1, T1c, T2 and FLAIR."""
    names = ("T1w", "ce-gadolinium_T1w", "T2w", "FLAIR")
    affine = np.diag([10.0, 10, 10, 1])
    for index in range(number):
        subject = f"sub-{index // 4:05d}"
        data = np.random.default_rng(index).integers(1, 1000, (16, 16, 16))
        save_array(data, affine, folder / subject / "anat" / f"{subject}_{names[index % 4]}.nii.gz", dtype=np.int16)


def stand_in(self, scan, known, old):
    """For ``ScanPreparer._process``: measures the scan, then one slice of noise, looks included."""
    known.quality = preparation._measure(scan, known.volume)
    rng = np.random.default_rng(int(scan.scan_id, 16))
    slices = np.zeros((1, 256, 256), dtype=np.float32)
    slices[:, 96:160, 96:160] = rng.standard_normal((1, 64, 64))
    return preparation._Prepared(slices, np.array([128]), rng.bytes(64).hex(), [])


def seconds_of(function: Callable[[Sequence[str]], int], arguments: Sequence[object]) -> tuple[float, str]:
    """Wall time, and what it printed."""
    printed = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(printed):
        code = function([str(argument) for argument in arguments])
    assert code == 0, code
    return time.perf_counter() - start, printed.getvalue()


def bookkeeping(folder: Path) -> None:
    print("ms per volume            first run   second run   dry run")
    original = preparation.ScanPreparer._process
    preparation.ScanPreparer._process = stand_in
    try:
        for size in SIZES:
            cohort, out = folder / f"cohort-{size}", folder / f"prepared-{size}"
            shutil.rmtree(out, ignore_errors=True)
            if not cohort.exists():
                write_cohort(cohort, size)
            command = [cohort, "--out", out, "--jobs", 0]
            dry, _ = seconds_of(prepare, [*command, "--dry-run", "--probe", 0])
            first, printed = seconds_of(prepare, command)
            assert f"{size} worked on" in printed, printed
            second, printed = seconds_of(prepare, command)
            assert "0 worked on" in printed, printed
            print(f"{size:>8,} volumes {1e3 * first / size:16.2f} {1e3 * second / size:12.2f} {1e3 * dry / size:9.2f}",
                  flush=True)  # fmt: skip
    finally:
        preparation.ScanPreparer._process = original


def scaling(folder: Path, scan: Path) -> None:
    cohort, volume = folder / "variants", load_volume(scan)
    for index in range(NUM_SCANS):
        # One voxel sets them apart: the same scan twice would be a duplicate.
        data = volume.data.copy()
        data[0, 0, 0] = index + 1
        name = f"sub-{index:02d}"
        save_array(data, volume.affine, cohort / name / "anat" / f"{name}_T1w.nii.gz", dtype=np.float32)
    print(f"{NUM_SCANS} variants of {scan.name}: processes, seconds, times faster than one")
    one = 0.0
    jobs = 1
    while jobs <= (os.cpu_count() or 1):
        out = folder / f"prepared-jobs-{jobs}"
        shutil.rmtree(out, ignore_errors=True)
        seconds, _ = seconds_of(prepare, [cohort, "--out", out, "--jobs", jobs])
        one = one or seconds
        print(f"{jobs:>3} {seconds:8.2f} {one / seconds:6.2f}", flush=True)
        jobs *= 2


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    bookkeeping(folder)
    if len(sys.argv) > 2:
        scaling(folder, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
