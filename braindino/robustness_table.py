"""``robustness.tsv``: what a task still reaches on perturbed scans (paper sec. 4.5). Owner of the format (version 1).

One row per task, encoder, label ratio, variant (such as the k of kNN), metric, perturbation and severity. Every
perturbation has a row of its own for the clean scans, at the severity that changes nothing, so that each is a curve by
itself. ``change`` is perturbed minus clean on the cases that both have, so it may differ a little from the difference
of the two estimates where ``n_missing`` is not 0. Numbers are ``n/a`` where they are not defined.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from braindino.leakage import UNKNOWN
from braindino.resampling import p_text
from braindino.tables import NOT_DEFINED, align, interval_text, number_text, read_rows, write_rows


@dataclass(frozen=True, kw_only=True)
class RobustnessRow:
    """One metric of one encoder under one condition.

    Raises:
        ValueError: ``better`` is neither higher nor lower.
    """

    task: str
    encoder: str
    """Or, of segmentation, the trainer."""
    ratio: float = 1.0
    """Share of the training subjects that was trained on."""
    variant: str = ""
    """``k=5`` for nearest neighbours, empty otherwise."""
    metric: str
    """With its unit and, of segmentation, its region: ``macro_auc``, ``mae (years)``, ``WT Dice``."""
    better: Literal["higher", "lower"]
    perturbation: str
    """Name in ``perturbations.PERTURBATIONS``."""
    severity: float
    clean: bool
    """The severity changes nothing: the scans as they are."""
    n_subjects: int
    """Tested subjects whose scans are there under this condition."""
    n_cases: int
    n_missing: int = 0
    """Tested cases that the clean scans have and this condition has not."""
    estimate: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    change: float = math.nan
    """Perturbed minus clean, on the cases that both have; NaN in the row of the clean scans."""
    change_low: float = math.nan
    change_high: float = math.nan
    p: float = math.nan
    """Two-sided, of the change; not adjusted. A bootstrap p of 0 is less than one draw of 2,000."""
    method: str = ""
    """How interval and p were made, in words."""
    pretraining_overlap: str = UNKNOWN
    """What the encoder saw of the tested subjects in pretraining (``leakage.check_test_scans``)."""
    data: str = ""
    """``SIMULATED data`` where scans were simulated."""
    warnings: str = ""
    """What a reader must know before believing the numbers."""

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better: found {self.better!r}; expected higher or lower")


COLUMNS = tuple(field.name for field in fields(RobustnessRow))


def write_robustness(rows: Iterable[RobustnessRow], path: str | Path) -> None:
    """Write the rows atomically, in their order."""
    write_rows(path, RobustnessRow, rows, _text)


def read_robustness(path: str | Path) -> list[RobustnessRow]:
    """The rows, in the order of the file.

    Raises:
        ValueError: a column is missing, a cell is not of its type, or there is no row; names the file and the line.
    """
    rows = read_rows(path, RobustnessRow, _value, written_by="braindino robustness")
    if not rows:
        raise ValueError(f"{path}: no row; expected the table that `braindino robustness` writes")
    return rows


def format_robustness(rows: Iterable[RobustnessRow]) -> str:
    """The rows as a text table for a terminal."""
    header = ("encoder", "", "metric", "perturbation", "severity", "cases", "estimate [95 %]", "change [95 %]", "p")
    lines = [
        (
            row.encoder,
            row.variant,
            row.metric,
            row.perturbation,
            f"{row.severity:g}" + (" (clean)" if row.clean else ""),
            f"{row.n_cases}" + (f" ({row.n_missing} missing)" if row.n_missing else ""),
            interval_text(row.estimate, row.low, row.high),
            "" if row.clean else interval_text(row.change, row.change_low, row.change_high),
            "" if row.clean else p_text(row.p),
        )
        for row in rows
    ]
    return align([header, *lines])


def _text(_name: str, value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return number_text(value, ".6g")
    # A tab or line break inside a text would need quoting, which few TSV readers expect.
    return " ".join(str(value).split())


def _value(name: str, text: str, kind: object) -> object:
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError(f"{name}: found {text!r}; expected 0 or 1")
        return text == "1"
    if kind is float and text == NOT_DEFINED:
        return math.nan
    try:
        return float(text) if kind is float else int(text) if kind is int else text
    except ValueError as error:
        raise ValueError(f"{name}: found {text!r}; expected a number") from error
