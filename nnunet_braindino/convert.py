"""From scans with labels to an nnU-Net raw dataset: the one way that every kind of source takes."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from braindino.command_line import EXIT_DONE, EXIT_PARTIAL
from braindino.leakage import exposure_of_encoder, read_exposure
from braindino.manifest import SEQUENCES
from braindino.splits import read_subjects
from nnunet_braindino import _startup
from nnunet_braindino.folds import FOLD_SEED, FoldRule, leaking_subjects, make_folds
from nnunet_braindino.pretraining_overlap import check_against_pretraining, write_overlap
from nnunet_braindino.raw_dataset import CASES_FILE, Case, Conversion, DatasetForm, Found, LeftOut, write_dataset

# Nested, the largest first: nnU-Net paints them in this order. Paper sec. 4.3.1: WT, TC, ET.
TUMOR_REGIONS = {"whole tumor": (1, 2, 3), "tumor core": (1, 3), "enhancing tumor": (3,)}

LABELS_FOLDER = Path("derivatives") / "tumor"
MAX_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What every kind of conversion asks for."""

    dataset_id: int
    """nnU-Net's number of the dataset, 1 to 999."""
    test_subjects: Path | None = None
    """List of cohort/subject, as `braindino split` writes it: these go to imagesTs."""
    cohort: str | None = None
    """The part before the slash in that list; by default the folder's name, or the release's cohort."""
    seed: int = FOLD_SEED
    """Seed of the folds, which keep all visits of a subject together."""
    pretrained_on: Path | None = None
    """Encoder, run or store: test subjects that it has seen are refused, and the scores say what was found. By default
    the encoder that BRAINDINO_ENCODER names, where that is set; of one that does not say what it has seen, the scores
    say 'unknown'."""
    crosswalk: tuple[Path, ...] = ()
    """Tables that join ids of different cohorts, as for `braindino audit`."""
    allow_overlap: bool = False
    """Convert all the same; the scores then say so."""
    jobs: int = 1
    """Processes."""


def run_conversion(
    options: ConvertOptions, found: Found, form: DatasetForm, *, name: str, fold_rule: FoldRule = "patients"
) -> int:
    """Check, convert and report; exit code 0, or 3 where cases were left out.

    Raises:
        ValueError: nothing can be converted, the test subjects were pretrained on, or the folder holds another dataset.
    """
    if not found.cases:
        first = found.left_out[0]
        raise ValueError(f"none of {len(found.left_out)} cases can be used, e.g. {first.name}: {first.reason}")
    test_subjects = choose_test_subjects(found.cases, options.test_subjects)
    model = _startup.encoder_name() if options.pretrained_on is None else str(options.pretrained_on)
    stamp = None
    if model:
        stamp = check_against_pretraining(
            found.cases,
            channels=form.channels,
            test_subjects=test_subjects,
            exposure=read_exposure(model) if options.pretrained_on is not None else exposure_of_encoder(model),
            model=model,
            crosswalk=options.crosswalk,
            allow_overlap=options.allow_overlap,
        )
    written = write_dataset(
        found,
        form,
        dataset_id=options.dataset_id,
        name=name,
        make_folds=partial(make_folds, rule=fold_rule, seed=options.seed),
        test_subjects=test_subjects,
        jobs=options.jobs,
    )
    print("\n".join([*_report(written, found.cases), *(f"note: {note}" for note in found.notes)]))
    if stamp is not None:
        write_overlap(written.folder, model=model, stamp=stamp)
        print(f"pretraining overlap with {model}: {stamp}")
    print(f"next: nnUNetv2_plan_and_preprocess -d {options.dataset_id} -c 2d")
    return EXIT_PARTIAL if written.left_out else EXIT_DONE


def find_bids_cases(bids_dir: Path, *, cohort: str, sequences: Sequence[str] = SEQUENCES) -> Found:
    """Every visit of a BIDS cohort that has a tumour label map (``derivatives/tumor/**/*_dseg.nii.gz``), sorted.

    Raises:
        ValueError: no label map at all, or an unknown sequence.
    """
    unknown = [sequence for sequence in sequences if sequence not in SEQUENCES]
    if unknown or not sequences:
        raise ValueError(f"sequences: found {list(sequences)}; expected a choice of {', '.join(SEQUENCES)}")
    label_paths = sorted((bids_dir / LABELS_FOLDER).glob("sub-*/**/*_dseg.nii*"))
    if not label_paths:
        raise ValueError(
            f"{bids_dir / LABELS_FOLDER}: no *_dseg.nii.gz in it; expected one label map per labelled visit"
        )
    cases, left_out = [], []
    for label_path in label_paths:
        visit = label_path.parent.relative_to(bids_dir / LABELS_FOLDER)
        entities = [part for part in label_path.name.split("_") if part.startswith(("sub-", "ses-"))]
        name, subject = "_".join(entities), f"{cohort}/{entities[0].removeprefix('sub-')}"
        images = defaultdict(list)
        for path in sorted((bids_dir / visit).glob("*.nii*")):
            images[_bids_sequence(path.name)].append(path)
        wrong = [sequence for sequence in sequences if len(images[sequence]) != 1]
        if wrong:
            reason = (
                f"{bids_dir / visit}: found {len(images[wrong[0]])} {wrong[0]} images "
                f"{[path.name for path in images[wrong[0]]]} for {label_path.name}; expected exactly one"
            )
            left_out.append(LeftOut(name, subject, "duplicate" if images[wrong[0]] else "missing_channel", reason))
            continue
        channels = tuple(images[sequence][0] for sequence in sequences)
        cases.append(Case(name=name, subject=subject, images=channels, labels=label_path))
    return Found(cases, left_out)


def find_paired_cases(images: Sequence[str], labels: str, *, cohort: str) -> Found:
    """Cases from file name patterns with one ``*`` each: what it stands for names the case and its subject.

    ``find_paired_cases(["data/*_t1.nii.gz", "data/*_t2.nii.gz"], "data/*_seg.nii.gz")``: one pattern per channel.

    Raises:
        ValueError: a pattern without exactly one ``*``, or no file that matches the first.
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
    cases, left_out = [], []
    for name in names:
        case = Case(
            name=name,
            subject=f"{cohort}/{name}",
            images=tuple(Path(pattern.replace("*", name)) for pattern in images),
            labels=Path(labels.replace("*", name)),
        )
        missing = [path for path in (*case.images, case.labels) if not path.is_file()]
        if missing:
            code = "no_labels" if missing == [case.labels] else "missing_channel"
            left_out.append(LeftOut(name, case.subject, code, f"{missing[0]}: not there; expected one for every case"))
        else:
            cases.append(case)
    return Found(cases, left_out)


def choose_test_subjects(cases: Iterable[Case], subjects_file: Path | None) -> list[str]:
    """Subjects of ``cases`` on the list ``subjects_file`` (``cohort/subject`` per line); none without a file.

    Raises:
        ValueError: the list names no subject of these cases, most likely for another cohort name.
    """
    if subjects_file is None:
        return []
    present = sorted({case.subject for case in cases})
    keys = [key.partition("/") for key in read_subjects(subjects_file)]
    listed = {f"{cohort}/{subject.removeprefix('sub-')}" for cohort, _, subject in keys}
    chosen = [subject for subject in present if subject in listed]
    if not chosen:
        raise ValueError(
            f"{subjects_file}: names none of the subjects with labels. Found e.g. {sorted(listed)[:3]}; expected e.g. "
            f"{present[:3]}; if only the part before the slash differs, give it with --cohort"
        )
    return chosen


def _report(written: Conversion, cases: Sequence[Case]) -> list[str]:
    """What was written, what was left out and why, and patients on both sides of a fold."""
    kept = written.num_training + written.num_test - written.num_converted
    first = written.splits[0]
    lines = [
        f"{written.folder}: {written.num_training} cases to train on, {written.num_test} to test on"
        + (f"; {kept} of them were there" if kept else ""),
        f"fold 0: {len(first['train'])} cases to train on, {len(first['val'])} to validate on",
    ]
    if written.left_out:
        counts = sorted(Counter(row.code for row in written.left_out).items())
        lines.append(
            f"{len(written.left_out)} cases left out ({', '.join(f'{code} {n}' for code, n in counts)}); "
            f"all in {written.folder / CASES_FILE}"
        )
        lines += [f"  {row.name}: {row.reason}" for row in written.left_out[:MAX_SHOWN]]
    subject_of = {case.name: case.subject for case in cases}
    leaks = [leaking_subjects(split, subject_of) for split in written.splits]
    if any(leaks):
        named = ", ".join(subject.partition("/")[2] for subject in leaks[0]) or "none"
        lines.append(
            f"WARNING: these folds go by case, not by patient. Fold 0 is validated on {len(leaks[0])} patients that it "
            f"trains on, at another time point: {named}. Folds 1 to {len(leaks) - 1}: "
            f"{', '.join(str(len(leak)) for leak in leaks[1:])}. Without --fold0 paper no patient is on both sides"
        )
    return lines


def _bids_sequence(file_name: str) -> str:
    """T1, T1c, T2 or FLAIR by the BIDS suffix (a T1w with a ``ce-`` entity is T1c); "" for anything else."""
    *entities, suffix = file_name.partition(".")[0].split("_")
    if suffix == "T1w":
        return "T1c" if any(entity.startswith("ce-") for entity in entities) else "T1"
    return {"T2w": "T2", "FLAIR": "FLAIR"}.get(suffix, "")
