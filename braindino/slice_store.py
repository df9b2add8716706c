"""Slices on disk for random reads: many volumes, one slice at a time. Owner of the store format (version 2).

A store is a folder::

    store.json                  format, slice shape, contract (how the slices were made), fingerprint; names the index
    index/<name>.slices.npy     (slices, 4) uint32: position along the axis, length, offset in its file, checksum
    index/<name>.scans.npy      per scan: its id, its first slice, the checksum of its file's header
    index/<name>.scans.tsv      one row per scan, in the order of the index
    slices/ab/<scan_id>         one file per scan: header, then the compressed slices one after another

A slice is float16, compressed losslessly by Blosc2 (byte shuffle, LZ4HC), with a CRC-32 of its compressed bytes that is
checked at every read. One file per scan keeps writing simple and safe: it appears whole, its bytes depend on nothing
but the scan, and the index can always be rebuilt from the files. Every byte of a store is under a checksum: header and
chunks of a scan's file in the file itself, the index files in ``store.json``, and ``store.json`` in its own last line.

Opening reads ``store.json`` and the ids of the scans; the records of the slices are mapped into memory, the rows of the
scans are read when they are asked for.

**Publishing while others read.** The files of an index are named by what they hold. A publish writes them beside those
of the last index, syncs them, then replaces ``store.json``: until that rename readers open the old index, afterwards
the new one, and a publish killed at any moment leaves one of the two whole. Files of other indexes are removed only
after the rename. A reader that had read the old ``store.json`` just before, and finds its files gone, reads
``store.json`` again; one that has the old index open keeps it (it is mapped). A store object belongs to one index for
life: copies of it in other processes refuse to open another one, since the same number would mean another slice.
"""

import errno
import filecmp
import hashlib
import json
import os
import shutil
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np

from braindino.atomic import replace_file, sync
from braindino.manifest import Scan, read_scans, write_scans

FORMAT_VERSION = 2
SLICE_SHAPE = (256, 256)
MAX_OPEN_FILES = 256
#: A publish of fewer scans reads all their headers within a tenth of a second and keeps no notes for the next one.
NOTES_FROM_SCANS = 1000
#: How long a reader waits for the index that ``store.json`` names (network file systems show changes late).
SECONDS_TO_OPEN = 5.0

_HEAD_BYTES = 128  # of an index file: what says how to read the rest
_FORMAT = "braindino slice store"
_DESCRIPTION = "store.json"
_MAGIC = b"BDSLICE2"
_PREFIX = np.dtype([("magic", "S8"), ("row_bytes", "<u4"), ("num_slices", "<u4"), ("crc32", "<u4")])
_SLICE_BYTES = 2 * SLICE_SHAPE[0] * SLICE_SHAPE[1]
_MAX_CHUNK_BYTES = _SLICE_BYTES + 32  # Blosc2 stores what it cannot make smaller behind its header
_POSITION, _LENGTH, _OFFSET, _CRC32 = range(4)
_SCAN_RECORD = np.dtype([("scan_id", "S16"), ("first_slice", "<u8"), ("header_crc32", "<u4")])
_NOTE = np.dtype(
    [("scan_id", "S16"), ("bytes", "<i8"), ("modified", "<i8"), ("changed", "<i8"), ("inode", "<u8"), ("row", "<i8")]
)
_PUBLISHED_ANEW = "published anew since it was opened; open it again (a run that reads it: start it again)"
# The file system has no hard links, or not for this file, or not to there.
_NO_LINKS = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
)
_INDEX_FILES = ("slices.npy", "scans.npy", "scans.tsv")
# Two changes of a file within one tick of the file system's clock have the same time.
_NANOSECONDS_OF_DOUBT = 2_000_000_000


class StoreError(ValueError):
    """A store, or a file of one, that cannot be trusted; the message names it."""


class ScanFile(NamedTuple):
    """The header of one scan's file, checked against its own checksum.

    Attributes:
        scan: the scan's row.
        records: (slices, 4) uint32: position, length, offset, CRC-32.
        crc32: of the header.
    """

    scan: Scan
    records: np.ndarray
    crc32: int


class Problem(NamedTuple):
    """Something wrong in a store.

    Attributes:
        file: relative to the store.
        scan: the path of the scan it holds, or the scan's id; empty for files of the whole store.
        message: a line that says all, the full path included.
    """

    file: str
    scan: str
    message: str


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
        positions = np.asarray(list(indices), dtype=np.uint32)
        if slices.shape != (len(positions), *SLICE_SHAPE):
            raise ValueError(
                f"slices of {scan.path}: found shape {slices.shape}; expected {(len(positions), *SLICE_SHAPE)}"
            )
        half = slices.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"slices of {scan.path}: values beyond ±65504 or not finite; expected z-scores")
        chunks = [_compress(part) for part in half]
        # Time taken is no property of the slices: two runs must write the same bytes.
        row = json.dumps(asdict(replace(scan, num_slices=len(chunks), seconds=0.0)), sort_keys=True).encode()
        records = np.zeros((len(chunks), 4), dtype="<u4")
        records[:, _POSITION] = positions
        records[:, _LENGTH] = [len(chunk) for chunk in chunks]
        records[:, _CRC32] = [zlib.crc32(chunk) for chunk in chunks]
        ends = _PREFIX.itemsize + len(row) + records.nbytes + np.cumsum(records[:, _LENGTH], dtype=np.uint64)
        records[:, _OFFSET] = ends - records[:, _LENGTH]
        prefix = np.array((_MAGIC, len(row), len(chunks), 0), dtype=_PREFIX)
        prefix["crc32"] = _header_crc32(prefix, row, records)
        path = self.scan_file(scan.scan_id)
        with replace_file(path) as temporary, temporary.open("wb") as handle:
            for part in (prefix.tobytes(), row, records.tobytes(), *chunks):
                handle.write(part)
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

    def adopt(self, source: Path, *, header_crc32: int) -> None:
        """Take over a finished scan file of another store: a hard link where the disk allows it, else a copy.

        Nothing is written where the same bytes are already. The caller syncs the folder of the link.

        Raises:
            StoreError: the file is missing, damaged, or not the one with this header.
        """
        try:
            header = read_scan_file(source, scan_id=source.name)
        except FileNotFoundError as error:
            raise StoreError(f"{source}: missing; run `braindino verify` on its store") from error
        if header.crc32 != header_crc32:
            raise StoreError(f"{source}: not the file that its store has indexed; publish that store again")
        path = self.scan_file(source.name)
        if path.exists() and (path.samefile(source) or filecmp.cmp(path, source, shallow=False)):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with replace_file(path) as copy:
                _copy(source, copy)
        else:
            temporary.replace(path)

    def publish(self) -> "SliceStore":
        """Write the index over all scan files present, in the order of cohort, subject, session, sequence and name.

        The order, and so every index ``i``, depends on the scans alone, not on who finished first. Headers of files
        that have not changed since the last publish (size, times, inode) are taken from its index; the result is the
        same.

        Raises:
            StoreError: a scan's file is damaged; names it.
        """
        started = time.time_ns()
        entries = sorted(self._entries(), key=lambda entry: (_order(entry.file.scan), entry.scan_id))
        records = np.concatenate([np.zeros((0, 4), dtype="<u4"), *(entry.file.records for entry in entries)])
        scans = np.zeros(len(entries), dtype=_SCAN_RECORD)
        scans["scan_id"] = [entry.scan_id.encode() for entry in entries]
        scans["first_slice"][1:] = np.cumsum([len(entry.file.records) for entry in entries], dtype=np.uint64)[:-1]
        scans["header_crc32"] = [entry.file.crc32 for entry in entries]
        index_dir = self.store_dir / "index"
        index_dir.mkdir(parents=True, exist_ok=True)
        unnamed = {name: index_dir / f".new.{name}" for name in _INDEX_FILES}
        for name, array in (("slices.npy", records), ("scans.npy", scans)):
            with replace_file(unnamed[name]) as temporary, temporary.open("wb") as handle:
                np.save(handle, array)
        write_scans(unnamed["scans.tsv"], [entry.file.scan for entry in entries])
        digest, files = hashlib.sha256(), {}
        for name, path in unnamed.items():
            content = path.read_bytes()
            files[name] = {
                "bytes": len(content),
                "crc32": f"{zlib.crc32(content):08x}",
                "head_crc32": f"{zlib.crc32(content[:_HEAD_BYTES]):08x}",
            }
            digest.update(content)
        index_name = digest.hexdigest()[:16]
        for name, path in unnamed.items():
            path.replace(index_dir / f"{index_name}.{name}")
        sync(index_dir)
        # The fingerprint covers every compressed byte through the checksums, and which scan and position it belongs to.
        fingerprint = hashlib.sha256()
        for entry in entries:
            fingerprint.update(entry.scan_id.encode())
            fingerprint.update(entry.file.records.tobytes())
        _write_description(
            self.store_dir / _DESCRIPTION,
            {
                "format": _FORMAT,
                "version": FORMAT_VERSION,
                "slice_shape": list(SLICE_SHAPE),
                "dtype": "float16",
                "num_scans": len(entries),
                "num_slices": len(records),
                "fingerprint": fingerprint.hexdigest(),
                "contract": self.contract,
                "index": {"name": index_name, "files": files},
            },
        )
        self._write_notes(index_name, entries, started)
        others = [path for path in index_dir.iterdir() if not path.name.lstrip(".").startswith(index_name)]
        for path in (*others, *self.store_dir.glob(".tmp-*")):  # the latter of killed publishes
            path.unlink(missing_ok=True)
        return SliceStore(self.store_dir)

    def _entries(self) -> Iterator["_Entry"]:
        """Every scan file present, its header read or, where it has not changed, remembered."""
        last, notes = self._last_index()
        for path, status in scan_files(self.store_dir):
            seen = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            row = notes.get((path.name, *seen))
            if last is None or row is None:
                yield _Entry(path.name, seen, read_scan_file(path, scan_id=path.name))
            else:
                file = ScanFile(last.scans[row], last.records_of_scan(row), int(last.header_crc32[row]))
                yield _Entry(path.name, seen, file)

    def _last_index(self) -> tuple["SliceStore | None", dict[tuple[str, int, int, int, int], int]]:
        """The published index and the rows in it of files as they were then; (None, {}) where nothing can be reused."""
        try:
            last = SliceStore(self.store_dir)
            path = self.store_dir / "index" / f".{last.index_name}.notes"
            if not path.exists() or last.check_index():
                return None, {}
            raw = path.read_bytes()
        except (OSError, ValueError):  # no store yet, an older or damaged one: the scan files are all that is needed
            return None, {}
        if zlib.crc32(raw[4:]) != int.from_bytes(raw[:4], "little"):
            return None, {}
        notes = np.frombuffer(raw[4:], dtype=_NOTE).tolist()
        return last, {(scan_id.decode(), *seen): row for scan_id, *seen, row in notes}

    def _write_notes(self, index_name: str, entries: Sequence["_Entry"], started: int) -> None:
        """Remember how the files looked when their headers were read, for the next publish."""
        path = self.store_dir / "index" / f".{index_name}.notes"
        path.unlink(missing_ok=True)
        if len(entries) < NOTES_FROM_SCANS:
            return
        notes = [
            (entry.scan_id.encode(), *entry.seen, row)
            for row, entry in enumerate(entries)
            if entry.seen[2] < started - _NANOSECONDS_OF_DOUBT
        ]
        content = np.array(notes, dtype=_NOTE).tobytes()
        with replace_file(path) as temporary:
            temporary.write_bytes(zlib.crc32(content).to_bytes(4, "little") + content)


class SliceStore:
    """Random access to the slices of a published store.

    Safe to share with forked or spawned reader processes and with threads.
    """

    def __init__(self, store_dir: str | Path):
        """
        Raises:
            FileNotFoundError: there is no published store in the folder.
            StoreError: the store has another format version, or its index is damaged.
        """
        self._open_index(Path(store_dir), None)

    def _open_index(self, store_dir: Path, index_name: str | None) -> None:
        """Open the published index, or only the named one."""
        self.store_dir = store_dir
        deadline = time.monotonic() + SECONDS_TO_OPEN
        while True:
            meta = read_description(store_dir)
            name = meta["index"]["name"]
            if index_name not in (None, name):
                raise StoreError(f"{store_dir}: {_PUBLISHED_ANEW}")
            try:
                scans = self._load(meta, "scans.npy")
                records = self._load(meta, "slices.npy", mapped=True)
                break
            except FileNotFoundError as error:
                # Either another process published between our two looks, or the index is really gone.
                if time.monotonic() > deadline:
                    raise StoreError(f"{error.filename}: missing, but store.json names it; publish again") from error
                if read_description(store_dir)["index"]["name"] == name:
                    time.sleep(0.05)
        if scans.dtype != _SCAN_RECORD or records.shape != (meta["num_slices"], 4) or records.dtype != "<u4":
            raise StoreError(f"{store_dir}: index {name} is not as store.json describes it; publish the store again")
        self.contract: dict[str, Any] = meta["contract"]
        self.fingerprint: str = meta["fingerprint"]
        self.index_name: str = name
        #: Rows of ``scans``.
        self.num_scans = len(scans)
        #: (num_scans,) CRC-32 of the header of each scan's file.
        self.header_crc32: np.ndarray = scans["header_crc32"]
        self._meta = meta
        self._records = records
        self._ids = scans["scan_id"]
        # A memoryview gives Python's own numbers without a list of them all, and bisect knows how to search it.
        self._first = scans["first_slice"].astype(np.int64).data
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        """(256, 256) float32 slice ``index``; rows run from anterior, columns from the patient's right.

        Raises:
            IndexError: outside the store.
            StoreError: the bytes on disk are not those that were written; names the scan and the slice.
        """
        return _float32(self.read_float16(index))

    def read_float16(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """(256, 256) float16: the slice exactly as stored, for loaders that convert on the device.

        Args:
            index: which slice.
            out: (256, 256) float16, C-contiguous, filled and returned instead of a new array: a place in a batch.
        """
        index = self._checked(index)
        row = self._row_of(index)
        position, length, offset, crc32 = self._records[index].tolist()
        if length > _MAX_CHUNK_BYTES:
            raise self._damage(index, row, position)
        file = self._file(row)  # held until it is read, or another thread might close it
        chunk = os.pread(file.descriptor, length, offset)
        # The second number of the chunk's own header is its size when unpacked.
        if zlib.crc32(chunk) != crc32 or int.from_bytes(chunk[4:8], "little") != _SLICE_BYTES:
            raise self._damage(index, row, position)
        half = np.empty(SLICE_SHAPE, dtype=np.float16) if out is None else out
        if half.nbytes != _SLICE_BYTES or half.dtype != np.float16 or not half.flags.c_contiguous:
            raise ValueError(f"out: found {half.dtype} {half.shape}; expected contiguous float16 {SLICE_SHAPE}")
        try:
            # One thread: a pool of them would be gone, and waited for, in a forked reader.
            blosc2.decompress2(chunk, half, nthreads=1)
        except (RuntimeError, ValueError) as error:
            raise self._damage(index, row, position) from error
        return half

    def scan_of(self, index: int) -> Scan:
        """The scan that slice ``index`` was taken from."""
        return self.scans[self._row_of(self._checked(index))]

    def position_of(self, index: int) -> int:
        """Position of slice ``index`` along the axis of its scan: 0 the lowest, 255 the highest."""
        return int(self._records[self._checked(index), _POSITION])

    @cached_property
    def scans(self) -> list[Scan]:
        """One row per scan, in the order of the index; read from the disk at first use.

        Raises:
            StoreError: the table is damaged.
        """
        try:
            scans = read_scans(self._index_file(self._meta, "scans.tsv", checked=True))
        except FileNotFoundError as error:
            raise self._gone() or StoreError(f"{error.filename}: missing; publish the store again") from error
        if len(scans) != self.num_scans:
            raise StoreError(
                f"{self.store_dir}: scans.tsv has {len(scans)} rows, the index {self.num_scans}; publish the store "
                "again"
            )
        return scans

    @cached_property
    def scan_ids(self) -> list[str]:
        """``scan_id`` of each scan, in the order of the index."""
        return [scan_id.decode() for scan_id in self._ids.tolist()]

    @cached_property
    def scan_index(self) -> np.ndarray:
        """(len,) int32 row in ``scans`` of each slice; made at first use."""
        return np.repeat(np.arange(self.num_scans, dtype=np.int32), self.slices_per_scan)

    @property
    def slices_per_scan(self) -> np.ndarray:
        """(num_scans,) number of slices of each scan."""
        return np.diff(np.array([*self._first, len(self)], dtype=np.int64))

    def records_of_scan(self, row: int) -> np.ndarray:
        """(slices, 4) uint32 records of scan ``row``: position, length, offset, CRC-32."""
        last = self._first[row + 1] if row + 1 < self.num_scans else len(self)
        return self._records[self._first[row] : last]

    def scan_path(self, row: int) -> Path:
        """The file that holds the slices of scan ``row``."""
        scan_id = self._ids[row].decode()
        return self.store_dir / "slices" / scan_id[:2] / scan_id

    def check_index(self) -> list["Problem"]:
        """Read the index files whole; what is wrong with them."""
        problems = []
        for name in _INDEX_FILES:
            try:
                self._index_file(self._meta, name, checked=True)
            except (OSError, StoreError) as error:
                problems.append(Problem(f"index/{self.index_name}.{name}", "", str(error)))
        return problems

    def check_scan(self, row: int, *, deep: bool = True) -> list["Problem"]:
        """What is wrong with the file of scan ``row``; ``deep`` reads its slices, too."""
        path, name = self.scan_path(row), self._name(row)
        # The file's own header counts: with a damaged index it still says what should be there.
        file, problems = check_scan_file(path, deep=deep)
        if file is None:
            return [problem._replace(scan=name, message=f"{problem.message} ({name})") for problem in problems]
        if file.crc32 != self.header_crc32[row] or not np.array_equal(file.records, self.records_of_scan(row)):
            message = f"{path}: not the file that was indexed ({file.scan.path}); publish the store again"
            problems.insert(0, Problem(_relative(path), file.scan.path, message))
        return problems

    def verify(self, *, deep: bool = True) -> list[str]:
        """Read everything (or, not ``deep``, all but the slices); what was found wrong, one line each naming the scan.

        Empty when the store is sound.
        """
        problems = self.check_index()
        for row in range(self.num_scans):
            problems += self.check_scan(row, deep=deep)
        return [problem.message for problem in problems]

    def __getstate__(self) -> dict[str, Any]:
        # Mapped and open files belong to this process; another one opens its own, of the same index.
        return {"store_dir": self.store_dir, "index_name": self.index_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open_index(state["store_dir"], state["index_name"])

    def _load(self, meta: dict[str, Any], name: str, *, mapped: bool = False) -> np.ndarray:
        path = self._index_file(meta, name, checked=not mapped)
        # As a plain array: a numpy.memmap answers each access several times slower.
        return np.asarray(np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False))

    def _index_file(self, meta: dict[str, Any], name: str, *, checked: bool) -> Path:
        """Path of a file of the index, of the right size and beginning and, when ``checked``, content."""
        path = self.store_dir / "index" / f"{meta['index']['name']}.{name}"
        expected = meta["index"]["files"][name]
        found = path.stat().st_size
        if found != expected["bytes"]:
            raise StoreError(f"{path}: found {found} bytes, expected {expected['bytes']}; publish the store again")
        with path.open("rb") as handle:
            content = handle.read(-1 if checked else _HEAD_BYTES)
        if f"{zlib.crc32(content):08x}" != expected["crc32" if checked else "head_crc32"]:
            raise StoreError(f"{path}: damaged, its checksum differs from that in store.json; publish the store again")
        return path

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"slice {index} of a store with {len(self)} slices")
        return index % len(self)

    def _row_of(self, index: int) -> int:
        return bisect_right(self._first, index) - 1

    def _name(self, row: int) -> str:
        """The scan's path; its id where the table of scans cannot be read."""
        try:
            return self.scans[row].path
        except (OSError, ValueError):
            return f"scan {self._ids[row].decode()}"

    def _gone(self) -> StoreError | None:
        """The error to raise when another index was published since this one was opened."""
        if read_description(self.store_dir)["index"]["name"] == self.index_name:
            return None
        return StoreError(f"{self.store_dir}: {_PUBLISHED_ANEW}")

    def _damage(self, index: int, row: int, position: int) -> StoreError:
        return self._gone() or StoreError(
            f"{self.store_dir}: slice {index} (position {position} of {self._name(row)}) "
            "is damaged on disk; prepare that scan again"
        )

    def _file(self, row: int) -> "_OpenFile":
        """The scan's file; the most recently used ones stay open."""
        file = self._files.get(row)
        if file is None:
            try:
                file = _OpenFile(self.scan_path(row))
            except FileNotFoundError as error:
                raise self._gone() or StoreError(
                    f"{self.scan_path(row)}: missing ({self._name(row)}); prepare that scan again"
                ) from error
            self._files[row] = file
            while len(self._files) > MAX_OPEN_FILES:
                with suppress(KeyError):  # another thread was quicker
                    self._files.popitem(last=False)
        else:
            try:  # not contextlib.suppress, which takes longer than all else here
                self._files.move_to_end(row)
            except KeyError:  # another thread has dropped it meanwhile; it is still open here
                self._files[row] = file
        return file


def read_description(store_dir: str | Path) -> dict[str, Any]:
    """What ``store.json`` says.

    Raises:
        FileNotFoundError: there is no published store in the folder.
        StoreError: it is damaged, or of another format version.
    """
    path = Path(store_dir) / _DESCRIPTION
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{store_dir}: no slice store here (no store.json); make one with `braindino prepare`"
        ) from None
    damaged = StoreError(f"{path}: damaged; publish the store again (`braindino prepare` does, from the scans' files)")
    try:
        meta = json.loads(content)
        version = meta.get("version")
    except (ValueError, AttributeError) as error:
        raise damaged from error
    if version == FORMAT_VERSION and content != _description(
        {key: value for key, value in meta.items() if key != "crc32"}
    ):
        raise damaged
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path}: format version {version}; this program reads version {FORMAT_VERSION}; prepare the store again"
        )
    if meta["slice_shape"] != list(SLICE_SHAPE) or meta["dtype"] != "float16":
        raise StoreError(
            f"{path}: slices of {meta['dtype']} {meta['slice_shape']}; this program reads float16 {list(SLICE_SHAPE)}"
        )
    return meta


def scan_files(store_dir: str | Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The scan files of a store, published or not, with their status; sorted by name."""
    slices_dir = Path(store_dir) / "slices"
    if not slices_dir.is_dir():
        return
    for folder in sorted(slices_dir.iterdir()):
        if folder.is_dir():
            with os.scandir(folder) as found:
                for entry in sorted(found, key=lambda entry: entry.name):
                    if not entry.name.startswith("."):
                        yield folder / entry.name, entry.stat()


def read_scan_file(path: Path, *, scan_id: str | None = None) -> ScanFile:
    """Header of a scan's file, checked.

    Args:
        path: the file.
        scan_id: the scan it must be of.

    Raises:
        StoreError: it is no such file, is damaged, or of another length than its header says; names it.
    """
    again = "remove it and prepare its scan again"
    with path.open("rb") as handle:
        raw = handle.read(_PREFIX.itemsize)
        size = os.fstat(handle.fileno()).st_size
        if len(raw) < _PREFIX.itemsize or raw[: len(_MAGIC)] != _MAGIC:
            raise StoreError(f"{path}: not a slice file of format version {FORMAT_VERSION}; {again}")
        prefix = np.frombuffer(raw, dtype=_PREFIX)[0]
        row_bytes, count = int(prefix["row_bytes"]), int(prefix["num_slices"])
        header_bytes = _PREFIX.itemsize + row_bytes + 16 * count
        if header_bytes > size:
            raise StoreError(f"{path}: found {size} bytes, expected a header of {header_bytes}; {again}")
        row = handle.read(row_bytes)
        records = np.frombuffer(handle.read(16 * count), dtype="<u4").reshape(-1, 4)
    if _header_crc32(prefix, row, records) != prefix["crc32"]:
        raise StoreError(f"{path}: damaged header; {again}")
    end = header_bytes + int(records[:, _LENGTH].sum(dtype=np.uint64))
    if size != end:
        raise StoreError(f"{path}: found {size} bytes, expected {end}; {again}")
    try:
        scan = Scan(**json.loads(row))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path}: its scan's row cannot be read ({error}); {again}") from error
    if scan_id is not None and scan.scan_id != scan_id:
        raise StoreError(f"{path}: holds scan {scan.scan_id} ({scan.path}), expected {scan_id}; {again}")
    return ScanFile(scan, records, int(prefix["crc32"]))


def check_scan_file(path: Path, *, deep: bool) -> tuple[ScanFile | None, list[Problem]]:
    """A scan's file, None when its header cannot be trusted, and what is wrong with it; ``deep`` reads its slices."""
    try:
        file = read_scan_file(path, scan_id=path.name)
        content = path.read_bytes() if deep else b""
    except FileNotFoundError:
        message = f"{path}: missing; prepare that scan again"
        return None, [Problem(_relative(path), "", message)]
    except (OSError, StoreError) as error:
        return None, [Problem(_relative(path), "", str(error))]
    problems = []
    for position, length, offset, crc32 in file.records.tolist() if deep else ():
        if zlib.crc32(memoryview(content)[offset : offset + length]) != crc32:
            message = f"{path}: slice at position {position} of {file.scan.path} is damaged; prepare that scan again"
            problems.append(Problem(_relative(path), file.scan.path, message))
    return file, problems


class _Entry(NamedTuple):
    """A scan's file as publish sees it: ``seen`` is its size, time of modification, time of change and inode."""

    scan_id: str
    seen: tuple[int, int, int, int]
    file: ScanFile


class _OpenFile:
    """A descriptor that is closed when nobody uses it any more, in this process or a forked one."""

    __slots__ = ("descriptor",)

    def __init__(self, path: Path):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _relative(path: Path) -> str:
    return f"slices/{path.parent.name}/{path.name}"


def _order(scan: Scan) -> tuple[str, ...]:
    # White space as scans.tsv has it, so that rows remembered from there sort as those from the files.
    texts = (scan.cohort, scan.subject, scan.session, scan.sequence)
    return (*(" ".join(text.split()) for text in texts), Path(scan.path).name)


def _copy(source: Path, target: Path) -> None:
    """Copy a file; file systems that can share its blocks between both do."""
    with source.open("rb") as read, target.open("wb") as write:
        try:
            while os.copy_file_range(read.fileno(), write.fileno(), 2**30):
                pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            read.seek(0)
            write.seek(0)
            shutil.copyfileobj(read, write, 2**20)


def _compress(half: np.ndarray) -> bytes:
    # Unpacked three times as fast as Zstandard, hardly larger: the best of the codecs tried on z-scored MRI
    # (benchmarks/RESULTS.md). One thread, so that the bytes do not depend on the machine.
    return blosc2.compress2(
        half.tobytes(), codec=blosc2.Codec.LZ4HC, clevel=5, filters=[blosc2.Filter.SHUFFLE], typesize=2, nthreads=1
    )


def _float32(half: np.ndarray) -> np.ndarray:
    """Exactly ``half.astype(np.float32)`` for finite values, seven times as fast as NumPy and without torch's threads.

    The bits of a float16 moved to their places in a float32, whose exponent is then too small by 112. (In a thread that
    has told the processor to flush denormals, values below 6e-5 become 0.)
    """
    bits = half.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70000001)  # the sign was smeared over three bits of the exponent
    single = bits.view(np.float32)
    single *= np.float32(2.0**112)
    return single


def _header_crc32(prefix: np.ndarray | np.void, row: bytes, records: np.ndarray) -> int:
    sizes = np.array([prefix["row_bytes"], prefix["num_slices"]], dtype="<u4")
    return zlib.crc32(records.tobytes(), zlib.crc32(row, zlib.crc32(sizes.tobytes())))


def _description(meta: dict[str, Any]) -> bytes:
    """``store.json``: its last entry is the checksum of all before it, so that a change of any byte is noticed."""
    body = json.dumps(meta, indent=2, ensure_ascii=False).encode().removesuffix(b"\n}") + b",\n"
    return body + f'  "crc32": "{zlib.crc32(body):08x}"\n}}\n'.encode()


def _write_description(path: Path, meta: dict[str, Any]) -> None:
    with replace_file(path) as temporary:
        temporary.write_bytes(_description(meta))
