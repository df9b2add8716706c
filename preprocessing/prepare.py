"""Prepare raw scans: ``python preprocessing/prepare.py SOURCE... --out DIR --skull-strip TOOL --jobs N``."""

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import tyro

from braindino.lock import lock_folder
from braindino.manifest import Scan
from braindino.preprocessing.cases import Case, CaseFolder, remove_case, write_case
from braindino.preprocessing.discovery import describe_inputs, find_inputs
from braindino.preprocessing.montage import draw_montages
from braindino.preprocessing.options import PrepareOptions
from braindino.preprocessing.preparation import STORE_CONTRACT, ScanPreparer, Settings
from braindino.preprocessing.skull_strip import TOOLS
from braindino.preprocessing.worker_pool import WorkerDied, run_tasks
from braindino.progress import track
from braindino.slice_store import SliceStore, SliceStoreWriter

SECONDS_BETWEEN_TABLES = 30.0
EXIT_DONE, EXIT_ERROR, EXIT_QUARANTINED, EXIT_INTERRUPTED = 0, 1, 3, 130
EXAMPLES_PER_REASON = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        options = tyro.cli(PrepareOptions, args=argv, prog="braindino prepare")
        return dry_run(options) if options.dry_run else prepare(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED


def prepare(options: PrepareOptions) -> int:
    """Prepare all sources into ``options.out``; the exit code.

    Raises:
        ValueError: a source, a name or the skull-strip tool is not usable; another process works in the folder.
        OSError: the folder cannot be written, or the disk is full; what was finished before is kept.
    """
    scans, skipped = _find(options)
    settings = _settings(options)
    preparer = ScanPreparer(
        options.out,
        settings,
        device=_device(options),
        num_threads=max(1, (os.cpu_count() or 1) // max(1, options.jobs)),
    )
    with lock_folder(options.out):
        _remove_leftovers(options.out)
        cases = CaseFolder(options.out)
        _make_room(cases, scans, skipped)
        todo = _not_current(cases, scans, settings)
        last_table = time.monotonic()
        try:
            for scan, outcome in track(run_tasks(preparer, todo, jobs=options.jobs), total=len(todo), desc="prepare"):
                case = _dead_case(options.out, scan, outcome, settings) if isinstance(outcome, WorkerDied) else outcome
                cases.record(case)
                if time.monotonic() - last_table > SECONDS_BETWEEN_TABLES:
                    cases.write_table()
                    last_table = time.monotonic()
        finally:
            cases.write_table()
            store = _publish(cases)
        pages = draw_montages(options.out / "montages", store, cases.rows())
    rows = [known.scan for scan in [*scans, *skipped] if (known := cases.of(scan.path)) is not None]
    _print_summary(rows, num_new=len(todo), out_dir=options.out, pages=pages)
    return EXIT_QUARANTINED if any(row.status == "quarantined" for row in rows) else EXIT_DONE


def dry_run(options: PrepareOptions) -> int:
    """Print what would be prepared and what left, and why; nothing is written."""
    scans, skipped = _find(options)
    todo = _not_current(CaseFolder(options.out), scans, _settings(options))
    print(f"{len(scans) + len(skipped)} files: {len(scans)} scans, {len(skipped)} left")
    for (cohort, sequence), count in sorted(Counter((scan.cohort, scan.sequence) for scan in scans).items()):
        subjects = {scan.subject for scan in scans if (scan.cohort, scan.sequence) == (cohort, sequence)}
        print(f"  take  {cohort} {sequence}: {count} scans of {len(subjects)} subjects")
    for reason, count in sorted(Counter(scan.reason for scan in skipped).items()):
        print(f"  leave {reason}: {count}")
    print(f"{len(scans) - len(todo)} are done already, {len(todo)} to do")
    return EXIT_DONE


def _find(options: PrepareOptions) -> tuple[list[Scan], list[Scan]]:
    return describe_inputs(
        find_inputs(options.sources, exclude_dir=options.out),
        cohort=options.cohort,
        sequence=options.sequence or "",
        subject_pattern=options.compiled_subject_pattern(),
    )


def _settings(options: PrepareOptions) -> Settings:
    version = TOOLS[options.skull_strip].check() if options.skull_strip != "none" else ""
    return Settings(seed=options.seed, skull_strip=options.skull_strip, skull_strip_version=version)


def _device(options: PrepareOptions) -> str:
    if options.device != "auto" or options.skull_strip == "none":
        return "cpu" if options.device == "auto" else options.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _remove_leftovers(out_dir: Path) -> None:
    """Temporary files of killed runs; the lock is held, so nobody is writing them."""
    for folder in ("store", "cases", "masks", "montages"):
        for path in (out_dir / folder).rglob(".tmp-*"):
            path.unlink()


def _make_room(cases: CaseFolder, scans: Sequence[Scan], skipped: Sequence[Scan]) -> None:
    """Bring the cases in line with what the inputs are called now, and note the files that are left."""
    for scan in scans:
        old = cases.of(scan.path)
        if old is not None and old.name != scan.scan_id:
            cases.forget(old)
    for scan in scans:
        other = cases.same_identity(scan)
        if other is None:
            continue
        if Path(other.scan.path).exists():
            raise ValueError(
                f"{scan.path} and {other.scan.path}, which is in {cases.out_dir} already, would both be cohort "
                f"{scan.cohort!r}, subject {scan.subject!r}, session {scan.session!r}, sequence {scan.sequence!r} with "
                "the same file name; give another --cohort, or another --out"
            )
        cases.forget(other)
    for scan in skipped:
        case = Case(scan)
        old = cases.of(scan.path)
        if old != case:
            if old is not None:
                cases.forget(old)
            write_case(cases.out_dir, case)
            cases.record(case)


def _not_current(cases: CaseFolder, scans: Sequence[Scan], settings: Settings) -> list[Scan]:
    """The scans that must be prepared (again)."""

    def is_current(scan: Scan) -> bool:
        return cases.is_current(scan, settings=settings.fingerprint)

    # Hashing releases the interpreter lock, and reading waits for the disk.
    with ThreadPoolExecutor() as pool:
        current = list(track(pool.map(is_current, scans), total=len(scans), desc="check"))
    return [scan for scan, done in zip(scans, current, strict=True) if not done]


def _dead_case(out_dir: Path, scan: Scan, died: WorkerDied, settings: Settings) -> Case:
    case = Case(replace(scan, status="quarantined", reason=f"worker_died: {died}"), settings=settings.fingerprint)
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
    for status in ("quarantined", "skipped"):
        by_code: dict[str, list[Scan]] = {}
        for row in rows:
            if row.status == status:
                by_code.setdefault(row.reason.partition(":")[0], []).append(row)
        for code, members in sorted(by_code.items()):
            print(f"  {status} {code}: {len(members)}")
            if status == "quarantined":
                for row in members[:EXAMPLES_PER_REASON]:
                    print(f"    {row.path}: {row.reason.partition(':')[2].strip()}")
                if len(members) > EXAMPLES_PER_REASON:
                    print(f"    and {len(members) - EXAMPLES_PER_REASON} more in scans.tsv")
    if pages:
        print(f"look at {pages[0].parent}: {len(pages)} montage{'s' if len(pages) > 1 else ''}")


if __name__ == "__main__":
    raise SystemExit(main())
