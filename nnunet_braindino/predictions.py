"""Which predictions are scored: a model folder's validation cases or a folder of predictions, and the checkpoint that
made them.

Owner of ``prediction_source.json`` (version 1), the record of the checkpoint beside predictions. nnU-Net itself writes
none, and ``--val_best`` puts its predictions into the same folder as the final checkpoint's.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from braindino.atomic import write_json
from braindino.records import read_json, read_json_list
from nnunet_braindino.raw_dataset import FILE_ENDING, raw_dir

SOURCE_FILE = "prediction_source.json"
FORMAT_VERSION = 1
FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"
PREPROCESSED_VARIABLE = "nnUNet_preprocessed"

Checkpoint = Literal["final", "best"]
Regions = Mapping[str, tuple[int, ...]]

_RATIO = re.compile(r"(?P<trainer>.+)_r(?P<percent>\d{1,2})(?P<schedule>_\w+)?")


class PredictionSet(NamedTuple):
    """Predictions of one model on one dataset."""

    name: str
    files: dict[str, Path]
    """Case -> predicted label map."""
    references: Path
    """Folder of reference label maps."""
    regions: Regions
    """Region -> label values, without the background."""
    checkpoint: str
    """Which made them, and how that is known."""


def find_predictions(
    path: Path,
    *,
    name: str | None = None,
    references: Path | None = None,
    folds: Sequence[int] = (),
    checkpoint: Checkpoint | None = None,
    complete: bool = True,
) -> PredictionSet:
    """The predictions at ``path``.

    Args:
        path: a model folder (``TRAINER__PLANS__CONFIGURATION``) or one of its folds, whose ``validation`` predictions
            are meant; or a folder of predicted label maps.
        name: by default the trainer, or the folder of predictions.
        references: folder of reference label maps; by default labelsTr of the model's dataset.
        folds: of a model folder; by default all that were validated.
        checkpoint: that made the predictions, where they do not say so themselves.
        complete: whether a folder of predictions must hold all cases that have a reference.

    Raises:
        ValueError: there is nothing to score, a prediction is missing, the training is not finished, or the predictions
            come from the best checkpoint and that was not asked for.
    """
    if path.name == "validation" and path.parent.name.startswith("fold_"):
        path = path.parent
    if re.fullmatch(r"fold_\d+", path.name):
        folds, path = (int(path.name.removeprefix("fold_")),), path.parent
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; expected a model folder or a folder of predictions")
    if any(path.glob("fold_*")):
        return _of_model(path, name=name, references=references, folds=folds, checkpoint=checkpoint)
    files = {_case_name(file): file for file in sorted(path.glob(f"*{FILE_ENDING}"))}
    if not files:
        raise ValueError(f"{path}: no *{FILE_ENDING} and no fold_* in it; expected predictions or a model folder")
    if references is None:
        raise ValueError(f"{path}: a folder of predictions needs --references, the folder of reference label maps")
    truths = [_case_name(file) for file in sorted(references.glob(f"*{FILE_ENDING}"))]
    if not truths:
        raise ValueError(f"{references}: no *{FILE_ENDING} in it; expected the reference label maps")
    missing = [f"{case}{FILE_ENDING}" for case in truths if case not in files]
    if len(missing) == len(truths) or (missing and complete):
        raise ValueError(f"{path}: {len(missing)} of {len(truths)} cases have no prediction, e.g. {missing[0]}")
    return PredictionSet(
        name or path.name,
        {case: files[case] for case in truths if case in files},
        references,
        _read_regions(path / "dataset.json", references.parent / "dataset.json"),
        _checkpoint(path, [path], checkpoint),
    )


def write_prediction_source(folder: Path, checkpoint_name: str) -> None:
    """Write beside predictions which checkpoint of their model made them, e.g. ``checkpoint_final.pth``."""
    write_json(folder / SOURCE_FILE, {"version": FORMAT_VERSION, "checkpoint": checkpoint_name})


def read_prediction_source(folder: Path) -> str | None:
    """The checkpoint that made the predictions in a folder; None where nobody wrote it down.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    path = folder / SOURCE_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']}; this program reads version {FORMAT_VERSION}")
        return str(content["checkpoint"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error!r}; predict again, or remove it and give --checkpoint") from error


def label_ratio(name: str) -> tuple[str, float]:
    """Trainer and share of the labels, by a name such as ``nnUNetTrainerBrainDINOFrozen_r10``; 1 without ``_rNN``."""
    match = _RATIO.fullmatch(name)
    if match is None:
        return name, 1.0
    return match["trainer"] + (match["schedule"] or ""), int(match["percent"]) / 100


def _of_model(
    path: Path, *, name: str | None, references: Path | None, folds: Sequence[int], checkpoint: Checkpoint | None
) -> PredictionSet:
    validated = sorted(
        int(folder.parent.name.removeprefix("fold_"))
        for folder in path.glob("fold_*/validation")
        if folder.parent.name != "fold_all" and any(folder.glob(f"*{FILE_ENDING}"))
    )
    if not validated or not set(folds) <= set(validated):
        hint = " (fold_all was validated on what it was trained on)" if (path / "fold_all").exists() else ""
        raise ValueError(
            f"{path}: found validation predictions of folds {validated}; expected "
            f"{'those of folds ' + str(list(folds)) if folds else 'at least one fold'}{hint}. Finish the training, or "
            "run nnUNetv2_train ... --val"
        )
    files: dict[str, Path] = {}
    sources = [path / f"fold_{fold}" for fold in folds or validated]
    for source in sources:
        if checkpoint is None and not (source / FINAL).exists():
            raise ValueError(
                f"{source}: no {FINAL}: the training is not finished, or its checkpoints were removed; finish it, or "
                "say with --checkpoint which one made the validation predictions"
            )
        found = {_case_name(file): file for file in sorted((source / "validation").glob(f"*{FILE_ENDING}"))}
        twice = sorted(files.keys() & found.keys())
        if twice:
            raise ValueError(f"{path}: {twice[0]} was validated in two folds; choose one with --folds")
        _check_complete(source, path.parent.name, found)
        files |= found
    return PredictionSet(
        name or path.name.partition("__")[0],
        files,
        references or raw_dir() / path.parent.name / "labelsTr",
        _read_regions(path / "dataset.json"),
        f"{_checkpoint(path, [source / 'validation' for source in sources], checkpoint)}; validation of "
        f"{', '.join(source.name for source in sources)}",
    )


def _check_complete(fold: Path, dataset: str, found: Mapping[str, Path]) -> None:
    """Compare with the splits beside the preprocessed data, where those are.

    Raises:
        ValueError: a validation case has no prediction.
    """
    folder = os.environ.get(PREPROCESSED_VARIABLE, "")
    path = Path(folder) / dataset / "splits_final.json"
    if not folder or not path.exists():
        return
    expected = read_json_list(path)[int(fold.name.removeprefix("fold_"))]["val"]
    missing = sorted(set(expected) - found.keys())
    if missing:
        raise ValueError(
            f"{fold / 'validation'}: {len(missing)} of {len(expected)} cases have no prediction, e.g. {missing[0]}; "
            "the validation was cut short: run nnUNetv2_train ... --val"
        )


def _checkpoint(path: Path, folders: Sequence[Path], asked: Checkpoint | None) -> str:
    """The statement that goes with the scores.

    Raises:
        ValueError: the best checkpoint without being asked for, or another than was stated.
    """
    recorded = {read_prediction_source(folder) for folder in folders}
    if len(recorded) > 1:
        raise ValueError(f"{path}: its folds were predicted with different checkpoints: {sorted(map(str, recorded))}")
    source = recorded.pop()
    by_name = source is None and "best" in path.name.lower()
    if asked is None and (source == BEST or by_name):
        raise ValueError(
            f"{path}: predicted with {BEST}" + (", by its name" if by_name else "") + ", which was chosen on the "
            "validation cases. Predict with the final one, or score it all the same with --checkpoint best, which "
            "marks the results"
        )
    if asked is not None and source not in (None, f"checkpoint_{asked}.pth"):
        raise ValueError(f"{path}: --checkpoint {asked}, but {SOURCE_FILE} beside the predictions says {source}")
    known = "stated with --checkpoint" if source is None else "recorded beside the predictions"
    if asked == "best":
        return f"BEST ({known}): chosen on the validation cases, so scores on them are too good"
    if asked == "final" or source == FINAL:
        return f"final ({known})"
    if source is None:
        return "final, nnU-Net's default (not recorded beside the predictions)"
    return f"{source} (recorded beside the predictions)"


def _read_regions(*candidates: Path) -> dict[str, tuple[int, ...]]:
    """Region name -> label values, without the background, from the first ``dataset.json`` that is there."""
    for path in candidates:
        if path.is_file():
            labels = read_json(path)["labels"]
            return {
                name: tuple(value) if isinstance(value, list) else (value,)
                for name, value in labels.items()
                if name not in ("background", "ignore")
            }
    raise ValueError(
        f"no dataset.json at {' or '.join(str(path) for path in candidates)}; it says which labels make which region"
    )


def _case_name(path: Path) -> str:
    return path.name.removesuffix(FILE_ENDING)
