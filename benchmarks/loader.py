"""Slices a second that reach the training process: read from a store, checked, with their masks drawn.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--workers 1 2 4] [--batch 256] [--slices 4096]

The loader of pretraining (braindino.pretrain.data) over a store that is made here: ellipses of smooth noise with sharp
noise on it, zero outside, which compress like brains. Batches are taken as fast as they come and dropped; the first of
every worker are not counted. 0 workers: this process by itself. The last figure but one is per second of processor
time, which other programs on the machine take nothing of. The store is in the page cache. An H100 is to take 700
slices/s.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from braindino.manifest import Scan
from braindino.pretrain.data import PREFETCH_FACTOR, BatchReader, build_loader
from braindino.pretrain.sampling import SliceSampler
from braindino.slice_store import SliceStore, SliceStoreWriter

SLICES_PER_SCAN = 128
NEEDED = 700


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=24, help="counted, for each number of workers")
    parser.add_argument("--slices", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", options.slices)
        stored = sum(store.scan_path(row).stat().st_size for row in range(len(store.scans)))
        print(
            f"{len(store)} slices, {stored / (len(store) * 2 * 256 * 256):.3f} of their raw size; batches of "
            f"{options.batch}; {os.cpu_count()} cores"
        )
        print(f"{'workers':>8s} {'slices/s':>10s} {'of a worker':>12s} {'per CPU second':>15s} {'of 700/s':>9s}")
        for workers in options.workers:
            rate, per_cpu = measure(store, workers, batch=options.batch, batches=options.batches)
            print(
                f"{workers:8d} {rate:10.0f} {rate / max(workers, 1):12.0f} {per_cpu:15.0f} {rate / NEEDED:9.2f}",
                flush=True,
            )


def make_store(folder: Path, num_slices: int) -> SliceStore:
    """Scans of 128 slices: an ellipse of smooth tissue with noise on it, zero outside."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[-1:1:256j, -1:1:256j]
    brain = (rows / 0.7) ** 2 + (columns / 0.55) ** 2 < 1
    writer = SliceStoreWriter(folder)
    for number in range(-(-num_slices // SLICES_PER_SCAN)):
        tissue = gaussian_filter(rng.standard_normal((SLICES_PER_SCAN, 256, 256), dtype=np.float32), (2, 6, 6))
        tissue = tissue / tissue.std() + 0.1 * rng.standard_normal(tissue.shape, dtype=np.float32)
        scan = Scan(path=f"/data/sub-{number:04d}.nii.gz", cohort="site", subject=f"sub-{number:04d}", sequence="T1")
        writer.add(scan, tissue * brain, range(SLICES_PER_SCAN))
    return writer.publish()


def measure(store: SliceStore, workers: int, *, batch: int, batches: int) -> tuple[float, float]:
    """Slices a second, and slices a second of processor time of this process and its workers."""
    warmup = (PREFETCH_FACTOR + 1) * workers + 1
    reader = BatchReader(
        store,
        SliceSampler(store.scan_index, batch_size=batch, seed=0),
        grids=[(16, 16)],
        pairs=np.zeros(warmup + batches, dtype=int),
        mask_probability=0.5,
        mask_ratios=(0.1, 0.5),
    )
    cpu = cpu_seconds()
    started = time.perf_counter()
    loader = iter(build_loader(reader, range(warmup + batches), num_workers=workers, pin_memory=False))
    for number, _ in enumerate(loader, start=1):
        if number == warmup:
            started = time.perf_counter()
    wall = time.perf_counter() - started
    del loader  # ends its workers, whose time counts only then
    return batches * batch / wall, (warmup + batches) * batch / (cpu_seconds() - cpu)


def cpu_seconds() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


if __name__ == "__main__":
    main()
