"""Pictures of segmentations: contours of reference and predictions on one slice of a case (paper Fig. 2)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from braindino.atomic import replace_file
from braindino.segmentation_scores import SegmentationScores
from braindino.slices import axial_slices
from braindino.volume import Volume, load_labels, load_volume
from nnunet_braindino.evaluate import channel_files, load_prediction
from nnunet_braindino.predictions import PredictionSet, label_ratio
from nnunet_braindino.raw_dataset import FILE_ENDING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUTH_COLOR = "#ffd400"
PREDICTION_COLORS = ("#e3342f", "#3ec1d3", "#7ed957", "#c77dff", "#ff9f1c", "#f5f5f5")
# The reference lies under the prediction and stays visible where both agree.
TRUTH_WIDTH, PREDICTION_WIDTH = 1.8, 0.8
MARGIN = 4  # pixels around the brain


class Panel(NamedTuple):
    """One picture: a slice and contours on it, the first at the bottom."""

    title: str
    background: np.ndarray
    """(rows, columns) float32."""
    aspect: float
    """Height of a pixel over its width."""
    contours: list[tuple[np.ndarray, str, float]]
    """(rows, columns) bool, colour, width of the line in points."""
    caption: str = ""


def chosen_cases(scores: SegmentationScores) -> dict[str, str]:
    """``worst``, ``median`` and ``best`` -> case, by the mean Dice over regions, so that a picture of them is no choice
    of the best. Fewer where there are fewer cases; cases without any Dice do not count.
    """
    means = {
        case: float(np.mean([value for value in row.values() if not math.isnan(value)]))
        for case, row in scores.cases.items()
        if not all(math.isnan(value) for value in row.values())
    }
    ranked = sorted(means, key=lambda case: (means[case], case))
    if len(ranked) < 3:
        return dict(zip(("worst", "best"), ranked, strict=False))
    return {"worst": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "best": ranked[-1]}


def set_panels(
    each: PredictionSet, scores: SegmentationScores, images: Path, cases: Mapping[str, str]
) -> list[list[Panel]]:
    """A row per case: the slice alone, then each region with reference and prediction.

    Args:
        each: the predictions.
        scores: of them.
        images: folder with nnU-Net's images; the last channel is shown.
        cases: word -> case, from ``chosen_cases``.
    """
    rows = []
    for word, case in cases.items():
        view = _View(case, [each], images)
        row = [view.panel("", [], caption=f"{word}: {case}")]
        for region, values in each.regions.items():
            contours = [(view.reference(values), TRUTH_COLOR, TRUTH_WIDTH)]
            contours.append((view.prediction(each.name, values), PREDICTION_COLORS[0], PREDICTION_WIDTH))
            row.append(view.panel(f"{region}  {_cell(scores.cases[case][region])}", contours))
        rows.append(row)
    return rows


def comparison_panels(
    sets: Sequence[PredictionSet], scores: Mapping[str, SegmentationScores], images: Path, cases: Mapping[str, str]
) -> list[list[Panel]]:
    """A row per case and region: the slice alone, the reference, then every set of predictions."""
    rows = []
    for word, case in cases.items():
        view = _View(case, sets, images)
        for region, values in sets[0].regions.items():
            truth = (view.reference(values), TRUTH_COLOR, TRUTH_WIDTH)
            row = [view.panel("", [], caption=f"{word}: {case}"), view.panel(f"reference, {region}", [truth])]
            for number, each in enumerate(sets):
                color = PREDICTION_COLORS[number % len(PREDICTION_COLORS)]
                contour = (view.prediction(each.name, values), color, PREDICTION_WIDTH)
                title = f"{each.name}  {_cell(scores[each.name].cases[case][region])}"
                row.append(view.panel(title, [truth, contour]))
            rows.append(row)
    return rows


def draw_panels(rows: Sequence[Sequence[Panel]], colors: Mapping[str, str]) -> "Figure":
    """The panels on black, with a legend.

    Args:
        rows: all of one length.
        colors: what a colour stands for -> colour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    size = (2.4 * len(rows[0]), 2.6 * len(rows) + 0.5)
    figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        for axis, panel in zip(axes, row, strict=True):
            inside = panel.background[panel.background != 0]
            low, high = np.percentile(inside, (1, 99)) if len(inside) else (0, 1)
            axis.imshow(panel.background, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=panel.aspect)
            for mask, color, width in panel.contours:
                if mask.any():
                    axis.contour(np.pad(mask, 1), levels=[0.5], colors=[color], linewidths=width, extent=_extent(mask))
            axis.set_title(panel.title, color="white", fontsize=7)
            if panel.caption:
                axis.text(0.02, 0.02, panel.caption, transform=axis.transAxes, color="white", fontsize=6)
            axis.set_axis_off()
    figure.legend(
        handles=[Line2D([], [], color=color, label=label) for label, color in colors.items()],
        loc="outside lower center", ncols=4, fontsize=7, labelcolor="white", facecolor="black", edgecolor="none",
        title="Dice of the whole case; the slice with most of all regions; patient's right on the left",
        title_fontproperties={"size": 7},
    ).get_title().set_color("white")  # fmt: skip
    return figure


def write_overlays(
    sets: Sequence[PredictionSet], scores: Mapping[str, SegmentationScores], images: Path, out: Path
) -> None:
    """Write ``OUT/<name>/overlay.png``, and ``OUT/overlay.png`` with those of the most labels side by side where there
    are several.

    The worst, median and best cases are those of the first set, so that all pictures show the same.
    """
    cases = chosen_cases(scores[sets[0].name])
    if not cases:
        return
    for each in sets:
        colors = {"reference": TRUTH_COLOR, each.name: PREDICTION_COLORS[0]}
        _save(draw_panels(set_panels(each, scores[each.name], images, cases), colors), out / each.name / "overlay.png")
    largest = max(label_ratio(each.name)[1] for each in sets)
    shown = [each for each in sets if label_ratio(each.name)[1] == largest]
    if len(shown) > 1:
        colors = {each.name: PREDICTION_COLORS[i % len(PREDICTION_COLORS)] for i, each in enumerate(shown)}
        panels = comparison_panels(shown, scores, images, cases)
        _save(draw_panels(panels, {"reference": TRUTH_COLOR, **colors}), out / "overlay.png")


class _View:
    """One case, cut at the slice with most of all its regions together, and to what is not empty there."""

    def __init__(self, case: str, sets: Sequence[PredictionSet], images: Path) -> None:
        path = sets[0].references / f"{case}{FILE_ENDING}"
        self._labels = Volume(*load_labels(path))
        self._image = load_volume(channel_files(images, case)[-1])
        self.predictions = {each.name: load_prediction(each.files[case], self._labels, path) for each in sets}
        area = sum(np.isin(self._labels.data, values).sum(axis=(0, 1)) for values in sets[0].regions.values())
        if not np.any(area):
            area = sum((prediction != 0).sum(axis=(0, 1)) for prediction in self.predictions.values())
        self._index = int(np.argmax(area)) if np.any(area) else self._labels.shape[2] // 2
        self._box: tuple[slice, ...] = (slice(None), slice(None))
        filled = np.any([self._cut(data) != 0 for data in (self._image.data, self._labels.data)], axis=0)
        for prediction in self.predictions.values():
            filled |= self._cut(prediction) != 0
        extents = [np.flatnonzero(filled.any(axis=axis)) for axis in (1, 0)]
        self._box = tuple(slice(max(0, each[0] - MARGIN), each[-1] + 1 + MARGIN) for each in extents)

    def reference(self, values: tuple[int, ...]) -> np.ndarray:
        """(rows, columns) bool: where the reference is one of the values."""
        return self._cut(np.isin(self._labels.data, values)) > 0

    def prediction(self, name: str, values: tuple[int, ...]) -> np.ndarray:
        """(rows, columns) bool: where a prediction is one of the values."""
        return self._cut(np.isin(self.predictions[name], values)) > 0

    def panel(self, title: str, contours: list[tuple[np.ndarray, str, float]], *, caption: str = "") -> Panel:
        column_mm, row_mm, _ = self._image.spacing
        return Panel(title, self._cut(self._image.data), row_mm / column_mm, contours, caption)

    def _cut(self, data: np.ndarray) -> np.ndarray:
        return axial_slices(Volume(data, self._labels.affine), [self._index])[0][self._box]


def _extent(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Where the centres of the padded mask's corner pixels lie, in pixels of the mask."""
    rows, columns = mask.shape
    return -1.0, columns, -1.0, rows


def _save(figure: "Figure", path: Path) -> None:
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="black")


def _cell(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"
