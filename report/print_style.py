"""How figures for print look and are kept: widths of journal columns, colours with a second channel, four files.

A figure is told apart without colour: every series has its own marker and dashes, every bar its own hatching.
"""

import io
import math
import string
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from braindino.atomic import replace_file
from braindino.report.figures import INK, LINE, SOFT, SVG_METADATA
from braindino.report.markup import THEME
from braindino.tables import write_table

COLUMN_MM, PAGE_MM = 89.0, 183.0
"""Widths of one and of two columns in most journals."""
DPI = 300
SIGNIFICANCE = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
"""The paper's tiered notation (sec. 4.7)."""
STARS_NOTE = "* p < 0.05, ** p < 0.01, *** p < 0.001"
NOT_SIGNIFICANT = "ns"
MAX_SERIES = 8
SMALL_PRINT = 5.5
"""Points."""
# Sizes of DejaVu Sans at 6.5 and 5.5 points, so that legends and small print fit without being drawn first.
LEGEND_CHARACTER_MM, LEGEND_HANDLE_MM, LEGEND_ROW_MM = 1.36, 12.0, 3.6
SMALL_CHARACTER_MM, LINE_MM = 1.09, 2.4
LONGEST_NAME = 28
# Typed loosely: matplotlib's own type for it spells out every key of one version.
STYLE: Any = {
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 6.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 7,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 4,
    "axes.labelpad": 2.5,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.2,
    "ytick.major.size": 2.2,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
}


class Look(NamedTuple):
    """How one series is drawn, by colour and without it."""

    colour: str
    marker: str
    dashes: Any
    hatch: str


_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = (
    "solid", (0, (4, 1.5)), (0, (1, 1.1)), (0, (5, 1.2, 1, 1.2)), (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 2)),
    (0, (8, 1.5, 2, 1.5)),
)  # fmt: skip
_HATCHES = ("", "/////", ".....", "xxxxx", "-----", "\\\\\\\\\\", "|||||", "+++++")
LOOKS = tuple(
    Look(THEME[f"series-{number + 1}"][0], _MARKERS[number], _DASHES[number], _HATCHES[number])
    for number in range(MAX_SERIES)
)


class Drawing(NamedTuple):
    """A figure and the table behind it.

    Attributes:
        figure: as it is printed.
        columns: header of the table.
        rows: exactly the numbers that are drawn.
        caption: what is shown, on how many, and what the marks mean.
    """

    figure: Figure
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str


class TooManySeriesError(ValueError):
    """More series than can be told apart in one figure."""


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """Name -> its look, in the order of first appearance, the same in all panels of a figure.

    Raises:
        TooManySeriesError: more names than can be told apart.
    """
    distinct = list(dict.fromkeys(names))
    if len(distinct) > MAX_SERIES:
        raise TooManySeriesError(
            f"{len(distinct)} series in one figure ({', '.join(distinct)}); expected at most {MAX_SERIES}, which can "
            "still be told apart in grey; choose some with --encoders"
        )
    return dict(zip(distinct, LOOKS, strict=False))


def stars(p: float) -> str:
    """``***``, ``**``, ``*`` or ``ns``; empty where p is NaN. A p of 0 is that of a bootstrap, below any tier."""
    if math.isnan(p):
        return ""
    return next((mark for limit, mark in SIGNIFICANCE if p < limit), NOT_SIGNIFICANT)


def p_words(p: float) -> str:
    """``p = 0.012``, ``p < 0.001``, or ``p n/a``."""
    if math.isnan(p):
        return "p n/a"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def short(name: str, longest: int = LONGEST_NAME) -> str:
    """The name, its middle left out where it is too long to stand in a figure; names differ at their ends."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


def inches(mm: float) -> float:
    """Millimetres as matplotlib takes lengths."""
    return mm / 25.4


def series_handles(looks: Mapping[str, Look], *, line: bool = True) -> list[Any]:
    """Handles of a legend: a name each, as a line with its marker, or as a marker alone."""
    return [
        Line2D(
            [], [], color=look.colour, marker=look.marker, linestyle=look.dashes if line else "none", label=short(name)
        )
        for name, look in looks.items()
    ]


def add_foot(figure: Figure, handles: Sequence[Any], small_print: str, *, colour: str = SOFT) -> None:
    """One legend and small print below all panels; the figure grows by as much.

    Args:
        figure: with a constrained layout.
        handles: of the legend.
        small_print: wrapped to the width.
        colour: of the small print.
    """
    width, height = figure.get_size_inches() * 25.4
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    columns = max(1, min(len(handles), int((width - 2) / (LEGEND_CHARACTER_MM * longest + LEGEND_HANDLE_MM))))
    rows = math.ceil(len(handles) / columns)
    lines = textwrap.wrap(small_print, int((width - 3) / SMALL_CHARACTER_MM))
    print_mm, legend_mm = LINE_MM * len(lines) + 0.8, LEGEND_ROW_MM * rows + (1.2 if rows else 0)
    foot, total = print_mm + legend_mm, height + print_mm + legend_mm
    figure.set_size_inches(inches(width), inches(total))
    engine = figure.get_layout_engine()
    assert engine is not None, "figures for print have a constrained layout"
    engine.set(rect=(0, foot / total, 1, 1 - foot / total))  # type: ignore[call-arg]
    if handles:
        # Without its place in the layout: the room below is kept free for it.
        placed = figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0, print_mm / total),
            ncols=columns,
            borderaxespad=0.1,
            borderpad=0.3,
        )
        placed.set_in_layout(False)
    words = figure.text(
        1.5 / width, 0.8 / total, "\n".join(lines), fontsize=SMALL_PRINT, color=colour, va="bottom", linespacing=1.2
    )
    words.set_in_layout(False)


def lettered(number: int, title: str) -> str:
    """``a  title``, as journals letter panels."""
    return f"{chr(ord('a') + number)}  {title}" if number < len(string.ascii_lowercase) else title


def save_drawing(drawing: Drawing, out: Path) -> list[Path]:
    """Write OUT.tsv, OUT.pdf, OUT.svg and OUT.png (300 dpi), each atomically; the same figure gives the same bytes.

    Args:
        drawing: what to write.
        out: path without an ending; a dot in its last part is part of the name.

    Returns:
        The four files.
    """
    paths = [out.with_name(f"{out.name}.{ending}") for ending in ("tsv", "pdf", "svg", "png")]
    write_table(paths[0], drawing.columns, drawing.rows)
    metadata: dict[str, Any] = {
        "pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
        "svg": SVG_METADATA,
        "png": {"Software": None},
    }
    for path in paths[1:]:
        kind = path.suffix[1:]
        buffer = io.BytesIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": out.name}):
            ground = drawing.figure.get_facecolor()
            clear = to_rgba(ground)[3] == 0
            drawing.figure.savefig(
                buffer,
                format=kind,
                dpi=DPI,
                facecolor="white" if clear and kind == "png" else ground,
                metadata=metadata[kind],
            )
        with replace_file(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    return paths


def thumbnail(figure: Figure, pixels: int) -> bytes:
    """The figure as a PNG so many pixels wide, in 256 colours: a page holds many of them."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        dpi = pixels / figure.get_size_inches()[0]
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
    small = io.BytesIO()
    with Image.open(buffer) as image:
        # Median cut would spend every colour on the greys, and none on thin lines.
        image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE).save(small, format="PNG", optimize=True)
    return small.getvalue()
