"""scores.json and scores.tsv: Dice per case and region, beside a trivial floor. Owner of the format (version 1)."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from braindino.atomic import write_json
from braindino.leakage import UNKNOWN
from braindino.tables import write_table

FORMAT_VERSION = 1
EMPTY_NOTE = "empty in both prediction and reference: no Dice, not counted in the mean"
FLOOR_NOTE = "Dice of calling every voxel of the brain the region, mean over the same cases"


class RegionSummary(NamedTuple):
    """Over the cases where the Dice of a region is defined; NaN where nothing is."""

    mean: float
    sd: float
    """Standard deviation over cases (n - 1); NaN for fewer than two."""
    num_cases: int
    floor: float
    """What calling the whole brain the region would give; NaN without images to tell where the brain is."""


class SegmentationScores(NamedTuple):
    """The Dice coefficients of one set of predictions."""

    cases: dict[str, dict[str, float]]
    """case -> region -> Dice; NaN where the region is empty in both."""
    summary: dict[str, RegionSummary]
    """region -> mean over cases."""
    pretraining_overlap: str = UNKNOWN
    """What of the test subjects the encoder has seen in pretraining (``leakage.check_test_scans``)."""


def write_scores(scores: SegmentationScores, out_dir: str | Path) -> None:
    """Write ``scores.json`` (summary and cases, null where undefined) and ``scores.tsv`` (one row per case)."""
    write_json(
        Path(out_dir) / "scores.json",
        {
            "version": FORMAT_VERSION,
            "metric": "Dice",
            "undefined": EMPTY_NOTE,
            "floor": FLOOR_NOTE,
            "pretraining_overlap": scores.pretraining_overlap,
            "regions": {
                name: {
                    "mean": _or_null(row.mean),
                    "sd": _or_null(row.sd),
                    "cases": row.num_cases,
                    "floor": _or_null(row.floor),
                }
                for name, row in scores.summary.items()
            },
            "cases": {case: {name: _or_null(dice) for name, dice in row.items()} for case, row in scores.cases.items()},
        },
    )
    names = list(scores.summary)
    rows = [[case, *(_cell(row[name]) for name in names)] for case, row in scores.cases.items()]
    write_table(Path(out_dir) / "scores.tsv", ["case", *names], rows)


def read_scores(path: str | Path) -> SegmentationScores:
    """The scores in a ``scores.json``.

    Raises:
        ValueError: it is another file, or of another version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"format version {content['version']}; this program reads version {FORMAT_VERSION}")
        summary = {
            name: RegionSummary(_or_nan(row["mean"]), _or_nan(row["sd"]), row["cases"], _or_nan(row["floor"]))
            for name, row in content["regions"].items()
        }
        cases = {case: {name: _or_nan(dice) for name, dice in row.items()} for case, row in content["cases"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; expected the file that `braindino nnunet score` writes") from error
    return SegmentationScores(cases, summary, content.get("pretraining_overlap", UNKNOWN))


def format_mean(mean: float, sd: float) -> str:
    """``0.812 ± 0.044``; without deviation for one case, a dash where no case has a Dice."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f}" + ("" if math.isnan(sd) else f" ± {sd:.3f}")


def _cell(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.4f}"


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
