"""The I-th of N parts of a cohort, as in a job array: which scans fall to it."""

import hashlib


def check_part(part: int | None, of: int | None) -> None:
    """
    Raises:
        ValueError: one of ``--part I`` and ``--of N`` without the other, or a part that there is not.
    """
    if (part is None) != (of is None):
        raise ValueError("--part I and --of N belong together")
    if part is not None and of is not None and not 1 <= part <= of:
        raise ValueError(f"--part {part} --of {of}: expected a part from 1 to {of}")


def part_of(scan_id: str, num_parts: int) -> int:
    """1 to ``num_parts``: which part does a scan; depends on the scan alone, not on what else there is."""
    digest = hashlib.sha256(scan_id.encode()).digest()
    return 1 + int.from_bytes(digest[:8], "little") % num_parts
