"""Targets of subjects and sessions from label tables: BIDS folders and plain TSV or CSV files."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from braindino.manifest import Scan

MISSING = ("", "n/a", "na", "nan")
SUBJECT_COLUMNS = ("subject", "participant_id")
SESSION_COLUMNS = ("session", "session_id")


class NoColumnError(ValueError):
    """No label table has the column that was asked for."""


class LabelKey(NamedTuple):
    """Whom a label is about; an empty cohort or session means any."""

    cohort: str
    subject: str
    session: str


class Label(NamedTuple):
    """A cell of a label table, with its place for messages."""

    text: str
    place: str


def number_of(text: str) -> float:
    """The number that a cell holds; NaN where it holds none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_labels(sources: Sequence[Path], column: str) -> dict[LabelKey, Label]:
    """Return the cells of ``column``, missing ones (empty, n/a, nan) left out.

    A source is a BIDS folder (``participants.tsv``, and the sessions tables of its subjects, which go before it),
    or a ``.tsv`` or ``.csv`` file with a column ``subject`` or ``participant_id``, the target, and where needed
    ``session`` or ``session_id`` and ``cohort``. Prefixes ``sub-`` and ``ses-`` do not matter.

    Raises:
        NoColumnError: no table has the column.
        ValueError: a table names no subjects, or two rows about the same scan disagree.
    """
    labels: dict[LabelKey, Label] = {}
    columns_seen: dict[Path, list[str]] = {}
    for path, defaults in _tables(sources):
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, delimiter="," if path.suffix == ".csv" else "\t")
            columns_seen[path] = list(reader.fieldnames or ())
            if column not in columns_seen[path]:
                continue
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                key = _key(row, defaults, place)
                text = (row[column] or "").strip()
                if text.lower() in MISSING:
                    continue
                if key in labels and labels[key].text != text:
                    raise ValueError(
                        f"{place}: {column} {text!r} of subject {key.subject!r}, session {key.session!r} contradicts "
                        f"{labels[key].text!r} in {labels[key].place}; add a column session or cohort that tells "
                        "them apart"
                    )
                labels[key] = Label(text, place)
    if not any(column in columns for columns in columns_seen.values()):
        found = "; ".join(f"{path} has {columns}" for path, columns in columns_seen.items())
        raise NoColumnError(f"no label table has a column {column!r}: {found}")
    return labels


def labels_of(scans: Iterable[Scan], labels: dict[LabelKey, Label]) -> dict[str, Label]:
    """Return scan_id -> label for the scans that have one; a session's own label goes before its subject's.

    Raises:
        ValueError: a label without a cohort fits scans of two cohorts that use the same subject name.
    """
    found: dict[str, Label] = {}
    cohorts_of_key: dict[LabelKey, set[str]] = defaultdict(set)
    for scan in scans:
        subject, session = _bare(scan.subject), _bare(scan.session)
        for key in (
            LabelKey(scan.cohort, subject, session),
            LabelKey("", subject, session),
            LabelKey(scan.cohort, subject, ""),
            LabelKey("", subject, ""),
        ):
            if key in labels:
                found[scan.scan_id] = labels[key]
                cohorts_of_key[key].add(scan.cohort)
                break
    for key, cohorts in cohorts_of_key.items():
        if len(cohorts) > 1:
            raise ValueError(
                f"{labels[key].place}: subject {key.subject!r} is a subject of each of the cohorts {sorted(cohorts)}; "
                "add a column cohort to the label table"
            )
    return found


def _tables(sources: Sequence[Path]) -> Iterator[tuple[Path, LabelKey]]:
    """Yield every table with what its place says about its rows."""
    for source in sources:
        if source.is_file():
            yield source, LabelKey("", "", "")
        elif (source / "participants.tsv").is_file():
            yield source / "participants.tsv", LabelKey("", "", "")
            for path in sorted([*source.glob("sub-*/*sessions.tsv"), *source.glob("sub-*/ses-*/*sessions.tsv")]):
                parts = path.relative_to(source).parts
                yield path, LabelKey("", parts[0], parts[1] if len(parts) == 3 else "")
        else:
            raise ValueError(f"{source}: expected a label table (.tsv, .csv) or a BIDS folder with participants.tsv")


def _key(row: dict[str, str], defaults: LabelKey, place: str) -> LabelKey:
    subject = next((row[name] for name in SUBJECT_COLUMNS if row.get(name)), defaults.subject)
    session = next((row[name] for name in SESSION_COLUMNS if row.get(name)), defaults.session)
    if not subject:
        raise ValueError(f"{place}: no subject; expected a column {' or '.join(SUBJECT_COLUMNS)}")
    return LabelKey(row.get("cohort") or "", _bare(subject), _bare(session))


def _bare(name: str) -> str:
    """``sub-01`` -> ``01``, ``ses-2`` -> ``2``."""
    return name.strip().removeprefix("sub-").removeprefix("ses-")
