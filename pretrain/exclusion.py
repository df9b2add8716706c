"""Subjects that a run must not see: those of a list, and whoever is the same person under another id."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from braindino.leakage import Crosswalk, Exposure, find_overlaps
from braindino.manifest import Scan
from braindino.splits import read_subjects

MAX_NAMED = 10


class Exclusion(NamedTuple):
    """Subjects kept out of a run."""

    subjects: frozenset[str]
    """All of them, `cohort/subject`: the listed ones and the joined ones."""
    sha256: str
    """Of the list's subjects."""
    joined: dict[str, str]
    """Subjects that are not on the list -> why they are kept out with it."""

    def lines(self) -> list[str]:
        """What to tell about the joined subjects; empty when there are none."""
        if not self.joined:
            return []
        named = [f"{subject} ({why})" for subject, why in list(self.joined.items())[:MAX_NAMED]]
        more = f" and {len(self.joined) - MAX_NAMED} more" if len(self.joined) > MAX_NAMED else ""
        return [f"{len(self.joined)} subjects that are not on the list are left out with it: {', '.join(named)}{more}"]


def read_exclusion(*paths: Path, scans: Sequence[Scan], crosswalk: Crosswalk | None = None) -> Exclusion:
    """The subjects of lists (`braindino split` writes one), and those of the store that `braindino audit` would take
    for one of them.

    What the audit finds between the listed subjects and the other scans is kept out as well, by the same function:
    other ids of one person (`crosswalk`, certain and probable), equal voxels, and scans that look the same. So a run
    with the lists is audited clean against the listed subjects.

    Args:
        paths: one `cohort/subject` per line.
        scans: of the store.
        crosswalk: ids of one person in several cohorts; by default the rules in `braindino/crosswalks` alone.

    Raises:
        ValueError: a line is no `cohort/subject`, or none of the subjects of a list is among the scans under any id (so
            that a list with misspelt names cannot pass for an exclusion).
    """
    of_list = {path: read_subjects(path) for path in paths}
    listed = frozenset(subject for subjects in of_list.values() for subject in subjects)
    held_out = [scan for scan in scans if scan.subject_key in listed]
    others = [scan for scan in scans if scan.subject_key not in listed]
    # Listed subjects without a scan here are known by their ids alone; another id of theirs may be in the store.
    absent = sorted(listed - {scan.subject_key for scan in held_out})
    parts = [key.partition("/") for key in absent]
    held_out += [Scan("", cohort, subject) for cohort, _, subject in parts]
    joined: dict[str, str] = {}
    found = {scan.subject_key for scan in held_out if scan.path}
    for overlap in find_overlaps(Exposure(tuple(held_out)), others, crosswalk or Crosswalk()):
        why = f"{overlap.kind} as {overlap.seen.subject_key}, {overlap.certainty}"
        joined.setdefault(overlap.scan.subject_key, why)
        found.add(overlap.seen.subject_key)
    for path, subjects in of_list.items():
        if subjects and found.isdisjoint(subjects):
            known = sorted({scan.subject_key for scan in scans})
            raise ValueError(
                f"{path}: none of its {len(subjects)} subjects is in the store (first: {subjects[0]!r}; the store has "
                f"{known[:3]}...); check the cohort names"
            )
    return Exclusion(
        subjects=listed | set(joined),
        sha256=hashlib.sha256("\n".join(sorted(listed)).encode()).hexdigest(),
        joined=joined,
    )
