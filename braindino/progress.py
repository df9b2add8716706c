"""Progress of long work: a bar on a terminal, a line now and then in a log, both with the time that is left."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 15.0


def track(iterable: Iterable[Item], *, total: int | None = None, desc: str = "") -> Iterator[Item]:
    """Yield the items of ``iterable`` while reporting progress on standard error.

    Args:
        iterable: what to walk over.
        total: number of items; taken from ``len(iterable)`` when it has one.
        desc: a word or two saying what is being done.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=desc, dynamic_ncols=True)
        return
    start = last_line = time.monotonic()
    for count, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES or (count == total and now - start >= SECONDS_BETWEEN_LINES):
            last_line = now
            print(_line(desc, count, total, now - start), file=sys.stderr, flush=True)


def _line(desc: str, count: int, total: int | None, elapsed: float) -> str:
    if total is None:
        return f"{desc}: {count} done, {elapsed:.0f} s"
    left = elapsed / count * (total - count)
    return f"{desc}: {count}/{total} done, {elapsed:.0f} s, about {left:.0f} s left"
