"""``braindino cohorts``: the table of cohorts, and one row of it in full."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from braindino.command_line import command_line
from braindino.preprocessing.cohort_table import (
    CohortRow,
    IdRule,
    KeyColumn,
    LabelColumn,
    LabelTable,
    list_cohorts,
    load_cohort,
)

WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class CohortsOptions:
    """List the cohorts that braindino prepare --cohort and braindino labels --cohort know, or show some in full."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME|FILE.yaml ...]")] = ()
    """Rows to show in full: names, or files of your own."""


@command_line("cohorts")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 when there is no such cohort."""
    options = tyro.cli(CohortsOptions, args=argv, prog="braindino cohorts")
    if options.names:
        print("\n\n".join(in_full(load_cohort(name)) for name in options.names))
    else:
        print(overview(list_cohorts()))
    return 0


def overview(rows: Sequence[CohortRow]) -> str:
    """One line per row, aligned, and what the paper makes of them."""
    part_of: dict[str, list[str]] = {}
    for row in rows:
        for member in row.members:
            part_of.setdefault(member, []).append(row.name)
    table = [("NAME", "ROLE", "READER", "ACCESS", "SEQUENCES", "IN THE PAPER")]
    for row in rows:
        part = f"part of {', '.join(part_of[row.name])}" if row.name in part_of else "-"
        numbers = ", ".join(f"{number} {words}" for words, number in row.numbers)
        table.append(
            (
                row.name,
                " + ".join(row.roles) or part,
                row.reader or "of its parts",
                row.access or "-",
                " ".join(row.sequences),
                textwrap.shorten(numbers or "-", 60, placeholder=" ..."),
            )
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    counts = [sum(role in row.roles for row in rows) for role in ("pretraining", "downstream")]
    lines.append(f"\n{len(rows)} rows: {counts[0]} datasets of pretraining, {counts[1]} downstream cohorts, and parts.")
    lines.append("braindino cohorts NAME shows one in full; a file of the same form is used by its path.")
    return "\n".join(lines)


def in_full(row: CohortRow) -> str:
    """Everything that a row says, in words."""
    lines = [f"{row.name}: {row.title}"]
    say = _Paragraphs(lines)
    say("file", row.path)
    say("role", " and ".join(row.roles))
    say("paper", row.paper)
    say("numbers", ", ".join(f"{words} {number}" for words, number in row.numbers))
    say("access", ": ".join(filter(None, (row.access, row.terms))))
    say("from", row.url)
    say("parts", ", ".join(row.members))
    say("reader", row.reader)
    say("layout", row.layout)
    say("sequences", ", ".join(row.sequences))
    for pattern in row.patterns:
        say("pattern", _shown(pattern.pattern))
    say("subject", _id_rule(row.subject))
    say("session", _id_rule(row.session))
    say("sequence by", ", ".join(f"{text} is {sequence}" for text, sequence in row.sequence_of))
    for sequence_rule in row.sequence_rules:
        conditions = [sequence_rule.pattern.pattern] if sequence_rule.pattern is not None else []
        conditions += [f"{tag} fits {pattern.pattern}" for tag, pattern in sequence_rule.tags]
        say("series", f"{' and '.join(conditions)}: {sequence_rule.sequence or 'left, ' + sequence_rule.reason}")
    for skip_rule in row.skip:
        say("left", f"{skip_rule.pattern.pattern} as {skip_rule.reason}")
    if row.repeats.keep != "all":
        prefer = "".join(f", rather {pattern.pattern}" for pattern in row.repeats.prefer)
        say("repeats", f"the {row.repeats.keep} of a {row.repeats.per} and sequence{prefer}")
    for name, value in row.geometry:
        say("geometry", f"{name} {value}")
    for table in row.labels:
        say("labels", _label_table(table))
    for other, words in row.overlaps:
        say("overlap", f"{other}: {words}")
    for note in row.notes:
        say("note", note)
    return "\n".join(lines)


class _Paragraphs:
    """Appends ``name  text`` to lines, the text wrapped beside its name; nothing for an empty text."""

    def __init__(self, lines: list[str]):
        self._lines = lines

    def __call__(self, name: str, text: str) -> None:
        if text:
            indent = " " * 14
            self._lines += textwrap.wrap(
                " ".join(text.split()),
                WIDTH,
                initial_indent=f"  {name:<12}",
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )


def _shown(pattern: str) -> str:
    """A path pattern as its author wrote it."""
    return pattern.removeprefix("(?:").removesuffix(r")\Z")


def _id_rule(rule: IdRule) -> str:
    parts = [
        f"read by {rule.pattern.pattern}" if rule.pattern is not None else "",
        f"a date as {' or '.join(rule.date)}" if rule.date else "",
        f"filled up to {rule.pad} digits" if rule.pad else "",
        f"prefix {rule.prefix}" if rule.prefix else "",
        f"{rule.case} case" if rule.case else "",
    ]
    return ", ".join(filter(None, parts))


def _label_table(table: LabelTable) -> str:
    whom = f"subject {_key_column(table.subject)}"
    if table.session is not None:
        whom += f", session {_key_column(table.session)}"
    rows = "".join(f", only rows with {column} {pattern.pattern}" for column, pattern in table.where)
    columns = "; ".join(_label_column(column) for column in table.columns if column.write)
    return f"{table.files.pattern} ({table.encoding.removesuffix('-sig')}): {whom}{rows}; {columns}"


def _key_column(key: KeyColumn) -> str:
    if key.constant:
        return f"always {key.constant}"
    near = f", the nearest within {key.within_days} days" if key.within_days else ""
    return " or ".join(key.column) + (f" ({text})" if (text := _id_rule(key.rule)) else "") + near


def _label_column(column: LabelColumn) -> str:
    if column.derive:
        arguments = ", ".join(_joined(value) for _, value in column.arguments)
        return f"{column.name} = {column.derive}({arguments})"
    codes = ", ".join(f"{cell} is {value}" for cell, value in column.values)
    parts = [codes, f"else {column.otherwise}" if column.otherwise else ""]
    parts.append(f"missing: {', '.join(column.missing)}" if column.missing else "")
    parts.append(f"times {column.factor:g}" if column.factor != 1 else "")
    told = "; ".join(filter(None, parts))
    return f"{column.name} = {' or '.join(column.column)}" + (f" ({told})" if told else "")


def _joined(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
