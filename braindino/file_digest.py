"""Digests of files: what decides whether two of them hold the same bytes."""

import hashlib
from pathlib import Path

_BLOCK_BYTES = 1 << 22


def file_digest(*paths: Path, algorithm: str = "sha256") -> str:
    """The digest, in hexadecimal, of the bytes of all files, one after another.

    Raises:
        OSError: one of them cannot be read.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for path in paths:
        with path.open("rb") as handle:
            while block := handle.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
