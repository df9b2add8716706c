"""Groups of cases by a number, such as the age, that are scored by themselves (paper sec. 4.7). Which groups there are
stands in the table of tasks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Stratum(NamedTuple):
    """A range of a number."""

    name: str
    low: float
    """Lowest value that belongs to it."""
    end: float
    """Lowest value beyond it."""


class Assignment(NamedTuple):
    """Which case is in which stratum."""

    rows: dict[str, np.ndarray]
    """Name of every stratum -> indices of its cases, ascending; empty where it has none."""
    outside: np.ndarray
    """Indices of the cases in none: their value is in no range, or not known."""


def strata_of_bins(bins: Sequence[tuple[float, float | None]]) -> tuple[Stratum, ...]:
    """The strata of bins in whole units: ``(55, 64)`` holds 55.0 to 64.99 and is called 55-64; ``(85, None)`` is 85+.

    Args:
        bins: lowest and highest whole value of each.

    Raises:
        ValueError: there is none, one is empty, or two overlap or are out of order.
    """
    if not bins:
        raise ValueError("strata: found no bins; expected at least one")
    strata = [
        Stratum(f"{low:g}+", float(low), np.inf)
        if high is None
        else Stratum(f"{low:g}-{high:g}", float(low), float(high) + 1)
        for low, high in bins
    ]
    for stratum, (low, high) in zip(strata, bins, strict=True):
        if high is not None and not low <= high:
            raise ValueError(f"strata: bin {stratum.name} is empty; expected the lowest value first")
    for lower, upper in pairwise(strata):
        if upper.low < lower.end:
            raise ValueError(f"strata: bin {upper.name} begins within or below {lower.name}; expected rising bins")
    return tuple(strata)


def assign_strata(values: Sequence[float] | np.ndarray, strata: Sequence[Stratum]) -> Assignment:
    """The cases of every stratum, and those in none.

    Args:
        values: (n,) such as ages in years; NaN where not known.
        strata: as ``strata_of_bins`` makes them.
    """
    numbers = np.asarray(values, dtype=np.float64)
    rows = {s.name: np.flatnonzero((numbers >= s.low) & (numbers < s.end)) for s in strata}
    inside = np.concatenate([*rows.values(), np.array([], dtype=np.intp)])
    return Assignment(rows, np.setdiff1d(np.arange(len(numbers)), inside))
