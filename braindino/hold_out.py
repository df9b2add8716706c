"""``braindino split``: choose the subjects that every room holds out, before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from braindino.command_line import command_line
from braindino.leakage import KINDS, Crosswalk, Exposure, Overlap, describe_overlaps, find_overlaps, read_exposure
from braindino.manifest import read_scans
from braindino.splits import split_subjects, write_subjects
from braindino.tables import read_table


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Choose subjects to hold out and write them to a list that pretraining, segmentation and evaluation all read."""

    prepared: Path
    """Folder made by `braindino prepare`; the subjects are those of its scans.tsv."""
    out: Path
    """Text file to write: one cohort/subject per line."""
    test_fraction: float = 0.3
    """Share of the subjects to hold out; all count, those that may not be held out as well."""
    seed: int = 0
    """Seed of the choice."""
    participants: Path | None = None
    """BIDS participants.tsv, needed with --strata."""
    strata: str | None = None
    """Column of participants.tsv whose groups are divided in the same proportion, e.g. tumor."""
    pretrained_on: Path | None = None
    """Encoder, run or store that exists already: subjects that it has seen, under whatever name, are not held out but
    left to train on."""
    crosswalk: tuple[Path, ...] = ()
    """Tables that join ids of different cohorts, as for `braindino audit`."""
    allow_overlap: bool = False
    """Hold out subjects that were pretrained on all the same; the list then says so."""


@command_line("split")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the list was written, 1 on an error."""
    _run(tyro.cli(HoldOut, args=argv, prog="braindino split"))
    return 0


def _run(config: HoldOut) -> None:
    scans = [scan for scan in read_scans(config.prepared / "scans.tsv") if scan.status == "done"]
    subjects = sorted({scan.subject_key for scan in scans})
    crosswalk = Crosswalk(config.crosswalk)
    strata = None
    if config.strata is not None:
        if config.participants is None:
            raise ValueError("--strata needs --participants FILE, the table with that column")
        groups = _column(config.participants, config.strata)
        missing = [key for key in subjects if _participant(key) not in groups]
        if missing:
            raise ValueError(f"{config.participants}: no row for {missing[:5]}; expected one per prepared subject")
        strata = {key: groups[_participant(key)] for key in subjects}
    person_of = crosswalk.person_of(subjects)
    exposure = Exposure() if config.pretrained_on is None else read_exposure(config.pretrained_on)
    overlaps = find_overlaps(exposure, scans, crosswalk)
    set_aside = set() if config.allow_overlap else _all_ids_of({each.scan.subject_key for each in overlaps}, person_of)
    if set_aside:
        why = f"{config.pretrained_on} has seen them ({_count_kinds(overlaps, set_aside)})"
        told = f"{len(set_aside)} of {len(subjects)} subjects are left to train on"
        print(f"{told} (--allow-overlap draws from them, too): {why}")
        if len(set_aside) == len(subjects):
            raise ValueError(
                f"none of the {len(subjects)} subjects can be held out: {why}; prepare subjects that it has not seen, "
                "or draw from these with --allow-overlap, which marks the list"
            )
    train, test = split_subjects(
        subjects,
        test_fraction=config.test_fraction,
        seed=config.seed,
        strata=strata,
        person_of=person_of,
        train_only=set_aside,
    )
    comment = f"held out: {len(test)} of {len(subjects)} subjects, seed {config.seed}; never trained on"
    if config.pretrained_on is not None:
        held_out = set(test)
        stamp = describe_overlaps(
            exposure,
            [scan for scan in scans if scan.subject_key in held_out],
            [each for each in overlaps if each.scan.subject_key in held_out],
        )
        if set_aside:
            comment += f"; {len(set_aside)} subjects that were pretrained on are not among them"
        comment += f"; pretraining overlap with {config.pretrained_on.name}: {stamp}"
        print(f"pretraining overlap with {config.pretrained_on}: {stamp}")
    write_subjects(config.out, test, comment=comment)
    print(f"{len(train)} subjects to train on, {len(test)} held out: {config.out}")


def _all_ids_of(subjects: set[str], person_of: Mapping[str, str]) -> set[str]:
    """The subjects, and those that are the same persons under other ids."""
    persons = {person_of[subject] for subject in subjects}
    return {subject for subject, person in person_of.items() if person in persons}


def _count_kinds(overlaps: Sequence[Overlap], set_aside: set[str]) -> str:
    """How many subjects were seen in which way; one may be seen in several."""
    counts = {kind: len({each.scan.subject_key for each in overlaps if each.kind == kind}) for kind in KINDS}
    counts["another id of one seen"] = len(set_aside - {each.scan.subject_key for each in overlaps})
    return ", ".join(f"{kind} {count}" for kind, count in counts.items() if count)


def _participant(subject_key: str) -> str:
    """``cohort/sub-01`` and ``cohort/01`` -> ``01``."""
    return subject_key.split("/", maxsplit=1)[1].removeprefix("sub-")


def _column(path: Path, column: str) -> dict[str, str]:
    table = read_table(path)
    if not {"participant_id", column} <= set(table.columns):
        raise ValueError(f"{path}: found columns {table.columns}; expected participant_id and {column}")
    return {row["participant_id"].removeprefix("sub-"): row[column] for row in table.rows}
