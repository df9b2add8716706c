"""``braindino nnunet``: datasets in, scores out, and what nnU-Net will find. Training and prediction are nnU-Net's
own commands.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import tyro

from braindino.leakage import exposure_of_encoder, read_exposure
from braindino.manifest import SEQUENCES
from braindino.segmentation_scores import write_scores
from nnunet_braindino import _startup, convert, evaluate

TRAINER = "nnUNetTrainerBrainDINOFrozen"
VARIABLES = (
    "nnUNet_raw",
    "nnUNet_preprocessed",
    "nnUNet_results",
    _startup.TRAINER_VARIABLE,
    _startup.OPT_OUT_VARIABLE,
)


@dataclass(frozen=True, kw_only=True)
class _Convert:
    """What both kinds of conversion ask for."""

    dataset_id: int
    """nnU-Net's number of the dataset, 1 to 999."""
    name: str
    """The rest of its name, letters and digits."""
    pretrained_on: Path | None = None
    """Encoder, run or store: test subjects that it has seen are refused, and the scores say what was found. By default
    the encoder that BRAINDINO_ENCODER names, where that is set; of one that does not say what it has seen, the scores
    say 'unknown'."""
    crosswalk: tuple[Path, ...] = ()
    """Tables that join ids of different cohorts, as for `braindino audit`."""
    allow_overlap: bool = False
    """Convert all the same; the scores then say so."""


@dataclass(frozen=True, kw_only=True)
class ConvertBids(_Convert):
    """A BIDS cohort with tumour labels in derivatives/tumor to an nnU-Net dataset with the regions WT, TC and ET."""

    bids: tyro.conf.Positional[Path]
    """Folder of the cohort."""
    test_subjects: Path | None = None
    """List of cohort/subject, as `braindino split` writes it: these go to imagesTs."""
    sequences: tuple[str, ...] = SEQUENCES
    """Input channels, in this order."""
    cohort: str | None = None
    """The part before the slash in that list; the folder's name by default."""


@dataclass(frozen=True, kw_only=True)
class ConvertPairs(_Convert):
    """Images and label maps found by file name patterns, each with one '*' (quote them), to an nnU-Net dataset."""

    images: tuple[str, ...]
    """A pattern per channel, e.g. 'data/*_t1.nii.gz'."""
    labels: str
    """The pattern of the label maps, e.g. 'data/*_seg.nii.gz'."""
    channels: tuple[str, ...]
    """What each channel is, e.g. T1."""
    label_names: tuple[str, ...]
    """Names of the labels 1, 2, ..."""
    test_subjects: Path | None = None
    """List of cohort/subject that go to imagesTs; what the '*' stands for is the subject."""
    cohort: str | None = None
    """The part before the slash in that list; the name of the images' folder by default."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Dice per region and case, mean and standard deviation: scores.json, scores.tsv and overlay.png."""

    predictions: tyro.conf.Positional[Path]
    """Folder that nnUNetv2_predict wrote."""
    references: tyro.conf.Positional[Path]
    """Folder of reference label maps, e.g. labelsTs."""
    out: Path | None = None
    """Where the results go; by default scores/ in the folder of predictions."""
    images: Path | None = None
    """nnU-Net's images, for the overlay; by default the imagesTs (or imagesTr) beside the references."""


@dataclass(frozen=True, kw_only=True)
class Env:
    """Print the line that lets nnU-Net find the trainers where the start-up hook is off: eval "$(braindino nnunet
    env)".
    """


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Tell whether nnU-Net finds the trainer, and which encoder a training would use."""


Command = (
    Annotated[ConvertBids, tyro.conf.subcommand("convert-bids")]
    | Annotated[ConvertPairs, tyro.conf.subcommand("convert-pairs")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Env, tyro.conf.subcommand("env")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all is done (or all is well), 1 on an error."""
    command = tyro.cli(Command, args=argv, prog="braindino nnunet", description=__doc__)  # type: ignore[call-overload]
    try:
        return _run(command)
    except (ValueError, OSError) as error:
        print(f"braindino nnunet: {error}", file=sys.stderr)
        return 1


def diagnose() -> tuple[list[str], bool]:
    """Lines on versions, folders, trainer class and encoder with its hash; whether nnU-Net finds the trainer."""
    lines = [f"nnunetv2 {_version('nnunetv2')}, torch {_version('torch')}, braindino {_version('braindino')}"]
    lines += [f"{name}={os.environ.get(name, '(not set)')}" for name in VARIABLES]
    trainer = _find_trainer()
    if trainer is None:
        lines.append(f'{TRAINER}: nnU-Net does not find it; eval "$(braindino nnunet env)"')
    else:
        lines.append(f"{TRAINER}: nnU-Net finds it in {trainer.__module__}")
    lines.append(_describe_encoder())
    return lines, trainer is not None


def _run(command: ConvertBids | ConvertPairs | Score | Env | Doctor) -> int:
    if isinstance(command, ConvertBids):
        return _convert_bids(command)
    if isinstance(command, ConvertPairs):
        return _convert_pairs(command)
    if isinstance(command, Score):
        return _score(command)
    if isinstance(command, Env):
        folders = _startup.extended(os.environ.get(_startup.TRAINER_VARIABLE, ""))
        print(f"export {_startup.TRAINER_VARIABLE}='{folders}'")
        return 0
    lines, found = diagnose()
    print("\n".join(lines))
    return 0 if found else 1


def _convert_bids(command: ConvertBids) -> int:
    cohort = command.cohort or command.bids.resolve().name
    cases = convert.find_bids_cases(command.bids, cohort=cohort, sequences=command.sequences)
    test_subjects = convert.choose_test_subjects(cases, command.test_subjects)
    stamp = _overlap_stamp(command, cases, command.sequences, test_subjects)
    written = convert.write_dataset(
        cases,
        dataset_id=command.dataset_id,
        name=command.name,
        channels=command.sequences,
        labels=convert.TUMOR_REGIONS,
        test_subjects=test_subjects,
    )
    return _report_conversion(written, command, stamp)


def _convert_pairs(command: ConvertPairs) -> int:
    if len(command.channels) != len(command.images):
        raise ValueError(
            f"{len(command.images)} image patterns but {len(command.channels)} channels; expected a name for each"
        )
    cohort = command.cohort or Path(command.images[0]).resolve().parent.name
    cases = convert.find_paired_cases(command.images, command.labels, cohort=cohort)
    test_subjects = convert.choose_test_subjects(cases, command.test_subjects)
    stamp = _overlap_stamp(command, cases, command.channels, test_subjects)
    written = convert.write_dataset(
        cases,
        dataset_id=command.dataset_id,
        name=command.name,
        channels=command.channels,
        labels={name: value for value, name in enumerate(command.label_names, start=1)},
        test_subjects=test_subjects,
    )
    return _report_conversion(written, command, stamp)


def _overlap_stamp(
    command: _Convert, cases: list[convert.Case], channels: Sequence[str], test_subjects: list[str]
) -> str | None:
    """What of the test subjects was pretrained on; None where no encoder is known."""
    model = _pretrained_on(command)
    if not model:
        return None
    return convert.check_against_pretraining(
        cases,
        channels=channels,
        test_subjects=test_subjects,
        exposure=read_exposure(model) if command.pretrained_on is not None else exposure_of_encoder(model),
        model=model,
        crosswalk=command.crosswalk,
        allow_overlap=command.allow_overlap,
    )


def _pretrained_on(command: _Convert) -> str:
    """The model that test subjects are compared with; empty where none is known."""
    return _startup.encoder_name() if command.pretrained_on is None else str(command.pretrained_on)


def _report_conversion(written: convert.Conversion, command: _Convert, stamp: str | None) -> int:
    print(f"{written.folder}: {written.num_training} cases to train on, {written.num_test} to test on")
    if stamp is not None:
        model = _pretrained_on(command)
        convert.write_overlap(written.folder, model=model, stamp=stamp)
        print(f"pretraining overlap with {model}: {stamp}")
    print(f"next: nnUNetv2_plan_and_preprocess -d {command.dataset_id} -c 2d")
    return 0


def _score(command: Score) -> int:
    out = command.out or command.predictions / "scores"
    images = command.images or _images_beside(command.references)
    with_images = images.is_dir()
    scores = evaluate.score_folder(command.predictions, command.references, images=images if with_images else None)
    scores = scores._replace(pretraining_overlap=convert.read_overlap(command.references.resolve().parent))
    write_scores(scores, out)
    print(evaluate.format_summary(scores))
    print(f"pretraining overlap: {scores.pretraining_overlap}")
    if with_images:
        evaluate.draw_overlay(
            command.predictions, command.references, images, out / "overlay.png", cases=evaluate.overlay_cases(scores)
        )
    else:
        print(f"no overlay and no floor: there is no folder {images}; give it with --images")
    print(f"written to {out}")
    return 0


def _images_beside(references: Path) -> Path:
    """labelsTs -> imagesTs."""
    return references.parent / references.name.replace("labels", "images")


def _find_trainer() -> type | None:
    """What nnU-Net's own search finds; it chats on standard output."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return recursive_find_trainer_class_by_name(TRAINER)
        except RuntimeError:
            return None


def _describe_encoder() -> str:
    from nnunet_braindino.trainer import encoder_from_environment, encoder_identity

    try:
        identity = encoder_identity(encoder_from_environment())
    except (ValueError, OSError) as error:
        return f"encoder: none ({error})"
    return f"encoder: {identity['name']}, sha256 {identity['sha256']}, from {_startup.ENCODER_VARIABLE}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    raise SystemExit(main())
