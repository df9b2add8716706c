"""Work on scans by threads, ahead of whoever uses it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from braindino.manifest import Scan

Loaded = TypeVar("Loaded")


def load_ahead(
    pool: ThreadPoolExecutor, load: Callable[[Scan], Loaded], scans: Iterable[Scan], *, depth: int
) -> Iterator[tuple[Scan, "Future[Loaded]"]]:
    """Yield the scans in order with the future of ``load``, always with ``depth`` more under way: memory stays
    bounded."""
    waiting: deque[tuple[Scan, Future[Loaded]]] = deque()
    for scan in scans:
        waiting.append((scan, pool.submit(load, scan)))
        if len(waiting) > depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
