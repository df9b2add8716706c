"""One piece of work at a time; of those that wait only the newest is done."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SupersededError(RuntimeError):
    """A newer request came while this one waited."""


class LatestWins:
    """A lock with a queue of one: clicks come faster than an encoder works, and only the last of them matters."""

    def __init__(self) -> None:
        self._work = threading.Lock()
        self._count = threading.Lock()
        self._newest: dict[str, int] = {}

    @contextmanager
    def turn(self, kind: str) -> Iterator[None]:
        """Wait until nothing else runs.

        Args:
            kind: of the request: one of another kind does not make this one superfluous.

        Raises:
            SupersededError: a newer one of the same kind came in the meantime.
        """
        with self._count:
            mine = self._newest[kind] = self._newest.get(kind, 0) + 1
        with self._work:
            if mine != self._newest[kind]:
                raise SupersededError(kind)
            yield
