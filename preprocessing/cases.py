"""The state of a prepared folder, one small file per input: what was made of it, from which bytes, with which settings.

A case file is the last thing written for a scan, so whatever is named in one is finished. Owner of ``cases/*.json``
(version 1).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from braindino.atomic import write_json
from braindino.manifest import Scan, mask_path, write_scans
from braindino.slice_store import SliceStoreWriter

CASE_VERSION = 1
# Outcomes that another try may change: they lie in the machine, not in the scan.
TRANSIENT_CODES = ("worker_died", "failed")

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Case:
    """One input file, what became of it, and what that depends on.

    Attributes:
        scan: its row of ``scans.tsv``.
        content: SHA-256 of the input's bytes; empty where they were not read.
        settings: fingerprint of the settings and the code that made the outcome.
        brain_ml: volume of the brain mask made here, in ml; None where none was made.
    """

    scan: Scan
    content: str = ""
    settings: str = ""
    brain_ml: float | None = None

    @property
    def name(self) -> str:
        """File name, without suffix: the scan's identity; files that are left have no identity but their path."""
        if self.scan.status == "skipped":
            return "skipped_" + hashlib.sha256(self.scan.path.encode()).hexdigest()[:16]
        return self.scan.scan_id


class CaseFolder:
    """The cases of a prepared folder and the files that belong to them."""

    def __init__(self, out_dir: Path):
        """Reads all cases of ``out_dir``; an unreadable case counts as missing, so its scan is prepared again."""
        self.out_dir = out_dir
        self.store = SliceStoreWriter(out_dir / "store")
        self._cases: dict[str, Case] = {}
        for path in sorted((out_dir / "cases").glob("*.json")):
            case = _read(path)
            if case is not None:
                self._cases[case.scan.path] = case

    def __iter__(self) -> Iterator[Case]:
        return iter(self._cases.values())

    def of(self, path: str) -> Case | None:
        """The case of an input file, if it has one."""
        return self._cases.get(path)

    def is_current(self, scan: Scan, *, settings: str) -> bool:
        """Whether ``scan`` needs no work: same row, same bytes, same settings, and its files are there."""
        case = self.of(scan.path)
        if case is None or case.scan.scan_id != scan.scan_id or case.settings != settings:
            return False
        status, code = case.scan.status, case.scan.reason.partition(":")[0]
        if status == "skipped" or (status == "quarantined" and code in TRANSIENT_CODES):
            return False
        if status == "done" and not self.store.has(scan.scan_id):
            return False
        if case.brain_ml is not None and not mask_path(self.out_dir, scan).exists():
            return False
        try:
            return case.content == content_hash(Path(scan.path))
        except OSError:
            return False

    def record(self, case: Case) -> None:
        """Take note of a case whose file :func:`write_case` has written already."""
        self._cases[case.scan.path] = case

    def forget(self, case: Case) -> None:
        """Remove what was made of an input: its row, its slices, its mask."""
        remove_case(self.out_dir, case)
        self._cases.pop(case.scan.path, None)

    def same_identity(self, scan: Scan) -> Case | None:
        """The case of another file that has the identity of ``scan``."""
        path = case_path(self.out_dir, scan.scan_id)
        case = _read(path) if path.exists() else None
        return case if case is not None and case.scan.path != scan.path else None

    def rows(self) -> list[Scan]:
        """All rows, ordered by cohort, subject, session, sequence, path."""
        return sorted((case.scan for case in self._cases.values()), key=row_order)

    def write_table(self) -> None:
        """Write ``scans.tsv``."""
        write_scans(self.out_dir / "scans.tsv", self.rows())


def row_order(scan: Scan) -> tuple[str, ...]:
    """Sort key of rows."""
    return scan.cohort, scan.subject, scan.session, scan.sequence, scan.path


def case_path(out_dir: Path, name: str) -> Path:
    """Where the case of that name lies."""
    return out_dir / "cases" / f"{name}.json"


def write_case(out_dir: Path, case: Case) -> None:
    """Write a case atomically; from then on its outcome stands."""
    write_json(case_path(out_dir, case.name), {"version": CASE_VERSION, **asdict(case)})


def remove_case(out_dir: Path, case: Case) -> None:
    """Remove a case and what belongs to it; the case file first: a half-removed one must not look finished."""
    case_path(out_dir, case.name).unlink(missing_ok=True)
    if case.scan.status != "skipped":
        SliceStoreWriter(out_dir / "store").discard(case.scan.scan_id)
        mask_path(out_dir, case.scan).unlink(missing_ok=True)


def content_hash(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def settings_hash(parts: Iterable[tuple[str, object]]) -> str:
    """16 digits that change with any of the named settings."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> Case | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("version") != CASE_VERSION:
            return None
        return Case(**{**record, "scan": Scan(**record["scan"])})
    except (ValueError, TypeError, KeyError):
        return None
