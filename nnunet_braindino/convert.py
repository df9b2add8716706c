"""From scans with labels to an nnU-Net raw dataset, every file in LPS so that the slices are those the encoder was
trained on.

nnU-Net reads arrays as they are stored and cuts its 2D slices from them, without reorienting. Stored in LPS, slices
are axial with row 0 anterior and column 0 on the patient's right: the orientation of
``braindino.slices.axial_slices``.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from braindino.atomic import write_json
from braindino.audit import add_fingerprints
from braindino.leakage import UNKNOWN, Crosswalk, Exposure, check_test_scans
from braindino.manifest import SEQUENCES, Scan
from braindino.progress import track
from braindino.splits import read_subjects
from braindino.volume import load_labels, load_volume, save_array

TUMOR_LABELS = {"necrotic core": 1, "oedema": 2, "enhancing tumor": 3}
# Nested, the largest first: nnU-Net paints them in this order. Paper sec. 4.3.1: WT, TC, ET.
TUMOR_REGIONS = {"whole tumor": (1, 2, 3), "tumor core": (1, 3), "enhancing tumor": (3,)}

LABELS_FOLDER = Path("derivatives") / "tumor"
RAW_VARIABLE = "nnUNet_raw"
NUM_FOLDS = 5
FOLD_SEED = 0
FILE_ENDING = ".nii.gz"

OVERLAP_FILE = "pretraining_overlap.json"

LabelDefinition = int | tuple[int, ...]


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


class Conversion(NamedTuple):
    """The dataset folder, and how many cases went to training and to test."""

    folder: Path
    num_training: int
    num_test: int


def find_bids_cases(bids_dir: Path, *, cohort: str, sequences: Sequence[str] = SEQUENCES) -> list[Case]:
    """Every visit of a BIDS cohort that has a tumour label map (``derivatives/tumor/**/*_dseg.nii.gz``), sorted.

    Raises:
        ValueError: no label map at all, an unknown sequence, or a visit where a sequence is missing or there twice.
    """
    unknown = [sequence for sequence in sequences if sequence not in SEQUENCES]
    if unknown or not sequences:
        raise ValueError(f"sequences: found {list(sequences)}; expected a choice of {', '.join(SEQUENCES)}")
    label_paths = sorted((bids_dir / LABELS_FOLDER).glob("sub-*/**/*_dseg.nii*"))
    if not label_paths:
        raise ValueError(
            f"{bids_dir / LABELS_FOLDER}: no *_dseg.nii.gz in it; expected one label map per labelled visit"
        )
    cases = []
    for label_path in label_paths:
        visit = label_path.parent.relative_to(bids_dir / LABELS_FOLDER)
        entities = [part for part in label_path.name.split("_") if part.startswith(("sub-", "ses-"))]
        found = defaultdict(list)
        for path in sorted((bids_dir / visit).glob("*.nii*")):
            found[_bids_sequence(path.name)].append(path)
        for sequence in sequences:
            if len(found[sequence]) != 1:
                raise ValueError(
                    f"{bids_dir / visit}: found {len(found[sequence])} {sequence} images "
                    f"{[path.name for path in found[sequence]]} for {label_path.name}; expected exactly one"
                )
        cases.append(
            Case(
                name="_".join(entities),
                subject=f"{cohort}/{entities[0].removeprefix('sub-')}",
                images=tuple(found[sequence][0] for sequence in sequences),
                labels=label_path,
            )
        )
    return cases


def find_paired_cases(images: Sequence[str], labels: str, *, cohort: str) -> list[Case]:
    """Cases from file name patterns with one ``*`` each: what it stands for names the case and its subject.

    ``find_paired_cases(["data/*_t1.nii.gz", "data/*_t2.nii.gz"], "data/*_seg.nii.gz")``: one pattern per channel.

    Raises:
        ValueError: a pattern without exactly one ``*``, no file that matches the first, or a file missing for a case.
    """
    for pattern in [*images, labels]:
        if pattern.count("*") != 1:
            raise ValueError(
                f"pattern {pattern!r}: found {pattern.count('*')} '*'; expected one, standing for the case's name"
            )
    if not images:
        raise ValueError("images: found no pattern; expected one per channel")
    first = Path(images[0])
    if "*" not in first.name:
        raise ValueError(f"pattern {images[0]!r}: the '*' must be in the file's name, not in a folder's")
    star = re.compile(re.escape(first.name).replace(re.escape("*"), "(.+)"))
    matches = [star.fullmatch(path.name) for path in sorted(first.parent.glob(first.name))]
    names = [match.group(1) for match in matches if match]
    if not names:
        raise ValueError(f"pattern {images[0]!r} matches no file")
    cases = [
        Case(
            name=name,
            subject=f"{cohort}/{name}",
            images=tuple(Path(pattern.replace("*", name)) for pattern in images),
            labels=Path(labels.replace("*", name)),
        )
        for name in names
    ]
    missing = [path for case in cases for path in [*case.images, case.labels] if not path.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} files are missing for {len(cases)} cases, the first is {missing[0]}")
    return cases


def write_dataset(
    cases: Sequence[Case],
    *,
    dataset_id: int,
    name: str,
    channels: Sequence[str],
    labels: Mapping[str, LabelDefinition],
    test_subjects: Collection[str] = (),
) -> Conversion:
    """Write ``nnUNet_raw/DatasetNNN_NAME``: images and labels in LPS, ``dataset.json``, and ``splits_final.json``.

    A finished dataset of the same cases, channels and labels is left as it is; one that was cut short is finished.
    The folds are by subject; nnU-Net's planner copies them beside the preprocessed data. Cases of ``test_subjects``
    go to imagesTs and labelsTs, which nnU-Net never trains on.

    Args:
        cases: what to convert.
        dataset_id: nnU-Net's number, 1 to 999.
        name: the rest of the dataset's name.
        channels: what each image of a case is, e.g. ("T1", "FLAIR").
        labels: label name -> value, or -> values when it is a region made of several; without the background.
        test_subjects: ``cohort/subject`` keys.

    Raises:
        ValueError: the folder holds another finished dataset, images and labels of a case are on different grids, a
            label value is not declared, or fewer than two subjects are left to train on.
    """
    folder = raw_dir() / dataset_name(dataset_id, name)
    held_out = set(test_subjects)
    training = [case for case in cases if case.subject not in held_out]
    test = [case for case in cases if case.subject in held_out]
    splits = subject_folds({case.name: case.subject for case in training})
    description = _description(channels, labels, len(training))
    converted = Conversion(folder, len(training), len(test))
    if (folder / "dataset.json").exists():
        if not _holds(folder, description, splits, training=training, test=test):
            raise ValueError(f"{folder} holds another dataset; remove it or choose another --dataset-id or --name")
        return converted

    allowed = {0, *_values(labels)}
    for part, part_cases in (("Tr", training), ("Ts", test)):
        for case in track(part_cases, desc=f"images{part}"):
            _write_case(case, folder / f"images{part}", folder / f"labels{part}", allowed)
    write_json(folder / "splits_final.json", splits)
    # Written last: a folder with a dataset.json is a finished one.
    write_json(folder / "dataset.json", description)
    return converted


def _holds(
    folder: Path, description: dict[str, Any], splits: list[dict[str, list[str]]], *, training: list, test: list
) -> bool:
    """Whether the finished dataset in ``folder`` is the one that these cases would make."""
    written = [json.loads((folder / name).read_text("utf-8")) for name in ("dataset.json", "splits_final.json")]
    names = [{path.name for path in (folder / part).glob("*.nii.gz")} for part in ("labelsTr", "labelsTs")]
    expected = [{f"{case.name}.nii.gz" for case in cases} for cases in (training, test)]
    # The order of the labels is that of the network's outputs, so it counts.
    same_order = list(written[0]["labels"]) == list(description["labels"])
    return written == [json.loads(json.dumps(description)), splits] and same_order and names == expected


def subject_folds(subject_of: Mapping[str, str]) -> list[dict[str, list[str]]]:
    """nnU-Net's splits: five folds (or one per subject where there are fewer), no subject on both sides of any.

    Args:
        subject_of: case name -> subject.

    Raises:
        ValueError: fewer than two subjects.
    """
    subjects = sorted(set(subject_of.values()))
    if len(subjects) < 2:
        raise ValueError(
            f"found {len(subjects)} subject(s) to train on; expected at least two, one of them for validation"
        )
    order = np.random.default_rng(FOLD_SEED).permutation(len(subjects))
    folds = np.array_split([subjects[i] for i in order], min(NUM_FOLDS, len(subjects)))
    return [
        {
            "train": sorted(name for name, subject in subject_of.items() if subject not in fold),
            "val": sorted(name for name, subject in subject_of.items() if subject in fold),
        }
        for fold in (set(fold.tolist()) for fold in folds)
    ]


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


def choose_test_subjects(cases: Iterable[Case], subjects_file: Path | None) -> list[str]:
    """Subjects of ``cases`` on the list ``subjects_file`` (``cohort/subject`` per line); none without a file.

    Raises:
        ValueError: the list names no subject of these cases, most likely for another cohort name.
    """
    if subjects_file is None:
        return []
    present = sorted({case.subject for case in cases})
    listed = {f"{cohort}/{subject.removeprefix('sub-')}" for cohort, _, subject in _split_keys(subjects_file)}
    chosen = [subject for subject in present if subject in listed]
    if not chosen:
        raise ValueError(
            f"{subjects_file}: names none of the subjects with labels. Found e.g. {sorted(listed)[:3]}; expected e.g. "
            f"{present[:3]}; if only the part before the slash differs, give it with --cohort"
        )
    return chosen


def check_against_pretraining(
    cases: Sequence[Case],
    *,
    channels: Sequence[str],
    test_subjects: Collection[str],
    exposure: Exposure | None,
    model: str,
    crosswalk: Iterable[Path] = (),
    allow_overlap: bool,
) -> str:
    """The stamp for scores on these cases: what of them an encoder has seen.

    The images of the test subjects are compared by voxels, looks and ids; without test subjects those of all, since
    every case is then scored in cross-validation.

    Args:
        cases: of the dataset.
        channels: sequence of each image of a case.
        test_subjects: ``cohort/subject`` keys.
        exposure: what the model was pretrained on; None where nobody wrote it down.
        model: what the exposure belongs to, for messages.
        crosswalk: tables that join ids.
        allow_overlap: stamp an overlap instead of refusing it.

    Raises:
        ValueError: something was pretrained on, and it was not allowed; names it.
    """
    tested = [case for case in cases if not test_subjects or case.subject in set(test_subjects)]
    scans = []
    for case in track(tested, desc="compare with pretraining"):
        cohort, _, subject = case.subject.partition("/")
        for path, channel in zip(case.images, channels, strict=True):
            scan = Scan(str(path), cohort, subject, sequence=channel)
            # Nothing to compare with needs no fingerprints, which take reading every image.
            scans.append(add_fingerprints(scan) if exposure is not None and exposure.scans else scan)
    return check_test_scans(exposure, scans, model=model, allow_overlap=allow_overlap, crosswalk=Crosswalk(crosswalk))


def write_overlap(dataset_dir: Path, *, model: str, stamp: str) -> None:
    """Write the stamp beside the dataset, where scoring finds it."""
    write_json(dataset_dir / OVERLAP_FILE, {"pretrained_on": model, "pretraining_overlap": stamp})


def read_overlap(dataset_dir: Path) -> str:
    """The stamp of a dataset; ``unknown`` where nobody asked.

    Raises:
        ValueError: the file is damaged.
    """
    path = dataset_dir / OVERLAP_FILE
    if not path.exists():
        return f"{UNKNOWN}: the dataset was converted without --pretrained-on, and BRAINDINO_ENCODER was not set"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["pretraining_overlap"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); convert the dataset again") from error


def _split_keys(subjects_file: Path) -> list[tuple[str, str, str]]:
    return [key.partition("/") for key in read_subjects(subjects_file)]


def _bids_sequence(file_name: str) -> str:
    """T1, T1c, T2 or FLAIR by the BIDS suffix (a T1w with a ``ce-`` entity is T1c); "" for anything else."""
    *entities, suffix = file_name.partition(".")[0].split("_")
    if suffix == "T1w":
        return "T1c" if any(entity.startswith("ce-") for entity in entities) else "T1"
    return {"T2w": "T2", "FLAIR": "FLAIR"}.get(suffix, "")


def _write_case(case: Case, images_dir: Path, labels_dir: Path, allowed: set[int]) -> None:
    labels, affine = load_labels(case.labels)
    undeclared = sorted(set(np.unique(labels).tolist()) - allowed)
    if undeclared:
        raise ValueError(
            f"{case.labels}: holds label values {undeclared}; expected only {sorted(allowed)}: remap or declare them"
        )
    for channel, path in enumerate(case.images):
        volume = load_volume(path)
        if volume.shape != labels.shape or not np.allclose(volume.affine, affine, atol=1e-3):
            raise ValueError(
                f"{path}: shape {volume.shape} and affine {volume.affine.round(3).tolist()} differ from those of "
                f"{case.labels}: {labels.shape}, {affine.round(3).tolist()}; bring all images of a visit to one "
                "grid first"
            )
        _save_lps(volume.data, volume.affine, images_dir / f"{case.name}_{channel:04d}{FILE_ENDING}", np.float32)
    _save_lps(labels, affine, labels_dir / f"{case.name}{FILE_ENDING}", np.uint8)


def _save_lps(data: np.ndarray, affine: np.ndarray, path: Path, dtype: type) -> None:
    """Write an array held in RAS+ with its first two axes reversed: stored from right to left and from front to
    back.
    """
    reverse = np.diag([-1.0, -1.0, 1.0, 1.0])
    reverse[:2, 3] = data.shape[0] - 1, data.shape[1] - 1
    save_array(data[::-1, ::-1], affine @ reverse, path, dtype=dtype)


def _description(channels: Sequence[str], labels: Mapping[str, LabelDefinition], num_training: int) -> dict:
    """dataset.json. The order of the labels is the order of the network's outputs, so keys are never sorted."""
    described: dict[str, object] = {
        "channel_names": {str(number): channel for number, channel in enumerate(channels)},
        "labels": {"background": 0} | {name: _as_json(value) for name, value in labels.items()},
        "numTraining": num_training,
        "file_ending": FILE_ENDING,
    }
    if any(isinstance(value, tuple) for value in labels.values()):
        described["regions_class_order"] = regions_class_order(labels.values())
    return described


def _values(labels: Mapping[str, LabelDefinition]) -> set[int]:
    return {value for definition in labels.values() for value in _as_tuple(definition)}


def _as_tuple(definition: LabelDefinition) -> tuple[int, ...]:
    return definition if isinstance(definition, tuple) else (definition,)


def _as_json(definition: LabelDefinition) -> int | list[int]:
    return list(definition) if isinstance(definition, tuple) else definition
