"""Files that appear whole or not at all: written under a temporary name, synced to disk, then renamed."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on leaving without an error it replaces ``path`` atomically.

    The temporary name keeps the suffixes of ``path`` (nibabel and numpy choose a format by suffix) and starts with
    a dot, so that no reader takes it for a finished file. After an error, and after an error only, nothing is left
    of it; a killed process may leave a ``.tmp-`` file, never half of ``path``.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffixes = "".join(path.suffixes[-2:])
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=suffixes, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        # mkstemp makes files private to their owner; a finished file gets the permissions any new file would have had.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` (UTF-8) atomically."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, keys in the order given, atomically.

    Raises:
        ValueError: NaN or infinity, which JSON does not have; nothing is written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """``value`` as it is after a way through JSON, where a tuple becomes a list."""
    return json.loads(json.dumps(value))


def sync(path: Path) -> None:
    """Flush a file, or the renames in a folder, to the disk: what is done later cannot get there before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
