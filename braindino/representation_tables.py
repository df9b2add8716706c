"""The tables of ``braindino represent``: how encoders describe the same scans. Owner of the formats (version 1).

REPRESENTATION/cka.tsv             alignment of every two encoders, at three depths
               spread.tsv          how much room the features of an encoder take
               cohort_share.tsv    how often the nearest scans are of the same cohort, beside chance
               neighbours.tsv      the scans and slices nearest to some that were asked about

A number that is not defined is NaN, and ``n/a`` in the file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from braindino.tables import NOT_DEFINED, number_text, read_rows, write_rows

CKA_FILE, SPREAD_FILE = "cka.tsv", "spread.tsv"
COHORT_SHARE_FILE, NEIGHBOURS_FILE = "cohort_share.tsv", "neighbours.tsv"
ALL = "all"
"""The group of all cohorts together; the bank of all scans; the slice of a neighbour that is a whole scan."""
UNITS = ("scan", "subject")
AMONG = ("all cohorts", "other cohorts")


@dataclass(frozen=True, kw_only=True)
class CkaRow:
    """Linear CKA of two encoders over the same scans (paper sec. 4.6)."""

    group: str
    """A cohort, or ``all``."""
    unit: str
    """What a row of the features is: ``scan``, as in the paper, or ``subject``, the mean of the subject's scans."""
    depth: str
    """``early``, ``mid`` or ``late``."""
    encoder_a: str
    """Name of the one encoder, that of its feature folder."""
    encoder_b: str
    """Of the other."""
    n: int
    """Number of units."""
    subjects: int
    """Number of subjects, which alone are independent."""
    dim_a: int
    """Length of the features of the one encoder."""
    dim_b: int
    """Of the other."""
    cka: float
    """0 to 1; where n is small beside the dimensions it is high for any two encoders, so look at ``debiased``."""
    low: float
    """Lower end of the 95 % interval, by leaving out one subject at a time."""
    high: float
    """Upper end of it."""
    debiased: float
    """The same with the unbiased estimate of HSIC: around 0 for features that have nothing to do with each other."""
    debiased_low: float
    """Lower end of its interval."""
    debiased_high: float
    """Upper end of it."""
    method: str
    """How the intervals were made, in words."""


@dataclass(frozen=True, kw_only=True)
class SpreadRow:
    """How the features of one encoder are spread over some scans."""

    group: str
    """A cohort, or ``all``."""
    encoder: str
    """Name of the encoder."""
    depth: str
    """``early``, ``mid``, ``late``, or ``global``: the feature that heads are given."""
    n: int
    """Number of scans."""
    subjects: int
    """Number of subjects."""
    dim: int
    """Length of the features."""
    effective_rank: float
    """exp of the entropy of the singular values of the centred features, as shares of their sum."""
    participation_ratio: float
    """(sum of the variances along the principal axes)^2 / sum of their squares."""
    mean_cosine: float
    """Mean cosine similarity of two scans, features as they are: near 1, they lie in a narrow cone."""
    first_share: float
    """Share of the variance that lies along the first principal axis."""
    between_within: float
    """Variance between subjects / variance between the scans of a subject (components of a one-way analysis of
    variance, summed over the features); NaN where no subject has two scans."""


@dataclass(frozen=True, kw_only=True)
class CohortShareRow:
    """Share of the nearest scans, of other subjects, that come from the scan's own cohort."""

    encoder: str
    """Name of the encoder."""
    bank: str
    """Among which scans: ``all``, or ``same sequence``, for cohorts that differ in their sequences."""
    cohort: str
    """Of the scans asked about; ``all`` for all of them."""
    k: int
    """How many nearest scans of each."""
    n: int
    """Scans asked about."""
    subjects: int
    """Their subjects."""
    share: float
    """0 to 1, mean over the scans asked about."""
    low: float
    """Lower end of the 95 % interval over subjects."""
    high: float
    """Upper end of it."""
    chance: float
    """The share if every scan of another subject were equally near."""
    method: str
    """How the interval was made, in words."""


@dataclass(frozen=True, kw_only=True)
class NeighbourRow:
    """One of the scans, or slices, nearest to one that was asked about; one a subject, none of the same subject."""

    encoder: str
    """Name of the encoder."""
    among: str
    """``all cohorts``, or ``other cohorts`` than that of the query."""
    query: str
    """``scan_id`` of the scan asked about."""
    query_cohort: str
    """Its cohort."""
    query_subject: str
    """Its subject."""
    query_sequence: str
    """Its sequence."""
    query_slice: str
    """Which slice of the features' S, from the lowest; ``all`` for the scan as a whole."""
    rank: int
    """1 for the nearest."""
    scan: str
    """``scan_id`` of the neighbour."""
    cohort: str
    """Its cohort."""
    subject: str
    """Its subject."""
    session: str
    """Its session."""
    sequence: str
    """Its sequence."""
    slice: str
    """Which slice; ``all`` for a whole scan."""
    similarity: float
    """Cosine, -1 to 1."""
    path: str
    """File of the neighbour."""


Row = TypeVar("Row", CkaRow, SpreadRow, CohortShareRow, NeighbourRow)


def write_cka(path: str | Path, rows: Sequence[CkaRow]) -> None:
    """Write ``cka.tsv`` atomically."""
    _write(path, rows, CkaRow)


def read_cka(path: str | Path) -> list[CkaRow]:
    """The rows of a ``cka.tsv``.

    Raises:
        ValueError: a column is missing, or a number is not one; names the file and the line.
    """
    return _read(path, CkaRow)


def write_spread(path: str | Path, rows: Sequence[SpreadRow]) -> None:
    """Write ``spread.tsv`` atomically."""
    _write(path, rows, SpreadRow)


def read_spread(path: str | Path) -> list[SpreadRow]:
    """The rows of a ``spread.tsv``; errors as for ``read_cka``."""
    return _read(path, SpreadRow)


def write_cohort_share(path: str | Path, rows: Sequence[CohortShareRow]) -> None:
    """Write ``cohort_share.tsv`` atomically."""
    _write(path, rows, CohortShareRow)


def read_cohort_share(path: str | Path) -> list[CohortShareRow]:
    """The rows of a ``cohort_share.tsv``; errors as for ``read_cka``."""
    return _read(path, CohortShareRow)


def write_neighbours(path: str | Path, rows: Sequence[NeighbourRow]) -> None:
    """Write ``neighbours.tsv`` atomically."""
    _write(path, rows, NeighbourRow)


def read_neighbours(path: str | Path) -> list[NeighbourRow]:
    """The rows of a ``neighbours.tsv``; errors as for ``read_cka``."""
    return _read(path, NeighbourRow)


def _write(path: str | Path, rows: Sequence[Row], kind: type[Row]) -> None:
    write_rows(path, kind, rows, _text)


def _read(path: str | Path, kind: type[Row]) -> list[Row]:
    return read_rows(path, kind, _value, written_by="braindino represent")


def _text(_name: str, value: object) -> str:
    if isinstance(value, float):
        return number_text(value, ".6g")
    return str(value)


def _value(_name: str, text: str, kind: object) -> object:
    if kind is float:
        return math.nan if text == NOT_DEFINED else float(text)
    return int(text) if kind is int else text
