"""Opening, publishing and memory of a slice store with 10 to 50,000 volumes of 128 slices.

    python benchmarks/store_scale.py

The slices are empty, so that a large store fits anywhere; index and headers are those of a real one. Opening and memory
are measured in a process of their own; opening includes the first slice read. What is opened is in the page cache.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from braindino.manifest import Scan
from braindino.slice_store import SliceStoreWriter, read_scan_file

SLICES = 128
COUNTS = (10, 100, 1000, 10_000, 50_000)

# Runs by itself: a process that made the store has its memory full of it.
READER = """
import sys, time
from braindino.slice_store import SliceStore
SliceStore(sys.argv[2])[0]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
times = []
for _ in range(20):
    start = time.perf_counter()
    store = SliceStore(sys.argv[1])
    opened = time.perf_counter()
    store[len(store) // 2]
    times.append((opened - start, time.perf_counter() - start))
memory = resident() - before
start = time.perf_counter()
store.scans
rows = time.perf_counter() - start
open_only, with_slice = (sorted(column)[10] for column in zip(*times))
print(1e3 * open_only, 1e3 * with_slice, memory / 2**20, rows)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="volumes of the largest store")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        small = Path(name) / "small"
        SliceStoreWriter(small).add(_scan(0), np.zeros((1, 256, 256), dtype=np.float32), [0])
        SliceStoreWriter(small).publish()
        print(
            f"{'volumes':>8s} {'slices':>10s} {'open, ms':>9s} {'and a slice':>12s} {'memory, MiB':>12s} "
            f"{'its rows, s':>12s} {'publish, s':>11s} {'per volume, ms':>15s} {'again, s':>9s} {'ratio':>6s}"
        )
        writer = SliceStoreWriter(Path(name) / "store", contract={"intensity": "none: a benchmark"})
        made = 0
        for count in (count for count in COUNTS if count <= arguments.most):
            _fill(writer, range(made, count))
            made = count
            for notes in writer.store_dir.glob("index/.*.notes"):
                notes.unlink()
            time.sleep(2.5)  # files written a moment ago are read again by the next publish, to be safe
            first, again = _seconds(writer), _seconds(writer)
            answer = subprocess.run(
                [sys.executable, "-c", READER, str(writer.store_dir), str(small)],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
            opened, with_slice, memory, rows = map(float, answer.split())
            print(
                f"{count:8d} {count * SLICES:10d} {opened:9.2f} {with_slice:12.2f} {memory:12.1f} {rows:12.3f} "
                f"{first:11.2f} {1e3 * first / count:15.3f} {again:9.2f} {first / again:6.1f}",
                flush=True,
            )


def _seconds(writer: SliceStoreWriter) -> float:
    start = time.perf_counter()
    writer.publish()
    return time.perf_counter() - start


def _scan(number: int) -> Scan:
    return Scan(
        path=f"/data/cohort-{number % 33:02d}/sub-{number:06d}/ses-1/anat/sub-{number:06d}_ses-1_T1w.nii.gz",
        cohort=f"cohort-{number % 33:02d}",
        subject=f"sub-{number:06d}",
        session="1",
        sequence="T1",
        content_hash=f"{number:032x}",
        appearance_hash=f"{number:0128x}",
    )


def _fill(writer: SliceStoreWriter, numbers: range) -> None:
    """Files of new scans: the writer makes one, the others are its bytes with another row, not synced one by one."""
    slices = np.zeros((SLICES, 256, 256), dtype=np.float32)
    pattern_scan = _scan(numbers[0])
    pattern = writer.add(pattern_scan, slices, range(SLICES))
    content, records = pattern.read_bytes(), read_scan_file(pattern).records
    row_bytes = int(records[0, 2]) - 20 - 16 * SLICES
    row = content[20 : 20 + row_bytes]
    for number in numbers[1:]:
        scan = _scan(number)
        mine = row
        for name in ("path", "cohort", "subject", "content_hash", "appearance_hash"):
            mine = mine.replace(
                f'"{name}": "{getattr(pattern_scan, name)}"'.encode(), f'"{name}": "{getattr(scan, name)}"'.encode()
            )
        assert len(mine) == row_bytes
        path = writer.scan_file(scan.scan_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_with_checksum(content[:16], mine, content[20 + row_bytes :]))


def _with_checksum(prefix: bytes, row: bytes, rest: bytes) -> bytes:
    records = rest[: 16 * SLICES]
    crc32 = zlib.crc32(records, zlib.crc32(row, zlib.crc32(prefix[8:16])))
    return prefix + crc32.to_bytes(4, "little") + row + rest


if __name__ == "__main__":
    main()
