"""The report's figures: tables in, figure out. Curves and intervals as drawings, slices and maps as pixels."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import EngFormatter, MaxNLocator

from braindino.patch_maps import edge
from braindino.report.markup import THEME

INK, SOFT, LINE, NEUTRAL = (THEME[name][0] for name in ("ink", "soft", "line", "neutral"))
SERIES = tuple(THEME[f"series-{number}"][0] for number in (1, 2, 3, 4))
# Typed loosely: matplotlib's own type for it spells out every key of one version.
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
MARKERS = "osv^"
SIMILARITY_COLOURS = "RdBu_r"
SMOOTH_FROM_POINTS = 100
SVG_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


class Estimate(NamedTuple):
    """One number with its interval.

    Attributes:
        label: whose number it is.
        value: the estimate.
        low: lower end of its interval, NaN without one.
        high: upper end, NaN without one.
        series: 0 to 3 for encoders, None for a trivial baseline; decides colour and marker.
    """

    label: str
    value: float
    low: float
    high: float
    series: int | None


class GateMeasure(NamedTuple):
    """One of the numbers that the quality gate judges brain masks by.

    Attributes:
        title: what it is.
        unit: of its values; empty for shares.
        passed, stopped: its values on masks that passed and on those that did not.
        low, high: limits; infinite where there is none.
    """

    title: str
    unit: str
    passed: Sequence[float]
    stopped: Sequence[float]
    low: float
    high: float


def cohort_figure(ages: Sequence[float], sequences: Mapping[str, int], sites: Mapping[str, int]) -> Figure:
    """Ages of the subjects, scans per sequence, subjects per site; parts without data are left out."""
    panels = [name for name, part in (("ages", ages), ("sequences", sequences), ("sites", sites)) if part]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(panels), 2.3), layout="constrained")
        axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
        if ages:
            low, high = 5 * math.floor(min(ages) / 5), 5 * math.floor(max(ages) / 5) + 5
            axes["ages"].hist(ages, bins=np.arange(low, high + 1, 5).tolist(), color=SERIES[0], rwidth=0.92)
            axes["ages"].set(title="Age", xlabel="years", ylabel="subjects")
            axes["ages"].yaxis.set_major_locator(MaxNLocator(integer=True))
            axes["ages"].grid(axis="y")
        if sequences:
            _bars(axes["sequences"], sequences, title="Sequence", xlabel="scans", colour=SERIES[0])
        if sites:
            _bars(axes["sites"], sites, title="Site", xlabel="subjects", colour=SERIES[0])
    return figure


def scans_figure(spacings: np.ndarray, intensities: Mapping[str, Sequence[float]]) -> Figure:
    """Voxel sizes along each axis, and how bright the scans of each sequence came.

    Args:
        spacings: (n, 3) mm along right, anterior, superior.
        intensities: sequence -> median raw intensity of each of its scans, in whatever unit the scanner used.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 2.5), layout="constrained")
        sizes, brightness = figure.subplots(1, 2)
        edges = np.linspace(0, max(1.0, 1.02 * float(spacings.max())), 41)
        for axis, name in enumerate(("right", "anterior", "superior")):
            sizes.hist(spacings[:, axis], bins=edges, histtype="step", linewidth=1.8, color=SERIES[axis], label=name)
        sizes.set(title="Voxel size", xlabel="mm", ylabel="scans")
        shown = {name: np.maximum(values, 1e-3) for name, values in intensities.items() if len(values)}
        everything = np.concatenate(list(shown.values()))
        edges = np.geomspace(everything.min() / 1.2, everything.max() * 1.2, 41)
        for place, (name, values) in enumerate(shown.items()):
            colour = SERIES[place] if place < len(SERIES) else NEUTRAL
            brightness.hist(values, bins=edges, histtype="step", linewidth=1.8, color=colour, label=name)
        brightness.set(title="Median raw intensity", xlabel="arbitrary units of the scanner", ylabel="scans")
        brightness.set_xscale("log")
        brightness.xaxis.set_major_formatter(EngFormatter(sep=""))
        for axes in (sizes, brightness):
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(axis="y")
            axes.legend(fontsize=8)
    return figure


def gate_figure(measures: Sequence[GateMeasure]) -> Figure:
    """What the quality gate measured on the masks that passed and on those it stopped, and where its limits are."""
    columns = min(4, len(measures))
    lines = math.ceil(len(measures) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.55 * columns, 1.9 * lines + 0.3), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, measure in zip(axes, measures, strict=False):
            values = np.concatenate([measure.passed, measure.stopped])
            inner = [limit for limit in (measure.low, measure.high) if math.isfinite(limit)]
            start, end = min([*values, *inner]), max([*values, *inner])
            margin = max(1e-3, 0.05 * (end - start))
            edges = np.linspace(start - margin, end + margin, 31).tolist()
            parts = [measure.passed, measure.stopped]
            panel.hist(parts, bins=edges, stacked=True, color=[SERIES[0], SERIES[1]], label=["passed", "stopped"])
            for limit in inner:
                panel.axvline(limit, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            panel.set(title=measure.title, xlabel=measure.unit)
            panel.locator_params(axis="x", nbins=4)
            panel.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        for panel in axes[len(measures) :]:
            panel.set_visible(False)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=2, fontsize=8)
    return figure


def curves_figure(rows: Sequence[Mapping[str, float]], titles: Mapping[str, str]) -> Figure:
    """One small panel per quantity against the iteration; from 100 points on, a running mean is drawn over the raw
    line.

    Args:
        rows: logged iterations, each with ``iteration`` and some of the quantities.
        titles: quantities in the order of the panels, each with the title of its panel.
    """
    names = list(titles)
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.75 * columns, 1.95 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for place, name in enumerate(names):
            points = np.array([(row["iteration"], row[name]) for row in rows if name in row], dtype=float)
            points = points[np.isfinite(points).all(axis=1)]
            panel = axes[place]
            many = len(points) >= SMOOTH_FROM_POINTS
            panel.plot(*points.T, color=SERIES[0], linewidth=0.9 if many else 1.5, alpha=0.35 if many else 1)
            if many:
                panel.plot(*_running_mean(points, width=len(points) // 25).T, color=SERIES[0], linewidth=1.8)
            panel.set_title(titles[name])
            panel.grid(axis="y")
            panel.locator_params(nbins=4)
            panel.yaxis.set_major_formatter("{x:g}")
            if place >= len(names) - columns:
                panel.set_xlabel("iteration")
        for panel in axes[len(names) :]:
            panel.set_visible(False)
    return figure


def interval_figure(estimates: Sequence[Estimate], *, xlabel: str, limits: tuple[float, float] | None = None) -> Figure:
    """A dot with its interval per estimate, one below the other; trivial baselines as hollow grey diamonds.

    Args:
        estimates: from top to bottom.
        xlabel: the measure, with its unit and which way is better.
        limits: ends of the axis, for measures that have them.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.75 + 0.34 * len(estimates)), layout="constrained")
        axes = figure.subplots()
        for height, estimate in enumerate(estimates):
            colour = NEUTRAL if estimate.series is None else SERIES[estimate.series]
            if math.isfinite(estimate.low) and math.isfinite(estimate.high):
                axes.plot(
                    [estimate.low, estimate.high], [height, height], color=colour, linewidth=2.4, solid_capstyle="round"
                )
            marker, face = ("D", "none") if estimate.series is None else (MARKERS[estimate.series], colour)
            axes.plot(
                [estimate.value],
                [height],
                marker=marker,
                color=colour,
                markerfacecolor=face,
                markersize=6.5,
                linestyle="none",
            )
        axes.set_yticks(range(len(estimates)), [estimate.label for estimate in estimates])
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=10)
        axes.set_ylim(len(estimates) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(xlabel)
        if limits is not None:
            axes.set_xlim(*limits)
    return figure


def dice_figure(scores: Mapping[str, Mapping[str, Sequence[float]]], regions: Sequence[str]) -> Figure:
    """One panel per region: a row per set of predictions, a small dot per case, a large one for the mean.

    Args:
        scores: predictions -> region -> Dice per case.
        regions: panels, from left to right.
    """
    names = list(scores)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.0 + 2.3 * len(regions), 0.95 + 0.38 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(regions), squeeze=False, sharey=True)[0]
        for panel, region in zip(panels, regions, strict=True):
            for height, name in enumerate(names):
                values = scores[name].get(region, ())
                if not len(values):
                    continue
                colour = SERIES[height % len(SERIES)]
                panel.plot(
                    values, [height] * len(values), "o", color=colour, markersize=4, alpha=0.4, markeredgewidth=0
                )
                panel.plot([np.mean(values)], [height], MARKERS[height % len(MARKERS)], color=colour, markersize=8)
            panel.set(title=region, xlabel="Dice", xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5))
            panel.set_xticks([0, 0.5, 1])
            panel.set_yticks(range(len(names)), names)
            panel.tick_params(axis="y", length=0, labelcolor=INK, labelsize=10)
            panel.spines["left"].set_visible(False)
            panel.grid(axis="x")
    return figure


def colour_bar() -> Figure:
    """The scale of all similarity maps, -1 to 1."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.2, 0.55), layout="constrained")
        axes = figure.subplots()
        colours = mpl.cm.ScalarMappable(mpl.colors.Normalize(-1, 1), SIMILARITY_COLOURS)
        bar = figure.colorbar(colours, cax=axes, orientation="horizontal", ticks=[-1, -0.5, 0, 0.5, 1])
        bar.outline.set_visible(False)
    return figure


def svg(figure: Figure, *, salt: str) -> str:
    """The figure as an SVG document, text as text; equal for equal figure and ``salt``, which sets its ids apart."""
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=SVG_METADATA)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """A (height, width, 3) picture, values 0 to 1, as PNG."""
    buffer = io.BytesIO()
    imsave(buffer, np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8), format="png", metadata={"Software": ""})
    return buffer.getvalue()


def grey_picture(image: np.ndarray) -> np.ndarray:
    """(height, width, 3) in 0 to 1: a standardised slice, 1st to 99th percentile dark to white, background black."""
    tissue = image != 0
    if not tissue.any():
        return np.zeros((*image.shape, 3))
    low, high = np.percentile(image[tissue], (1, 99))
    grey = 0.08 + 0.92 * np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat((grey * tissue)[..., None], 3, axis=2)


def similarity_picture(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(height, width, 3) in 0 to 1: similarity, -1 (blue) to 1 (red), the tissue of ``image`` outlined in black."""
    pixels = mpl.colormaps[SIMILARITY_COLOURS]((values + 1) / 2)[..., :3]
    pixels[edge(image != 0)] = 0.1
    return pixels


def mark_patch(pixels: np.ndarray, row: int, column: int, patch_size: int) -> np.ndarray:
    """The picture with a frame around one patch: white within black, so that it is seen on any ground."""
    marked = pixels.copy()
    for margin, value in ((2, 0.0), (1, 1.0), (0, 1.0), (-1, 0.0)):
        top, left = row * patch_size - margin, column * patch_size - margin
        bottom, right = (row + 1) * patch_size - 1 + margin, (column + 1) * patch_size - 1 + margin
        height, width = marked.shape[:2]
        rows = np.clip(np.arange(top, bottom + 1), 0, height - 1)
        columns = np.clip(np.arange(left, right + 1), 0, width - 1)
        marked[rows[[0, -1]][:, None], columns] = value
        marked[rows[:, None], columns[[0, -1]]] = value
    return marked


def _bars(axes: Axes, counts: Mapping[str, int], *, title: str, xlabel: str, colour: str) -> None:
    names = list(counts)
    axes.barh(range(len(names)), [counts[name] for name in names], color=colour, height=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(title=title, xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _running_mean(points: np.ndarray, *, width: int) -> np.ndarray:
    """(n - width + 1, 2) means of ``width`` consecutive points."""
    sums = np.cumsum(np.vstack([np.zeros(2), points]), axis=0)
    return (sums[width:] - sums[:-width]) / width
