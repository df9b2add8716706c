"""``braindino figure NAME INPUT... --out PATH``: a paper figure from the tables that the other verbs wrote.

Every figure is kept four times, PATH.pdf, .svg, .png (300 dpi) and the table behind it, PATH.tsv. docs/figures.md shows
them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from braindino.command_line import command_line
from braindino.encoders.catalogue import load_volume_encoder
from braindino.manifest import SEQUENCES
from braindino.patch_maps import (
    AxialSlice,
    SlicePoint,
    axial_labels,
    points_in_labels,
    points_of_patches,
    reference_points,
    similarity_panels,
    tumour_slice,
)
from braindino.report import (
    corpus,
    representation_figures,
    robustness_figures,
    segmentation_figures,
    survival_figures,
    task_figures,
)
from braindino.report.print_style import Drawing, save_drawing
from braindino.representation_tables import read_cka
from braindino.robustness_table import read_robustness
from braindino.segmentation_scores import read_comparisons, read_overview
from braindino.slice_store import SliceStore
from braindino.store_verify import store_folder
from braindino.transforms import standardize
from braindino.volume import Volume, load_labels, load_volume

OVERVIEW_FILE, COMPARISON_FILE = "scores.tsv", "comparison.tsv"
POINT_PATCH = 16
"""Side of the patches among which reference points are looked for, in pixels of the standardised slice."""
Tasks = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT/TASK")]
Encoders = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What all figures take."""

    out: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """PATH.pdf, PATH.svg, PATH.png and PATH.tsv are written."""

    def draw(self) -> Drawing:
        """The figure and its table.

        Raises:
            ValueError: an input is not what the figure is made of; names the file and what was expected.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Ratios(Figure):
    """A metric over the share of labels, a panel per task (Fig. 3b to l)."""

    tasks: Tasks
    """Folders of `braindino evaluate`, in the order of the panels."""
    metric: str | None = None
    """Instead of each task's main metric."""
    encoders: Encoders = None
    """To show, instead of all."""

    def draw(self) -> Drawing:
        runs = [task_figures.read_task_run(folder) for folder in self.tasks]
        return task_figures.ratio_figure(runs, metric=self.metric, encoders=self.encoders)


@dataclass(frozen=True, kw_only=True)
class Neighbours(Figure):
    """Accuracy of nearest neighbours over k, a panel per task (Fig. 6b, left)."""

    tasks: Tasks
    """Folders of `braindino evaluate` of kNN tasks."""
    encoders: Encoders = None
    """To show, instead of all."""

    def draw(self) -> Drawing:
        return task_figures.knn_figure([task_figures.read_task_run(f) for f in self.tasks], encoders=self.encoders)


@dataclass(frozen=True, kw_only=True)
class Strata(Figure):
    """The main metric by age group with all labels, a panel per task (Fig. 3k and m)."""

    tasks: Tasks
    """Folders of `braindino evaluate` of tasks with strata."""
    encoders: Encoders = None
    """To show, instead of all."""

    def draw(self) -> Drawing:
        return task_figures.strata_figure([task_figures.read_task_run(f) for f in self.tasks], encoders=self.encoders)


@dataclass(frozen=True, kw_only=True)
class Survival(Figure):
    """Kaplan-Meier curves of risk groups: encoders by label ratios (Fig. 4)."""

    task: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT/TASK")]
    """Folder of `braindino evaluate` of a survival task."""
    until: float | None = None
    """End of the time axis; the paper's is 2000 days."""
    unit: str = "days"
    """Of the times."""
    ratios: tuple[float, ...] | None = None
    """Label ratios to show, instead of all."""
    encoders: Encoders = None
    """To show, instead of all."""

    def draw(self) -> Drawing:
        groups, steps = survival_figures.read_survival(self.task)
        return survival_figures.survival_figure(
            groups, steps, unit=self.unit, until=self.until, ratios=self.ratios, encoders=self.encoders
        )


@dataclass(frozen=True, kw_only=True)
class Calibration(Figure):
    """Predicted beside observed: probabilities of two classes, or numbers (beyond the paper)."""

    task: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT/TASK")]
    """Folder of `braindino evaluate` of a task with two classes or of numbers."""

    def draw(self) -> Drawing:
        return task_figures.calibration_drawing(self.task)


@dataclass(frozen=True, kw_only=True)
class Robustness(Figure):
    """What tasks still reach on perturbed scans (Fig. 5)."""

    tables: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ROBUSTNESS.TSV")]
    """Tables of `braindino robustness`."""
    style: Literal["bars", "lines"] = "bars"
    """Grouped bars, as the paper, or curves over the severity."""
    encoders: Encoders = None
    """To show, instead of all."""

    def draw(self) -> Drawing:
        rows = [row for path in self.tables for row in read_robustness(path)]
        return robustness_figures.perturbation_figure(rows, style=self.style, encoders=self.encoders)


@dataclass(frozen=True, kw_only=True)
class Cka(Figure):
    """Linear CKA of one encoder with others over depth, a panel per cohort (Fig. 6b, right)."""

    table: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKA.TSV")]
    """Table of `braindino represent`."""
    reference: str | None = None
    """The one encoder; by default the first of the table."""
    unit: Literal["scan", "subject"] = "scan"
    """What a row of the features is."""
    debiased: bool = False
    """Draw the debiased estimate, which does not grow with the number of features."""
    encoders: Encoders = None
    """The other encoders, instead of all."""

    def draw(self) -> Drawing:
        return representation_figures.cka_figure(
            read_cka(self.table),
            reference=self.reference,
            encoders=self.encoders,
            unit=self.unit,
            debiased=self.debiased,
        )


@dataclass(frozen=True, kw_only=True)
class Similarity(Figure):
    """Similarity of patch tokens with reference points, encoders below each other (Fig. 6a)."""

    scan: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCAN")]
    """Skull-stripped scan, background 0."""
    encoders: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=ENCODER")]
    """Encoders as for `braindino extract`, each with the name that the figure gives it."""
    labels: Path | None = None
    """Segmentation on any grid: the slice with most of it is shown, and one point lies in it."""
    tissues: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=LABEL[,LABEL]")] = ()
    """Points: the innermost pixel of each of these parts of --labels, instead of those found by rule."""
    points: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=ROW,COLUMN")] = ()
    """Points at these pixels of the slice, which has 256 x 256, row 0 anterior and column 0 the patient's right; with
    or instead of --tissues."""
    slice: int | None = None
    """Of the standardised volume's 256, from the bottom; by default the tumour's largest, or the middle."""
    sequence: str | None = None
    """Of the scan, for encoders that must be told: T1, T1c, T2 or FLAIR."""

    def draw(self) -> Drawing:
        if self.sequence is not None and self.sequence not in SEQUENCES:
            raise ValueError(f"--sequence: found {self.sequence!r}; expected one of {', '.join(SEQUENCES)}")
        encoders = {}
        for text in self.encoders:
            name, _, encoder = text.partition("=")
            if not encoder:
                raise ValueError(f"--encoders: found {text!r}; expected NAME=ENCODER, such as ours=run/encoder")
            encoders[name] = load_volume_encoder(encoder, device="cpu")
        volume = load_volume(self.scan)
        cube = standardize(volume)
        axial, labels = _slice_to_show(cube, self.labels, self.slice)
        points = [*_points_in_tissues(self.tissues, labels), *_points_given(self.points, axial.image.shape)]
        if not points:
            rule = reference_points(axial.image, POINT_PATCH, None if labels is None else labels > 0)
            points = [*points_of_patches(rule, POINT_PATCH)]
        panels = similarity_panels(encoders, volume, axial, points, sequence=self.sequence)
        return representation_figures.similarity_figure(panels, title=f"{self.scan.name}, axial slice {axial.index}")


@dataclass(frozen=True, kw_only=True)
class Contours(Figure):
    """Outlines of segmented regions, reference and predictions side by side (Fig. 2)."""

    predictions: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PREDICTIONS")]
    """Folders of nnUNetv2_predict or `braindino segment`."""
    images: Path
    """nnU-Net's images, imagesTs."""
    references: Path
    """Label maps of the same cases, labelsTs."""
    cases: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CASE")]
    """To show, one below the other."""
    names: tuple[str, ...] | None = None
    """Of the predictions, instead of the names of their folders."""
    channel: int = -1
    """Image to show, counted from 0; -1 for the last, FLAIR in BraTS."""

    def draw(self) -> Drawing:
        names = self.names or tuple(
            folder.resolve().parent.name if folder.resolve().name == "predictions" else folder.resolve().name
            for folder in self.predictions
        )
        if len(set(names)) != len(self.predictions):
            raise ValueError(
                f"--names: found {', '.join(names)} for {len(self.predictions)} folders; expected as many, "
                "all different"
            )
        folders = dict(zip(names, self.predictions, strict=True))
        regions = segmentation_figures.read_regions(self.predictions[0])
        slices = [
            segmentation_figures.cut_case(
                case,
                _image_of(self.images, case, self.channel),
                _label_map(self.references, case),
                {name: _label_map(folder, case) for name, folder in folders.items()},
                regions,
            )
            for case in self.cases
        ]
        return segmentation_figures.contour_figure(slices)


@dataclass(frozen=True, kw_only=True)
class Dice(Figure):
    """Mean Dice or HD95 over the share of labels, a panel per region (Fig. 3a)."""

    scores: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of `braindino segment-eval`."""
    metric: Literal["Dice", "HD95 (mm)"] = "Dice"
    """Which of the two."""
    encoders: Encoders = None
    """Trainers to show, instead of all."""

    def draw(self) -> Drawing:
        path = self.scores / OVERVIEW_FILE
        if not path.is_file():
            raise ValueError(
                f"{self.scores}: no {OVERVIEW_FILE}; expected a folder that `braindino segment-eval` wrote"
            )
        compared = self.scores / COMPARISON_FILE
        comparisons = read_comparisons(compared) if compared.is_file() else []
        return segmentation_figures.dice_ratio_figure(
            read_overview(path), comparisons, metric=self.metric, trainers=self.encoders
        )


@dataclass(frozen=True, kw_only=True)
class Corpus(Figure):
    """Slices of a store per cohort and sequence (Fig. 1a); `braindino stats` prints the same."""

    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Slice store, or a folder made by `braindino prepare`."""

    def draw(self) -> Drawing:
        store = SliceStore(store_folder(self.store))
        rows = corpus.count_corpus(store.scans, store.slices_per_scan.tolist())
        return Drawing(corpus.corpus_figure(rows), corpus.COLUMNS, rows, "Slices per cohort and per sequence.")


FIGURES: Mapping[str, type[Figure]] = {
    "ratios": Ratios,
    "strata": Strata,
    "knn": Neighbours,
    "survival": Survival,
    "calibration": Calibration,
    "robustness": Robustness,
    "similarity": Similarity,
    "cka": Cka,
    "contours": Contours,
    "dice": Dice,
    "corpus": Corpus,
}


@command_line("figure")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the four files were written, 1 on an error."""
    figure = tyro.extras.subcommand_cli_from_dict(
        dict(FIGURES),
        args=argv,
        prog="braindino figure",
        description="A paper figure from the tables that the other verbs wrote: PDF, SVG, PNG and the table behind it.",
    )
    drawing = figure.draw()
    paths = save_drawing(drawing, figure.out)
    print(drawing.caption)
    print("\n".join(str(path) for path in paths))
    return 0


def _slice_to_show(cube: Volume, labels: Path | None, index: int | None) -> tuple[AxialSlice, np.ndarray | None]:
    """And the labels (rows, columns) on it, if any were given."""
    on_slice = None
    if labels is not None:
        data, affine = load_labels(labels)
        if not data.any():
            raise ValueError(f"{labels}: no voxel is labelled; expected a tumour, or leave --labels out")
        index = tumour_slice(data > 0, affine, cube.affine, cube.shape[2]) if index is None else index
        on_slice = axial_labels(data, affine, cube.affine, index, cube.shape)
    return AxialSlice.of(cube, cube.shape[2] // 2 if index is None else index), on_slice


def _points_in_tissues(tissues: Sequence[str], labels: np.ndarray | None) -> tuple[SlicePoint, ...]:
    if not tissues:
        return ()
    if labels is None:
        raise ValueError("--tissues: they are parts of a segmentation; give it as --labels")
    names = {}
    for text in tissues:
        name, _, numbers = text.partition("=")
        try:
            names[name] = [int(number) for number in numbers.split(",")]
        except ValueError:
            raise ValueError(f"--tissues: found {text!r}; expected NAME=LABEL[,LABEL], such as tumour=1,2,4") from None
    return points_in_labels(labels, names)


def _points_given(points: Sequence[str], shape: tuple[int, ...]) -> list[SlicePoint]:
    found = []
    for text in points:
        name, _, place = text.partition("=")
        row, _, column = place.partition(",")
        try:
            point = SlicePoint(name, float(row), float(column))
        except ValueError:
            raise ValueError(f"--points: found {text!r}; expected NAME=ROW,COLUMN, such as CSF=120,96") from None
        if not (0 <= point.row <= shape[0] - 1 and 0 <= point.column <= shape[1] - 1):
            raise ValueError(f"--points: {text} lies beside the slice, which has {shape[0]} x {shape[1]} pixels")
        found.append(point)
    return found


def _image_of(images: Path, case: str, channel: int) -> Path:
    paths = sorted(
        path
        for path in images.glob(f"*_[0-9][0-9][0-9][0-9]{segmentation_figures.FILE_ENDING}")
        if path.name.rpartition("_")[0] == case
    )
    if not paths or not -len(paths) <= channel < len(paths):
        raise ValueError(
            f"{images}: {len(paths)} images of case {case}, channel {channel} asked for; expected {case}_0000 "
            "and the like"
        )
    return paths[channel]


def _label_map(folder: Path, case: str) -> Path:
    ending = segmentation_figures.FILE_ENDING
    path = next((each for each in folder.glob(f"*{ending}") if each.name.removesuffix(ending) == case), None)
    if path is None:
        raise ValueError(f"{folder}: no {case}{ending}; expected a label map of every case")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
