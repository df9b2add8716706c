"""Panels of curves with intervals, side by side: the form of most of the paper's figures (Figs. 3, 5 and 6b).

One panel holds the curves of several series (encoders) over few places on the x axis. Beside colours, series differ in
marker and dashes, and stand a little apart on the x axis so that no interval hides another. Tests stand above the axes,
one row a series, so that no star hides a curve.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from braindino.report.figures import NEUTRAL, SOFT
from braindino.report.print_style import (
    COLUMN_MM,
    NOT_SIGNIFICANT,
    PAGE_MM,
    STARS_NOTE,
    STYLE,
    Look,
    add_foot,
    inches,
    lettered,
    series_handles,
    stars,
)

FLOOR_DASHES = (0, (1, 2))
ROW_POINTS = 5.5
"""Height of a row of stars."""
CROWDED = 0.055
"""Share of the x axis below which two places are too close for three stars; then all places are equally far apart."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One number of one series."""

    series: str
    x: float
    estimate: float
    """NaN: missing, and shown as missing."""
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, kw_only=True)
class CurveTest:
    """A test of one series at one place, usually against the first series."""

    series: str
    x: float
    p: float


@dataclass(frozen=True, kw_only=True)
class CurvePanel:
    """One pair of axes."""

    title: str
    xlabel: str
    ylabel: str
    points: Sequence[CurvePoint]
    tick_labels: Mapping[float, str]
    """Of every place on the x axis."""
    tests: Sequence[CurveTest] = ()
    floor: float = math.nan
    """What a predictor that knows nothing of the image reaches."""
    joined: bool = True
    """Whether the places have an order, so that a line between them means something."""
    limits: tuple[float, float] | None = None
    """Ends of the y axis."""


def curve_figure(
    panels: Sequence[CurvePanel],
    looks: Mapping[str, Look],
    *,
    small_print: str = "",
    floor_name: str = "without image",
    columns: int | None = None,
) -> Figure:
    """The panels in rows, with one legend and what the marks mean.

    Args:
        panels: in reading order; one alone is as wide as a column, more fill a page.
        looks: series -> look.
        small_print: a line below the legend.
        floor_name: of the dotted line.
        columns: panels in a row, at most three unless given.

    Raises:
        ValueError: no panel.
    """
    if not panels:
        raise ValueError("no panel to draw; expected at least one table with rows")
    if columns is None:
        columns = min(3, len(panels)) if len(panels) != 4 else 2
    lines = math.ceil(len(panels) / columns)
    width = COLUMN_MM if len(panels) == 1 else PAGE_MM
    rows = max(len(_tested(panel, looks)) for panel in panels)
    height = lines * (44 + rows * ROW_POINTS * 0.353) + 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(inches(width), inches(height)), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for number, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
            draw_panel(axis, panel, looks, title=lettered(number, panel.title) if len(panels) > 1 else panel.title)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        handles = series_handles(looks, line=any(panel.joined for panel in panels))
        if any(math.isfinite(panel.floor) for panel in panels):
            handles.append(Line2D([], [], color=NEUTRAL, linestyle=FLOOR_DASHES, label=floor_name))
        add_foot(figure, handles, small_print)
    return figure


def draw_panel(axes: Axes, panel: CurvePanel, looks: Mapping[str, Look], *, title: str) -> None:
    """The curves, intervals, floor and tests of one panel."""
    places = _places(panel.tick_labels)
    names = [name for name in looks if any(point.series == name for point in panel.points)]
    gap = min((b - a for a, b in pairwise(places.values())), default=1.0)
    step = min(0.6 * gap / max(len(names), 1), 0.09 * gap if panel.joined else gap)
    offsets = {name: step * (number - (len(names) - 1) / 2) for number, name in enumerate(names)}
    for order, name in enumerate(names):
        of_series = sorted((point for point in panel.points if point.series == name), key=lambda p: places[p.x])
        shown = [point for point in of_series if math.isfinite(point.estimate)]
        look = looks[name]
        x = [places[point.x] + offsets[name] for point in shown]
        y = [point.estimate for point in shown]
        for place, point in zip(x, shown, strict=True):
            if math.isfinite(point.low) and math.isfinite(point.high):
                axes.plot(
                    [place, place], [point.low, point.high], color=look.colour, linewidth=0.8, alpha=0.75, zorder=2
                )
        (line,) = axes.plot(
            x,
            y,
            color=look.colour,
            marker=look.marker,
            zorder=3,
            gid=f"series {name}",
            linestyle=look.dashes if panel.joined else "none",
            markeredgecolor="white",
            markeredgewidth=0.3,
        )
        line.set_label(name)
        for point in of_series:
            if not math.isfinite(point.estimate):
                axes.plot(
                    [places[point.x]],
                    [0.03 + 0.055 * order],
                    marker=look.marker,
                    color=look.colour,
                    fillstyle="none",
                    transform=axes.get_xaxis_transform(),
                    linestyle="none",
                    markersize=3,
                    gid=f"missing {name}",
                )
    if math.isfinite(panel.floor):
        axes.axhline(panel.floor, color=NEUTRAL, linestyle=FLOOR_DASHES, linewidth=1, zorder=1)
    axes.set_xticks(list(places.values()), [panel.tick_labels[x] for x in places])
    span = max(places.values()) - min(places.values())
    reach = step * (len(names) - 1) / 2
    margin = 0.5 * gap if not span or not panel.joined else max(0.06 * span, reach + 0.03 * span)
    axes.set_xlim(min(places.values()) - margin, max(places.values()) + margin)
    axes.margins(y=0.08)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="y")
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    tested = _tested(panel, looks)
    axes.set_title(title, pad=4 + ROW_POINTS * len(tested))
    mpl_pad = axes.figure.dpi_scale_trans  # type: ignore[union-attr]
    for row, name in enumerate(reversed(tested)):
        height = 3 + ROW_POINTS * row
        shifted = axes.transAxes + ScaledTranslation(-4 / 72, (height + 1.6) / 72, mpl_pad)
        axes.plot(
            [0],
            [1],
            marker=looks[name].marker,
            color=looks[name].colour,
            markersize=2.8,
            transform=shifted,
            clip_on=False,
            linestyle="none",
            gid=f"row {name}",
        )
        for test in panel.tests:
            if test.series == name and (mark := stars(test.p)):
                significant = mark != NOT_SIGNIFICANT
                axes.annotate(
                    mark,
                    (places[test.x], 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, height - significant),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=6 if significant else 4.5,
                    color=looks[name].colour if significant else SOFT,
                    annotation_clip=False,
                    linespacing=0.7,
                )


def small_print(panels: Sequence[CurvePanel], first: str, adjustment: str) -> str:
    """What the marks of these panels mean.

    Args:
        panels: of the figure.
        first: the series that the others are compared with.
        adjustment: of p, in words.
    """
    words = []
    if any(not math.isnan(test.p) for panel in panels for test in panel.tests):
        words.append(f"{STARS_NOTE}, ns not significant: {first} against the marked, {adjustment}.")
    if any(math.isfinite(point.low) for panel in panels for point in panel.points):
        words.append("Bars: 95 % intervals.")
    if any(not math.isfinite(point.estimate) for panel in panels for point in panel.points):
        words.append("Hollow on the axis: no value.")
    return " ".join(words)


def _tested(panel: CurvePanel, looks: Mapping[str, Look]) -> list[str]:
    """The series that have a test to show, in the order of the legend."""
    return [name for name in looks if any(test.series == name and stars(test.p) for test in panel.tests)]


def _places(ticks: Mapping[float, str]) -> dict[float, float]:
    """x -> where it is drawn: as it is, or equally far apart where that would be crowded."""
    values = sorted(ticks)
    span = values[-1] - values[0]
    if any(b - a < CROWDED * span for a, b in pairwise(values)):
        return {value: float(number) for number, value in enumerate(values)}
    return {value: value for value in values}
