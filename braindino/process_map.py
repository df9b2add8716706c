"""Work on many items in one or several processes, with progress."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from braindino.child_process import end_with_parent
from braindino.progress import track

Result = TypeVar("Result")


def map_in_processes(work: Callable[..., Result], *arguments: Sequence[Any], jobs: int, desc: str) -> Iterator[Result]:
    """Yield the results in the order of the items.

    Args:
        work: a function that a new process can import, given one of each of ``arguments``.
        arguments: sequences of equal length, one of each for every result.
        jobs: processes; with 1 all is done here.
        desc: a word or two for the progress.

    Raises:
        ValueError: a process died.
    """
    total = len(arguments[0])
    if jobs == 1 or total < 2:
        yield from track(map(work, *arguments), total=total, desc=desc)
        return
    # Started afresh: a fork would copy whatever threads hold at that moment.
    with ProcessPoolExecutor(
        min(jobs, total), multiprocessing.get_context("spawn"), initializer=end_with_parent
    ) as pool:
        try:
            yield from track(pool.map(work, *arguments), total=total, desc=desc)
        except BrokenProcessPool as error:
            raise ValueError(
                f"{desc}: a process died, most likely for want of memory; run again with fewer --jobs (what is "
                "written is kept)"
            ) from error
