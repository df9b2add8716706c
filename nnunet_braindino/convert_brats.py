"""``braindino convert-brats SOURCE --release NAME --dataset-id N``: a BraTS training set to an nnU-Net dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from braindino.command_line import GOES_ON, command_line
from nnunet_braindino.brats_releases import RELEASES, find_brats_cases
from nnunet_braindino.convert import ConvertOptions, run_conversion
from nnunet_braindino.folds import FoldRule


@dataclass(frozen=True, kw_only=True)
class ConvertBrats(ConvertOptions):
    """A BraTS training set to an nnU-Net dataset with the regions WT, TC and ET, axial slices, folds by patient.

    Exit code 0: all cases converted; 3: some were left out, cases.tsv says why; 1: error. A second run goes on where
    the first was stopped.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of the unpacked training set."""
    release: Annotated[str, tyro.conf.arg(help=f"Which release it is: {', '.join(RELEASES)}.")]
    name: str | None = None
    """The rest of nnU-Net's dataset name, letters and digits; by default that of the release, e.g. BraTS2021."""
    fold0: FoldRule = "patients"
    """'patients': no patient on both sides of a fold, by --seed. 'paper': nnU-Net's own folds by case, whose fold 0 is
    the paper's (1000/251 cases of BraTS 2021); patients with several time points leak, and are named."""


@command_line("convert-brats", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all is done, 3 when cases were left out, 1 on an error."""
    return _run(tyro.cli(ConvertBrats, args=argv, prog="braindino convert-brats"))


def _run(command: ConvertBrats) -> int:
    if command.release not in RELEASES:
        raise ValueError(f"--release: found {command.release!r}; expected one of {', '.join(RELEASES)}")
    release = RELEASES[command.release]
    found = find_brats_cases(command.source, release, cohort=command.cohort or release.cohort)
    code = run_conversion(command, found, release.form(), name=command.name or release.dataset, fold_rule=command.fold0)
    if len(found.cases) != release.num_labelled:
        paper = "; the paper's folds are those of the whole release" if command.fold0 == "paper" else ""
        print(
            f"note: found {len(found.cases)} complete labelled cases; BraTS {release.name} has "
            f"{release.num_labelled}{paper}"
        )
    return code


if __name__ == "__main__":
    raise SystemExit(main())
