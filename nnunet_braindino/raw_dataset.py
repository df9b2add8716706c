"""nnU-Net's raw dataset, every file in LPS so that the slices are those the encoder was trained on.

nnU-Net reads arrays as they are stored and cuts its 2D slices from them, without reorienting. Stored in LPS, slices
are axial with row 0 anterior and column 0 on the patient's right: the orientation of
``braindino.slices.axial_slices``.

Owner of what lies beside nnU-Net's own files (version 1): ``conversion.json``, what a folder is being filled with,
written first; and ``cases.tsv``, a row for every case that was found: its subject, where it went, or why it was left
out.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from braindino.atomic import write_json
from braindino.lock import lock_folder
from braindino.process_map import map_in_processes
from braindino.tables import read_table, write_table
from braindino.volume import VolumeError, load_labels, load_volume, save_array
from nnunet_braindino.folds import Split

RAW_VARIABLE = "nnUNet_raw"
FILE_ENDING = ".nii.gz"
CONVERSION_FILE, CASES_FILE = "conversion.json", "cases.tsv"
FORMAT_VERSION = 1
CASE_COLUMNS = ("case", "subject", "part", "code", "reason", "labels")
TRAINING, TEST, LEFT_OUT = "training", "test", "left_out"
#: nnU-Net copies dataset.json to models and predictions, and this entry of it travels along.
NOTE_KEY = "braindino"

LabelDefinition = int | tuple[int, ...]
FoldMaker = Callable[[Mapping[str, str]], list[Split]]

_PARTS = {TRAINING: "Tr", TEST: "Ts"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training or test example: the images of one visit on one grid, and their label map.

    Attributes:
        name: nnU-Net's case identifier.
        subject: ``cohort/subject``; all visits of a subject share it and stay on one side of every split.
        images: one file per channel, in the order of the channels.
        labels: the label map, on the grid of the images.
    """

    name: str
    subject: str
    images: tuple[Path, ...]
    labels: Path


class LeftOut(NamedTuple):
    """A case that is not in the dataset, and why: a short code, and a sentence."""

    name: str
    subject: str
    code: str
    reason: str


class Found(NamedTuple):
    """Cases to convert, those that lack a file, and what else is worth knowing."""

    cases: list[Case]
    left_out: list[LeftOut]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetForm:
    """What every case of a dataset is turned into.

    Attributes:
        channels: what each image of a case is, e.g. ("T1", "FLAIR").
        labels: label name -> value, or -> values when it is a region made of several; without the background.
        stored_as: value in the source -> value in the dataset, where they differ.
        hints: value that must not occur -> what it most likely means.
        empty_allowed: whether a label map without any label is a case.
        note: what else dataset.json says, under ``braindino``.
    """

    channels: Sequence[str]
    labels: Mapping[str, LabelDefinition]
    stored_as: Mapping[int, int] = field(default_factory=dict)
    hints: Mapping[int, str] = field(default_factory=dict)
    empty_allowed: bool = True
    note: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stored_of(self) -> dict[int, int]:
        """Every value that a source may hold, the background included -> the value in the dataset."""
        changed = set(self.stored_as.values())
        values = {value for definition in self.labels.values() for value in _as_tuple(definition)}
        return {0: 0} | {value: value for value in sorted(values - changed)} | dict(self.stored_as)


class Conversion(NamedTuple):
    """The dataset folder, and what went into it."""

    folder: Path
    num_training: int
    num_test: int
    num_converted: int
    """Cases written by this run; the others were there."""
    left_out: list[LeftOut]
    splits: list[Split]


def write_dataset(
    found: Found,
    form: DatasetForm,
    *,
    dataset_id: int,
    name: str,
    make_folds: FoldMaker,
    test_subjects: Collection[str] = (),
    jobs: int = 1,
) -> Conversion:
    """Write ``nnUNet_raw/DatasetNNN_NAME``: images and labels in LPS, ``dataset.json``, ``splits_final.json`` and
    ``cases.tsv``.

    A case that cannot be used gets a row with the reason, and the rest go on. What an earlier run finished is kept, as
    long as its sources are no newer; nnU-Net's planner copies the folds beside the preprocessed data. Cases of
    ``test_subjects`` go to imagesTs and labelsTs, which nnU-Net never trains on.

    Args:
        found: what to convert.
        form: channels and labels.
        dataset_id: nnU-Net's number, 1 to 999.
        name: the rest of the dataset's name.
        make_folds: case -> subject of the training cases, to the splits.
        test_subjects: ``cohort/subject`` keys.
        jobs: processes.

    Raises:
        ValueError: the folder holds another dataset, no case can be used, the folds cannot be made, or a process died.
    """
    folder = raw_dir() / dataset_name(dataset_id, name)
    held_out = set(test_subjects)
    part_of = {case.name: TEST if case.subject in held_out else TRAINING for case in found.cases}
    # What would fail at the end fails before the work is done.
    make_folds({case.name: case.subject for case in found.cases if part_of[case.name] == TRAINING})
    with lock_folder(folder):
        _claim(folder, form, part_of)
        todo = [case for case in found.cases if not _is_finished(case, folder, part_of[case.name])]
        if todo:
            # A folder with a dataset.json is a finished one.
            (folder / "dataset.json").unlink(missing_ok=True)
        outputs = [_outputs(case, folder, part_of[case.name]) for case in todo]
        rows = map_in_processes(partial(_convert_case, form=form), todo, outputs, jobs=jobs, desc="convert")
        failed = {row.name: row for row in rows if row is not None}
        left_out = sorted([*found.left_out, *failed.values()])
        done = [case for case in found.cases if case.name not in failed]
        _write_cases(folder, done, part_of, left_out)
        if not done:
            raise ValueError(
                f"none of {len(left_out)} cases can be used, e.g. {left_out[0].name}: {left_out[0].reason}. All "
                f"reasons are in {folder / CASES_FILE}"
            )
        training = {case.name: case.subject for case in done if part_of[case.name] == TRAINING}
        splits = make_folds(training)
        _write_if_changed(folder / "splits_final.json", splits)
        _write_if_changed(folder / "dataset.json", _description(form, len(training)))
    return Conversion(folder, len(training), len(done) - len(training), len(todo) - len(failed), left_out, splits)


def read_subject_of(dataset_dir: Path) -> dict[str, str]:
    """Case -> subject of a dataset that was converted here; empty for any other.

    Raises:
        ValueError: the table is damaged.
    """
    path = dataset_dir / CASES_FILE
    if not path.exists():
        return {}
    return {row["case"]: row["subject"] for row in read_table(path, CASE_COLUMNS).rows if row["part"] != LEFT_OUT}


def regions_class_order(regions: Iterable[LabelDefinition]) -> list[int]:
    """The label that nnU-Net paints for each region, in their order, so that predicted regions become labels again.

    nnU-Net paints one region after the other, later over earlier. So the regions must be nested, the largest first,
    and each must hold exactly one label that no later one holds: the label it is painted with.

    Raises:
        ValueError: the regions are not of that form.
    """
    sets = [set(_as_tuple(region)) for region in regions]
    order = []
    for number, region in enumerate(sets):
        later = sets[number + 1 :]
        own = region.difference(*later)
        if len(own) != 1 or any(not inner <= region for inner in later):
            raise ValueError(
                f"regions {[sorted(each) for each in sets]}: expected each to contain all later ones and exactly one "
                f"label of its own, but {sorted(region)} has {sorted(own)} of its own; order them "
                "from the largest to the smallest"
            )
        order.append(own.pop())
    return order


def dataset_name(dataset_id: int, name: str) -> str:
    """nnU-Net's folder name, e.g. ``Dataset007_Tumor``."""
    if not 0 < dataset_id < 1000 or not re.fullmatch(r"[A-Za-z0-9]+", name):
        raise ValueError(
            f"dataset {dataset_id} {name!r}: expected a number from 1 to 999 and a name of letters and digits"
        )
    return f"Dataset{dataset_id:03d}_{name}"


def raw_dir() -> Path:
    """nnU-Net's folder of raw datasets."""
    value = os.environ.get(RAW_VARIABLE, "")
    if not value:
        raise ValueError(
            f"{RAW_VARIABLE} is not set; export it, nnUNet_preprocessed and nnUNet_results as nnU-Net asks for"
        )
    return Path(value)


def _claim(folder: Path, form: DatasetForm, part_of: Mapping[str, str]) -> None:
    """Make the folder ready for these cases in this form.

    Raises:
        ValueError: it holds cases in another form, or other cases.
    """
    other = f"{folder} holds another dataset; remove it or choose another --dataset-id or --name"
    # What a killed process left; nnU-Net would take it for an image.
    for stray in folder.glob("*/.tmp-*"):
        stray.unlink()
    written = sorted(path for part in _PARTS.values() for path in folder.glob(f"*{part}/*{FILE_ENDING}"))
    conversion = {"version": FORMAT_VERSION, **_description(form, None)}
    if written or (folder / "dataset.json").exists():
        if not (folder / CONVERSION_FILE).exists():
            raise ValueError(other)
        # As text: the order of the labels is that of the network's outputs, so it counts.
        if (folder / CONVERSION_FILE).read_text("utf-8") != _as_text(conversion):
            raise ValueError(other)
    for path in written:
        case = path.name.removesuffix(FILE_ENDING)
        case = case if path.parent.name.startswith("labels") else case.rpartition("_")[0]
        if case not in part_of or not path.parent.name.endswith(_PARTS[part_of[case]]):
            raise ValueError(f"{other}: {path.parent.name}/{path.name} is none of the cases to be there")
    _write_if_changed(folder / CONVERSION_FILE, conversion)


def _outputs(case: Case, folder: Path, part: str) -> list[Path]:
    """The images, and last the label map."""
    suffix = _PARTS[part]
    images = [folder / f"images{suffix}" / f"{case.name}_{i:04d}{FILE_ENDING}" for i in range(len(case.images))]
    return [*images, folder / f"labels{suffix}" / f"{case.name}{FILE_ENDING}"]


def _is_finished(case: Case, folder: Path, part: str) -> bool:
    """Whether every file of a case is there and none of its sources is newer, as make has it."""
    try:
        oldest = min(path.stat().st_mtime_ns for path in _outputs(case, folder, part))
        newest = max(path.stat().st_mtime_ns for path in (*case.images, case.labels))
    except FileNotFoundError:
        return False
    return newest <= oldest


def _convert_case(case: Case, outputs: Sequence[Path], *, form: DatasetForm) -> LeftOut | None:
    """Write the files of a case, the label map last; or say why it cannot be used, and leave nothing of it."""
    try:
        labels, affine = _load_source_labels(case.labels, form)
        volumes = []
        for path in case.images:
            volume = load_volume(path)
            if volume.shape != labels.shape or not np.allclose(volume.affine, affine, atol=1e-3):
                raise VolumeError(
                    "grids_differ",
                    f"{path}: shape {volume.shape} and affine {volume.affine.round(3).tolist()} differ from those of "
                    f"{case.labels}: {labels.shape}, {affine.round(3).tolist()}; bring all images of a visit to one "
                    "grid first",
                )
            volumes.append(volume)
    except VolumeError as error:
        reason = LeftOut(case.name, case.subject, error.code, error.message)
    except OSError as error:
        reason = LeftOut(case.name, case.subject, "unreadable", str(error))
    else:
        for volume, path in zip(volumes, outputs, strict=False):
            _save_lps(volume.data, volume.affine, path, np.float32)
        _save_lps(labels, affine, outputs[-1], np.uint8)
        return None
    for path in outputs:
        path.unlink(missing_ok=True)
    return reason


def _load_source_labels(path: Path, form: DatasetForm) -> tuple[np.ndarray, np.ndarray]:
    """The label map in the dataset's values, (X, Y, Z) uint8 in RAS+, and its affine.

    Raises:
        VolumeError: it cannot be read, holds a value that was not declared, or none at all.
    """
    labels, affine = load_labels(path)
    stored_of = form.stored_of
    found = np.unique(labels).tolist()
    undeclared = [value for value in found if value not in stored_of]
    if undeclared:
        hint = "; ".join(form.hints[value] for value in undeclared if value in form.hints)
        raise VolumeError(
            "unexpected_label",
            f"{path}: holds label values {undeclared}; expected only {sorted(stored_of)}: "
            + (hint or "remap or declare them"),
        )
    if found == [0] and not form.empty_allowed:
        raise VolumeError("empty_labels", f"{path}: no voxel has a label; expected a tumour in every label map")
    stored = np.zeros(labels.shape, dtype=np.uint8)
    for value in found:
        stored[labels == value] = stored_of[value]
    return stored, affine


def _save_lps(data: np.ndarray, affine: np.ndarray, path: Path, dtype: type) -> None:
    """Write an array held in RAS+ with its first two axes reversed: stored from right to left and from front to
    back.
    """
    reverse = np.diag([-1.0, -1.0, 1.0, 1.0])
    reverse[:2, 3] = data.shape[0] - 1, data.shape[1] - 1
    save_array(data[::-1, ::-1], affine @ reverse, path, dtype=dtype)


def _write_cases(folder: Path, done: Sequence[Case], part_of: Mapping[str, str], left_out: Sequence[LeftOut]) -> None:
    rows = [(case.name, case.subject, part_of[case.name], "", "", str(case.labels)) for case in done]
    rows += [(row.name, row.subject, LEFT_OUT, row.code, " ".join(row.reason.split()), "") for row in left_out]
    path = folder / CASES_FILE
    if path.exists() and [tuple(row.values()) for row in read_table(path, CASE_COLUMNS).rows] == sorted(rows):
        return
    write_table(path, CASE_COLUMNS, sorted(rows))


def _description(form: DatasetForm, num_training: int | None) -> dict[str, Any]:
    """dataset.json. The order of the labels is the order of the network's outputs, so keys are never sorted."""
    labels = {name: list(value) if isinstance(value, tuple) else value for name, value in form.labels.items()}
    described: dict[str, Any] = {
        "channel_names": {str(number): channel for number, channel in enumerate(form.channels)},
        "labels": {"background": 0} | labels,
        "file_ending": FILE_ENDING,
    }
    if num_training is not None:
        described["numTraining"] = num_training
    if any(isinstance(value, tuple) for value in form.labels.values()):
        described["regions_class_order"] = regions_class_order(form.labels.values())
    if form.note:
        described[NOTE_KEY] = dict(form.note)
    return described


def _write_if_changed(path: Path, value: Any) -> None:
    """A second run leaves the times of finished files as they are."""
    if not path.exists() or path.read_text("utf-8") != _as_text(value):
        write_json(path, value)


def _as_text(value: Any) -> str:
    """As ``write_json`` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _as_tuple(definition: LabelDefinition) -> tuple[int, ...]:
    return definition if isinstance(definition, tuple) else (definition,)
