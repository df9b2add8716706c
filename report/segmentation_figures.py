"""Contours of segmented regions on a slice, reference and predictions side by side (paper Fig. 2), and Dice over label
ratios (Fig. 3a)."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from braindino.records import read_json
from braindino.report.curve_panels import CurvePanel, CurvePoint, CurveTest, curve_figure, small_print
from braindino.report.print_style import PAGE_MM, STYLE, Drawing, add_foot, inches, looks_of, short, stars
from braindino.segmentation_scores import Comparison, OverviewRow
from braindino.slices import axial_slices
from braindino.volume import Volume, load_labels, load_volume

FILE_ENDING = ".nii.gz"
DATASET_FILE = "dataset.json"
# On grey brains: light, and each with its own dashes.
REGION_LOOKS: tuple[tuple[str, Any], ...] = (
    ("#ffd400", "solid"),
    ("#39d0ff", (0, (4, 1.2))),
    ("#ff5cc8", (0, (1.2, 1))),
    ("#9dff57", (0, (5, 1, 1, 1))),
)
MARGIN = 4
REFERENCE = "reference"


@dataclass(frozen=True, eq=False)
class SegmentedSlice:
    """One case, cut at the slice with most of its reference.

    Attributes:
        case: its name.
        image: (rows, columns) float32; row 0 anterior, column 0 patient right.
        index: slice, from the bottom.
        aspect: height of a pixel over its width.
        masks: ``reference`` and names of predictions -> region -> (rows, columns) bool.
        dice: name of predictions -> region -> Dice of the whole case; NaN where neither has the region.
    """

    case: str
    image: np.ndarray
    index: int
    aspect: float
    masks: Mapping[str, Mapping[str, np.ndarray]]
    dice: Mapping[str, Mapping[str, float]]


def read_regions(predictions: Path) -> dict[str, tuple[int, ...]]:
    """Region -> its labels, from nnU-Net's ``dataset.json`` beside the predictions.

    Raises:
        ValueError: there is none, or it names no region.
    """
    path = predictions / DATASET_FILE
    if not path.is_file():
        raise ValueError(f"{predictions}: no {DATASET_FILE}; expected a folder that nnUNetv2_predict wrote")
    labels = read_json(path).get("labels")
    if not isinstance(labels, dict):
        raise ValueError(f"{path}: no labels; expected the description that nnU-Net copies beside its predictions")
    regions = {
        str(name): tuple(int(value) for value in (values if isinstance(values, list) else [values]))
        for name, values in labels.items()
        if name not in ("background", "ignore")
    }
    if not regions:
        raise ValueError(f"{path}: no label besides the background; expected regions to outline")
    return regions


def cut_case(
    case: str, image: Path, reference: Path, predictions: Mapping[str, Path], regions: Mapping[str, Sequence[int]]
) -> SegmentedSlice:
    """A case at the slice with most of its reference, or of its predictions where that is empty.

    Args:
        case: its name.
        image: scan to show.
        reference: label map.
        predictions: name -> label map.
        regions: name -> labels.

    Raises:
        ValueError: a label map is on another grid than the reference.
    """
    labels, affine = load_labels(reference)
    maps = {REFERENCE: labels}
    for name, path in predictions.items():
        predicted, place = load_labels(path)
        if predicted.shape != labels.shape or not np.allclose(place, affine, atol=1e-3):
            raise ValueError(
                f"{path}: grid {predicted.shape} differs from that of {reference}, {labels.shape}, or lies elsewhere"
            )
        maps[name] = predicted
    volume = load_volume(image)
    if volume.shape != labels.shape:
        raise ValueError(f"{image}: grid {volume.shape} differs from that of {reference}, {labels.shape}")
    members = sorted({value for values in regions.values() for value in values})
    area = np.isin(labels, members).sum(axis=(0, 1))
    if not area.any():
        area = sum(np.isin(data, members).sum(axis=(0, 1)) for data in maps.values())
    index = int(np.argmax(area)) if np.any(area) else labels.shape[2] // 2

    def cut(data: np.ndarray) -> np.ndarray:
        return axial_slices(Volume(data, affine), [index])[0]

    shown = cut(volume.data)
    filled = shown != 0
    for data in maps.values():
        filled |= cut(data) != 0
    if not filled.any():
        filled[:] = True
    box = tuple(
        slice(max(0, places[0] - MARGIN), places[-1] + 1 + MARGIN)
        for places in (np.flatnonzero(filled.any(axis=axis)) for axis in (1, 0))
    )
    masks = {
        name: {region: cut(np.isin(data, list(values)))[box] > 0 for region, values in regions.items()}
        for name, data in maps.items()
    }
    dice = {
        name: {
            region: _dice(np.isin(data, list(values)), np.isin(labels, list(values)))
            for region, values in regions.items()
        }
        for name, data in maps.items()
        if name != REFERENCE
    }
    width_mm, height_mm, _ = volume.spacing
    return SegmentedSlice(case, shown[box], index, height_mm / width_mm, masks, dice)


def contour_figure(slices: Sequence[SegmentedSlice], *, width_mm: float = PAGE_MM) -> Drawing:
    """A row per case: the slice, the reference, and each set of predictions with the Dice of the whole case.

    Args:
        slices: of the same predictions and regions.
        width_mm: of the figure.

    Raises:
        ValueError: no case.
    """
    if not slices:
        raise ValueError("contours: no case to draw; expected at least one")
    sets = [REFERENCE, *slices[0].dice]
    regions = list(slices[0].masks[REFERENCE])
    looks = {region: REGION_LOOKS[number % len(REGION_LOOKS)] for number, region in enumerate(regions)}
    columns = 1 + len(sets)
    side = (width_mm - 4) / columns
    tallest = max(each.aspect * each.image.shape[0] / each.image.shape[1] for each in slices)
    table = []
    with mpl.rc_context({**STYLE, "text.color": "white", "axes.titlecolor": "white"}):
        size = inches(width_mm), inches(len(slices) * (side * tallest + 5) + 1)
        figure = Figure(figsize=size, layout="constrained", facecolor="black")
        grid = figure.subplots(len(slices), columns, squeeze=False)
        for line, each in zip(grid, slices, strict=True):
            _grey(line[0], each)
            line[0].set_title(f"{short(each.case, 22)}, slice {each.index}", fontweight="normal", fontsize=6)
            for axes, name in zip(line[1:], sets, strict=True):
                _grey(axes, each)
                for region, (colour, dashes) in looks.items():
                    mask = each.masks[name][region]
                    if mask.any():
                        axes.contour(
                            np.pad(mask, 1).astype(float),
                            levels=[0.5],
                            colors=[colour],
                            linewidths=0.8,
                            linestyles=[dashes],
                            extent=(-1.0, mask.shape[1], -1.0, mask.shape[0]),
                        )
                axes.set_title(short(name, 22), fontsize=6)
                if name != REFERENCE:
                    scores = each.dice[name]
                    axes.text(
                        0.02,
                        0.02,
                        "\n".join(_short_dice(scores[region]) for region in regions),
                        transform=axes.transAxes,
                        fontsize=5,
                        va="bottom",
                        linespacing=1.2,
                    )
                    table += [(each.case, each.index, name, region, _short_dice(scores[region])) for region in regions]
        handles = [
            Line2D([], [], color=colour, linestyle=dashes, label=region) for region, (colour, dashes) in looks.items()
        ]
        words = f"Numbers: Dice of the whole case, {', '.join(regions)}. The patient's right is on the left."
        add_foot(figure, handles, words, colour="white")
    caption = "Contours of the regions on the slice with most of the reference; Dice of the whole case."
    return Drawing(figure, ("case", "slice", "predictions", "region", "dice"), table, caption)


def dice_ratio_figure(
    rows: Sequence[OverviewRow],
    comparisons: Sequence[Comparison],
    *,
    metric: str = "Dice",
    trainers: Collection[str] | None = None,
) -> Drawing:
    """Mean Dice or HD95 over the share of the labels, a panel per region (paper Fig. 3a).

    Args:
        rows: of ``scores.tsv``.
        comparisons: of ``comparison.tsv``; those of the first trainer are marked.
        metric: ``Dice`` or ``HD95 (mm)``.
        trainers: to show; None for all.

    Raises:
        ValueError: no row is left.
    """
    kept = [row for row in rows if row.metric == metric and (trainers is None or row.trainer in trainers)]
    if not kept:
        found = ", ".join(dict.fromkeys(f"{row.trainer} ({row.metric})" for row in rows)) or "no row at all"
        raise ValueError(f"segmentation scores: no row of {metric} of the trainers asked for; found {found}")
    looks = looks_of(row.trainer for row in kept)
    first = next(iter(looks))
    trainer_of = {row.predictions: row.trainer for row in kept}
    panels, table = [], []
    for region in dict.fromkeys(row.region for row in kept):
        of_region = [row for row in kept if row.region == region]
        tests = [
            (trainer_of[c.second], c)
            for c in comparisons
            if (c.metric, c.region) == (metric, region) and trainer_of.get(c.first) == first and c.second in trainer_of
        ]
        floors = [row.floor for row in of_region if math.isfinite(row.floor)] if metric == "Dice" else []
        panels.append(
            CurvePanel(
                title=region,
                xlabel=f"labels (%); {max(row.cases for row in of_region)} cases",
                ylabel=f"mean {metric}" + ("" if metric == "Dice" else ", lower is better"),
                points=[
                    CurvePoint(series=row.trainer, x=100 * row.ratio, estimate=row.mean, low=row.low, high=row.high)
                    for row in of_region
                ],
                tick_labels={100 * row.ratio: f"{100 * row.ratio:g}" for row in of_region},
                tests=[CurveTest(series=name, x=100 * c.ratio, p=c.p_bootstrap_holm) for name, c in tests],
                floor=floors[0] if floors else math.nan,
            )
        )
        p_of = {(name, c.ratio): c.p_bootstrap_holm for name, c in tests}
        for row in of_region:
            p = p_of.get((row.trainer, row.ratio), math.nan)
            cells = (row.mean, row.sd, row.low, row.high, row.floor, p)
            table.append(
                (
                    row.trainer,
                    f"{row.ratio:g}",
                    row.metric,
                    row.region,
                    row.cases,
                    *("n/a" if math.isnan(value) else f"{value:.6g}" for value in cells),
                    stars(p),
                )
            )
    words = small_print(panels, short(first), "paired bootstrap over subjects, Holm")
    columns = ("trainer", "ratio", "metric", "region", "cases", "mean", "sd", "low", "high", "floor", "p_holm", "mark")
    caption = f"Mean {metric} per region over the share of labelled cases. Dotted: the whole brain."
    figure = curve_figure(panels, looks, small_print=words, floor_name="the whole brain")
    return Drawing(figure, columns, table, caption)


def _grey(axes: Axes, each: SegmentedSlice) -> None:
    inside = each.image[each.image != 0]
    low, high = np.percentile(inside, (1, 99)) if len(inside) else (0.0, 1.0)
    axes.imshow(each.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=each.aspect)
    axes.set_axis_off()


def _dice(predicted: np.ndarray, reference: np.ndarray) -> float:
    total = int(predicted.sum()) + int(reference.sum())
    return 2 * int((predicted & reference).sum()) / total if total else math.nan


def _short_dice(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"
