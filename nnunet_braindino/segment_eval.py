"""``braindino segment-eval PREDICTIONS --out OUT``: from predictions to the table (paper sec. 4.3.1, 4.7; Fig. 3a)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from braindino.atomic import replace_file, write_text
from braindino.command_line import command_line
from braindino.robustness_table import format_robustness, write_robustness
from braindino.segmentation_scores import write_comparisons, write_overview, write_scores
from braindino.tables import read_table
from nnunet_braindino.condition_scores import find_condition_sets, robustness_rows, score_condition_sets
from nnunet_braindino.evaluate import EmptyRules, compare, score_predictions
from nnunet_braindino.overlay import write_overlays
from nnunet_braindino.predictions import Checkpoint, PredictionSet, find_predictions, label_ratio
from nnunet_braindino.pretraining_overlap import read_overlap
from nnunet_braindino.raw_dataset import read_subject_of
from nnunet_braindino.score_tables import draw_curves, format_report, label_curves


@dataclass(frozen=True, kw_only=True)
class SegmentEval:
    """Dice and HD95 of one or several sets of predictions on the same cases, with intervals and paired tests.

    Writes OUT/table.md, scores.tsv, comparison.tsv and overlay.png, and scores.json, scores.tsv and overlay.png of each
    set in a folder of its name; of trainers with label ratios (..._r10 to ..._r80 and all) label_ratios.png and .tsv.
    """

    predictions: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PREDICTIONS")] = ()
    """nnU-Net model folders (TRAINER__PLANS__CONFIGURATION), whose validation predictions are scored, or folders that
    nnUNetv2_predict wrote."""
    out: Path
    """Folder for the results."""
    conditions: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Instead of PREDICTIONS: a folder with predictions on clean and on perturbed scans, DIR/clean/MODEL and
    DIR/gamma-0.5/MODEL, with --references. Writes OUT/robustness.tsv, every condition against the clean scans, and
    OUT/MODEL/CONDITION/scores.json: docs/robustness.md."""
    references: Path | None = None
    """Folder of reference label maps, e.g. labelsTs; by default labelsTr of a model folder's dataset."""
    images: Path | None = None
    """nnU-Net's images, for overlays and the floor; by default the imagesTs (or imagesTr) beside the references."""
    names: tuple[str, ...] = ()
    """What the sets are called, in their order; a name with _r10 was trained on 10 % of the labels. By default
    the trainers, or the folders of predictions."""
    folds: tuple[int, ...] = ()
    """Folds of model folders; by default all that were validated."""
    subjects: Path | None = None
    """Table (.tsv) with the columns case and subject; by default the dataset's cases.tsv. Cases of one subject are
    drawn together."""
    checkpoint: Checkpoint | None = None
    """Which checkpoint made the predictions, where they do not say so. Those of the best checkpoint, which was chosen
    on the validation cases, are refused unless 'best' is given, and then marked."""
    empty: EmptyRules = field(default_factory=EmptyRules)
    """Empty masks."""
    jobs: int = 1
    """Processes."""


@command_line("segment-eval")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all is scored, 1 on an error."""
    return _run(tyro.cli(SegmentEval, args=argv, prog="braindino segment-eval", config=(tyro.conf.OmitArgPrefixes,)))


def _run(command: SegmentEval) -> int:
    if command.conditions is not None:
        return _run_conditions(command, command.conditions)
    if not command.predictions:
        raise ValueError("found no predictions; expected model folders, or folders of predictions with --references")
    sets = _find_all(command)
    dataset = sets[0].references.resolve().parent
    images = command.images or _images_beside(sets[0].references)
    with_images = images.is_dir()
    scores = score_predictions(
        sets,
        subject_of=_subjects(command, dataset),
        images=images if with_images else None,
        rules=command.empty,
        pretraining_overlap=read_overlap(dataset),
        jobs=command.jobs,
    )
    comparisons = compare(scores)
    out = command.out
    for name, each in scores.items():
        write_scores(each, out / name)
    ratios = {name: label_ratio(name)[1] for name in scores}
    write_overview(scores, ratios, out / "scores.tsv")
    if comparisons:
        write_comparisons(comparisons, out / "comparison.tsv")
    curves = label_curves(list(scores))
    if curves:
        members = {point.name: scores[point.name] for points in curves.values() for point in points}
        write_overview(members, ratios, out / "label_ratios.tsv")
        with replace_file(out / "label_ratios.png") as temporary:
            draw_curves(curves, scores).savefig(temporary, format="png")
    report = format_report(scores, comparisons)
    write_text(out / "table.md", report)
    if with_images:
        write_overlays(sets, scores, images, out)
    print(report)
    if not with_images:
        print(f"no overlay and no floor: there is no folder {images}; give it with --images")
    print(f"written to {out}")
    return 0


def _run_conditions(command: SegmentEval, folder: Path) -> int:
    if command.predictions or command.references is None or command.names or command.folds:
        raise ValueError("--conditions DIR goes with --references, without PREDICTIONS, --names and --folds")
    dataset = command.references.resolve().parent
    scores = score_condition_sets(
        find_condition_sets(folder, references=command.references, checkpoint=command.checkpoint),
        subject_of=_subjects(command, dataset),
        rules=command.empty,
        pretraining_overlap=read_overlap(dataset),
        jobs=command.jobs,
    )
    for model, of_model in scores.items():
        for condition, each in of_model.items():
            write_scores(each, command.out / model / condition)
    rows = robustness_rows(dataset.name, scores)
    write_robustness(rows, command.out / "robustness.tsv")
    print(format_robustness(rows))
    print(f"written to {command.out}")
    return 0


def _find_all(command: SegmentEval) -> list[PredictionSet]:
    names = command.names or (None,) * len(command.predictions)
    if len(names) != len(command.predictions):
        raise ValueError(f"--names: found {len(names)} for {len(command.predictions)} sets of predictions")
    bad = [name for name in names if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name)]
    if bad:
        raise ValueError(f"--names: found {bad}; expected letters, digits, '.', '_', '+' or '-': folders are called so")
    return [
        find_predictions(
            path.resolve(),
            name=name,
            references=command.references,
            folds=command.folds,
            checkpoint=command.checkpoint,
        )
        for path, name in zip(command.predictions, names, strict=True)
    ]


def _subjects(command: SegmentEval, dataset: Path) -> dict[str, str]:
    if command.subjects is None:
        return read_subject_of(dataset)
    return {row["case"]: row["subject"] for row in read_table(command.subjects, ("case", "subject")).rows}


def _images_beside(references: Path) -> Path:
    """labelsTs -> imagesTs."""
    return references.parent / references.name.replace("labels", "images")


if __name__ == "__main__":
    raise SystemExit(main())
