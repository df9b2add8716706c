"""One writer per folder: the second is told who the first is."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Hold ``folder/.lock`` while working in the folder.

    A lock left behind by a process of this host that is gone is taken over; one of another host is respected, since
    nobody here can tell whether its owner lives.

    Raises:
        ValueError: somebody else is at work there; names process and host.
    """
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            holder = _holder(path)
            if holder is None or (holder["host"] == owner["host"] and not _alive(holder["pid"])):
                path.unlink(missing_ok=True)
                continue
            raise ValueError(
                f"{folder}: process {holder['pid']} on {holder['host']} is working here; wait for it, "
                f"or remove {path} if that process is gone"
            ) from None
    with os.fdopen(descriptor, "w") as handle:
        json.dump(owner, handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _holder(path: Path) -> dict | None:
    """Who holds the lock; None when it vanished or was left half written by a killed process."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
