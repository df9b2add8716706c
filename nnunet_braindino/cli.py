"""``braindino nnunet``: datasets in, and what nnU-Net will find. Training and prediction are nnU-Net's own commands;
``braindino segment-eval`` scores.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from braindino.command_line import GOES_ON, command_line
from braindino.manifest import SEQUENCES
from nnunet_braindino import _startup
from nnunet_braindino.convert import (
    TUMOR_REGIONS,
    ConvertOptions,
    find_bids_cases,
    find_paired_cases,
    run_conversion,
)
from nnunet_braindino.diagnosis import diagnose
from nnunet_braindino.raw_dataset import DatasetForm


@dataclass(frozen=True, kw_only=True)
class ConvertBids(ConvertOptions):
    """A BIDS cohort with tumour labels in derivatives/tumor to an nnU-Net dataset with the regions WT, TC and ET."""

    bids: tyro.conf.Positional[Path]
    """Folder of the cohort."""
    name: str
    """The rest of nnU-Net's dataset name, letters and digits."""
    sequences: tuple[str, ...] = SEQUENCES
    """Input channels, in this order."""


@dataclass(frozen=True, kw_only=True)
class ConvertPairs(ConvertOptions):
    """Images and label maps found by file name patterns, each with one '*' (quote them), to an nnU-Net dataset.

    What the '*' stands for names the case and its subject.
    """

    images: tuple[str, ...]
    """A pattern per channel, e.g. 'data/*_t1.nii.gz'."""
    labels: str
    """The pattern of the label maps, e.g. 'data/*_seg.nii.gz'."""
    channels: tuple[str, ...]
    """What each channel is, e.g. T1."""
    label_names: tuple[str, ...]
    """Names of the labels 1, 2, ..."""
    name: str
    """The rest of nnU-Net's dataset name, letters and digits."""


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
    | Annotated[Env, tyro.conf.subcommand("env")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


@command_line("nnunet", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all is done (or all is well), 3 when cases were left out, 1 on an error."""
    return _run(tyro.cli(Command, args=argv, prog="braindino nnunet", description=__doc__))  # type: ignore[call-overload]


def _run(command: ConvertBids | ConvertPairs | Env | Doctor) -> int:
    if isinstance(command, ConvertBids):
        return _convert_bids(command)
    if isinstance(command, ConvertPairs):
        return _convert_pairs(command)
    if isinstance(command, Env):
        folders = _startup.extended(os.environ.get(_startup.TRAINER_VARIABLE, ""))
        print(f"export {_startup.TRAINER_VARIABLE}='{folders}'")
        return 0
    lines, found = diagnose()
    print("\n".join(lines))
    return 0 if found else 1


def _convert_bids(command: ConvertBids) -> int:
    cohort = command.cohort or command.bids.resolve().name
    found = find_bids_cases(command.bids, cohort=cohort, sequences=command.sequences)
    form = DatasetForm(channels=command.sequences, labels=TUMOR_REGIONS)
    return run_conversion(command, found, form, name=command.name)


def _convert_pairs(command: ConvertPairs) -> int:
    if len(command.channels) != len(command.images):
        raise ValueError(
            f"{len(command.images)} image patterns but {len(command.channels)} channels; expected a name for each"
        )
    cohort = command.cohort or Path(command.images[0]).resolve().parent.name
    found = find_paired_cases(command.images, command.labels, cohort=cohort)
    labels = {name: value for value, name in enumerate(command.label_names, start=1)}
    return run_conversion(command, found, DatasetForm(channels=command.channels, labels=labels), name=command.name)


if __name__ == "__main__":
    raise SystemExit(main())
