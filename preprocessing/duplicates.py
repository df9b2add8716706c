"""Scans whose voxels are those of another scan, whatever they are called: one of them is kept."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from braindino.manifest import mask_path
from braindino.preprocessing.cases import DUPLICATE, Case, CaseFolder, input_path, row_order, write_case


def resolve_duplicates(cases: CaseFolder) -> list[Case]:
    """Quarantine every finished scan that is the same as another, but for the first by cohort, subject, session...

    Which one is kept depends on the scans alone, not on the order of work.

    Returns:
        The cases that were put aside by an earlier run and are now the first of their kind: they must be prepared.
    """
    revived = []
    for group in _groups(cases):
        first, *others = sorted(group, key=lambda case: row_order(case.scan))
        if first.scan.status == "quarantined":
            revived.append(first)
        for case in others:
            words = f"{DUPLICATE}: the same voxels as {input_path(first.scan)}"
            if case.scan.reason != words:
                _put_aside(cases, case, words)
    return revived


def _groups(cases: CaseFolder) -> Iterable[Sequence[Case]]:
    """Cases with the same voxels. One that was put aside earlier makes a group of its own when the other is gone."""
    by_content: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.scan.content_hash and (case.scan.status == "done" or case.code == DUPLICATE):
            by_content[case.scan.content_hash].append(case)
    return [group for group in by_content.values() if len(group) > 1 or group[0].code == DUPLICATE]


def _put_aside(cases: CaseFolder, case: Case, reason: str) -> None:
    aside = replace(case, scan=replace(case.scan, status="quarantined", reason=reason, num_slices=0))
    write_case(cases.out_dir, aside)
    cases.record(aside)
    cases.store.discard(case.scan.scan_id)
    mask_path(cases.out_dir, case.scan).unlink(missing_ok=True)
