"""One writer per folder: the second is told who the first is."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS_TO_WRITE = 1.0


@contextmanager
def lock_folder(folder: str | Path, *, part: str = "") -> Iterator[None]:
    """Hold ``folder/.lock`` while working in the folder; with ``part``, ``folder/.lock-<part>``.

    Writers of different parts may work side by side; a writer of the whole folder works alone. A lock left behind by
    a process of this host that is gone is taken over; one of another host is respected, since nobody here can tell
    whether its owner lives.

    Args:
        folder: made when it is not there.
        part: letters, digits and ``-``: what this process has for itself.

    Raises:
        ValueError: somebody else is at work there; names process and host.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f".lock-{part}" if part else ".lock")
    _take(path)
    try:
        # Having made one's own lock first, of two that meet at least one sees the other.
        for other in [folder / ".lock"] if part else sorted(folder.glob(".lock-*")):
            _refuse_if_held(other)
        yield
    finally:
        path.unlink(missing_ok=True)


def _take(path: Path) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            _refuse_if_held(path)
    with os.fdopen(descriptor, "w") as handle:
        json.dump(owner, handle)


def _refuse_if_held(path: Path) -> None:
    """Remove the lock at ``path`` if its owner is gone.

    Raises:
        ValueError: it is not, or may not be.
    """
    holder = _holder(path)
    if holder is None:
        return
    if holder["host"] == socket.gethostname() and not _alive(holder["pid"]):
        path.unlink(missing_ok=True)
        return
    raise ValueError(
        f"{path.parent}: process {holder['pid']} on {holder['host']} is working here; wait for it, "
        f"or remove {path} if that process is gone"
    )


def _holder(path: Path) -> dict | None:
    """Who holds the lock; None when it went away meanwhile, or was left unwritten by a killed process and removed."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        # Its owner writes it at once after making it; an empty one that stays empty belongs to nobody.
        time.sleep(SECONDS_TO_WRITE)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        path.unlink(missing_ok=True)
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
