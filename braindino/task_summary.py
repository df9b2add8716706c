"""EVAL/<task>/summary.tsv: every number of a task beside its trivial baseline. Owner of the format (version 2).

One row per encoder, label ratio, variant (such as the k of kNN) and metric; estimates are means over the seeds, and the
interval is the 95 % bootstrap interval over subjects. ``pretraining_overlap`` says what of the test subjects the
encoder has seen before (``braindino.leakage``); tables of version 1 have no such column and are read as ``unknown``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from braindino.leakage import UNKNOWN
from braindino.tables import read_table, write_table

COLUMNS = (
    "encoder", "ratio", "variant", "metric", "estimate", "low", "high", "baseline", "baseline_low", "baseline_high",
    "baseline_name", "train_subjects", "test_subjects", "seeds", "data",
    "pretraining_overlap",
)  # fmt: skip


def write_task_summary(path: str | Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the rows atomically; each has a text for every one of ``COLUMNS``."""
    write_table(path, COLUMNS, ([row[name] for name in COLUMNS] for row in rows))


def read_task_summary(path: str | Path) -> list[dict[str, str]]:
    """The rows as texts, in the order of the file.

    Raises:
        ValueError: a column is missing, a row is cut short, or there is no row.
    """
    try:
        rows = read_table(path, COLUMNS[:-1]).rows
    except ValueError as error:
        raise ValueError(f"{error}: expected the table that `braindino evaluate` writes") from error
    if not rows:
        raise ValueError(f"{path}: no row; expected the table that `braindino evaluate` writes")
    return [{"pretraining_overlap": UNKNOWN} | row for row in rows]
