"""What was measured on each scan while it was prepared. Owner of ``quality.tsv`` (version 1).

The table stands beside ``scans.tsv`` and has one row for every scan that could be read, quarantined ones included;
``scan_id`` joins the two.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from braindino.tables import NOT_DEFINED, read_table, write_table


@dataclass(frozen=True, kw_only=True)
class ScanQuality:
    """Geometry, intensities and, where a brain mask was made here, what the quality gate saw. None: not measured.

    Attributes:
        scan_id: of the row in ``scans.tsv``.
        shape: voxels along right, anterior, superior, as ``182x218x182``.
        spacing: mm along the same axes, as ``1.000x1.000x1.000``.
        obliqueness: degrees between the scan's axes and the nearest anatomical ones.
        p01, median, p99: percentiles of the raw intensity of the voxels that are not 0.
        foreground: share of the voxels that are not 0, before any stripping.
        stripped_by: ``hd-bet``, ``hd-bet-offline``, ``already`` (came stripped) or ``none`` (nobody was asked).
        brain_ml: volume of the brain mask.
        components: connected parts of the mask as the model made it.
        largest_component: share of the mask's voxels in its largest part.
        border: share of that part's voxels on the faces of the field of view.
        agreement: Dice of that part with a quick second opinion.
        covered: share of where a brain must be, by that opinion, that the mask holds.
        inside: share of the mask that lies where a brain can be.
        holes: volume that the mask encloses without holding it, as a share of its own.
    """

    scan_id: str
    shape: str
    spacing: str
    obliqueness: float
    p01: float
    median: float
    p99: float
    foreground: float
    stripped_by: str = "none"
    brain_ml: float | None = None
    components: int | None = None
    largest_component: float | None = None
    border: float | None = None
    agreement: float | None = None
    covered: float | None = None
    inside: float | None = None
    holes: float | None = None


#: What a mask of the quality gate must be within, both ends included. Measured on HD-BET's
#: masks of six scans (T1, T1c, T2, FLAIR; 0.9 to 5.5 mm slices) and on wrong masks made of them, see docs/decisions.md.
LIMITS: dict[str, tuple[float, float]] = {
    # A newborn's brain has 350 ml, the largest adult ones 2.1 l; a head has 3 to 6.
    "brain_ml": (300.0, 2300.0),
    "largest_component": (0.9, math.inf),
    "border": (-math.inf, 0.05),
    "agreement": (0.75, math.inf),
    "covered": (0.85, math.inf),
    "holes": (-math.inf, 0.02),
    "inside": (0.97, math.inf),
}

COLUMNS = tuple(field.name for field in fields(ScanQuality))
_TEXTS = ("scan_id", "shape", "spacing", "stripped_by")


def read_quality(path: str | Path) -> list[ScanQuality]:
    """The rows of a ``quality.tsv``.

    Raises:
        ValueError: a column is missing or a number is not one; names the file and the line.
    """
    table = read_table(path, COLUMNS)
    rows = []
    for line, row in zip(table.lines, table.rows, strict=True):
        try:
            rows.append(ScanQuality(**{name: _parse(name, row[name]) for name in COLUMNS}))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    return rows


def write_quality(path: str | Path, rows: Iterable[ScanQuality]) -> None:
    """Write ``quality.tsv`` atomically, in the order given."""
    write_table(path, COLUMNS, ([_format(getattr(row, name)) for name in COLUMNS] for row in rows))


def _format(cell: str | float | None) -> str:
    if cell is None:
        return NOT_DEFINED
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def _parse(name: str, cell: str) -> Any:
    if name in _TEXTS:
        return cell
    if cell == NOT_DEFINED:
        return None
    return int(cell) if name == "components" else float(cell)
