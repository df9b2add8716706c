"""Random slice reads and size of the slice store, beside plain .npy files and other Blosc2 codecs; ratios last.

    python benchmarks/slice_store.py --volume SCAN.nii.gz

Without --volume a smooth random phantom is used (real scans compress differently: say which was used).
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np

from braindino.manifest import Scan
from braindino.slice_store import SliceStoreWriter
from braindino.slices import axial_slices, uniform_indices
from braindino.transforms import standardize
from braindino.volume import Volume, load_volume

READS = 4000
NUM_COPIES = 8


def reads_per_second(read: Callable[[int], np.ndarray], count: int) -> float:
    """Best of three passes of random reads, warm."""
    order = np.random.default_rng(0).integers(0, count, READS)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        for index in order:
            read(int(index))
        best = max(best, READS / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volume", type=Path)
    arguments = parser.parse_args()
    if arguments.volume is None:
        rng = np.random.default_rng(0)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 160)] * 3, indexing="ij"))
        data = np.where(
            (grid**2).sum(0) < 0.9, 500 + 200 * np.sin(7 * grid).sum(0) + rng.normal(0, 20, grid[0].shape), 0
        )
        volume = Volume(data.astype(np.float32), np.eye(4))
    else:
        volume = load_volume(arguments.volume)
    slices = axial_slices(standardize(volume), uniform_indices(128))
    half = slices.astype(np.float16)

    with tempfile.TemporaryDirectory() as folder:
        writer = SliceStoreWriter(Path(folder) / "store")
        for copy in range(NUM_COPIES):
            scan = Scan(path=f"/scan{copy}.nii.gz", cohort="benchmark", subject=str(copy), sequence="T1")
            path = writer.add(scan, slices, uniform_indices(128))
        store = writer.publish()
        size = path.stat().st_size / half.nbytes
        ours16 = reads_per_second(store.read_float16, len(store))
        ours32 = reads_per_second(store.__getitem__, len(store))
        for index in range(NUM_COPIES * 128):
            np.save(Path(folder) / f"{index}.npy", half[index % 128])
        plain = reads_per_second(lambda index: np.load(Path(folder) / f"{index}.npy"), NUM_COPIES * 128)
        print(f"store, float16        {ours16:8.0f} slices/s   size {size:.3f} of raw float16, checksum verified")
        print(f"store, float32        {ours32:8.0f} slices/s")
        print(f"one .npy per slice    {plain:8.0f} slices/s   size 1.000, no checksum")
        print(f"ratio store / .npy    {ours16 / plain:8.2f}")

    filters = {"bitshuffle": [blosc2.Filter.BITSHUFFLE], "shuffle": [blosc2.Filter.SHUFFLE]}
    for codec in (blosc2.Codec.LZ4, blosc2.Codec.LZ4HC, blosc2.Codec.ZSTD):
        for level in (1, 5):
            for name, chain in filters.items():
                options = {"codec": codec, "clevel": level, "filters": chain, "typesize": 2, "nthreads": 1}
                start = time.perf_counter()
                chunks = [blosc2.compress2(part.tobytes(), **options) for part in half]
                write = (time.perf_counter() - start) / len(chunks)
                read = reads_per_second(lambda index, chunks=chunks: blosc2.decompress2(chunks[index]), len(chunks))
                share = sum(map(len, chunks)) / half.nbytes
                label = f"{codec.name} {level} {name}"
                print(f"{label:22s} size {share:.3f}   decode {1e6 / read:5.0f} us   encode {1e6 * write:5.0f} us")


if __name__ == "__main__":
    main()
