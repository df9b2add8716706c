"""The inputs that SOURCE arguments stand for, each with what its path says about it and whether it is taken.

Every file or series that looks like an image is accounted for, once, whether it will be prepared or not. Without a
row of the table of cohorts, inputs are files named like NIfTI and their names are read by :mod:`naming`; with a row,
its reader does it.
"""

import glob
import importlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from braindino.manifest import Scan
from braindino.preprocessing.cohort_table import CohortRow, Repeats, load_cohort
from braindino.preprocessing.conversion import Conversion, converted_name
from braindino.preprocessing.naming import HIDDEN, NameFacts, is_nifti_name, read_name

# Each module has read_candidates(folders, *, cohort, out_dir) -> list[Candidate]: one for each file or series in the
# folders that looks like an image. Repeats, unwanted sequences and namesakes are settled here, for all of them.
READER_MODULES = {
    "bids": "braindino.preprocessing.bids_reader",
    "template": "braindino.preprocessing.template_reader",
    "loni": "braindino.preprocessing.loni_reader",
    "dicom": "braindino.preprocessing.dicom_series",
    "fastmri": "braindino.preprocessing.fastmri",
}
UNRECOGNISED = "unrecognised"
# Version control's own folders: a dataset fetched with DataLad keeps a second name for each of its files there.
NOT_DATA = (".git", ".datalad")

_MAGIC = re.compile(r"[*?\[]")
_INSIDE_BIDS = re.compile(r"(sub|ses)-.+|anat")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One input of a cohort.

    Attributes:
        scan: status ``done`` stands for "to prepare"; ``skipped``, with ``code: words``, for what is left;
            ``quarantined``, with ``code: words``, for what is known already not to be usable.
        conversion: how ``scan.path`` is made from ``scan.source``; None where the file is read as it is.
        description: what the series is called by those who made it; empty where a file has but its name.
    """

    scan: Scan
    conversion: Conversion | None = None
    description: str = ""

    @property
    def origin(self) -> str:
        """The raw input: what the user has on disk."""
        return self.scan.source or self.scan.path


class SourceFolder(NamedTuple):
    """A folder with files, and the source it was found under, both absolute; the names of its files, sorted."""

    path: str
    root: str
    names: tuple[str, ...]


class Input(NamedTuple):
    """One NIfTI-looking file and the source folder it was found under, both absolute."""

    path: Path
    root: Path


def find_candidates(
    sources: Iterable[str],
    *,
    out_dir: Path,
    cohort: CohortRow | None = None,
    name: str = "",
    sequence: str = "",
    subject_pattern: re.Pattern[str] | None = None,
) -> list[Candidate]:
    """All inputs of all sources: those to prepare, sorted by identity, then those that are left, sorted by path.

    Args:
        sources: folders (searched to the bottom), files, or glob patterns (``**`` crosses folders).
        out_dir: the output folder, which may lie inside a source: what the program wrote is no input. Converted
            inputs get their path below it.
        cohort: row of the table of cohorts; None reads names of any NIfTI files.
        name: what the dataset is called, instead of the row's name or that of each source folder.
        sequence: the sequence of files whose name does not tell; not with a row.
        subject_pattern: see :func:`braindino.preprocessing.naming.read_name`; not with a row.

    Raises:
        ValueError: a source does not exist or holds no image, nothing in the sources is what the row describes, two
            inputs have one identity and nothing tells them apart, or the arguments contradict each other.
    """
    if cohort is None:
        inputs = find_inputs(sources, exclude_dir=out_dir)
        scans, skipped = describe_inputs(inputs, cohort=name, sequence=sequence, subject_pattern=subject_pattern)
        return [Candidate(scan=scan) for scan in (*scans, *skipped)]
    if sequence or subject_pattern is not None:
        raise ValueError(
            f"--sequence and --subject-pattern are for datasets without a row; cohort {cohort.name} says both itself "
            f"(in {cohort.path})"
        )
    if name and cohort.members:
        raise ValueError(
            f"--cohort-name: cohort {cohort.name} consists of {', '.join(cohort.members)}, which keep theirs"
        )
    folders = walk_sources(sources, exclude_dir=out_dir)
    found = _read(folders, cohort, out_dir)
    if not found:
        raise ValueError(f"{', '.join(map(str, sources))}: no image in it; expected {cohort.title}: {cohort.layout}")
    if all(candidate.scan.reason.startswith(UNRECOGNISED) for candidate in found):
        raise ValueError(
            f"none of the {len(found)} images is of the cohort {cohort.name}, the first is {found[0].origin} "
            f"({found[0].scan.reason}); expected {cohort.layout or 'what ' + cohort.path + ' describes'}"
        )
    if name:
        found = [replace(candidate, scan=replace(candidate.scan, cohort=name)) for candidate in found]
    return _in_order(found)


def walk_sources(sources: Iterable[str], *, exclude_dir: Path) -> list[SourceFolder]:
    """The folders of all sources that hold files, sorted by path, each once; without those below ``exclude_dir``.

    Linked folders are followed, each real folder once per source. No file is opened.

    Raises:
        ValueError: a source does not exist, or matches nothing.
    """
    excluded = str(_absolute(exclude_dir))
    found: dict[str, tuple[str, set[str]]] = {}
    for source in sources:
        empty = True
        for folder in _folders_of(source, excluded):
            empty = False
            known = found.setdefault(folder.path, (folder.root, set()))
            known[1].update(folder.names)
        if empty:
            raise ValueError(f"{source}: no file in it; expected a folder with scans, a scan or a quoted pattern")
    return [SourceFolder(path, root, tuple(sorted(names))) for path, (root, names) in sorted(found.items())]


def describe(
    path: str, found: Mapping[str, str | None], *, cohort: CohortRow, sequence: str, reason: str, problem: str = ""
) -> Candidate:
    """The candidate of one file, from what its reader found.

    Args:
        path: of the file, absolute.
        found: ``subject`` and ``session`` as they stand in the path; the row's rules make identifiers of them.
        cohort: the row.
        sequence: what it is.
        reason: why it is left; empty for what is taken.
        problem: why it cannot be used, ``code: words``: it is quarantined if it is not left. Whom it shows may then be
            unknown.
    """
    subject = session = unknown = ""
    if found.get("subject"):
        try:
            subject = cohort.subject.read(found["subject"] or "")
            session = cohort.session.read(found.get("session") or "")
        except ValueError as error:
            unknown = f"{UNRECOGNISED}: {'session' if subject else 'subject'}: {error}"
    else:
        unknown = f"{UNRECOGNISED}: the path fits no pattern of the row"
    reason = reason or ("" if problem else unknown)
    status = "skipped" if reason else "quarantined" if problem else "done"
    return Candidate(
        scan=Scan(path, cohort.name, subject, session, sequence, status=status, reason=reason or problem),
        description=found.get("description") or "",
    )


def convert_to(out_dir: Path, candidate: Candidate, conversion: Conversion, identity: str) -> Candidate:
    """``candidate``, to be converted; its path so far becomes the source.

    Args:
        out_dir: the output folder.
        candidate: of the raw file or series; comes back as it is where it is left.
        conversion: how.
        identity: what makes the input unique in its cohort, wherever the cohort lies.
    """
    if candidate.scan.status == "skipped":
        return candidate
    name = converted_name(conversion.kind, f"{candidate.scan.cohort}/{identity}")
    path = str(_absolute(out_dir) / "converted" / name)
    scan = replace(candidate.scan, path=path, source=candidate.scan.path)
    return replace(candidate, scan=scan, conversion=conversion)


def reason_to_leave(path: str, root: str, *, cohort: CohortRow) -> str:
    """Why ``path`` (below its source ``root``) is left by its place and name alone; empty where nothing speaks so."""
    below = path[len(root) :].lstrip("/")
    if "/." in f"/{below}":
        return HIDDEN
    return next((rule.reason for rule in cohort.skip if rule.pattern.search(below)), "")


def leave(candidate: Candidate, reason: str) -> Candidate:
    """``candidate`` as a skipped one; its row then names the raw input, since nothing will be converted."""
    scan = replace(candidate.scan, path=candidate.origin, source="", status="skipped", reason=reason)
    return replace(candidate, scan=scan, conversion=None)


def find_inputs(sources: Iterable[str], *, exclude_dir: Path) -> list[Input]:
    """The NIfTI-looking files of all sources, sorted by path, each once.

    Args:
        sources: folders (searched to the bottom), files, or glob patterns (``**`` crosses folders).
        exclude_dir: the output folder, which may lie inside a source: what the program wrote is no input.

    Raises:
        ValueError: a source does not exist, matches nothing or holds no NIfTI file.
    """
    excluded = str(_absolute(exclude_dir))
    found: dict[str, str] = {}
    for source in sources:
        path = _absolute(Path(source))
        if path.is_file() and not is_nifti_name(path.name):
            raise ValueError(f"{source}: expected a folder, a pattern, or a file ending in .nii or .nii.gz")
        inputs = [
            (f"{folder.path}/{name}", folder.root)
            for folder in _folders_of(source, excluded)
            for name in folder.names
            if is_nifti_name(name)
        ]
        if not inputs:
            raise ValueError(
                f"{source}: no file ending in .nii or .nii.gz in it; expected a folder with scans, a scan or a pattern"
            )
        for file, root in inputs:
            found.setdefault(file, root)
    return sorted(Input(Path(file), Path(root)) for file, root in found.items())


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


def _read(folders: Sequence[SourceFolder], cohort: CohortRow, out_dir: Path) -> list[Candidate]:
    """What the cohort's reader makes of the folders; of a cohort of several, what the first that knows a file says."""
    rows = [load_cohort(member) for member in cohort.members] or [cohort]
    best: dict[str, Candidate] = {}
    for row in rows:
        reader = importlib.import_module(READER_MODULES[row.reader])
        for candidate in reader.read_candidates(folders, cohort=row, out_dir=out_dir):
            if cohort.members and row.known_by is not None and not row.known_by.search(candidate.origin):
                candidate = leave(candidate, f"{UNRECOGNISED}: of no part of cohort {cohort.name}")  # noqa: PLW2901
            other = best.get(candidate.origin)
            if other is None or _knowledge(candidate) > _knowledge(other):
                best[candidate.origin] = candidate
    by_cohort: dict[str, list[Candidate]] = {row.name: [] for row in rows}
    for candidate in best.values():
        by_cohort[candidate.scan.cohort].append(_only_wanted(candidate, cohort))
    return [candidate for row in rows for candidate in _leave_repeats(by_cohort[row.name], row.repeats)]


def _knowledge(candidate: Candidate) -> int:
    if candidate.scan.status != "skipped":
        return 2
    return 0 if candidate.scan.reason.startswith(UNRECOGNISED) else 1


def _only_wanted(candidate: Candidate, cohort: CohortRow) -> Candidate:
    found = candidate.scan.sequence
    if candidate.scan.status != "done" or found in cohort.sequences:
        return candidate
    return leave(candidate, f"other_sequence: {found}; cohort {cohort.name} is taken for {', '.join(cohort.sequences)}")


def _leave_repeats(candidates: Iterable[Candidate], repeats: Repeats) -> list[Candidate]:
    if repeats.keep == "all":
        return list(candidates)
    result: list[Candidate] = []
    groups: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        scan = candidate.scan
        if scan.status != "done":
            result.append(candidate)
        else:
            groups[(scan.subject, scan.sequence, "" if repeats.per == "subject" else scan.session)].append(candidate)
    choose = min if repeats.keep == "first" else max
    for group in groups.values():
        session = choose((candidate.scan.session for candidate in group), key=natural_order)
        best = min(_preference(candidate, repeats) for candidate in group if candidate.scan.session == session)
        taken = choose(
            (item for item in group if item.scan.session == session and _preference(item, repeats) == best),
            key=lambda candidate: natural_order(candidate.origin),
        )
        reason = f"repeat: the row takes the {repeats.keep} scan of a {repeats.per} and sequence, and this is another"
        result += [candidate if candidate is taken else leave(candidate, reason) for candidate in group]
    return result


def _preference(candidate: Candidate, repeats: Repeats) -> int:
    text = candidate.description or candidate.origin
    return next((rank for rank, p in enumerate(repeats.prefer) if p.search(text)), len(repeats.prefer))


def natural_order(text: str) -> list[tuple[int, str]]:
    """Sorting key with numbers in their order: ``run-2`` before ``run-10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(text) if part]


def _in_order(found: Iterable[Candidate]) -> list[Candidate]:
    """Scans by identity, then what is left by path.

    Raises:
        ValueError: two inputs have one identity.
    """
    taken: list[Candidate] = []
    left: list[Candidate] = []
    identities: dict[str, Candidate] = {}
    for candidate in found:
        scan = candidate.scan
        (left if scan.status == "skipped" else taken).append(candidate)
        if scan.status == "skipped":
            continue
        other = identities.setdefault(scan.scan_id, candidate)
        if other is not candidate:
            raise ValueError(
                f"{other.origin} and {candidate.origin} would both be cohort {scan.cohort!r}, subject "
                f"{scan.subject!r}, session {scan.session!r}, sequence {scan.sequence!r} with the same file name; give "
                "one of two copies, or tell them apart in the cohort's row (group session, or repeats: {keep: first})"
            )
    taken.sort(key=lambda c: (c.scan.cohort, c.scan.subject, c.scan.session, c.scan.sequence, c.scan.path))
    left.sort(key=lambda c: c.scan.path)
    return [*taken, *left]


def _folders_of(source: str, excluded: str) -> Iterator[SourceFolder]:
    path = _absolute(Path(source))
    if path.is_dir():
        yield from _walk(str(path), str(path), excluded)
    elif path.exists() or path.is_symlink():
        yield from _single_file(path, path.parent, excluded)
    elif _MAGIC.search(source):
        parts = path.parts
        first_magic = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
        root = Path(*parts[:first_magic])
        # Path.glob takes no absolute pattern.
        for match in map(Path, sorted(glob.glob(str(path), recursive=True))):  # noqa: PTH207
            if match.is_dir():
                yield from _walk(str(match), str(root), excluded)
            else:
                yield from _single_file(match, root, excluded)
    else:
        raise ValueError(f"{source}: no such file or folder; expected a folder with scans, a scan or a quoted pattern")


def _single_file(path: Path, root: Path, excluded: str) -> Iterator[SourceFolder]:
    if excluded not in map(str, path.parents):
        yield SourceFolder(str(path.parent), str(root), (path.name,))


def _walk(top: str, root: str, excluded: str) -> Iterator[SourceFolder]:
    """Folders with files below ``top``, depth first; linked folders are followed, each real folder once."""
    if top == excluded or top.startswith(excluded + "/"):
        return
    visited: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        status = Path(folder).stat()
        if folder == excluded or (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        names, folders = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    names.append(entry.name)
                elif entry.name not in NOT_DATA:
                    folders.append(entry.name)
        # The last is walked first.
        waiting += [f"{folder.rstrip('/')}/{name}" for name in sorted(folders, reverse=True)]
        if names:
            yield SourceFolder(folder, root, tuple(sorted(names)))


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
                    "prepare their folders one after the other with different --cohort-name, or tell them apart "
                    "with --subject-pattern"
                )
            result.append(scan)
    return sorted(result, key=lambda scan: (scan.cohort, scan.subject, scan.session, scan.sequence, scan.path))


def _absolute(path: Path) -> Path:
    """``path`` made absolute without following links: users know their files by the names they gave."""
    # Path.absolute keeps "..", Path.resolve follows links.
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100
