"""``braindino stats STORE --out DIR``: what a slice store is made of, as the paper's Fig. 1a: a table and a figure."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib as mpl
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from braindino.atomic import replace_file, write_text
from braindino.command_line import command_line
from braindino.manifest import SEQUENCES, UNKNOWN_SEQUENCE, Scan
from braindino.report.figures import INK, NEUTRAL, SERIES, SOFT, STYLE, svg
from braindino.slice_store import SliceStore
from braindino.store_verify import store_folder
from braindino.tables import write_table

TOTAL = "total"
COLUMNS = ("cohort", "sequence", "subjects", "scans", "slices")
# Colours for the screen, hatching for a grey print; both in the order of SEQUENCES.
COLOURS = dict(zip((*SEQUENCES, UNKNOWN_SEQUENCE), (*SERIES, NEUTRAL), strict=True))
HATCHES = dict(zip((*SEQUENCES, UNKNOWN_SEQUENCE), ("", "////", "....", "xxxx", "--"), strict=True))


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """Count the subjects, scans and slices of a slice store, per cohort and sequence.

    Writes DIR/corpus.tsv, DIR/corpus.svg and DIR/corpus.png, and prints the table.
    """

    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Slice store, or a folder made by `braindino prepare`."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the table and the figure."""


class CorpusRow(NamedTuple):
    """One line of the table.

    Attributes:
        cohort: its name, or ``total``.
        sequence: ``T1``, ``T1c``, ``T2``, ``FLAIR``, ``unknown`` or ``total``.
        subjects: different ones; one with several sequences counts in each, and once in their total.
        scans: volumes.
        slices: of those volumes in the store.
    """

    cohort: str
    sequence: str
    subjects: int
    scans: int
    slices: int


@command_line("stats")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when table and figure were written, 1 on an error."""
    options = tyro.cli(StatsOptions, args=argv, prog="braindino stats")
    store = SliceStore(store_folder(options.store))
    rows = count_corpus(store.scans, store.slices_per_scan.tolist())
    write_table(options.out / "corpus.tsv", COLUMNS, rows)
    figure = corpus_figure(rows)
    write_text(options.out / "corpus.svg", svg(figure, salt="corpus"))
    with replace_file(options.out / "corpus.png") as temporary, mpl.rc_context(STYLE):
        figure.savefig(temporary, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    print(_aligned(rows))
    print(options.out / "corpus.tsv")
    return 0


def count_corpus(scans: Sequence[Scan], slices: Sequence[int]) -> list[CorpusRow]:
    """The table: cohorts with most slices first, their sequences in the usual order, each cohort's total, the totals.

    Args:
        scans: rows of the store.
        slices: number of slices of each.

    Raises:
        ValueError: there is nothing to count.
    """
    if not scans:
        raise ValueError("the store holds no scans; nothing to count")
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row, scan in enumerate(scans):
        for cohort in (scan.cohort, TOTAL):
            for sequence in (scan.sequence, TOTAL):
                groups[cohort, sequence].append(row)
    counted = {
        key: CorpusRow(*key, len({scans[i].subject_key for i in rows}), len(rows), sum(slices[i] for i in rows))
        for key, rows in groups.items()
    }
    order = {sequence: place for place, sequence in enumerate((*COLOURS, TOTAL))}
    return sorted(
        counted.values(),
        key=lambda row: (
            row.cohort == TOTAL,
            -counted[row.cohort, TOTAL].slices,
            row.cohort,
            order.get(row.sequence, len(SEQUENCES)),
            row.sequence,
        ),
    )


def corpus_figure(rows: Sequence[CorpusRow]) -> Figure:
    """Slices per cohort, stacked by sequence, with its numbers of scans and subjects; slices per sequence in all."""
    of = {(row.cohort, row.sequence): row for row in rows}
    cohorts = [row.cohort for row in rows if row.sequence == TOTAL and row.cohort != TOTAL]
    sequences = [row.sequence for row in rows if row.cohort == TOTAL and row.sequence != TOTAL]
    with mpl.rc_context({**STYLE, "hatch.linewidth": 0.7}):
        lines = max(len(cohorts), len(sequences))
        figure = Figure(figsize=(9.2, 1.5 + 0.27 * lines), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 1.3))
        start = np.zeros(len(cohorts))
        for name in sequences:
            widths = np.array([of[cohort, name].slices if (cohort, name) in of else 0 for cohort in cohorts])
            _bars(left, np.arange(len(cohorts)), widths, start=start, sequence=name)
            start += widths
        for place, cohort in enumerate(cohorts):
            row = of[cohort, TOTAL]
            _note(left, start[place], place, f"{_plural(row.scans, 'scan')}, {_plural(row.subjects, 'subject')}")
        _finish(left, cohorts, f"Slices per cohort, {of[TOTAL, TOTAL].slices:,} in all", lines=lines, margin=0.42)
        totals = [of[TOTAL, name].slices for name in sequences]
        for place, name in enumerate(sequences):
            _bars(right, np.array([place]), np.array([totals[place]]), start=np.zeros(1), sequence=name)
            _note(right, totals[place], place, f"{totals[place]:,}")
        _finish(right, sequences, "Slices per sequence", lines=lines, margin=0.45)
        handles = []
        for name in sequences:
            colour, hatch = _look(name)
            handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name))
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), handlelength=2.2)
    return figure


def _bars(axes: Axes, places: np.ndarray, widths: np.ndarray, *, start: np.ndarray, sequence: str) -> None:
    colour, hatch = _look(sequence)
    axes.barh(places, widths, left=start, height=0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)


def _look(sequence: str) -> tuple[str, str]:
    """Colour and hatching."""
    name = sequence if sequence in COLOURS else UNKNOWN_SEQUENCE
    return COLOURS[name], HATCHES[name]


def _note(axes: Axes, end: float, place: int, text: str) -> None:
    axes.annotate(text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", color=SOFT, fontsize=8)


def _finish(axes: Axes, names: Sequence[str], title: str, *, lines: int, margin: float) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(lines - 0.4, -0.6)
    axes.set_xlim(0, axes.dataLim.x1 * (1 + margin))  # room for the notes behind the bars
    axes.set(title=title, xlabel="slices")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _aligned(rows: Sequence[CorpusRow]) -> str:
    cells = [COLUMNS, *((row.cohort, row.sequence, *(f"{number:,}" for number in row[2:])) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(text.ljust(width) if column < 2 else text.rjust(width) for column, (text, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    )


if __name__ == "__main__":
    raise SystemExit(main())
