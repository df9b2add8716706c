"""``braindino perturb SOURCE --out DIR``: a cohort under every perturbation of paper sec. 4.5, before preprocessing.

Leaves, and owns the format of (version 1)::

DIR/clean/                        the files of SOURCE as they are, byte for byte (copies, no links)
    <perturbation>-<severity>/    the same relative paths: scans perturbed, everything else copied
    perturb.json                  settings, definitions, versions, command
    perturb.tsv                   a row for every file of SOURCE: what became of it, and why
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from braindino.atomic import plain, replace_file, write_json
from braindino.command_line import EXIT_DONE, EXIT_PARTIAL, GOES_ON, command_line
from braindino.lock import lock_folder
from braindino.manifest import Scan
from braindino.perturbations import (
    CLEAN,
    PAPER_PERTURBATIONS,
    PERTURBATIONS,
    Condition,
    keep_background,
    paper_conditions,
    perturb,
    read_condition,
    subject_generator,
)
from braindino.preprocessing.cohort_table import load_cohort
from braindino.preprocessing.discovery import SourceFolder, find_candidates, walk_sources
from braindino.preprocessing.naming import DICOM_SUFFIXES, OTHER_FORMATS, is_nifti_name, nifti_stem
from braindino.preprocessing.options import compile_subject_pattern
from braindino.preprocessing.preparation import check_is_image
from braindino.preprocessing.skull_strip import looks_stripped
from braindino.preprocessing.worker_pool import WorkerDied, run_tasks
from braindino.progress import track
from braindino.provenance import code_commit, versions
from braindino.records import read_json
from braindino.splits import read_subjects
from braindino.tables import read_table, write_table
from braindino.volume import VolumeError, file_grid, load_volume, save_on_grid

FORMAT_VERSION = 1
RECORD, TABLE = "perturb.json", "perturb.tsv"
SECONDS_BETWEEN_TABLES = 30.0
# What goes along with scans; anything else that is no image, such as an archive, is not written fourteen times.
SIDECARS = (".tsv", ".csv", ".json", ".txt", ".md", ".yaml", ".yml", ".xml", ".xls", ".xlsx", ".bval", ".bvec")
SIDECAR_NAMES = ("README", "CHANGES", "LICENSE")
NNUNET_IMAGES = ("imagesTr", "imagesTs")
Background = Literal["keep", "perturb"]


@dataclass(frozen=True, kw_only=True)
class PerturbOptions:
    """Write copies of a cohort's raw scans under gamma, Gibbs ringing and bias fields, each at every severity, for
    asking what a trained model still makes of them: docs/robustness.md.

    Every folder of DIR is a cohort like SOURCE: `braindino prepare`, `nnUNetv2_predict` and everything else take it as
    they take SOURCE. Run it again to go on: finished files are kept. Exit code 3: some scans could not be used.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder with NIfTI files: BIDS, nnU-Net's (whole dataset, or imagesTs), or any other that prepare takes."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the copies."""
    conditions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Such as gamma-0.7 or gibbs_sphere-0.3; by default the paper's 13 of gamma, gibbs and bias_field."""
    background: Background = "keep"
    """Of scans that were stripped already: `keep` puts the zeros around the brain back after the perturbation;
    `perturb` leaves what it makes of them."""
    unperturbed: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GLOB")] = ()
    """More files to copy as they are, by pattern of the path below SOURCE such as '*/masks/*'. Masks, label maps and
    derivatives are told by their names."""
    subjects: Path | None = None
    """Subject list (as written by `braindino split`): only their scans, since nobody trains on the others' copies."""
    cohort: str = ""
    """A name that `braindino cohorts` lists, or a YAML file of the same form, as for prepare."""
    cohort_name: str = ""
    """What the dataset is called in prepare and in lists of subjects; by default its folder."""
    subject_pattern: str = ""
    """Regular expression that reads subjects from paths, as for prepare."""
    seed: int = 0
    """Of the bias fields; a subject has one field in all its scans and at all severities."""
    jobs: int | None = None
    """Processes; each needs about 1 GB. By default up to 4. 0 works without processes, for debugging."""

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 0:
            raise ValueError(f"--jobs: found {self.jobs}; expected 0 or more")
        compile_subject_pattern(self.subject_pattern)
        for condition in self.chosen():
            if condition.is_clean:
                raise ValueError(f"--conditions {condition.name}: changes nothing; it is written anyway, as {CLEAN}")

    def chosen(self) -> list[Condition]:
        """The conditions, each once."""
        named = [read_condition(name) for name in dict.fromkeys(self.conditions)]
        return named or paper_conditions(PAPER_PERTURBATIONS)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one file of SOURCE.

    Attributes:
        file: path below SOURCE.
        status: ``perturbed``; ``copied`` as it is; ``left`` out of DIR; ``quarantined``: cannot be used.
        reason: why it was not perturbed, ``code: words``; of a perturbed scan what was mended when it was read.
        subject: ``cohort/subject`` of a scan, which its bias field is drawn for.
        background: ``kept`` where the zeros of a stripped scan were put back.
        seconds: that it took in this run.
    """

    file: str
    status: Literal["perturbed", "copied", "left", "quarantined"]
    reason: str = ""
    subject: str = ""
    background: str = ""
    seconds: float = 0.0


COLUMNS = ("file", "status", "reason", "subject", "background", "seconds")


class Perturber:
    """Writes all conditions of one file; picklable."""

    def __init__(self, source: Path, out_dir: Path, conditions: Sequence[Condition], *, seed: int, background: str):
        self.source = source
        self.out_dir = out_dir
        self.conditions = conditions
        self.seed = seed
        self.background = background

    def __call__(self, row: Row) -> Row:
        """The row after the work; a file that is there and no older than its source is kept.

        Raises:
            OSError: DIR cannot be written.
        """
        start = time.perf_counter()
        path = self.source / row.file
        try:
            _check_readable(path)
            if row.status == "perturbed":
                row = self._perturb(row, path)
            else:
                for name in self._folders():
                    self._copy(path, name, row.file)
        except VolumeError as error:
            message = error.message.removeprefix(f"{path}: ")
            row = replace(row, status="quarantined", reason=f"{error.code}: {message}")
        return replace(row, seconds=round(time.perf_counter() - start, 3))

    def is_done(self, row: Row) -> bool:
        """Whether every file of the row is there and no older than its source."""
        path = self.source / row.file
        return all(_is_current(self.out_dir / name / row.file, path) for name in self._folders())

    def _folders(self) -> list[str]:
        return [CLEAN, *(condition.name for condition in self.conditions)]

    def _perturb(self, row: Row, path: Path) -> Row:
        targets = {condition: self._target(condition.name, row.file) for condition in self.conditions}
        volume = load_volume(path)
        check_is_image(volume)
        self._copy(path, CLEAN, row.file)
        kept = self.background == "keep" and looks_stripped(volume)
        grid = file_grid(path)
        for condition, target in targets.items():
            if _is_current(target, path):
                continue
            data = perturb(volume.data, condition, subject_generator(self.seed, row.subject))
            if kept:
                data = keep_background(data, volume.data)
            save_on_grid(data, grid, target, dtype=np.float32)
        return replace(row, reason="; ".join(volume.notes), background="kept" if kept else "")

    def _copy(self, path: Path, condition: str, file: str) -> None:
        target = self._target(condition, file)
        if not _is_current(target, path):
            with replace_file(target) as temporary:
                shutil.copyfile(path, temporary)

    def _target(self, condition: str, file: str) -> Path:
        target = self.out_dir / condition / file
        target.parent.mkdir(parents=True, exist_ok=True)
        # Somebody may have put a link there.
        if not target.parent.resolve().is_relative_to(self.out_dir.resolve()):
            raise ValueError(f"{target.parent}: leads out of {self.out_dir}; nothing is written there")
        return target


@command_line("perturb", errors=(RuntimeError,), interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all scans were perturbed, 3 when some were quarantined, 1 on an error."""
    options = tyro.cli(PerturbOptions, args=argv, prog="braindino perturb")
    return perturb_cohort(options, command=["braindino", "perturb", *(sys.argv[1:] if argv is None else argv)])


def perturb_cohort(options: PerturbOptions, *, command: Sequence[str]) -> int:
    """Write all conditions of ``options.source`` into ``options.out``; the exit code.

    Raises:
        ValueError: SOURCE holds nothing to perturb, DIR was made with other settings, or somebody is at work there.
        OSError: DIR cannot be written, or the disk is full; what was finished before is kept.
    """
    source, out = _absolute(options.source), _absolute(options.out)
    if not source.is_dir():
        raise ValueError(f"{options.source}: no such folder; expected a folder with NIfTI files")
    if source == out or out in source.parents:
        raise ValueError(f"--out {options.out}: holds SOURCE; expected a folder beside it, or a new one")
    rows = find_rows(options)
    conditions = options.chosen()
    with lock_folder(out):
        _write_record(options, conditions, command)
        perturber = Perturber(source, out, conditions, seed=options.seed, background=options.background)
        for leftover in out.rglob(".tmp-*"):  # of killed runs
            leftover.unlink()
        before = _read_rows(out)
        done, todo = {}, []
        for row in rows:
            known = before.get(row.file)
            if row.status == "left":
                done[row.file] = row
            elif known is not None and known.status == row.status and perturber.is_done(row):
                done[row.file] = known
            else:
                todo.append(row)
        last_table = time.monotonic()
        try:
            for row in track(_outcomes(perturber, todo, options.jobs), total=len(todo), desc="perturb"):
                done[row.file] = row
                if time.monotonic() - last_table > SECONDS_BETWEEN_TABLES:
                    _write_rows(out, done)
                    last_table = time.monotonic()
        finally:
            _write_rows(out, done)
    _print_summary(options, list(done.values()), conditions)
    return EXIT_PARTIAL if any(row.status == "quarantined" for row in done.values()) else EXIT_DONE


def find_rows(options: PerturbOptions) -> list[Row]:
    """What will be done with every file of SOURCE, sorted by path.

    Raises:
        ValueError: there is nothing to perturb.
    """
    source, out = _absolute(options.source), _absolute(options.out)
    folders = walk_sources([str(source)], exclude_dir=out)
    scans = _scans(options, folders)
    listed = set(read_subjects(options.subjects)) if options.subjects else None
    rows = []
    for folder in folders:
        for name in folder.names:
            path = Path(folder.path) / name
            scan = scans.get(str(path))
            subject = "" if scan is None else _subject(path, scan)
            row = _row(path.relative_to(source), scan, subject, options.unperturbed)
            # A label map whose subject is known goes where its scans go.
            of_subject = row.status == "perturbed" or (row.status == "copied" and scan is not None)
            if of_subject and listed is not None and subject not in listed:
                row = Row(file=row.file, status="left", reason="other_subject: not on the list of --subjects")
            rows.append(row)
    if not any(row.status == "perturbed" for row in rows):
        reasons = sorted({row.reason for row in rows if row.reason})
        raise ValueError(
            f"{options.source}: no scan to perturb among {len(rows)} files ({'; '.join(reasons[:3])}); expected NIfTI "
            "files. DICOM, HDF5 and Analyze are converted first: `braindino prepare` leaves NIfTI files in "
            "PREPARED/converted"
        )
    return sorted(rows, key=lambda row: row.file)


def _scans(options: PerturbOptions, folders: Sequence[SourceFolder]) -> dict[str, Scan]:
    """Path -> what prepare makes of it.

    Raises:
        ValueError: the cohort's files are none that can be perturbed as they are.
    """
    cohort = load_cohort(options.cohort) if options.cohort else None
    if cohort is None and not any(is_nifti_name(name) for folder in folders for name in folder.names):
        return {}
    candidates = find_candidates(
        [str(_absolute(options.source))],
        out_dir=options.out,
        cohort=cohort,
        name=options.cohort_name,
        subject_pattern=compile_subject_pattern(options.subject_pattern),
    )
    converted = [candidate.origin for candidate in candidates if candidate.conversion is not None]
    if converted:
        raise ValueError(
            f"cohort {options.cohort}: {len(converted)} inputs are no NIfTI files, the first is {converted[0]}; run "
            "`braindino prepare` on it and perturb what it leaves in PREPARED/converted, or convert it with dcm2niix"
        )
    return {candidate.scan.path: candidate.scan for candidate in candidates}


def _row(file: Path, scan: Scan | None, subject: str, unperturbed: Sequence[str]) -> Row:
    name = file.as_posix()
    if any(part.startswith(".") for part in file.parts):
        return Row(file=name, status="left", reason="hidden_file: its name or a folder's starts with a dot")
    if any(file.match(pattern) for pattern in unperturbed):
        return Row(file=name, status="copied", reason="unperturbed: by pattern")
    lower = file.name.lower()
    if not is_nifti_name(lower):
        if lower.endswith((".img", ".hdr", *DICOM_SUFFIXES, *OTHER_FORMATS)):
            return Row(file=name, status="left", reason="other_format: an image, but no NIfTI file; convert it first")
        if lower.endswith(SIDECARS) or file.name in SIDECAR_NAMES:
            return Row(file=name, status="copied", reason="sidecar: goes along with the scans")
        return Row(file=name, status="left", reason="other_file: neither an image nor a table")
    # nnU-Net's labelsTr and labelsTs hold files that are named like images.
    if any(part.startswith("labels") for part in file.parts[:-1]):
        return Row(file=name, status="copied", reason="label: in a folder of labels")
    if scan is None:
        return Row(file=name, status="left", reason="unrecognised: no file of the cohort")
    if scan.status == "skipped":
        kept = scan.reason.partition(":")[0] in ("label", "derivative")
        return Row(file=name, status="copied" if kept else "left", reason=scan.reason)
    return Row(file=name, status="perturbed", subject=subject)


def _subject(path: Path, scan: Scan) -> str:
    """Whose bias field it gets. The channels of a case in nnU-Net's layout are one subject, though their names differ
    as those of subjects do."""
    stem, _, channel = nifti_stem(path.name).rpartition("_")
    if path.parent.name in NNUNET_IMAGES and stem and len(channel) == 4 and channel.isdigit():
        return f"{scan.cohort}/{stem}"
    return scan.subject_key


def _outcomes(perturber: Perturber, todo: list[Row], jobs: int | None) -> Iterator[Row]:
    num_jobs = min(4, os.cpu_count() or 1) if jobs is None else jobs
    if num_jobs == 0:
        yield from map(perturber, todo)
        return
    for row, outcome in run_tasks([perturber] * num_jobs, todo):
        if isinstance(outcome, WorkerDied):
            yield replace(row, status="quarantined", reason=f"worker_died: {outcome}")
        else:
            yield outcome


def _check_readable(path: Path) -> None:
    """
    Raises:
        VolumeError: the file cannot be opened; what fails later is the writing.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise VolumeError("unreadable", f"{path}: {error.strerror or error}") from error


def _is_current(target: Path, path: Path) -> bool:
    """As make has it: there, and no older than what it is made from."""
    return target.exists() and target.stat().st_mtime_ns >= path.stat().st_mtime_ns


def _write_record(options: PerturbOptions, conditions: Sequence[Condition], command: Sequence[str]) -> None:
    """Write perturb.json before the work begins.

    Raises:
        ValueError: DIR holds scans of other settings.
    """
    path = options.out / RECORD
    settings: dict[str, Any] = {
        "source": str(_absolute(options.source)),
        "seed": options.seed,
        "background": options.background,
        "cohort": options.cohort,
        "cohort_name": options.cohort_name,
        "subject_pattern": options.subject_pattern,
    }
    names = [condition.name for condition in conditions]
    if path.exists():
        before = read_json(path)
        if before.get("version") != FORMAT_VERSION:
            raise ValueError(f"{path}: version {before.get('version')}; expected {FORMAT_VERSION}; give another --out")
        changed = [key for key, value in settings.items() if before["settings"].get(key) != value]
        if changed:
            raise ValueError(f"{options.out}: holds scans made with another {', '.join(changed)}; give another --out")
        # More conditions may be added; what is there already stays.
        names = list(dict.fromkeys([*before["conditions"], *names]))
    elif any(child.name != ".lock" for child in options.out.iterdir()):
        raise ValueError(f"{options.out}: is not empty and holds no {RECORD}; give a new folder")
    used = dict.fromkeys(read_condition(name).perturbation for name in names)
    record = {
        "version": FORMAT_VERSION,
        "settings": settings,
        "conditions": names,
        "definitions": {name: PERTURBATIONS[name].definition for name in used},
        "one_at_a_time": True,
        "clean": "byte-identical copies",
        "stored_as": "float32, on the grid and with the codes of the source",
        "command": list(command),
        "versions": versions(),
        "code_commit": code_commit(),
    }
    write_json(path, plain(record))


def _read_rows(out_dir: Path) -> dict[str, Row]:
    """Rows of an earlier run by file; none where there was none."""
    if not (out_dir / TABLE).exists():
        return {}
    table = read_table(out_dir / TABLE, COLUMNS)
    return {
        row["file"]: Row(**{name: row[name] for name in COLUMNS[:-1]}, seconds=float(row["seconds"]))  # type: ignore[arg-type]
        for row in table.rows
    }


def _write_rows(out_dir: Path, rows: dict[str, Row]) -> None:
    write_table(
        out_dir / TABLE,
        COLUMNS,
        ([" ".join(str(getattr(rows[file], name)).split()) for name in COLUMNS] for file in sorted(rows)),
    )


def _print_summary(options: PerturbOptions, rows: Sequence[Row], conditions: Sequence[Condition]) -> None:
    counts = {status: sum(row.status == status for row in rows) for status in ("perturbed", "copied", "left")}
    bad = [row for row in rows if row.status == "quarantined"]
    print(
        f"{len(rows)} files -> {options.out / TABLE}: {counts['perturbed']} scans under {len(conditions)} conditions "
        f"and {CLEAN}, {counts['copied']} files copied, {counts['left']} left, {len(bad)} that cannot be used"
    )
    for row in bad[:10]:
        print(f"  {row.file}: {row.reason}")
    name = options.cohort_name or _absolute(options.source).name
    cohort = f"--cohort {options.cohort}" if options.cohort else f"--cohort-name {name}"
    print(
        f"next, for every folder C of {options.out}: braindino prepare {options.out}/C --out PREPARED/C {cohort}; the "
        "name must be that of the clean scans"
    )


def _absolute(path: Path) -> Path:
    """Made absolute without following links, as discovery does."""
    # Path.absolute keeps "..", Path.resolve follows links.
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100


if __name__ == "__main__":
    raise SystemExit(main())
