"""``braindino audit PRETRAIN DOWNSTREAM``: was anything that is tested on pretrained on, under whatever name?"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from braindino.command_line import command_line
from braindino.fingerprint import MAX_APPEARANCE_DISTANCE, appearance_hash, content_hash
from braindino.leakage import KINDS, Crosswalk, Exposure, Overlap, find_overlaps, read_exposure
from braindino.manifest import Scan, read_scans
from braindino.progress import track
from braindino.tables import write_table
from braindino.transforms import standardize
from braindino.volume import Volume, VolumeError, load_volume

OVERLAP_COLUMNS = (
    "kind", "certainty", "distance", "cohort", "subject", "session", "sequence", "path",
    "seen_cohort", "seen_subject", "seen_session", "seen_sequence", "num_seen",
)  # fmt: skip
#: A brain fills about a fifth of its field of view; with the skull on, noise or tissue is nearly everywhere.
STRIPPED_ZERO_FRACTION = 0.4
MAX_SHOWN = 10

_SCAN_COLUMNS = ("path", "cohort", "subject", "session", "sequence", "content_hash", "appearance_hash")


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Find scans and subjects to be tested on among those that were pretrained on.

    Exit code 0: no overlap found; 3: overlap found; 1: error. What cannot be decided is printed either way.
    """

    pretrain: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PRETRAIN")]
    """Encoder or run of pretraining (with its pretrained_on.tsv), slice store, or folder of `braindino prepare`."""
    downstream: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DOWNSTREAM")]
    """Folder made by `braindino prepare`, its scans.tsv, or a .csv or .tsv with the columns path, or cohort and
    subject."""
    crosswalk: tuple[Path, ...] = ()
    """Tables that join ids, such as BraTS2021_MappingToTCIA.xlsx: ids in one row are one person's."""
    out: Path | None = None
    """Table to write, a row for each overlap."""
    json: bool = False
    """Print the result as JSON instead of text."""
    max_distance: int = MAX_APPEARANCE_DISTANCE
    """Most bits, of 512, in which two scans that look the same may differ."""


@dataclass(frozen=True)
class AuditResult:
    """What was found.

    Attributes:
        num_seen: scans that were pretrained on.
        scans: that are to be tested on.
        overlaps: as ``find_overlaps`` gives them.
        undecided: what could not be checked, and why.
    """

    num_seen: int
    scans: list[Scan]
    overlaps: list[Overlap]
    undecided: list[str]


@command_line("audit")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 without overlap, 3 with, 1 on an error."""
    result = _run(tyro.cli(Audit, args=argv, prog="braindino audit"))
    return 3 if result.overlaps else 0


def audit(
    exposure: Exposure, scans: list[Scan], crosswalk: Crosswalk, *, max_distance: int = MAX_APPEARANCE_DISTANCE
) -> AuditResult:
    """Overlaps, and what could not be checked: missing fingerprints or ids, and cohorts that no id rule joins."""
    overlaps = find_overlaps(exposure, scans, crosswalk, max_distance=max_distance)
    undecided = [f"pretraining: {text}" for text in exposure.unknown]
    for side, rows in (("pretrained on", exposure.scans), ("to test on", tuple(scans))):
        for what, missing in (
            ("no content hash: exact copies of them are not found", [row for row in rows if not row.content_hash]),
            ("no appearance hash: near-duplicates are not found", [row for row in rows if not row.appearance_hash]),
            ("no subject: ids cannot be compared", [row for row in rows if not row.subject]),
        ):
            if missing:
                undecided.append(f"{len(missing)} of {len(rows)} scans {side} have {what}")
    undecided += [f"cannot be decided by ids: {line}" for line in crosswalk.undecided(exposure.scans, scans)]
    return AuditResult(len(exposure.scans), scans, overlaps, undecided)


def read_downstream(
    path: Path, *, progress: Callable[[list[Scan]], Iterable[Scan]] = iter
) -> tuple[list[Scan], list[str]]:
    """The scans to be tested on, and what could not be read of them, a line each.

    Rows of a table with paths and without fingerprints get theirs here, from the files.

    Args:
        path: prepared folder, ``scans.tsv``, or a table with ``path``, or ``cohort`` and ``subject``.
        progress: wraps the scans whose files are read.

    Raises:
        ValueError: the table has none of these columns, or no row.
        FileNotFoundError: there is nothing at ``path``.
    """
    if path.is_dir():
        path = path / "scans.tsv"
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle, delimiter=delimiter)
        columns = list(reader.fieldnames or ())
        rows = list(reader)
    if "content_hash" in columns and "status" in columns:
        scans = [scan for scan in read_scans(path) if scan.status == "done"]
    elif "path" in columns or {"cohort", "subject"} <= set(columns):
        given = [name for name in _SCAN_COLUMNS if name in columns]
        scans = [Scan(**{"path": "", "cohort": "", "subject": ""} | {n: row[n] or "" for n in given}) for row in rows]
        scans = [replace(scan, path=str(path.parent / scan.path)) if scan.path else scan for scan in scans]
    else:
        raise ValueError(f"{path}: found columns {columns}; expected path, or cohort and subject, or both")
    if not scans:
        raise ValueError(f"{path}: no scan in it; expected one row for each scan to be tested on")

    unread = []
    fingerprinted: dict[int, Scan] = {}
    blind = {id(scan): row for row, scan in enumerate(scans) if scan.path and not scan.content_hash}
    if blind:
        for scan in progress([scans[row] for row in blind.values()]):
            try:
                fingerprinted[blind[id(scan)]] = add_fingerprints(scan)
            except (VolumeError, OSError) as error:
                unread.append(f"not read: {error}")
    return [fingerprinted.get(row, scan) for row, scan in enumerate(scans)], unread


def add_fingerprints(scan: Scan) -> Scan:
    """The row with the fingerprints of its file; no appearance where the skull is on: it is that of a brain.

    Raises:
        VolumeError: the file cannot be used. OSError: it cannot be read.
    """
    volume = load_volume(scan.path)
    looks = appearance_hash(standardize(volume).data) if _is_stripped(volume) else ""
    return replace(scan, content_hash=content_hash(volume), appearance_hash=looks)


def write_overlaps(path: Path, overlaps: Sequence[Overlap]) -> None:
    """Write a row for each overlap, atomically."""
    records = map(_record, overlaps)
    write_table(path, OVERLAP_COLUMNS, ([record[name] for name in OVERLAP_COLUMNS] for record in records))


def format_result(result: AuditResult) -> str:
    """Counts for each kind, the worst cases, and what could not be checked."""
    subjects = {_who(scan) for scan in result.scans}
    lines = [f"pretrained on {result.num_seen} scans; to test on {len(result.scans)} scans of {len(subjects)} subjects"]
    counts = Counter(overlap.kind for overlap in result.overlaps)
    lines += [f"  {kind:<26} {counts[kind]:>7} scans" for kind in KINDS]
    worst = sorted(result.overlaps, key=lambda each: (KINDS.index(each.kind), each.distance or 0))
    for overlap in worst[:MAX_SHOWN]:
        distance = f", distance {overlap.distance} of 512" if overlap.distance is not None else ""
        lines.append(
            f"{overlap.kind} ({overlap.certainty}{distance}): {_name(overlap.scan)} = {_name(overlap.seen)}"
            + (f" and {overlap.num_seen - 1} more" if overlap.num_seen > 1 else "")
        )
    if len(worst) > MAX_SHOWN:
        lines.append(f"... and {len(worst) - MAX_SHOWN} more (--out FILE writes all)")
    lines += [f"not checked: {line}" for line in result.undecided]
    touched = {_who(overlap.scan) for overlap in result.overlaps}
    lines.append(
        f"OVERLAP: {len(touched)} of {len(subjects)} subjects to test on were pretrained on"
        if touched
        else "no overlap found" + (", but see what was not checked" if result.undecided else "")
    )
    return "\n".join(lines)


def _run(config: Audit) -> AuditResult:
    exposure = read_exposure(config.pretrain)
    crosswalk = Crosswalk(config.crosswalk)
    scans, unread = read_downstream(config.downstream, progress=partial(track, desc="fingerprints"))
    result = audit(exposure, scans, crosswalk, max_distance=config.max_distance)
    result = replace(result, undecided=[*unread, *result.undecided])
    if config.out is not None:
        write_overlaps(config.out, result.overlaps)
    print(json.dumps(_as_json(result), indent=2) if config.json else format_result(result))
    return result


def _as_json(result: AuditResult) -> dict[str, object]:
    counts = Counter(overlap.kind for overlap in result.overlaps)
    return {
        "pretrained_on_scans": result.num_seen,
        "tested_on_scans": len(result.scans),
        "counts": {kind: counts[kind] for kind in KINDS},
        "overlaps": [_record(overlap) for overlap in result.overlaps],
        "not_checked": result.undecided,
    }


def _record(overlap: Overlap) -> dict[str, object]:
    scan, seen = overlap.scan, overlap.seen
    return {
        "kind": overlap.kind,
        "certainty": overlap.certainty,
        "distance": "" if overlap.distance is None else overlap.distance,
        **{name: getattr(scan, name) for name in ("cohort", "subject", "session", "sequence", "path")},
        **{f"seen_{name}": getattr(seen, name) for name in ("cohort", "subject", "session", "sequence")},
        "num_seen": overlap.num_seen,
    }


def _name(scan: Scan) -> str:
    parts = (scan.subject_key if scan.subject else "", scan.session, scan.sequence)
    return " ".join(part for part in parts if part and part != "unknown") or scan.path


def _who(scan: Scan) -> str:
    return scan.subject_key if scan.subject else scan.path


def _is_stripped(volume: Volume) -> bool:
    return bool(1 - np.count_nonzero(volume.data) / volume.data.size > STRIPPED_ZERO_FRACTION)


if __name__ == "__main__":
    raise SystemExit(main())
