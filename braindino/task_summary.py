"""EVAL/<task>/summary.tsv: every number of a task beside its trivial baseline. Owner of the format (version 2).

One row per encoder, label ratio, variant (such as the k of kNN) and metric; estimates are means over the seeds, and the
interval is the 95 % bootstrap interval over subjects. ``pretraining_overlap`` says what of the test subjects the
encoder has seen before (``braindino.leakage``); tables of version 1 have no such column and are read as ``unknown``.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from braindino.atomic import write_text
from braindino.leakage import UNKNOWN

COLUMNS = (
    "encoder", "ratio", "variant", "metric", "estimate", "low", "high", "baseline", "baseline_low", "baseline_high",
    "baseline_name", "train_subjects", "test_subjects", "seeds", "data",
    "pretraining_overlap",
)  # fmt: skip


def write_task_summary(path: str | Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the rows atomically; each has a text for every one of ``COLUMNS``."""
    lines = ["\t".join(COLUMNS), *("\t".join(row[name] for name in COLUMNS) for row in rows)]
    write_text(path, "\n".join(lines) + "\n")


def read_task_summary(path: str | Path) -> list[dict[str, str]]:
    """The rows as texts, in the order of the file.

    Raises:
        ValueError: a column is missing, a row is cut short, or there is no row.
    """
    with Path(path).open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle, delimiter="\t")
        rows = list(reader)
    for row in rows:
        row.setdefault("pretraining_overlap", UNKNOWN)
    missing = [name for name in COLUMNS[:-1] if name not in (reader.fieldnames or ())]
    if missing or not rows or any(None in row.values() for row in rows):
        raise ValueError(
            f"{path}: columns {missing} are missing, {len(rows)} rows; "
            "expected the table that `braindino evaluate` writes"
        )
    return rows
