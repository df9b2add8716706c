"""The tables beside EVAL/<task>/summary.tsv. Owner of the formats (version 1)::

comparisons.tsv        the first encoder against the others, over all cases and by stratum
strata.tsv             the main metric by stratum
survival.tsv           risk groups: cases, events, Kaplan-Meier medians, log-rank
survival_curves.tsv    the Kaplan-Meier curves of the risk groups, a row per time
calibration.tsv        calibration lines
reliability.tsv        predicted probabilities beside observed shares, for two classes
<encoder>/predictions.csv   every test case of every trial, as texts; its columns follow the task

A number that is not defined is NaN, and ``n/a`` in the file. A p of 0 is that of a bootstrap of which no draw lay
beyond zero, ``<0.0005`` in the file.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from braindino import tables
from braindino.atomic import write_text
from braindino.resampling import p_text
from braindino.tables import NOT_DEFINED, number_text

COMPARISONS_FILE, STRATA_FILE = "comparisons.tsv", "strata.tsv"
SURVIVAL_FILE, SURVIVAL_CURVES_FILE = "survival.tsv", "survival_curves.tsv"
CALIBRATION_FILE, RELIABILITY_FILE = "calibration.tsv", "reliability.tsv"
PREDICTIONS_FILE, CASES_FILE = "predictions.csv", "cases.tsv"
HIGH_RISK, LOW_RISK = "high risk", "low risk"
_P_COLUMNS = ("p", "p_holm")
_TRIAL_COLUMNS = ("split", "seed", "ratio", "variant", "case", "subject")


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """The first encoder minus another."""

    ratio: float
    """Share of the training subjects that was trained on."""
    variant: str
    """``k=5`` for nearest neighbours, empty otherwise."""
    stratum: str
    """Empty for all cases."""
    first: str
    second: str
    what: str
    """Of which metric."""
    difference: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    p: float
    p_holm: float
    """Adjusted for the family that ``docs/evaluate.md`` names."""
    n: int
    """Subjects, or splits."""
    method: str


@dataclass(frozen=True, kw_only=True)
class StratumRow:
    """The main metric of an encoder in one stratum."""

    encoder: str
    ratio: float
    variant: str
    stratum: str
    metric: str
    estimate: float
    low: float
    high: float
    subjects: int
    method: str


@dataclass(frozen=True, kw_only=True)
class SurvivalRow:
    """One risk group of the test cases, divided at the median risk of the training cases."""

    encoder: str
    ratio: float
    group: str
    """``high risk`` or ``low risk``."""
    cases: int
    events: int
    median: float
    """Kaplan-Meier, in the unit of the times; infinite where half never had the event."""
    median_low: float
    median_high: float
    chi_squared: float
    """Log-rank test of the two groups; the same in both rows."""
    p: float
    method: str


@dataclass(frozen=True, kw_only=True)
class SurvivalStep:
    """The Kaplan-Meier curve of a risk group at one time."""

    encoder: str
    ratio: float
    group: str
    time: float
    """At which cases had their event or left, in the unit of the target."""
    at_risk: int
    """Under observation just before it."""
    events: int
    """At it."""
    left: int
    """Censored at it."""
    survival: float
    """Probability of no event up to and including it."""
    low: float
    """Lower end of its 95 % interval."""
    high: float


@dataclass(frozen=True, kw_only=True)
class CalibrationRow:
    """The line between predictions and outcomes of an encoder, at the most labels."""

    encoder: str
    what: str
    intercept: float
    intercept_low: float
    intercept_high: float
    slope: float
    slope_low: float
    slope_high: float
    subjects: int
    method: str


@dataclass(frozen=True, kw_only=True)
class ReliabilityRow:
    """The test cases of an encoder whose predicted probability lies in a range, at the most labels."""

    encoder: str
    positive: str
    """The class that the probability is of."""
    low: float
    """low < probability <= high; the first range holds 0 as well."""
    high: float
    n: int
    """Predictions, over seeds and splits."""
    mean_predicted: float
    observed_share: float


Row = TypeVar("Row", ComparisonRow, StratumRow, SurvivalRow, SurvivalStep, CalibrationRow, ReliabilityRow)


def write_rows(path: str | Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Write the table of rows of one kind atomically; a header alone where there is none."""
    tables.write_rows(path, kind, rows, _text)


def read_rows(path: str | Path, kind: type[Row]) -> list[Row]:
    """The rows of a table of one kind, in the order of the file.

    Raises:
        ValueError: a column is missing, or a number is not one; names the file and the line.
    """
    return tables.read_rows(path, kind, _value, written_by="braindino evaluate")


def write_predictions(path: str | Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a ``predictions.csv`` atomically, a row per test case of a trial.

    Args:
        path: the file.
        rows: column -> cell, every row with the columns of the first.
    """
    buffer = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(buffer, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    write_text(path, buffer.getvalue())


def read_predictions(path: str | Path) -> list[dict[str, str]]:
    """The rows of a ``predictions.csv`` as texts.

    Raises:
        ValueError: it is another table, or a row is cut short.
    """
    with Path(path).open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle, restkey="\0", restval="\0")
        missing = [name for name in (*_TRIAL_COLUMNS, "predicted") if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path}: columns {missing} are missing; expected the predictions that `braindino evaluate` writes"
            )
        rows = []
        for row in reader:
            if "\0" in row or "\0" in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: expected as many cells as in the header")
            rows.append(row)
    return rows


def _text(name: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if name in _P_COLUMNS:
        return p_text(value)
    return f"{value:g}" if name in ("ratio", "time") else number_text(value)


def _value(name: str, text: str, kind: object) -> object:
    if kind is str:
        return text
    if text == NOT_DEFINED and kind is float:
        return math.nan
    if name in _P_COLUMNS and text.startswith("<"):
        return 0.0
    try:
        return int(text) if kind is int else float(text)
    except ValueError as error:
        raise ValueError(f"{name}: found {text!r}; expected a number") from error
