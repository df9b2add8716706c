"""Tab-separated tables with a header line: the form of every table that the program writes for others to read."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from braindino.atomic import write_text

NOT_DEFINED = "n/a"
"""What stands in a cell for NaN, as in BIDS."""

Row = TypeVar("Row")


class Table(NamedTuple):
    """A table as it stands in its file.

    Attributes:
        columns: the header.
        rows: column -> text, row by row.
        lines: number of the line on which each row ends, for messages.
    """

    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]


def read_table(path: str | Path, columns: Sequence[str] = ()) -> Table:
    """A table in UTF-8.

    Args:
        path: the file.
        columns: that it must have; it may have others.

    Raises:
        ValueError: the file is empty, a column is missing, or a row has more or fewer cells than the header; names the
            file and the line.
    """
    with Path(path).open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle, delimiter="\t", restkey="\0", restval="\0")
        found = list(reader.fieldnames or ())
        if not found:
            raise ValueError(f"{path}: empty; expected a header line")
        missing = [name for name in columns if name not in found]
        if missing:
            raise ValueError(f"{path}: columns {missing} are missing; found {found}, expected {list(columns)}")
        rows, lines = [], []
        for row in reader:
            if "\0" in row or "\0" in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: expected {len(found)} cells, as in the header")
            rows.append(row)
            lines.append(reader.line_num)
    return Table(found, rows, lines)


def read_rows(
    path: str | Path, kind: type[Row], parse: Callable[[str, str, Any], object], *, written_by: str
) -> list[Row]:
    """The rows of a table with a column for each field of the dataclass ``kind``, in the order of the file.

    Args:
        path: the file.
        kind: of the rows.
        parse: (name, text, type of the field) -> value; a ValueError says what is wrong with the text.
        written_by: command that makes such tables, for messages.

    Raises:
        ValueError: a column is missing, or a cell is not of its type; names the file and the line.
    """
    columns: Any = fields(kind)  # type: ignore[arg-type]
    expected = f"expected the table that `{written_by}` writes"
    try:
        table = read_table(path, [column.name for column in columns])
    except ValueError as error:
        raise ValueError(f"{error}: {expected}") from error
    rows = []
    for line, texts in zip(table.lines, table.rows, strict=True):
        try:
            rows.append(kind(**{each.name: parse(each.name, texts[each.name], each.type) for each in columns}))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}; {expected}") from error
    return rows


def write_rows(path: str | Path, kind: type[Row], rows: Iterable[Row], text: Callable[[str, Any], str]) -> None:
    """Write what ``read_rows`` reads, atomically, with ``text`` of (name, value) in the cells; a header alone where
    there is no row.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    write_table(path, names, ([text(name, getattr(row, name)) for name in names] for row in rows))


def number_text(value: float, form: str = ".3f") -> str:
    """A number in Python's format ``form``, or ``n/a``."""
    return NOT_DEFINED if math.isnan(value) else format(value, form)


def interval_text(estimate: float, low: float, high: float) -> str:
    """An estimate and its interval, three decimals each."""
    return f"{number_text(estimate)} [{number_text(low)}, {number_text(high)}]"


def align(lines: Sequence[Sequence[str]]) -> str:
    """Cells as text in columns, for a terminal; every line has as many."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def write_table(
    path: str | Path, columns: Sequence[str], rows: Iterable[Iterable[object]], *, comments: Iterable[str] = ()
) -> None:
    """Write a table atomically.

    Args:
        path: the file.
        columns: the header.
        rows: cells in the order of the columns. Those with tabs or line breaks get quoted, which few readers expect.
        comments: lines to put before the header.
    """
    buffer = io.StringIO()
    buffer.writelines(f"{line}\n" for line in comments)
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
