"""Dice of predicted label maps, per case and region, and a picture of where they agree (paper sec. 4.3.1, Fig. 2)."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from braindino.atomic import replace_file, write_json, write_text
from braindino.progress import track
from braindino.slices import axial_slices
from braindino.volume import Volume, load_labels, load_volume

FILE_ENDING = ".nii.gz"
OVERLAY_CASES = 4
TRUTH_COLOR, PREDICTION_COLOR = "#ffd400", "#e3342f"
EMPTY_NOTE = "empty in both prediction and reference: no Dice, not counted in the mean"

Regions = Mapping[str, tuple[int, ...]]


class RegionSummary(NamedTuple):
    """Over the cases where the Dice of a region is defined."""

    mean: float
    sd: float
    """Standard deviation over cases (n - 1); NaN for fewer than two."""
    num_cases: int


class Scores(NamedTuple):
    cases: dict[str, dict[str, float]]
    """case -> region -> Dice; NaN where the region is empty in both."""
    summary: dict[str, RegionSummary]


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of two masks; NaN when both are empty, 0 when one is."""
    size = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2 * int(np.count_nonzero(prediction & reference)) / size if size else math.nan


def score_folder(predictions: Path, references: Path) -> Scores:
    """Dice of every reference label map against the prediction of the same file name.

    Regions are read from the ``dataset.json`` that nnU-Net leaves beside the predictions, or from the one of the
    dataset that the references belong to.

    Raises:
        ValueError: a prediction is missing or on another grid, or there is nothing to score.
    """
    regions = read_regions(predictions, references)
    paths = sorted(references.glob(f"*{FILE_ENDING}"))
    if not paths:
        raise ValueError(f"{references}: no *{FILE_ENDING} in it; expected the reference label maps")
    missing = [path.name for path in paths if not (predictions / path.name).is_file()]
    if missing:
        raise ValueError(f"{predictions}: {len(missing)} of {len(paths)} cases have no prediction, e.g. {missing[0]}")
    cases = {}
    for path in track(paths, desc="score"):
        prediction, reference = _load_pair(predictions / path.name, path)
        cases[_case_name(path)] = {
            name: dice(np.isin(prediction, values), np.isin(reference, values)) for name, values in regions.items()
        }
    summary = {name: summarize([case[name] for case in cases.values()]) for name in regions}
    return Scores(cases, summary)


def summarize(values: Iterable[float]) -> RegionSummary:
    """Mean and standard deviation of the values that are not NaN."""
    defined = np.array([value for value in values if not math.isnan(value)])
    mean = float(defined.mean()) if len(defined) else math.nan
    sd = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    return RegionSummary(mean, sd, len(defined))


def read_regions(predictions: Path, references: Path) -> dict[str, tuple[int, ...]]:
    """Region name -> label values, without the background, from the dataset's ``dataset.json``."""
    candidates = [predictions / "dataset.json", references.parent / "dataset.json"]
    for path in candidates:
        if path.is_file():
            labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
            return {
                name: tuple(value) if isinstance(value, list) else (value,)
                for name, value in labels.items()
                if name not in ("background", "ignore")
            }
    raise ValueError(f"no dataset.json at {candidates[0]} or {candidates[1]}; it says which labels make which region")


def write_scores(scores: Scores, out_dir: Path) -> None:
    """``scores.json`` (summary and cases, null where undefined) and ``scores.tsv`` (one row per case)."""
    write_json(
        out_dir / "scores.json",
        {
            "metric": "Dice",
            "undefined": EMPTY_NOTE,
            "regions": {
                name: {"mean": _or_null(row.mean), "sd": _or_null(row.sd), "cases": row.num_cases}
                for name, row in scores.summary.items()
            },
            "cases": {
                case: {name: _or_null(value) for name, value in row.items()} for case, row in scores.cases.items()
            },
        },
    )
    names = list(scores.summary)
    rows = [[case, *(_cell(row[name]) for name in names)] for case, row in scores.cases.items()]
    lines = ["\t".join(row) for row in [["case", *names], *rows]]
    write_text(out_dir / "scores.tsv", "\n".join(lines) + "\n")


def format_summary(scores: Scores) -> str:
    """A small table for the terminal."""
    width = max(len(name) for name in scores.summary)
    lines = [f"{'region':<{width}}  Dice mean    SD  cases"]
    lines += [
        f"{name:<{width}}  {row.mean:9.3f} {row.sd:5.3f}  {row.num_cases:5d}" for name, row in scores.summary.items()
    ]
    return "\n".join(lines)


def draw_overlay(predictions: Path, references: Path, images: Path, path: Path, *, cases: Sequence[str]) -> None:
    """A PNG with a row per case: the slice with most reference voxels, contours of every region in reference and
    prediction.

    Args:
        predictions: folder of predicted label maps.
        references: folder of reference label maps.
        images: folder with nnU-Net's images; the last channel is shown.
        path: the PNG.
        cases: case names, a row each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    regions = read_regions(predictions, references)
    figure = Figure(figsize=(2.6 * len(regions), 2.9 * len(cases) + 0.4), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), len(regions), squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        prediction, reference = _load_pair(predictions / f"{case}{FILE_ENDING}", references / f"{case}{FILE_ENDING}")
        image = load_volume(sorted(images.glob(f"{case}_[0-9][0-9][0-9][0-9]{FILE_ENDING}"))[-1])
        for axis, (name, values) in zip(row, regions.items(), strict=True):
            in_prediction, in_reference = np.isin(prediction, values), np.isin(reference, values)
            shown = in_reference if in_reference.any() else in_prediction
            index = int(shown.sum(axis=(0, 1)).argmax()) if shown.any() else image.shape[2] // 2
            background, predicted, true = (
                axial_slices(Volume(data, image.affine), [index])[0]
                for data in (image.data, in_prediction.astype(np.float32), in_reference.astype(np.float32))
            )
            low, high = np.percentile(background[background != 0], (1, 99)) if background.any() else (0, 1)
            row_mm, column_mm = image.spacing[1], image.spacing[0]
            axis.imshow(background, cmap="gray", vmin=low, vmax=high, aspect=row_mm / column_mm)
            for mask, color in ((true, TRUTH_COLOR), (predicted, PREDICTION_COLOR)):
                if mask.any():
                    axis.contour(mask, levels=[0.5], colors=[color], linewidths=0.8)
            axis.set_title(f"{name}  {_cell(dice(in_prediction, in_reference))}", color="white", fontsize=8)
            axis.set_axis_off()
        row[0].text(0.02, 0.02, case, transform=row[0].transAxes, color="white", fontsize=6)
    handles = [
        Line2D([], [], color=color, label=label)
        for color, label in ((TRUTH_COLOR, "reference"), (PREDICTION_COLOR, "prediction"))
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, fontsize=8, labelcolor="white", facecolor="black",
        edgecolor="none", title="Dice of the whole case; patient's right on the left", title_fontproperties={"size": 7},
    ).get_title().set_color("white")  # fmt: skip
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png", facecolor="black")


def overlay_cases(scores: Scores, *, num: int = OVERLAY_CASES) -> list[str]:
    """Case names spread from the lowest to the highest mean Dice, so that a picture of them is no choice of the
    best.
    """
    ranked = sorted(scores.cases, key=lambda case: (_nan_last(summarize(scores.cases[case].values()).mean), case))
    positions = np.unique(np.linspace(0, len(ranked) - 1, min(num, len(ranked))).round().astype(int))
    return [ranked[position] for position in positions]


def _load_pair(prediction_path: Path, reference_path: Path) -> tuple[np.ndarray, np.ndarray]:
    prediction, prediction_affine = load_labels(prediction_path)
    reference, reference_affine = load_labels(reference_path)
    if prediction.shape != reference.shape or not np.allclose(prediction_affine, reference_affine, atol=1e-3):
        raise ValueError(
            f"{prediction_path}: grid {prediction.shape} differs from that of {reference_path}, {reference.shape}, "
            "or lies elsewhere; predict from the images that the references belong to"
        )
    return prediction, reference


def _case_name(path: Path) -> str:
    return path.name.removesuffix(FILE_ENDING)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _or_null(value: float) -> Any:
    return None if math.isnan(value) else value


def _cell(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.4f}"
