"""The input files that SOURCE arguments stand for, each with what its path says about it.

Every file whose name looks like NIfTI is accounted for, once, whether it will be prepared or not.
"""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from braindino.manifest import Scan
from braindino.preprocessing.naming import NameFacts, is_nifti_name, read_name

_MAGIC = re.compile(r"[*?\[]")
_INSIDE_BIDS = re.compile(r"(sub|ses)-.+|anat")


class Input(NamedTuple):
    """One NIfTI-looking file and the source folder it was found under, both absolute."""

    path: Path
    root: Path


def find_inputs(sources: Iterable[str], *, exclude_dir: Path) -> list[Input]:
    """The NIfTI-looking files of all sources, sorted by path, each once.

    Args:
        sources: folders (searched to the bottom), files, or glob patterns (``**`` crosses folders).
        exclude_dir: the output folder, which may lie inside a source: what the program wrote is no input.

    Raises:
        ValueError: a source does not exist, matches nothing or holds no NIfTI file.
    """
    excluded = _absolute(exclude_dir)
    found: dict[Path, Input] = {}
    for source in sources:
        inputs = [item for item in _expand(source) if excluded not in item.path.parents]
        if not inputs:
            raise ValueError(
                f"{source}: no file ending in .nii or .nii.gz in it; expected a folder with scans, a scan or a pattern"
            )
        for item in inputs:
            found.setdefault(item.path, item)
    return sorted(found.values())


def describe_inputs(
    inputs: Iterable[Input], *, cohort: str = "", sequence: str = "", subject_pattern: re.Pattern[str] | None = None
) -> tuple[list[Scan], list[Scan]]:
    """Rows for all inputs: the scans to prepare, and the files to leave, those with status ``skipped`` and a reason.

    Files that would be one and the same scan by their names (``P1/2019/T1.nii.gz`` and ``P1/2020/T1.nii.gz``) are told
    apart by the folders between: these become their session.

    Args:
        inputs: what :func:`find_inputs` found.
        cohort: name for all of them; by default each gets the name of its source folder.
        sequence: the sequence of files whose name does not tell.
        subject_pattern: see :func:`braindino.preprocessing.naming.read_name`.

    Raises:
        ValueError: two files have one identity and their folders do not tell them apart either.
    """
    scans: list[tuple[Scan, Input]] = []
    skipped: list[Scan] = []
    for item in inputs:
        root = _cohort_root(item.root)
        facts = read_name(
            item.path.relative_to(root), source_name=item.root.name, subject_pattern=subject_pattern, sequence=sequence
        )
        scan = _row(item.path, cohort or root.name, facts)
        if facts.skip:
            skipped.append(scan)
        else:
            scans.append((scan, item))
    return _tell_apart(scans), skipped


def _expand(source: str) -> Iterator[Input]:
    path = _absolute(Path(source))
    if path.is_dir():
        for file in _walk(path):
            yield Input(file, path)
    elif path.exists() or path.is_symlink():
        if not is_nifti_name(path.name):
            raise ValueError(f"{source}: expected a folder, a pattern, or a file ending in .nii or .nii.gz")
        yield Input(path, path.parent)
    elif _MAGIC.search(source):
        parts = path.parts
        first_magic = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
        root = Path(*parts[:first_magic])
        # Path.glob takes no absolute pattern.
        for match in map(Path, sorted(glob.glob(str(path), recursive=True))):  # noqa: PTH207
            if match.is_dir():
                yield from (Input(file, root) for file in _walk(match))
            elif is_nifti_name(match.name):
                yield Input(match, root)
    else:
        raise ValueError(f"{source}: no such file or folder; expected a folder with scans, a scan or a quoted pattern")


def _walk(folder: Path) -> Iterator[Path]:
    """NIfTI-looking files below ``folder``; linked folders are followed, each real folder once."""
    visited: set[str] = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        yield from (Path(current, name) for name in sorted(files) if is_nifti_name(name))


def _cohort_root(root: Path) -> Path:
    """The dataset's folder when the source is a subject, session or ``anat`` folder of a BIDS dataset."""
    while _INSIDE_BIDS.fullmatch(root.name) and root.parent != root:
        root = root.parent
    return root


def _row(path: Path, cohort: str, facts: NameFacts) -> Scan:
    return Scan(
        path=str(path),
        cohort=cohort,
        subject=facts.subject,
        session=facts.session,
        sequence=facts.sequence,
        status="skipped" if facts.skip else "done",
        reason=facts.skip,
    )


def _tell_apart(scans: list[tuple[Scan, Input]]) -> list[Scan]:
    by_identity: dict[str, list[tuple[Scan, Input]]] = defaultdict(list)
    for scan, item in scans:
        by_identity[scan.scan_id].append((scan, item))
    result = []
    taken: dict[str, Scan] = {}
    for group in by_identity.values():
        for scan, item in group:
            if len(group) > 1:
                folders = [part for part in item.path.relative_to(item.root).parts[:-1] if part != scan.subject]
                scan = replace(scan, session="/".join(filter(None, [scan.session, *folders])))  # noqa: PLW2901
            other = taken.setdefault(scan.scan_id, scan)
            if other is not scan:
                raise ValueError(
                    f"{other.path} and {scan.path} would both be cohort {scan.cohort!r}, subject "
                    f"{scan.subject!r}, session {scan.session!r}, sequence {scan.sequence!r} with the same file name; "
                    "prepare their folders one after the other with different --cohort names, or tell them apart "
                    "with --subject-pattern"
                )
            result.append(scan)
    return sorted(result, key=lambda scan: (scan.cohort, scan.subject, scan.session, scan.sequence, scan.path))


def _absolute(path: Path) -> Path:
    """``path`` made absolute without following links: users know their files by the names they gave."""
    # Path.absolute keeps "..", Path.resolve follows links.
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100
