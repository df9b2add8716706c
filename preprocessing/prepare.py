"""Prepare raw scans: ``python preprocessing/prepare.py SOURCE... --out DIR --skull-strip TOOL --jobs N``."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import tyro

from braindino.command_line import EXIT_DONE, EXIT_PARTIAL, GOES_ON, command_line
from braindino.lock import lock_folder
from braindino.manifest import Scan
from braindino.parts import part_of
from braindino.preprocessing.cases import Case, CaseFolder, input_path, remove_case, write_case
from braindino.preprocessing.cohort_table import load_cohort
from braindino.preprocessing.dask_engine import run_on_dask
from braindino.preprocessing.discovery import Candidate, find_candidates
from braindino.preprocessing.duplicates import resolve_duplicates
from braindino.preprocessing.estimate import estimate, free_bytes
from braindino.preprocessing.montage import draw_montages
from braindino.preprocessing.options import PrepareOptions
from braindino.preprocessing.preparation import STORE_CONTRACT, ScanPreparer, Settings
from braindino.preprocessing.skull_strip import TOOLS
from braindino.preprocessing.worker_pool import WorkerDied, run_tasks
from braindino.progress import track
from braindino.slice_store import SliceStore, SliceStoreWriter

SECONDS_BETWEEN_TABLES = 30.0
EXAMPLES_PER_REASON = 3


@command_line("prepare", errors=(RuntimeError,), interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all scans were prepared, 3 when some were quarantined, 1 on an error."""
    options = tyro.cli(PrepareOptions, args=argv, prog="braindino prepare")
    return dry_run(options) if options.dry_run else prepare(options)


def prepare(options: PrepareOptions) -> int:
    """Prepare all sources into ``options.out``; the exit code.

    Raises:
        ValueError: a source, a name or the skull-strip tool is not usable; another process works in the folder.
        OSError: the folder cannot be written, the disk is full, or a source folder is gone; what was finished before
            is kept.
    """
    candidates, preparers = _find(options), _preparers(options)
    settings = preparers[0].settings
    part = f"part-{options.part}-of-{options.of}" if options.part is not None else ""
    if part:
        candidates = [
            candidate for candidate in candidates if part_of(candidate.scan.scan_id, options.of or 1) == options.part
        ]
    with lock_folder(options.out, part=part):
        if not part:
            _remove_leftovers(options.out)
        cases = CaseFolder(options.out)
        _make_room(cases, candidates)
        todo = _not_current(cases, candidates, settings, recheck=options.recheck)
        try:
            num_done = _work(options, preparers, cases, todo, part=part)
            # Every part knows its own scans alone; the last run over all of them finds the duplicates.
            while not part and (revived := _among(candidates, resolve_duplicates(cases))):
                num_done += _work(options, preparers, cases, revived, part=part)
        except (OSError, KeyboardInterrupt) as error:
            _save_what_is_there(cases, part=part)
            if isinstance(error, OSError) and not error.filename:
                # A write to a file that is open already does not say which one it was.
                error.filename = str(options.out)
            raise
        rows = [known.scan for candidate in candidates if (known := cases.of(candidate.scan)) is not None]
        if part:
            _print_summary(rows, num_new=num_done, out_dir=options.out, pages=[])
            print(f"part {options.part} of {options.of}; when all are done, run once more without --part and --of")
        else:
            cases.write_tables()
            store = _publish(cases)
            pages = draw_montages(options.out / "montages", store, cases.rows())
            _print_summary(rows, num_new=num_done, out_dir=options.out, pages=pages)
    return EXIT_PARTIAL if any(row.status == "quarantined" for row in rows) else EXIT_DONE


def dry_run(options: PrepareOptions) -> int:
    """Print what would be prepared and what left, and why, and what it will cost; nothing is written to the folder."""
    candidates, preparers = _find(options), _preparers(options)
    scans, skipped, unusable = (
        [candidate.scan for candidate in candidates if candidate.scan.status == status]
        for status in ("done", "skipped", "quarantined")
    )
    cases = CaseFolder(options.out)
    todo = [
        candidate
        for candidate in candidates
        if candidate.scan.status == "done"
        and not cases.is_current(
            candidate, preparers[0].settings.keys(candidate), recheck=options.recheck, remember=False
        )
    ]
    told = f", {len(unusable)} that cannot be used" if unusable else ""
    print(f"{len(candidates)} files: {len(scans)} scans, {len(skipped)} left{told}")
    for (cohort, sequence), count in sorted(Counter((scan.cohort, scan.sequence) for scan in scans).items()):
        subjects = {scan.subject for scan in scans if (scan.cohort, scan.sequence) == (cohort, sequence)}
        print(f"  take  {cohort} {sequence}: {count} scans of {len(subjects)} subjects")
    for reason, count in sorted(Counter(scan.reason for scan in skipped).items()):
        print(f"  leave {reason}: {count}")
    _print_by_code(unusable)
    print(f"{len(scans) - len(todo)} are done already, {len(todo)} to do")
    if todo and options.probe:
        cost = estimate(todo, preparers[0], num_probes=options.probe)
        for line in cost.lines(jobs=len(preparers), free_bytes=free_bytes(options.out)):
            print(line)
    return EXIT_DONE


def _find(options: PrepareOptions) -> list[Candidate]:
    return find_candidates(
        options.sources,
        out_dir=options.out,
        cohort=load_cohort(options.cohort) if options.cohort else None,
        name=options.cohort_name,
        sequence=options.sequence or "",
        subject_pattern=options.compiled_subject_pattern(),
    )


def _preparers(options: PrepareOptions) -> list[ScanPreparer]:
    """One for each process, each with its GPU; at least one."""
    version = TOOLS[options.skull_strip].check() if options.skull_strip != "none" else ""
    settings = Settings(
        seed=options.seed,
        skull_strip=options.skull_strip,
        skull_strip_version=version,
        mirroring=options.mirroring,
        accepted=_read_accepted(options.accept) if options.accept is not None else frozenset(),
    )
    devices = _devices(options)
    jobs = options.num_jobs(0 if devices == ["cpu"] else len(devices))
    # This very process is left as it is: its threads are not only ours.
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs else 0
    return [
        ScanPreparer(options.out, settings, device=devices[number % len(devices)], num_threads=threads)
        for number in range(max(1, jobs))
    ]


def _devices(options: PrepareOptions) -> list[str]:
    """Where scans are stripped: on the CPU, or on all GPUs."""
    if options.device == "cpu" or options.skull_strip == "none":
        return ["cpu"]
    from braindino.devices import choose_devices  # here: it loads torch, which nothing else in this process needs

    return choose_devices(options.device)


def _read_accepted(path: Path) -> frozenset[str]:
    lines = (line.split("#", 1)[0].split() for line in path.read_text(encoding="utf-8").splitlines())
    return frozenset(words[0] for words in lines if words)


def _work(
    options: PrepareOptions, preparers: Sequence[ScanPreparer], cases: CaseFolder, todo: list[Candidate], *, part: str
) -> int:
    """Prepare ``todo`` and take note of what became of it; the number of scans."""
    last_table = time.monotonic()
    for candidate, outcome in track(_outcomes(options, preparers, todo), total=len(todo), desc="prepare"):
        if isinstance(outcome, WorkerDied):
            outcome = _dead_case(options.out, candidate, outcome, preparers[0].settings)  # noqa: PLW2901
        cases.record(outcome)
        if not part and time.monotonic() - last_table > SECONDS_BETWEEN_TABLES:
            cases.write_tables()
            last_table = time.monotonic()
    return len(todo)


def _outcomes(
    options: PrepareOptions, preparers: Sequence[ScanPreparer], todo: list[Candidate]
) -> Iterator[tuple[Candidate, Case | WorkerDied]]:
    if options.scheduler:
        return run_on_dask(preparers[0], todo, scheduler=options.scheduler)
    if options.jobs == 0:
        return ((candidate, preparers[0](candidate)) for candidate in todo)
    return run_tasks(preparers, todo)


def _among(candidates: Sequence[Candidate], cases: Sequence[Case]) -> list[Candidate]:
    wanted = {input_path(case.scan) for case in cases}
    return [candidate for candidate in candidates if input_path(candidate.scan) in wanted]


def _save_what_is_there(cases: CaseFolder, *, part: str) -> None:
    """Tables and index of what is finished, as far as the disk still takes them; the next run writes them anyway."""
    if part:
        return
    try:
        _remove_leftovers(cases.out_dir)
        cases.write_tables()
        _publish(cases)
    except OSError as error:
        print(f"the tables and the index could not be brought up to date ({error}); the next run does", file=sys.stderr)


def _remove_leftovers(out_dir: Path) -> None:
    """Temporary files of killed runs; the lock is held, so nobody is writing them."""
    for folder in ("store", "cases", "masks", "montages", "quarantine", "converted"):
        for path in (out_dir / folder).rglob(".tmp-*"):
            path.unlink()


def _make_room(cases: CaseFolder, candidates: Sequence[Candidate]) -> None:
    """Bring the cases in line with what the inputs are called now, and note those that are left."""
    for case in _part_of_other_inputs(cases, candidates):
        cases.forget(case)
    scans = [candidate.scan for candidate in candidates if candidate.scan.status != "skipped"]
    for scan in scans:
        old = cases.of(scan)
        if old is not None and old.name != scan.scan_id:
            cases.forget(old)
    for scan in scans:
        other = cases.same_identity(scan)
        if other is None:
            continue
        if Path(input_path(other.scan)).exists():
            raise ValueError(
                f"{input_path(scan)} and {input_path(other.scan)}, which is in {cases.out_dir} already, would both be "
                f"cohort {scan.cohort!r}, subject {scan.subject!r}, session {scan.session!r}, sequence "
                f"{scan.sequence!r} with the same file name; give another --cohort-name, or another --out"
            )
        cases.forget(other)
    for candidate in candidates:
        if candidate.scan.status == "skipped":
            case = Case(candidate.scan)
            old = cases.of(candidate.scan)
            if old != case:
                if old is not None:
                    cases.forget(old)
                write_case(cases.out_dir, case)
                cases.record(case)


def _part_of_other_inputs(cases: CaseFolder, candidates: Sequence[Candidate]) -> list[Case]:
    """Cases of DICOM files that belong to a series of today which goes by its folder or by another file: some file of
    that folder was mended, added or removed since.
    """
    inputs = {candidate.origin for candidate in candidates}
    folders: set[str] = set()
    members: set[str] = set()
    for candidate in candidates:
        if candidate.conversion is not None and candidate.conversion.kind == "dicom":
            if candidate.conversion.files:
                folder = candidate.origin.rpartition("/")[0]
                members.update(f"{folder}/{name}" for name in candidate.conversion.files)
            else:
                folders.add(candidate.origin)
    return [
        case
        for case in cases
        if (path := input_path(case.scan)) not in inputs
        and case.scan.source
        and (path in members or (path.rpartition("/")[0] in folders and Path(path).exists()))
    ]


def _not_current(
    cases: CaseFolder, candidates: Sequence[Candidate], settings: Settings, *, recheck: bool
) -> list[Candidate]:
    """The scans that must be prepared (again)."""
    scans = [candidate for candidate in candidates if candidate.scan.status != "skipped"]

    def is_current(candidate: Candidate) -> bool:
        return cases.is_current(candidate, settings.keys(candidate), recheck=recheck)

    # Hashing releases the interpreter lock, and reading waits for the disk.
    with ThreadPoolExecutor() as pool:
        current = list(track(pool.map(is_current, scans), total=len(scans), desc="check"))
    return [candidate for candidate, done in zip(scans, current, strict=True) if not done]


def _dead_case(out_dir: Path, candidate: Candidate, died: WorkerDied, settings: Settings) -> Case:
    scan = replace(candidate.scan, status="quarantined", reason=f"worker_died: {died}")
    case = Case(scan, keys=settings.keys(candidate))
    remove_case(out_dir, case)
    write_case(out_dir, case)
    return case


def _publish(cases: CaseFolder) -> SliceStore:
    """Publish the store of exactly the scans that are done."""
    writer = SliceStoreWriter(cases.out_dir / "store", contract=STORE_CONTRACT)
    store = writer.publish()
    done = {case.scan.scan_id for case in cases if case.scan.status == "done"}
    strays = [scan.scan_id for scan in store.scans if scan.scan_id not in done]
    if strays:  # a run was killed between a scan's slices and its case, and that scan is not among today's inputs
        for scan_id in strays:
            writer.discard(scan_id)
        store = writer.publish()
    return store


def _print_summary(rows: Sequence[Scan], *, num_new: int, out_dir: Path, pages: Sequence[Path]) -> None:
    done = [row for row in rows if row.status == "done"]
    seconds = sum(row.seconds for row in done) / max(1, len(done))
    print(
        f"{len(rows)} files -> {out_dir / 'scans.tsv'}: {len(done)} done "
        f"({sum(row.num_slices for row in done)} slices, {seconds:.1f} s per scan), "
        f"{len(rows) - len(done)} not; {num_new} worked on in this run"
    )
    _print_by_code(rows)
    if pages:
        print(f"look at {pages[0].parent}: {len(pages)} montage{'s' if len(pages) > 1 else ''}")


def _print_by_code(rows: Sequence[Scan]) -> None:
    """How many were quarantined and left for which reason; of the quarantined, examples."""
    for status in ("quarantined", "skipped"):
        by_code: dict[str, list[Scan]] = {}
        for row in rows:
            if row.status == status:
                by_code.setdefault(row.reason.partition(":")[0], []).append(row)
        for code, members in sorted(by_code.items()):
            print(f"  {status} {code}: {len(members)}")
            if status == "quarantined":
                for row in members[:EXAMPLES_PER_REASON]:
                    print(f"    {input_path(row)}: {row.reason.partition(':')[2].strip()}")
                if len(members) > EXAMPLES_PER_REASON:
                    print(f"    and {len(members) - EXAMPLES_PER_REASON} more")


if __name__ == "__main__":
    raise SystemExit(main())
