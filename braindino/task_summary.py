"""EVAL/<task>/summary.tsv: every number of a task beside its baselines. Owner of the format (version 3).

One row per encoder, label ratio, variant (such as the k of kNN) and metric. With one test set an estimate is the mean
over the seeds and its interval the 95 % bootstrap interval over subjects; with several (``splits``) it is the mean over
them with Student's t interval; ``interval`` says which. ``baseline`` is the trivial predictor, ``clinical`` what age,
sex and the like say without an image. ``warnings`` holds what a reader must know before believing the number.

Older tables lack some columns and are read with those of ``ABSENT`` instead.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from braindino.leakage import UNKNOWN
from braindino.tables import read_table, write_table

COLUMNS = (
    "encoder", "ratio", "variant", "metric", "estimate", "low", "high", "baseline", "baseline_low", "baseline_high",
    "baseline_name", "train_subjects", "test_subjects", "seeds", "data",
    "pretraining_overlap", "clinical", "clinical_low", "clinical_high", "splits", "interval", "permutation_p",
    "warnings",
)  # fmt: skip
ABSENT: Mapping[str, str] = MappingProxyType(
    {
        "pretraining_overlap": UNKNOWN,
        "clinical": "n/a",
        "clinical_low": "n/a",
        "clinical_high": "n/a",
        "splits": "1",
        "interval": "95 % percentile bootstrap over subjects",
        "permutation_p": "n/a",
        "warnings": "",
    }
)


def write_task_summary(path: str | Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the rows atomically; each has a text for every one of ``COLUMNS``."""
    write_table(path, COLUMNS, ([row[name] for name in COLUMNS] for row in rows))


def read_task_summary(path: str | Path) -> list[dict[str, str]]:
    """The rows as texts, in the order of the file.

    Raises:
        ValueError: a column is missing, a row is cut short, or there is no row.
    """
    try:
        rows = read_table(path, [name for name in COLUMNS if name not in ABSENT]).rows
    except ValueError as error:
        raise ValueError(f"{error}: expected the table that `braindino evaluate` writes") from error
    if not rows:
        raise ValueError(f"{path}: no row; expected the table that `braindino evaluate` writes")
    return [dict(ABSENT) | row for row in rows]
