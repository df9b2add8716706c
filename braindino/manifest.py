"""One row per input file: what it is, what became of it, and why. Owner of the ``scans.tsv`` format (version 2)."""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from braindino.tables import read_table, write_table
from braindino.volume import Volume, load_mask, load_volume

SEQUENCES = ("T1", "T1c", "T2", "FLAIR")
UNKNOWN_SEQUENCE = "unknown"
STATUSES = ("done", "quarantined", "skipped")


@dataclass(frozen=True)
class Scan:
    """One input file and its outcome.

    Attributes:
        path: the file, absolute.
        cohort: name of the dataset it came with.
        subject: identifier within the cohort.
        session: visit, empty when there is but one.
        sequence: ``T1``, ``T1c``, ``T2``, ``FLAIR`` or ``unknown``.
        status: ``done``, ``quarantined`` (could not be used) or ``skipped`` (not meant to be used).
        reason: why it was not used, ``code: message``; for a done scan, what was mended on the way.
        num_slices: slices that went into the store.
        seconds: time it took.
        source: what ``path`` was converted from (a DICOM series folder, an HDF5 or Analyze file), absolute; empty where
            the file is read as it came.
        content_hash: the scan's voxels, whatever the file is called and however it is stored, see
            :mod:`braindino.fingerprint`; empty where they were not read.
        appearance_hash: what its brain looks like, for finding near-duplicates; empty where there is no brain.
    """

    path: str
    cohort: str
    subject: str
    session: str = ""
    sequence: str = UNKNOWN_SEQUENCE
    status: str = "done"
    reason: str = ""
    num_slices: int = 0
    seconds: float = 0.0
    source: str = ""
    content_hash: str = ""
    appearance_hash: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status of {self.path}: found {self.status!r}; expected one of {STATUSES}")

    @property
    def subject_key(self) -> str:
        """The subject, unique over cohorts: what splits are made of."""
        return f"{self.cohort}/{self.subject}"

    @property
    def scan_id(self) -> str:
        """16 hexadecimal digits from cohort, subject, session, sequence and file name: the scan's identity.

        The folder is left out, so that a cohort moved to another disk keeps its identities and with them its
        slices. Used as a file name wherever a scan gets files of its own, so that no text from a table ever becomes
        a path.
        """
        identity = "\0".join((self.cohort, self.subject, self.session, self.sequence, Path(self.path).name))
        return hashlib.sha256(identity.encode()).hexdigest()[:16]


COLUMNS = tuple(field.name for field in fields(Scan))


def read_scans(path: str | Path) -> list[Scan]:
    """The rows of a ``scans.tsv``.

    Raises:
        ValueError: a column is missing or a number is not one; names the file and the line.
    """
    table = read_table(path, COLUMNS)
    scans = []
    for line, row in zip(table.lines, table.rows, strict=True):
        try:
            num_slices, seconds = int(row["num_slices"]), float(row["seconds"])
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}; expected numbers in num_slices and seconds") from error
        texts = {name: row[name] for name in COLUMNS if name not in ("num_slices", "seconds")}
        scans.append(Scan(**texts, num_slices=num_slices, seconds=seconds))
    return scans


def write_scans(path: str | Path, scans: list[Scan]) -> None:
    """Write ``scans.tsv`` atomically, one row per scan in the order given."""
    rows = []
    for scan in scans:
        row = [getattr(scan, name) for name in COLUMNS]
        row[COLUMNS.index("seconds")] = f"{scan.seconds:.3f}"
        # A tab or line break inside a message would need quoting, which few TSV readers expect.
        rows.append(
            [
                " ".join(cell.split()) if isinstance(cell, str) and name not in ("path", "source") else cell
                for name, cell in zip(COLUMNS, row, strict=True)
            ]
        )
    write_table(path, COLUMNS, rows)


def mask_path(prepared_dir: str | Path, scan: Scan) -> Path:
    """Where the brain mask of ``scan`` lies, on its own grid; there is one only if the scan was stripped here."""
    return Path(prepared_dir) / "masks" / f"{scan.scan_id}_mask.nii.gz"


def load_brain(prepared_dir: str | Path, scan: Scan) -> Volume:
    """The scan's volume in RAS+ with everything outside the brain set to 0: what ``transforms.standardize`` expects.

    Raises:
        VolumeError: the scan or its mask can no longer be read.
        ValueError: the mask is not on the scan's grid.
    """
    volume = load_volume(scan.path)
    path = mask_path(prepared_dir, scan)
    if not path.exists():
        return volume
    mask = load_mask(path)
    if mask.shape != volume.shape:
        raise ValueError(f"{path}: grid {mask.shape} differs from {scan.path}'s {volume.shape}; prepare the scan again")
    return Volume(np.where(mask, volume.data, np.float32(0)), volume.affine, volume.notes)
