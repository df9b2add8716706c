"""The state of a prepared folder, one small file per input: what was made of it, from which bytes, with which settings.

A case file is the last thing written for a scan, so whatever is named in one is finished. Owner of
``cases/<2 digits>/<name>.json`` (version 2).

An input whose size and time of change are those of its case is taken as unchanged, as git and make do; otherwise its
bytes decide. Work has three stages, each with a key of everything it depends on besides the bytes: ``convert``
(DICOM and others to NIfTI), ``strip`` (the brain mask) and ``slices``. A stage is done again when its own key or
that of a stage before it has changed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from braindino.atomic import write_json
from braindino.file_digest import file_digest
from braindino.manifest import Scan, mask_path, write_scans
from braindino.preprocessing.conversion import Conversion, source_files
from braindino.preprocessing.discovery import Candidate
from braindino.scan_quality import ScanQuality, write_quality
from braindino.slice_store import SliceStoreWriter
from braindino.volume import VolumeError

CASE_VERSION = 2
STAGES = ("convert", "strip", "slices")
# Outcomes that another try may change: they lie in the machine, not in the scan.
TRANSIENT_CODES = ("worker_died", "failed")
DUPLICATE = "duplicate"


class InputState(NamedTuple):
    """How the files of an input look without reading them."""

    num_bytes: int
    mtime_ns: int
    """Of the file changed last."""


@dataclass(frozen=True)
class Case:
    """One input, what became of it, and what that depends on.

    Attributes:
        scan: its row of ``scans.tsv``.
        state: its size and time of change; None where it could not be looked at.
        file_hash: SHA-256 of its bytes; empty where they were not read.
        keys: stage -> key of the settings and the code that made its result.
        conversion_notes: what was mended or assumed when ``scan.path`` was made.
        quality: what was measured on it; None where it could not be read.
    """

    scan: Scan
    state: InputState | None = None
    file_hash: str = ""
    keys: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(STAGES, ""))
    conversion_notes: tuple[str, ...] = ()
    quality: ScanQuality | None = None

    @property
    def name(self) -> str:
        """File name, without suffix: the scan's identity; inputs that are left have no identity but their path."""
        if self.scan.status == "skipped":
            return "skipped_" + hashlib.sha256(input_path(self.scan).encode()).hexdigest()[:16]
        return self.scan.scan_id

    @property
    def code(self) -> str:
        """The reason code of a scan that was not used."""
        return self.scan.reason.partition(":")[0]


class CaseFolder:
    """The cases of a prepared folder and the files that belong to them."""

    def __init__(self, out_dir: Path):
        """Reads all cases of ``out_dir``; an unreadable case counts as missing, so its scan is prepared again."""
        self.out_dir = out_dir
        self.store = SliceStoreWriter(out_dir / "store")
        self._cases: dict[str, Case] = {}
        for path in sorted((out_dir / "cases").glob("*/*.json")):
            case = _read(path)
            if case is not None:
                self._cases[input_path(case.scan)] = case

    def __iter__(self) -> Iterator[Case]:
        return iter(self._cases.values())

    def __len__(self) -> int:
        return len(self._cases)

    def of(self, scan: Scan) -> Case | None:
        """The case of an input, if it has one."""
        return self._cases.get(input_path(scan))

    def is_current(
        self, candidate: Candidate, keys: Mapping[str, str], *, recheck: bool = False, remember: bool = True
    ) -> bool:
        """Whether an input needs no work: same row, same bytes, same keys, and its files are there.

        Args:
            candidate: the input.
            keys: stage -> key under today's settings.
            recheck: read the bytes even where size and time of change are the same.
            remember: whether a time of change that means nothing is written down, to spare the reading next time.
        """
        scan = candidate.scan
        case = self.of(scan)
        if case is None or case.scan.scan_id != scan.scan_id or dict(case.keys) != dict(keys):
            return False
        if case.scan.status == "skipped" or case.code in TRANSIENT_CODES:
            return False
        if case.scan.status == "done" and not self.store.has(scan.scan_id):
            return False
        if needs_mask(case) and not mask_path(self.out_dir, scan).exists():
            return False
        if candidate.conversion is not None and case.scan.status == "done" and not Path(scan.path).exists():
            return False
        try:
            files = input_files(scan, candidate.conversion)
            state = input_state(files)
            if state == case.state and not recheck:
                return True
            if file_digest(*files) != case.file_hash:
                return False
        except (OSError, VolumeError):
            return False
        if remember and state != case.state:
            touched = replace(case, state=state)
            write_case(self.out_dir, touched)
            self.record(touched)
        return True

    def record(self, case: Case) -> None:
        """Take note of a case whose file :func:`write_case` has written already."""
        self._cases[input_path(case.scan)] = case

    def forget(self, case: Case) -> None:
        """Remove what was made of an input: its row, its slices, its mask."""
        remove_case(self.out_dir, case)
        self._cases.pop(input_path(case.scan), None)

    def same_identity(self, scan: Scan) -> Case | None:
        """The case of another input that has the identity of ``scan``."""
        case = read_case(self.out_dir, scan.scan_id)
        return case if case is not None and input_path(case.scan) != input_path(scan) else None

    def rows(self) -> list[Scan]:
        """All rows, ordered by cohort, subject, session, sequence, path."""
        return sorted((case.scan for case in self), key=row_order)

    def write_tables(self) -> None:
        """Write ``scans.tsv`` and ``quality.tsv``."""
        ordered = sorted(self, key=lambda case: row_order(case.scan))
        write_scans(self.out_dir / "scans.tsv", [case.scan for case in ordered])
        write_quality(self.out_dir / "quality.tsv", [case.quality for case in ordered if case.quality is not None])


def row_order(scan: Scan) -> tuple[str, ...]:
    """Sort key of rows."""
    return scan.cohort, scan.subject, scan.session, scan.sequence, scan.path


def input_path(scan: Scan) -> str:
    """The file or folder that the user gave, from which ``scan.path`` may have been converted."""
    return scan.source or scan.path


def needs_mask(case: Case) -> bool:
    """Whether a brain mask was made here and belongs to the case's result."""
    return case.scan.status == "done" and case.quality is not None and case.quality.brain_ml is not None


def case_path(out_dir: Path, name: str) -> Path:
    """Where the case of that name lies; the folders keep each listing short."""
    return out_dir / "cases" / name[-2:] / f"{name}.json"


def quarantined_mask_path(out_dir: Path, scan: Scan) -> Path:
    """Where the brain mask of a scan lies that the quality gate stopped, for looking at and for accepting it."""
    return out_dir / "quarantine" / f"{scan.scan_id}_mask.nii.gz"


def picture_path(out_dir: Path, scan: Scan) -> Path:
    """Where the picture of a quarantined scan lies."""
    return out_dir / "quarantine" / f"{scan.scan_id}.png"


def write_case(out_dir: Path, case: Case) -> None:
    """Write a case atomically; from then on its outcome stands."""
    write_json(case_path(out_dir, case.name), {"version": CASE_VERSION, **asdict(case)})


def read_case(out_dir: Path, name: str) -> Case | None:
    """The case of that name; None when there is none, or none that can be read."""
    return _read(case_path(out_dir, name))


def remove_case(out_dir: Path, case: Case, *, keep_mask: bool = False) -> None:
    """Remove a case and what belongs to it; the case file first: a half-removed one must not look finished."""
    case_path(out_dir, case.name).unlink(missing_ok=True)
    if case.scan.status == "skipped":
        return
    SliceStoreWriter(out_dir / "store").discard(case.scan.scan_id)
    picture_path(out_dir, case.scan).unlink(missing_ok=True)
    if not keep_mask:
        mask_path(out_dir, case.scan).unlink(missing_ok=True)
        quarantined_mask_path(out_dir, case.scan).unlink(missing_ok=True)


def input_files(scan: Scan, conversion: Conversion | None) -> list[Path]:
    """All files that an input consists of, in a fixed order.

    Raises:
        OSError: the folder of a series cannot be listed.
        VolumeError: a series has no files.
    """
    path = Path(input_path(scan))
    if conversion is None:
        return [path]
    # A missing part (a header, say) is for the conversion to name.
    return [file for file in source_files(conversion, path) if file.exists()]


def input_state(files: Iterable[Path]) -> InputState:
    """Size and time of change of all files together.

    Raises:
        OSError: one of them is not there.
    """
    stats = [path.stat() for path in files]
    return InputState(sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0))


def key_of(*parts: object) -> str:
    """16 digits that change with any of the parts (values that JSON knows)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> Case | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("version") != CASE_VERSION:
            return None
        state, quality = record["state"], record["quality"]
        return Case(
            **record
            | {
                "scan": Scan(**record["scan"]),
                "conversion_notes": tuple(record["conversion_notes"]),
                "state": None if state is None else InputState(*state),
                "quality": None if quality is None else ScanQuality(**quality),
            }
        )
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        return None
