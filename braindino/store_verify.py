"""``braindino verify``: is every byte of a slice store still what was written?"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from braindino.command_line import command_line
from braindino.process_map import map_in_processes
from braindino.progress import track
from braindino.slice_store import Problem, SliceStore, StoreError, check_scan_file, scan_files

#: Given to a process at once; fewer scans are checked sooner than other processes start.
SCANS_PER_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check a slice store against its own checksums; every file that is damaged is named, with its scan.

    Exit code 0: sound; 1: damaged, or no store.
    """

    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Slice store, or a folder made by `braindino prepare`."""
    deep: bool = False
    """Read every slice, too; otherwise the index, and the size and header of every scan's file."""
    jobs: int = min(4, os.cpu_count() or 1)
    """Processes that read."""
    json: bool = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs: found {self.jobs}; expected 1 or more")


@dataclass
class Verification:
    """What was looked at and what was found.

    Attributes:
        store: the folder.
        deep: whether the slices were read.
        num_scans: scan files looked at.
        num_slices: slices of the index, None when it cannot be read.
        problems: damage, in the order of the index.
        notes: what is no damage but worth knowing.
    """

    store: str
    deep: bool
    num_scans: int = 0
    num_slices: int | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@command_line("verify")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the store is sound, 1 when it is damaged or none."""
    options = tyro.cli(VerifyOptions, args=argv, prog="braindino verify")
    result = verify_store(store_folder(options.store), deep=options.deep, jobs=options.jobs)
    if options.json:
        described = asdict(result) | {"problems": [problem._asdict() for problem in result.problems]}
        print(json.dumps({"sound": not result.problems, **described}, indent=2, ensure_ascii=False))
        return int(bool(result.problems))
    for problem in result.problems:
        print(problem.message)
    for note in result.notes:
        print(f"note: {note}")
    slices = "?" if result.num_slices is None else result.num_slices
    how = "every byte read" if result.deep else "index, sizes and headers; --deep reads the slices, too"
    verdict = f"{len(result.problems)} problem(s)" if result.problems else "sound"
    print(f"{result.store}: {result.num_scans} scans, {slices} slices ({how}): {verdict}")
    return int(bool(result.problems))


def store_folder(folder: Path) -> Path:
    """The store that is, or is in, a folder given by the user."""
    inside = folder / "store"
    return inside if not (folder / "store.json").exists() and inside.is_dir() else folder


def verify_store(store_dir: Path, *, deep: bool, jobs: int = 1) -> Verification:
    """Check the index, and every scan's file against it and itself.

    Where the index cannot be read, the files are checked by themselves.

    Raises:
        FileNotFoundError: there is no store in the folder.
        StoreError: another process published the store meanwhile.
    """
    result = Verification(str(store_dir), deep)
    files = [path for path, _ in scan_files(store_dir)]
    try:
        store = SliceStore(store_dir)
    except StoreError as error:
        result.problems.append(Problem(_file_named(store_dir, str(error)), "", str(error)))
        result.num_scans = len(files)
        checked = _over_processes(partial(_check_files, deep=deep), files, jobs)
    else:
        result.problems += store.check_index()
        result.num_scans, result.num_slices = store.num_scans, len(store)
        checked = _over_processes(partial(_check_rows, store=store, deep=deep), range(store.num_scans), jobs)
        strays = sorted({path.name for path in files} - set(store.scan_ids))
        if strays:
            result.notes.append(
                f"{len(strays)} scan file(s) are not in the index (first: {strays[0]}): added after the last publish, "
                "or left by a killed run; the next publish takes them in"
            )
    result.problems += checked
    return result


def _over_processes(check: Callable[[Sequence], list[Problem]], items: Sequence, jobs: int) -> list[Problem]:
    """The problems of all items, in their order."""
    batches = [items[start : start + SCANS_PER_BATCH] for start in range(0, len(items), SCANS_PER_BATCH)]
    if jobs == 1 or len(batches) < 2:
        return [problem for item in track(items, desc="verify: scans") for problem in check([item])]
    found = map_in_processes(check, batches, jobs=jobs, desc=f"scans, by {SCANS_PER_BATCH}")
    return [problem for problems in found for problem in problems]


def _check_rows(rows: Sequence[int], *, store: SliceStore, deep: bool) -> list[Problem]:
    return [problem for row in rows for problem in store.check_scan(row, deep=deep)]


def _check_files(paths: Sequence[Path], *, deep: bool) -> list[Problem]:
    return [problem for path in paths for problem in check_scan_file(path, deep=deep)[1]]


def _file_named(store_dir: Path, message: str) -> str:
    path = Path(message.partition(": ")[0])
    return str(path.relative_to(store_dir)) if path.is_relative_to(store_dir) and path != store_dir else "store.json"


if __name__ == "__main__":
    raise SystemExit(main())
