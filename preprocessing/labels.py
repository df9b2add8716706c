"""The published label tables of a cohort as one tidy table: ``braindino labels --cohort NAME SOURCE... --out FILE``.

Which table says what, in which units and with which codes for missing values, stands in the cohort's row.
"""

import csv
import io
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from braindino.command_line import EXIT_DONE, EXIT_PARTIAL, command_line
from braindino.manifest import Scan, read_scans
from braindino.preprocessing.cohort_table import CohortRow, KeyColumn, LabelColumn, LabelTable, iso_date, load_cohort
from braindino.tables import write_table

MISSING = "n/a"
DAYS_PER_YEAR = 365.25
EXAMPLES_PER_PROBLEM = 3
WORKBOOKS = (".xlsx", ".xlsm", ".xls")
ALWAYS_MISSING = ("", "n/a", "na", "nan")

_ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, kw_only=True)
class LabelsOptions:
    """Read the published label tables of a cohort into one tidy table (tab-separated).

    Columns: cohort, subject, session, then age_years, sex, diagnosis... as the cohort's row says (braindino cohorts
    NAME). Values that are missing become n/a. Exit code 0: all rows read; 3: some rows could not be used, which are
    counted and named.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """The published tables, or folders that hold them under their published names."""
    cohort: str
    """Name of a row of the table of cohorts, or a YAML file of the same form."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Where the tidy table goes (.tsv)."""
    cohort_name: str = ""
    """What the dataset was called in `braindino prepare --cohort-name`, where it was."""
    scans: Annotated[Path | None, tyro.conf.arg(metavar="SCANS.TSV")] = None
    """A scans.tsv of this cohort: tells how many of its scans the labels reach, and gives the dates of sessions that
    tables are joined to by the nearest date."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("SOURCE: none given; expected label tables, or folders that hold them")


class Key(NamedTuple):
    """Whom a label is about; an empty session means the subject as a whole."""

    cohort: str
    subject: str
    session: str


class Cell(NamedTuple):
    """A value in its final form, and where it stands."""

    text: str
    place: str


@dataclass
class TidyLabels:
    """What the tables say.

    Attributes:
        columns: the standard columns, in the order of the rows.
        rows: key -> column -> value; a column that is not there is missing.
        problems: kind -> places of rows or cells that could not be used.
        tables: how many rows came from each file.
        contradicted: keys and columns that have no value because two rows disagree.
    """

    columns: list[str] = field(default_factory=list)
    rows: dict[Key, dict[str, Cell]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tables: Counter[Path] = field(default_factory=Counter)
    contradicted: set[tuple[Key, str]] = field(default_factory=set)


@command_line("labels")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the table was written, 3 when rows of the sources could not be used, 1 on an error."""
    options = tyro.cli(LabelsOptions, args=argv, prog="braindino labels")
    scans = read_scans(options.scans) if options.scans else []
    labels = read_labels(load_cohort(options.cohort), options.sources, name=options.cohort_name, scans=scans)
    write_labels(options.out, labels)
    print(summary(labels, options.out, scans))
    return EXIT_PARTIAL if labels.problems else EXIT_DONE


def read_labels(cohort: CohortRow, sources: Sequence[str], *, name: str = "", scans: Iterable[Scan] = ()) -> TidyLabels:
    """What the cohort's tables, found among ``sources``, say.

    Args:
        cohort: its row; of one with members, the tables of all of them.
        sources: tables, or folders searched for files that are called like tables of the row.
        name: what the cohort is called, instead of the row's name.
        scans: rows of its scans; their sessions count where a table is joined by the nearest date.

    Raises:
        ValueError: the row has no tables, none is found, one is unreadable or lacks a column, or two rows about the
            same subject and session contradict each other in a table of which the row does not say what to do then.
    """
    rows = [load_cohort(member) for member in cohort.members] or [cohort]
    tables = [(row, table) for row in rows for table in row.labels]
    if not tables:
        raise ValueError(f"cohort {cohort.name} has no label tables; a row's key 'labels' names them ({cohort.path})")
    files = _files(sources)
    labels = TidyLabels()
    # Tables that are joined by the nearest date need the sessions of the others.
    for joined in (False, True):
        sessions = _sessions(labels, scans) if joined else {}
        for row, table in tables:
            if bool(table.session is not None and table.session.within_days) == joined:
                for path in files:
                    if table.files.search(path.name) and _is_of(row, path, cohort):
                        _add_table(labels, name or row.name, table, path, sessions)
    if not labels.tables:
        expected = sorted({table.files.pattern for _, table in tables})
        raise ValueError(
            f"{', '.join(sources)}: no label table of cohort {cohort.name} in it; expected a file whose name fits "
            f"{' or '.join(expected)}"
        )
    names = [column.name for _, table in tables for column in table.columns if column.write]
    labels.columns = list(dict.fromkeys(names))
    return labels


def write_labels(path: Path, labels: TidyLabels) -> None:
    """Write the tidy table atomically: cohort, subject, session, then the standard columns; n/a where there is none."""
    rows = (
        [*key, *(cells[name].text if name in cells else MISSING for name in labels.columns)]
        for key, cells in sorted(labels.rows.items())
    )
    write_table(path, [*Key._fields, *labels.columns], rows)


def summary(labels: TidyLabels, out: Path, scans: Sequence[Scan] = ()) -> str:
    """What was read, what could not be used, and where; for a person."""
    lines = [f"{path}: {count} rows" for path, count in sorted(labels.tables.items())]
    lines.append(f"{out}: {len(labels.rows)} subjects or sessions")
    for name in labels.columns:
        values = [cells[name].text for cells in labels.rows.values() if name in cells]
        kinds = Counter(values)
        told = ": " + ", ".join(f"{value} {count}" for value, count in sorted(kinds.items())) if len(kinds) <= 6 else ""
        lines.append(f"  {name}: {len(values)} known, {len(labels.rows) - len(values)} missing{told}")
    for problem, places in sorted(labels.problems.items()):
        more = f" and {len(places) - EXAMPLES_PER_PROBLEM} more" if len(places) > EXAMPLES_PER_PROBLEM else ""
        lines.append(f"  not used, {problem}: {len(places)} ({'; '.join(places[:EXAMPLES_PER_PROBLEM])}{more})")
    done = [scan for scan in scans if scan.status == "done"]
    if scans:
        reached = [scan for scan in done if _keys_of(scan) & labels.rows.keys()]
        lines.append(f"{len(reached)} of {len(done)} prepared scans have a row; without one: ")
        missing = sorted({scan.subject_key for scan in done} - {scan.subject_key for scan in reached})
        lines[-1] += f"{len(missing)} subjects{', such as ' + ', '.join(missing[:3]) if missing else ''}"
    return "\n".join(lines)


def _is_of(row: CohortRow, path: Path, cohort: CohortRow) -> bool:
    """Whether a table is that of ``row`` and not one that another part of ``cohort`` calls the same."""
    return not cohort.members or row.known_by is None or row.known_by.search(path.absolute().as_posix()) is not None


def _keys_of(scan: Scan) -> set[Key]:
    return {Key(scan.cohort, scan.subject, scan.session), Key(scan.cohort, scan.subject, "")}


def _files(sources: Sequence[str]) -> list[Path]:
    """All files of the sources, sorted; what programs derived from a dataset holds copies of its tables."""
    files: set[Path] = set()
    for source in map(Path, sources):
        if source.is_dir():
            for current, folders, names in os.walk(source):
                folders[:] = [folder for folder in folders if folder != "derivatives"]
                files.update(Path(current, name) for name in names if not name.startswith("."))
        elif source.exists():
            files.add(source)
        else:
            raise ValueError(f"{source}: no such file or folder; expected a label table or a folder that holds it")
    return sorted(files)


def _sessions(labels: TidyLabels, scans: Iterable[Scan]) -> dict[tuple[str, str], set[str]]:
    """(cohort, subject) -> its sessions that are dates."""
    keys = [*labels.rows, *(Key(scan.cohort, scan.subject, scan.session) for scan in scans)]
    sessions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for key in keys:
        if _ISO_DATE.fullmatch(key.session):
            sessions[key.cohort, key.subject].add(key.session)
    return sessions


def _add_table(
    labels: TidyLabels, cohort: str, table: LabelTable, path: Path, sessions: Mapping[tuple[str, str], set[str]]
) -> None:
    by_subject: dict[str, list[tuple[date, dict[str, Cell]]]] = defaultdict(list)
    for place, row in _rows(table, path):
        labels.tables[path] += 1
        try:
            subject, session = _read_key(table.subject, row), _read_key(table.session, row) if table.session else ""
        except ValueError as error:
            labels.problems[f"nobody that the row names ({error})"].append(place)
            continue
        cells = _read_cells(table, row, place, labels.problems)
        if table.session is not None and table.session.within_days:
            by_subject[subject].append((date.fromisoformat(session), cells))
        else:
            _merge(labels, Key(cohort, subject, session), cells, table)
    if table.session is None:
        return
    for subject, dated in by_subject.items():
        used = 0
        for session in sorted(sessions.get((cohort, subject), ())):
            day = date.fromisoformat(session)
            nearest, cells = min(dated, key=lambda item: (abs((item[0] - day).days), item[0]))
            if abs((nearest - day).days) <= table.session.within_days:
                _merge(labels, Key(cohort, subject, session), cells, table)
                used += 1
        if not used:
            words = f"no known session within {table.session.within_days} days"
            labels.problems[words].append(f"{path}, subject {subject}")


def _rows(table: LabelTable, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, column -> text) for each row that is meant.

    Raises:
        ValueError: the file cannot be read, or lacks a column.
    """
    header, rows = _workbook(path, table.sheet) if path.suffix.lower() in WORKBOOKS else _text(path, table.encoding)
    keys = [key.column for key in (table.subject, table.session) if key is not None and not key.constant]
    needed = [column.column for column in table.columns if not column.derive and not column.optional]
    for names in [*keys, *needed, *((name,) for name, _ in table.where)]:
        if not set(names) & set(header):
            raise ValueError(f"{path}: column {' or '.join(map(repr, names))} is missing; found {header}")
    named = {name for column in table.columns for name in column.column}.union(*keys)
    twice = sorted(name for name in named if header.count(name) > 1)
    if twice:
        raise ValueError(f"{path}: columns {twice} stand twice; rename one of each")
    for line, cells in rows:
        if not any(cells):
            continue
        row = dict(zip(header, [*cells, *[""] * len(header)], strict=False))
        if all(pattern.fullmatch(row[column]) for column, pattern in table.where):
            yield f"{path}, line {line}", row


def _text(path: Path, encoding: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    try:
        content = path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not {encoding} ({error}); set 'encoding' in the cohort's row") from error
    except LookupError as error:
        raise ValueError(f"{path}: {error}; set 'encoding' in the cohort's row") from error
    reader = csv.reader(io.StringIO(content, newline=""), delimiter="," if path.suffix.lower() == ".csv" else "\t")
    header = [name.strip() for name in next(reader, [])]
    return header, ((reader.line_num, [cell.strip() for cell in cells]) for cells in reader)


def _workbook(path: Path, sheet: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    import pandas

    try:
        frame = pandas.read_excel(path, sheet_name=sheet or 0, header=None, dtype=object, na_filter=False)
    except ImportError as error:
        raise ValueError(f"{path}: {error}; or save the table as .xlsx or .csv") from error
    except Exception as error:  # each of pandas' engines has errors of its own
        raise ValueError(f"{path}: cannot be read as a workbook: {error}") from error
    rows = [[_cell_text(cell) for cell in row] for row in frame.itertuples(index=False, name=None)]
    return (rows[0] if rows else []), ((number, row) for number, row in enumerate(rows[1:], start=2))


def _cell_text(value: object) -> str:
    """A workbook's cell as text: whole numbers without a point, days without a time."""
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == datetime.min.time() else value.isoformat(sep=" ")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value).strip()


def _read_key(key: KeyColumn, row: Mapping[str, str]) -> str:
    if key.constant:
        return key.constant
    try:
        return key.rule.read(_cell(key.column, row))
    except ValueError as error:
        raise ValueError(f"{key.column[0]}: {error}") from error


def _cell(names: Sequence[str], row: Mapping[str, str]) -> str:
    """The cell of the first of the columns that the table has; empty where it has none."""
    return next((row[name] for name in names if name in row), "")


def _read_cells(
    table: LabelTable, row: Mapping[str, str], place: str, problems: dict[str, list[str]]
) -> dict[str, Cell]:
    values: dict[str, str] = {}
    for column in table.columns:
        try:
            text = _derive(column, values) if column.derive else _read_cell(column, _cell(column.column, row))
        except ValueError as error:
            problems[f"{column.name}: {error}"].append(place)
            continue
        if text:
            values[column.name] = text
    return {column.name: Cell(values[column.name], place) for column in table.columns
            if column.write and column.name in values}  # fmt: skip


def _read_cell(column: LabelColumn, text: str) -> str:
    """The value in its final form; empty where it is missing."""
    if text.lower() in ALWAYS_MISSING or any(_same(text, code) for code in column.missing):
        return ""
    if column.values:
        for cell, value in column.values:
            if _same(text, cell):
                return value
        if column.otherwise:
            return column.otherwise
        raise ValueError(f"found {text!r}; expected one of {', '.join(cell for cell, _ in column.values)}")
    if column.kind == "number":
        number = _number(text)
        if number is None:
            raise ValueError(f"found {text!r}; expected a number")
        return f"{number * column.factor:.10g}"
    if column.kind == "date":
        return iso_date(text, column.date)
    return text


def _same(text: str, code: str) -> bool:
    """Whether a cell is that code; 1.0 is 1."""
    if text.lower() == code.lower():
        return True
    number = _number(text)
    return number is not None and number == _number(code)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _derive(column: LabelColumn, values: Mapping[str, str]) -> str:
    """A value from those of columns further up; empty where they do not tell."""
    arguments = dict(column.arguments)
    if column.derive == "first_of":
        return next((values[name] for name in arguments["columns"] if name in values), "")
    if column.derive == "years_between":
        start, end = values.get(arguments["start"]), values.get(arguments["end"])
        if start is None or end is None:
            return ""
        return f"{(date.fromisoformat(end) - date.fromisoformat(start)).days / DAYS_PER_YEAR:.4f}"
    assert column.derive == "event_within", column.derive
    time, event = values.get(arguments["time"]), values.get(arguments["event"])
    if time is None or (float(time) <= arguments["days"] and event is None):
        return ""
    if float(time) > arguments["days"]:
        return "0"
    return "1" if event == "1" else ""


def _merge(labels: TidyLabels, key: Key, cells: Mapping[str, Cell], table: LabelTable) -> None:
    row = labels.rows.setdefault(key, {})
    for name, cell in cells.items():
        if (key, name) in labels.contradicted:
            labels.problems[f"{name}: rows contradict each other"].append(cell.place)
            continue
        other = row.setdefault(name, cell)
        if other.text == cell.text:
            continue
        whom = f"subject {key.subject}" + (f", session {key.session}" if key.session else "")
        if table.contradictions == "error":
            raise ValueError(
                f"{cell.place}: {name} {cell.text!r} of {whom} contradicts {other.text!r} in {other.place}; mend the "
                "table, or set 'contradictions: missing' for it in the cohort's row"
            )
        del row[name]
        labels.contradicted.add((key, name))
        labels.problems[f"{name}: rows contradict each other"] += [other.place, cell.place]
