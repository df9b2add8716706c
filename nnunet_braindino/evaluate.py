"""Dice of predicted label maps, per case and region, and a picture of where they agree (paper sec. 4.3.1, Fig. 2)."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from braindino.atomic import replace_file
from braindino.progress import track
from braindino.segmentation_scores import RegionSummary, SegmentationScores
from braindino.slices import axial_slices
from braindino.volume import Volume, load_labels, load_volume

FILE_ENDING = ".nii.gz"
OVERLAY_CASES = 4
TRUTH_COLOR, PREDICTION_COLOR = "#ffd400", "#e3342f"

Regions = Mapping[str, tuple[int, ...]]


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of two masks; NaN when both are empty, 0 when one is."""
    size = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2 * int(np.count_nonzero(prediction & reference)) / size if size else math.nan


def score_folder(predictions: Path, references: Path, *, images: Path | None = None) -> SegmentationScores:
    """Dice of every reference label map against the prediction of the same file name.

    Regions are read from the ``dataset.json`` that nnU-Net leaves beside the predictions, or from the one of the
    dataset that the references belong to.

    Args:
        predictions: folder of predicted label maps.
        references: folder of reference label maps.
        images: folder with nnU-Net's images; their non-zero voxels are the brain, which gives the trivial floor.

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
    cases: dict[str, dict[str, float]] = {}
    floors: dict[str, dict[str, float]] = {}
    for path in track(paths, desc="score"):
        case = _case_name(path)
        prediction, reference = _load_pair(predictions / path.name, path)
        truth = {name: np.isin(reference, values) for name, values in regions.items()}
        cases[case] = {name: dice(np.isin(prediction, regions[name]), mask) for name, mask in truth.items()}
        if images is not None:
            brain = np.any([load_volume(channel).data != 0 for channel in channel_files(images, case)], axis=0)
            # Where a region is absent nothing is to be found, and the whole brain would score 0: not a fair floor.
            floors[case] = {name: dice(brain, mask) if mask.any() else math.nan for name, mask in truth.items()}
    summary = {
        name: summarize([row[name] for row in cases.values()], floor=[row[name] for row in floors.values()])
        for name in regions
    }
    return SegmentationScores(cases, summary)


def summarize(values: Iterable[float], *, floor: Iterable[float] = ()) -> RegionSummary:
    """Mean and standard deviation of the values that are not NaN, and the mean of the floor's."""
    defined, floors = (np.array([v for v in numbers if not math.isnan(v)]) for numbers in (values, floor))
    mean = float(defined.mean()) if len(defined) else math.nan
    sd = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    return RegionSummary(mean, sd, len(defined), float(floors.mean()) if len(floors) else math.nan)


def channel_files(images: Path, case: str) -> list[Path]:
    """nnU-Net's images of a case, one file per channel, in their order.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(images.glob(f"{case}_[0-9][0-9][0-9][0-9]{FILE_ENDING}"))
    if not paths:
        raise ValueError(f"{images}: no image {case}_0000{FILE_ENDING}; expected nnU-Net's images of the scored cases")
    return paths


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


def format_summary(scores: SegmentationScores) -> str:
    """A small table for the terminal."""
    width = max(len(name) for name in scores.summary)
    lines = [f"{'region':<{width}}  Dice mean    SD  cases  whole brain"]
    lines += [
        f"{name:<{width}}  {row.mean:9.3f} {row.sd:5.3f}  {row.num_cases:5d}  {row.floor:11.3f}"
        for name, row in scores.summary.items()
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
        image = load_volume(channel_files(images, case)[-1])
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


def overlay_cases(scores: SegmentationScores, *, num: int = OVERLAY_CASES) -> list[str]:
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


def _cell(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.4f}"
