"""RUN/metrics.jsonl: one JSON object per logged iteration. Owner of the format (version 1).

Every row has ``iteration``, counted from 1, ``loss`` and each of its terms.
"""

import json
from pathlib import Path
from typing import Any

from braindino.atomic import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows written so far; a last line that a killed process left unfinished is passed over."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
    return rows


def drop_metrics_after(path: Path, iteration: int) -> None:
    """Keep only the rows up to an iteration: those after it are about to be computed again."""
    rows = [row for row in read_metrics(path) if row["iteration"] <= iteration]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add one row at the end."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")
