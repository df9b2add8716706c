"""Slices on disk for random reads: many volumes, one slice at a time. Owner of the store format (version 1).

A store is a folder::

    store.json            format, slice shape, contract (how the slices were made), fingerprint
    index.npz             one record per slice: scan row, slice index, offset, length, checksum
    scans.tsv             one row per scan, in the order of the index
    slices/ab/<scan_id>   one file per scan: header, then the compressed slices one after another

A slice is float16, compressed losslessly by Blosc2 (byte shuffle, Zstandard), with a CRC-32 of its compressed bytes
that is checked at every read. One file per scan keeps writing simple and safe: it appears whole, its bytes depend
on nothing but the scan, and the index can always be rebuilt from the files.
"""

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np

from braindino.atomic import replace_file, write_json
from braindino.manifest import Scan, read_scans, write_scans

FORMAT_VERSION = 1
SLICE_SHAPE = (256, 256)
MAX_OPEN_FILES = 256

_MAGIC = b"BDSLICES"
# All 65,536 values of float16: looking them up is twice as fast as NumPy's conversion, and needs no threads as torch's.
_FLOAT_OF_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
_SLICE_RECORD = np.dtype([("slice_index", "<i4"), ("length", "<u4"), ("offset", "<u8"), ("crc32", "<u4")])
_PREFIX_BYTES = len(_MAGIC) + 8


class StoreError(ValueError):
    """A store, or a file of one, that cannot be trusted; the message names it."""


class SliceStoreWriter:
    """Adds scans to a store folder; nothing is visible to readers until :meth:`publish`.

    Several processes may add scans to the same folder, since each scan has a file of its own; one of them publishes.
    """

    def __init__(self, store_dir: str | Path, *, contract: dict[str, Any] | None = None):
        """
        Args:
            store_dir: the folder; made when it is not there.
            contract: how the slices were made (intensity, orientation, skull-strip...), JSON values; kept in
                ``store.json``.
        """
        self.store_dir = Path(store_dir)
        self.contract = contract or {}

    def add(self, scan: Scan, slices: np.ndarray, indices: Iterable[int]) -> Path:
        """Write the slices of one scan, replacing what the store held of it.

        Args:
            scan: its row; ``num_slices`` is set here.
            slices: (n, 256, 256) values within the range of float16.
            indices: (n,) positions of the slices along the axis, 0 = inferior.
        """
        positions = np.asarray(list(indices), dtype=np.int32)
        if slices.shape != (len(positions), *SLICE_SHAPE):
            raise ValueError(
                f"slices of {scan.path}: found shape {slices.shape}; expected {(len(positions), *SLICE_SHAPE)}"
            )
        half = slices.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"slices of {scan.path}: values beyond ±65504 or not finite; expected z-scores")
        chunks = [_compress(part) for part in half]
        records = np.zeros(len(chunks), dtype=_SLICE_RECORD)
        records["slice_index"] = positions
        records["length"] = [len(chunk) for chunk in chunks]
        records["crc32"] = [zlib.crc32(chunk) for chunk in chunks]
        # Time taken is no property of the slices: two runs must write the same bytes.
        row = json.dumps(asdict(replace(scan, num_slices=len(chunks), seconds=0.0)), sort_keys=True).encode()
        header_bytes = _PREFIX_BYTES + len(row) + records.nbytes
        records["offset"] = header_bytes + np.concatenate([[0], np.cumsum(records["length"].astype(np.uint64))[:-1]])
        path = self.scan_file(scan.scan_id)
        with replace_file(path) as temporary, temporary.open("wb") as handle:
            handle.write(_MAGIC)
            handle.write(np.array([len(row), len(chunks)], dtype="<u4").tobytes())
            handle.write(row)
            handle.write(records.tobytes())
            for chunk in chunks:
                handle.write(chunk)
        return path

    def scan_file(self, scan_id: str) -> Path:
        """The file that holds, or would hold, the slices of a scan."""
        return self.store_dir / "slices" / scan_id[:2] / scan_id

    def has(self, scan_id: str) -> bool:
        """Whether the store holds a finished file of this scan."""
        return self.scan_file(scan_id).exists()

    def discard(self, scan_id: str) -> None:
        """Remove a scan's slices; readers notice at the next publish."""
        self.scan_file(scan_id).unlink(missing_ok=True)

    def publish(self) -> "SliceStore":
        """Write the index over all scan files present, in the order of cohort, subject, session, sequence and name.

        The order, and so every index ``i``, depends on the scans alone, not on who finished first.
        """
        entries = [
            _read_header(path) for path in sorted(self.store_dir.glob("slices/??/*")) if not path.name.startswith(".")
        ]
        entries.sort(
            key=lambda e: (
                e.scan.cohort,
                e.scan.subject,
                e.scan.session,
                e.scan.sequence,
                Path(e.scan.path).name,
                e.scan.scan_id,
            )
        )
        records = np.concatenate([entry.records for entry in entries]) if entries else np.zeros(0, dtype=_SLICE_RECORD)
        counts = np.array([len(entry.records) for entry in entries], dtype=np.int64)
        # The fingerprint covers every compressed byte through the checksums, and which scan and position it belongs to.
        digest = hashlib.sha256()
        for entry in entries:
            digest.update(entry.scan.scan_id.encode())
            digest.update(entry.records.tobytes())
        self.store_dir.mkdir(parents=True, exist_ok=True)
        with replace_file(self.store_dir / "index.npz") as temporary, temporary.open("wb") as handle:
            np.savez(handle, records=records, counts=counts)
        write_scans(self.store_dir / "scans.tsv", [entry.scan for entry in entries])
        write_json(
            self.store_dir / "store.json",
            {
                "format": "braindino slice store",
                "version": FORMAT_VERSION,
                "slice_shape": list(SLICE_SHAPE),
                "dtype": "float16",
                "num_scans": len(entries),
                "num_slices": len(records),
                "fingerprint": digest.hexdigest(),
                "contract": self.contract,
            },
        )
        return SliceStore(self.store_dir)


class SliceStore:
    """Random access to the slices of a published store. Safe to share with forked or spawned reader processes."""

    def __init__(self, store_dir: str | Path):
        """
        Raises:
            FileNotFoundError: there is no published store in the folder.
            StoreError: the store has another format version, or its index is damaged.
        """
        self.store_dir = Path(store_dir)
        description = self.store_dir / "store.json"
        if not description.exists():
            raise FileNotFoundError(
                f"{self.store_dir}: no slice store here (no store.json); make one with `braindino prepare`"
            )
        meta = json.loads(description.read_text(encoding="utf-8"))
        if meta.get("version") != FORMAT_VERSION:
            raise StoreError(
                f"{description}: format version {meta.get('version')}; this program reads version {FORMAT_VERSION}"
            )
        self.contract: dict[str, Any] = meta["contract"]
        self.fingerprint: str = meta["fingerprint"]
        self.scans: list[Scan] = read_scans(self.store_dir / "scans.tsv")
        with np.load(self.store_dir / "index.npz") as index:
            self._records, counts = index["records"], index["counts"]
        if len(counts) != len(self.scans) or counts.sum() != len(self._records):
            raise StoreError(
                f"{self.store_dir}: index.npz and scans.tsv do not belong together; publish the store again"
            )
        #: (len,) row in ``scans`` of each slice.
        self.scan_index: np.ndarray = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._scan_ids = [scan.scan_id for scan in self.scans]
        self._files: OrderedDict[str, int] = OrderedDict()
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        """(256, 256) float32 slice ``index``; rows run from anterior, columns from the patient's right.

        Raises:
            IndexError: outside the store.
            StoreError: the bytes on disk are not those that were written; names the scan and the slice.
        """
        return np.take(_FLOAT_OF_HALF, self.read_float16(index).view(np.uint16))

    def read_float16(self, index: int) -> np.ndarray:
        """(256, 256) float16: the slice exactly as stored, for loaders that convert on the device."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"slice {index} of a store with {len(self)} slices")
        record = self._records[index]
        chunk = os.pread(
            self._open(self._scan_ids[self.scan_index[index]]), int(record["length"]), int(record["offset"])
        )
        if zlib.crc32(chunk) != record["crc32"]:
            raise StoreError(
                f"{self.store_dir}: slice {index} (position {record['slice_index']} of {self.scan_of(index).path}) "
                "is damaged on disk; prepare that scan again"
            )
        # One thread: a pool of them would be gone, and waited for, in a forked reader.
        raw = blosc2.decompress2(chunk, nthreads=1)
        return np.frombuffer(raw, dtype=np.float16).reshape(SLICE_SHAPE).copy()

    def scan_of(self, index: int) -> Scan:
        """The scan that slice ``index`` was taken from."""
        return self.scans[self.scan_index[index]]

    def position_of(self, index: int) -> int:
        """Position of slice ``index`` along the axis of its scan: 0 the lowest, 255 the highest."""
        return int(self._records["slice_index"][index])

    def verify(self) -> list[str]:
        """Read everything; the problems found, one line each naming the scan. Empty when the store is sound."""
        problems = []
        for index in range(len(self)):
            try:
                self.read_float16(index)
            except (OSError, StoreError) as error:
                problems.append(str(error))
        return problems

    def __getstate__(self) -> dict[str, Any]:
        # File descriptors belong to this process; another one opens its own.
        return {**self.__dict__, "_files": OrderedDict()}

    def _open(self, scan_id: str) -> int:
        """Descriptor of the scan's file; the most recently used ones stay open."""
        if self._owner != os.getpid():
            self._files, self._owner = OrderedDict(), os.getpid()
        descriptor = self._files.get(scan_id)
        if descriptor is not None:
            self._files.move_to_end(scan_id)
            return descriptor
        descriptor = os.open(self.store_dir / "slices" / scan_id[:2] / scan_id, os.O_RDONLY)
        self._files[scan_id] = descriptor
        if len(self._files) > MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)


class _ScanEntry(NamedTuple):
    scan: Scan
    records: np.ndarray


def _compress(half: np.ndarray) -> bytes:
    # Byte shuffle with Zstandard at its fastest: the smallest and among the fastest to read of the codecs tried on
    # z-scored MRI (benchmarks/RESULTS.md). One thread, so that the bytes do not depend on the machine.
    return blosc2.compress2(
        half.tobytes(), codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.SHUFFLE], typesize=2, nthreads=1
    )


def _read_header(path: Path) -> _ScanEntry:
    """Row and slice records at the start of a scan's file."""
    with path.open("rb") as handle:
        prefix = handle.read(_PREFIX_BYTES)
        if len(prefix) < _PREFIX_BYTES or prefix[: len(_MAGIC)] != _MAGIC:
            raise StoreError(f"{path}: not a slice file; remove it and prepare its scan again")
        row_bytes, count = np.frombuffer(prefix[len(_MAGIC) :], dtype="<u4")
        try:
            scan = Scan(**json.loads(handle.read(int(row_bytes))))
            records = np.frombuffer(handle.read(int(count) * _SLICE_RECORD.itemsize), dtype=_SLICE_RECORD)
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path}: damaged header ({error}); remove it and prepare its scan again") from error
    end = int(records["offset"][-1] + records["length"][-1]) if len(records) else _PREFIX_BYTES + int(row_bytes)
    if len(records) != count or path.stat().st_size != end:
        raise StoreError(
            f"{path}: found {path.stat().st_size} bytes, expected {end}; remove it and prepare its scan again"
        )
    return _ScanEntry(scan, records)
