"""``braindino subset``: a slice store of some scans of another, by cohort, sequence and subject."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from braindino.command_line import GOES_ON, command_line
from braindino.manifest import Scan
from braindino.slice_store import SliceStore
from braindino.splits import read_subjects
from braindino.store_merge import Pick, assemble
from braindino.store_verify import store_folder


@dataclass(frozen=True, kw_only=True)
class SubsetOptions:
    """Make a slice store of some scans of another one, without copying where the disk allows links.

    A scan is taken when it meets every condition given. Run it again after an interruption.
    """

    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Slice store, or a folder made by `braindino prepare`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the new store."""
    cohort: tuple[str, ...] = ()
    """Only these cohorts."""
    sequence: tuple[str, ...] = ()
    """Only these sequences."""
    subject: tuple[str, ...] = ()
    """Only these subjects, each cohort/subject."""
    subjects: Path | None = None
    """Only the subjects of this list, cohort/subject per line (`braindino split` writes one); adds to --subject."""
    exclude_subjects: Path | None = None
    """All but the subjects of this list."""

    def __post_init__(self) -> None:
        if not (self.cohort or self.sequence or self.subject or self.subjects or self.exclude_subjects):
            raise ValueError(
                "no condition given; expected one of --cohort, --sequence, --subject, --subjects, --exclude-subjects"
            )


@command_line("subset", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the store was made, 1 on an error."""
    options = tyro.cli(SubsetOptions, args=argv, prog="braindino subset")
    store = SliceStore(store_folder(options.store))
    picks = [Pick(store, row) for row in choose(store.scans, options)]
    subset = assemble(options.out, picks, contract=store.contract)
    print(f"{options.out}: {subset.num_scans} of {store.num_scans} scans, {len(subset)} of {len(store)} slices")
    return 0


def choose(scans: Sequence[Scan], options: SubsetOptions) -> list[int]:
    """Rows of the scans that meet every condition.

    Raises:
        ValueError: a condition names what the store does not have (so that a misspelt name is noticed), or no scan
            meets them all.
    """
    subjects = set(options.subject)
    if options.subjects is not None:
        subjects.update(read_subjects(options.subjects))
    excluded = set(read_subjects(options.exclude_subjects)) if options.exclude_subjects is not None else set()
    known = {scan.subject_key for scan in scans}
    _check_known("--cohort", options.cohort, {scan.cohort for scan in scans})
    _check_known("--sequence", options.sequence, {scan.sequence for scan in scans})
    _check_known("--subject", options.subject, known)
    for flag, path, named in (("--subjects", options.subjects, subjects), ("--exclude-subjects", None, excluded)):
        # A list may name subjects of other stores, but not only those.
        if named and not known.intersection(named):
            raise ValueError(
                f"{flag} {path or options.exclude_subjects}: none of its {len(named)} subjects is in the store "
                f"(first: {min(named)!r}; the store has {sorted(known)[:3]}...); check the cohort names"
            )
    only_these = bool(options.subject) or options.subjects is not None
    rows = [
        row
        for row, scan in enumerate(scans)
        if (not options.cohort or scan.cohort in options.cohort)
        and (not options.sequence or scan.sequence in options.sequence)
        and (not only_these or scan.subject_key in subjects)
        and scan.subject_key not in excluded
    ]
    if not rows:
        raise ValueError(f"no scan of {len(scans)} meets all conditions; nothing was written")
    return rows


def _check_known(flag: str, named: Iterable[str], known: set[str]) -> None:
    missing = [name for name in named if name not in known]
    if missing:
        shown = ", ".join(sorted(known)[:10]) + (" ..." if len(known) > 10 else "")
        raise ValueError(f"{flag}: found {missing}, which the store does not have; it has {shown}")


if __name__ == "__main__":
    raise SystemExit(main())
