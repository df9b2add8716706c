"""What a model was pretrained on, and which scans of a test set are among it, under whatever name.

Owner of ``pretrained_on.tsv`` (version 1), the exposure table: one row per scan that a model has seen, with cohort,
subject, session, sequence and both fingerprints. It lies beside the encoder's weights and travels on with the features
made by it. Lines that start with ``#`` come first: the version, and what is not known.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braindino.fingerprint import MAX_APPEARANCE_DISTANCE, pack_appearance
from braindino.manifest import Scan, read_scans
from braindino.slice_store import SliceStore
from braindino.tables import write_table

EXPOSURE_FILE = "pretrained_on.tsv"
FORMAT_VERSION = 1
EXPOSURE_COLUMNS = ("cohort", "subject", "session", "sequence", "content_hash", "appearance_hash")

SAME_VOXELS = "same_voxels"
LOOKS_THE_SAME = "looks_the_same"
SAME_SUBJECT = "same_subject"
SAME_BY_CROSSWALK = "same_subject_by_crosswalk"
KINDS = (SAME_VOXELS, LOOKS_THE_SAME, SAME_SUBJECT, SAME_BY_CROSSWALK)
NO_OVERLAP = "none"
UNKNOWN = "unknown"
#: Encoders that have seen no scan at all.
UNTRAINED = ("untrained:", "intensity")

_FIRST_LINE = f"# braindino {EXPOSURE_FILE} version "
_UNKNOWN_LINE = "# unknown: "
_MAX_NAMED = 10
_ID_COLUMN = re.compile(r"patient|subject|(?:^|[^a-z])id(?:$|[^a-z])|^brats ?\d+$", re.IGNORECASE)
_COLLECTION_COLUMN = re.compile(r"collection|cohort name", re.IGNORECASE)
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 64, 8192


@dataclass(frozen=True)
class Exposure:
    """The scans that a model has seen.

    Attributes:
        scans: a row each; their paths are empty.
        unknown: what else it may have seen, in words; empty when ``scans`` is all.
    """

    scans: tuple[Scan, ...] = ()
    unknown: tuple[str, ...] = ()


class Overlap(NamedTuple):
    """A scan to be tested on that a model has seen in some form."""

    kind: str
    """One of KINDS."""
    scan: Scan
    """To be tested on."""
    seen: Scan
    """What it meets in the exposure: the nearest, or the first of several."""
    num_seen: int
    """How many scans it meets in this way."""
    certainty: str
    """``certain`` or ``probable``."""
    distance: int | None = None
    """Bits, of 512, between the two appearance hashes; None where they were not what counted."""


def write_exposure(path: str | Path, exposure: Exposure) -> None:
    """Write the table atomically, sorted, each row once: the same scans give the same bytes."""
    rows = {tuple(" ".join(getattr(scan, name).split()) for name in EXPOSURE_COLUMNS) for scan in exposure.scans}
    unknown = [f"{_UNKNOWN_LINE}{' '.join(text.split())}" for text in exposure.unknown]
    write_table(path, EXPOSURE_COLUMNS, sorted(rows), comments=[f"{_FIRST_LINE}{FORMAT_VERSION}", *unknown])


def read_exposure(path: str | Path) -> Exposure:
    """What a model was, or would be, pretrained on.

    Args:
        path: an encoder (its folder or file), a run of pretraining, a folder of features, a ``pretrained_on.tsv``, a
            slice store, or a folder made by ``braindino prepare``.

    Raises:
        ValueError: none of these, or a table of another version.
        FileNotFoundError: there is nothing at ``path``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; expected an encoder, a slice store or a prepared folder")
    table = _exposure_file(path)
    if table is not None:
        return _read_table(table)
    if (path / "store.json").exists():
        return Exposure(tuple(SliceStore(path).scans))
    if (path / "scans.tsv").exists():
        return Exposure(tuple(scan for scan in read_scans(path / "scans.tsv") if scan.status == "done"))
    raise ValueError(
        f"{path}: found neither {EXPOSURE_FILE} nor store.json nor scans.tsv; nobody wrote down what this was "
        "pretrained on. Give the store or the prepared folder it was trained on instead"
    )


def exposure_of_encoder(path_or_name: str | Path) -> Exposure | None:
    """What an encoder was pretrained on, by the name that ``load_encoder`` takes; None where nobody wrote it down."""
    text = str(path_or_name)
    if text.startswith(UNTRAINED):
        return Exposure()
    table = _exposure_file(Path(text))
    return None if table is None else _read_table(table)


class Crosswalk:
    """Which ids of different cohorts mean the same person.

    The rules are tables in ``braindino/crosswalks/``: ``persons.tsv`` turns a cohort's ids into those of an id space,
    ``same_number.tsv`` joins spaces that share their numbers, ``undecided.tsv`` names pairs of spaces that are known to
    overlap and that no rule can join. A user's own mapping tables join ids one by one, with certainty.
    """

    def __init__(self, tables: Iterable[str | Path] = ()) -> None:
        """
        Args:
            tables: .xlsx, .csv or .tsv files with two or more id columns; ids in one row are one person's.

        Raises:
            ValueError: a table has no row with two ids that the rules know.
        """
        self._certain: dict[str, str] = {}
        self._probable: dict[str, str] = {}
        self._joined: set[frozenset[str]] = set()
        for path in tables:
            self._add(Path(path))

    def person(self, cohort: str, subject: str) -> str:
        """``space/id``, by the rules; ``cohort/subject`` where none fits. A leading ``sub-`` is no part of an id."""
        rule = _resolve(cohort, subject)
        return rule if rule is not None else _subject_key(cohort, subject)

    def certain_key(self, person: str) -> str:
        """Equal for ids that are certainly one person's."""
        return _root(self._certain, person)

    def probable_key(self, person: str) -> str:
        """Equal for ids that are at least probably one person's."""
        return _root(self._probable, _lowest_number_twin(person))

    def person_of(self, subject_keys: Iterable[str]) -> dict[str, str]:
        """``cohort/subject`` -> the person, equal for ids that are certainly one person's."""
        return {key: self.certain_key(self.person(*key.split("/", maxsplit=1))) for key in subject_keys}

    def undecided(self, seen: Iterable[Scan], tested: Iterable[Scan]) -> list[str]:
        """What ids cannot tell about these two sets of scans, in words, a line for each pair of id spaces."""
        seen_spaces, tested_spaces = self._spaces(seen), self._spaces(tested)
        lines = []
        for row in _table("undecided.tsv"):
            for space in sorted(seen_spaces):
                for other in sorted(tested_spaces):
                    if not (_fits(row, space, other) or _fits(row, other, space)):
                        continue
                    if row["resolved_by"] and frozenset((space, other)) in self._joined:
                        continue
                    remedy = f"; give {row['resolved_by']} with --crosswalk" if row["resolved_by"] else ""
                    lines.append(f"{space} against {other}: {row['why']}{remedy}; only the fingerprints can tell")
        return lines

    def _spaces(self, scans: Iterable[Scan]) -> set[str]:
        pairs = {(scan.cohort, scan.subject) for scan in scans}
        return {self.person(*pair).partition("/")[0].lower() for pair in pairs}

    def _add(self, path: Path) -> None:
        rows = _read_mapping(path)
        num_joined = 0
        for row in rows:
            # The collection says in which space a bare id of the row lies.
            collection = next((value for name, value in row.items() if _COLLECTION_COLUMN.search(name)), "")
            cells = [(name, value) for name, value in row.items() if value and _ID_COLUMN.search(name)]
            found = [_resolve(name, value) or _resolve(collection, value) for name, value in cells]
            ids = {person for person in found if person is not None}
            num_joined += len(ids) > 1
            first, *rest = sorted(ids) or [""]
            for other in rest:
                _join(self._certain, first, other)
                _join(self._probable, _lowest_number_twin(first), _lowest_number_twin(other))
            spaces = {person.partition("/")[0] for person in ids}
            spaces |= {name for space in spaces for name in _twins(space)}
            self._joined |= {frozenset((a, b)) for a in spaces for b in spaces}
        if not num_joined:
            columns = list(rows[0]) if rows else []
            raise ValueError(
                f"{path}: no row with two ids that are known here; found columns {columns}; expected a table such as "
                "BraTS2021_MappingToTCIA.xlsx, with ids like BraTS2021_00000 and UPENN-GBM-00001 in one row"
            )


def find_overlaps(
    exposure: Exposure,
    scans: Sequence[Scan],
    crosswalk: Crosswalk,
    *,
    max_distance: int = MAX_APPEARANCE_DISTANCE,
) -> list[Overlap]:
    """Every way in which a scan meets the exposure, in the order of ``scans`` and then of ``KINDS``.

    A scan with the same voxels also looks the same, and a subject of the same cohort is also the same by any
    crosswalk: the weaker finding is left out.

    Args:
        exposure: what was pretrained on.
        scans: to be tested on; rows without fingerprints are compared by their ids alone.
        crosswalk: ids of one person in several cohorts.
        max_distance: most bits, of 512, in which hashes of one scan may differ.
    """
    seen = exposure.scans
    by_voxels, by_subject, by_certain, by_probable = (defaultdict(list) for _ in range(4))
    for scan in seen:
        if scan.content_hash:
            by_voxels[scan.content_hash].append(scan)
        if scan.subject:
            person = crosswalk.person(scan.cohort, scan.subject)
            by_subject[_subject_key(scan.cohort, scan.subject)].append(scan)
            by_certain[crosswalk.certain_key(person)].append(scan)
            by_probable[crosswalk.probable_key(person)].append(scan)
    near = _find_near(seen, scans, max_distance=max_distance)

    overlaps = []
    for row, scan in enumerate(scans):
        if scan.content_hash and (found := by_voxels.get(scan.content_hash)):
            overlaps.append(Overlap(SAME_VOXELS, scan, found[0], len(found), "certain"))
        elif row in near:
            nearest, distance, count = near[row]
            overlaps.append(Overlap(LOOKS_THE_SAME, scan, seen[nearest], count, "probable", distance))
        if not scan.subject:
            continue
        person = crosswalk.person(scan.cohort, scan.subject)
        if found := by_subject.get(_subject_key(scan.cohort, scan.subject)):
            overlaps.append(Overlap(SAME_SUBJECT, scan, found[0], len(found), "certain"))
        elif found := by_certain.get(crosswalk.certain_key(person)):
            overlaps.append(Overlap(SAME_BY_CROSSWALK, scan, found[0], len(found), "certain"))
        elif found := by_probable.get(crosswalk.probable_key(person)):
            overlaps.append(Overlap(SAME_BY_CROSSWALK, scan, found[0], len(found), "probable"))
    return overlaps


def check_test_scans(
    exposure: Exposure | None,
    scans: Sequence[Scan],
    *,
    model: str,
    allow_overlap: bool,
    crosswalk: Crosswalk | None = None,
) -> str:
    """The stamp for results on ``scans``: ``none...``, ``unknown...``, or how many test subjects overlap and how.

    Args:
        exposure: what the model was pretrained on; None where nobody wrote it down.
        scans: tested on.
        model: what the exposure belongs to, for messages.
        allow_overlap: stamp an overlap instead of refusing it.
        crosswalk: by default that of the tables in ``braindino/crosswalks``.

    Raises:
        ValueError: scans or subjects were pretrained on; names them and what to do.
    """
    if exposure is None:
        return f"{UNKNOWN}: {model} has no {EXPOSURE_FILE}"
    overlaps = find_overlaps(exposure, scans, crosswalk or Crosswalk())
    if overlaps and not allow_overlap:
        named = [f"{each.scan.subject_key} ({each.kind}: {each.seen.subject_key})" for each in overlaps]
        named = list(dict.fromkeys(named))
        more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
        raise ValueError(
            f"{_count_subjects(overlaps)} of {len({scan.subject_key for scan in scans})} test subjects were seen when "
            f"{model} was pretrained: {', '.join(named[:_MAX_NAMED])}{more}. Test on others, pretrain again without "
            "them (--exclude-subjects), or go on with --allow-overlap, which marks the results"
        )
    return describe_overlaps(exposure, scans, overlaps)


def describe_overlaps(exposure: Exposure, scans: Sequence[Scan], overlaps: Sequence[Overlap]) -> str:
    """One line for a table of results."""
    notes = list(exposure.unknown)
    blind = sum(not scan.content_hash for scan in scans)
    if exposure.scans and blind:
        notes.append(f"{blind} of {len(scans)} test scans have no fingerprint, compared by ids alone")
    if overlaps:
        total = len({scan.subject_key for scan in scans})
        text = f"{_count_subjects(overlaps)} of {total} test subjects: " + ", ".join(
            f"{kind} {_count_subjects([each for each in overlaps if each.kind == kind])}"
            for kind in KINDS
            if any(each.kind == kind for each in overlaps)
        )
    else:
        text = UNKNOWN if exposure.unknown else NO_OVERLAP
    return "; ".join([text, *notes])


def _count_subjects(overlaps: Sequence[Overlap]) -> int:
    return len({each.scan.subject_key for each in overlaps})


def _find_near(seen: Sequence[Scan], scans: Sequence[Scan], *, max_distance: int) -> dict[int, tuple[int, int, int]]:
    """Row of ``scans`` -> (row of the nearest in ``seen``, its distance, how many are within the limit)."""
    seen_rows = [row for row, scan in enumerate(seen) if scan.appearance_hash]
    rows = [row for row, scan in enumerate(scans) if scan.appearance_hash]
    if not seen_rows or not rows:
        return {}
    known = np.ascontiguousarray(pack_appearance([seen[row].appearance_hash for row in seen_rows]).T)
    asked = pack_appearance([scans[row].appearance_hash for row in rows])
    nearest = np.zeros(len(rows), dtype=np.int64)
    distance = np.full(len(rows), max_distance + 1, dtype=np.int64)
    count = np.zeros(len(rows), dtype=np.int64)
    # Blocks of half a million pairs: the arrays between the two loops stay in the cache.
    for top in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(top, top + _ROWS_AT_ONCE)
        for left in range(0, known.shape[1], _COLUMNS_AT_ONCE):
            bits = np.zeros((len(asked[part]), len(known[0, left : left + _COLUMNS_AT_ONCE])), dtype=np.uint16)
            for word, theirs in enumerate(known[:, left : left + _COLUMNS_AT_ONCE]):
                bits += np.bitwise_count(asked[part, word, None] ^ theirs)
            best = bits.argmin(axis=1)
            value = bits[np.arange(len(bits)), best].astype(np.int64)
            count[part] += (bits <= max_distance).sum(axis=1)
            closer = value < distance[part]
            nearest[part] = np.where(closer, best + left, nearest[part])
            distance[part] = np.where(closer, value, distance[part])
    return {
        row: (seen_rows[nearest[index]], int(distance[index]), int(count[index]))
        for index, row in enumerate(rows)
        if count[index]
    }


def _exposure_file(path: Path) -> Path | None:
    """The table that belongs to an encoder's folder or file, a run, a table of features; or the file itself."""
    if path.is_file():
        beside = path if path.name == EXPOSURE_FILE else path.with_name(EXPOSURE_FILE)
        return beside if beside.is_file() else None
    for candidate in (path / EXPOSURE_FILE, path / "encoder" / EXPOSURE_FILE):
        if candidate.is_file():
            return candidate
    return None


def _read_table(path: Path) -> Exposure:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    first = lines[0].rstrip("\n") if lines else ""
    if first != f"{_FIRST_LINE}{FORMAT_VERSION}":
        raise ValueError(f"{path}: found {first!r} in its first line; expected {_FIRST_LINE + str(FORMAT_VERSION)!r}")
    comments = [line.rstrip("\n") for line in takewhile(lambda line: line.startswith("#"), lines)]
    reader = csv.DictReader(lines[len(comments) :], delimiter="\t")
    if tuple(reader.fieldnames or ()) != EXPOSURE_COLUMNS:
        raise ValueError(f"{path}: found columns {reader.fieldnames}; expected {list(EXPOSURE_COLUMNS)}")
    scans = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, line {reader.line_num + len(comments)}: expected {len(EXPOSURE_COLUMNS)} cells; "
                "the file was cut short or edited"
            )
        scans.append(Scan("", **{name: row[name] for name in EXPOSURE_COLUMNS}))  # type: ignore[arg-type]
    unknown = tuple(line.removeprefix(_UNKNOWN_LINE) for line in comments if line.startswith(_UNKNOWN_LINE))
    return Exposure(tuple(scans), unknown)


def _subject_key(cohort: str, subject: str) -> str:
    return f"{cohort}/{subject.removeprefix('sub-')}"


class _Rule(NamedTuple):
    cohort: re.Pattern[str]
    subject: re.Pattern[str]
    space: str
    width: int


@cache
def _rules() -> tuple[_Rule, ...]:
    return tuple(
        _Rule(
            re.compile(row["cohort"], re.IGNORECASE),
            re.compile(row["subject"], re.IGNORECASE),
            row["space"],
            int(row["width"]),
        )
        for row in _table("persons.tsv")
    )


@cache
def _resolve(cohort: str, subject: str) -> str | None:
    """``space/id`` by the first rule that fits; None where none does."""
    text = subject.strip().removeprefix("sub-")
    for rule in _rules():
        match = rule.subject.fullmatch(text)
        if match and rule.cohort.search(cohort):
            digits = "".join(group for group in match.groups() if group).upper()
            return f"{rule.space}/{digits.lstrip('0').zfill(rule.width) if rule.width else digits}"
    return None


def _twins(space: str) -> set[str]:
    """Other spaces with the same numbers."""
    pairs = [(row["space"], row["other"]) for row in _table("same_number.tsv")]
    return {b for a, b in pairs if a == space} | {a for a, b in pairs if b == space}


def _lowest_number_twin(person: str) -> str:
    """The person's name in the first of the spaces that share its numbers."""
    space, _, number = person.partition("/")
    for row in _table("same_number.tsv"):
        if space == row["other"]:
            return f"{row['space']}/{number}"
    return person


def _fits(row: dict[str, str], space: str, other: str) -> bool:
    return bool(re.fullmatch(row["space"], space) and re.fullmatch(row["other"], other))


@cache
def _table(name: str) -> tuple[dict[str, str], ...]:
    text = files("braindino").joinpath("crosswalks", name).read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines(), delimiter="\t"))


def _read_mapping(path: Path) -> list[dict[str, str]]:
    """Rows of a spreadsheet (all its sheets) or text table, every cell as text."""
    if path.suffix.lower() in (".xlsx", ".xlsm"):
        import pandas as pd

        sheets = pd.read_excel(path, sheet_name=None, dtype=str, keep_default_na=False)
        return [
            {str(name).strip(): str(value).strip() for name, value in row.items()}
            for sheet in sheets.values()
            for row in sheet.to_dict("records")
        ]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as handle:
        return [
            {(name or "").strip(): (value or "").strip() for name, value in row.items() if isinstance(value, str)}
            for row in csv.DictReader(handle, delimiter=delimiter)
        ]


def _root(parents: dict[str, str], key: str) -> str:
    while key in parents:
        key = parents[key]
    return key


def _join(parents: dict[str, str], a: str, b: str) -> None:
    a, b = _root(parents, a), _root(parents, b)
    if a != b:
        parents[max(a, b)] = min(a, b)
