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
            if holder is None:
                continue
            if holder["host"] == owner["host"] and not _alive(holder["pid"]):
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
