"""What ``braindino segment-eval`` leaves on disk. Owner of the format (version 2)::

OUT/<predictions>/scores.json     Dice and HD95 per case and region, beside a trivial floor
OUT/<predictions>/scores.tsv      the same, a row per case
OUT/scores.tsv                    every number of every set of predictions
OUT/comparison.tsv                paired tests between them

Files of version 1 hold Dice alone; they are read with everything else not known.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from braindino.atomic import write_json
from braindino.leakage import UNKNOWN
from braindino.tables import NOT_DEFINED, number_text, read_table, write_table

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
EMPTY_NOTE = "empty in both prediction and reference: no Dice, not counted in the mean"
FLOOR_NOTE = "Dice of calling every voxel of the brain the region, mean over the same cases"


class RegionSummary(NamedTuple):
    """Of one metric over the cases where it is defined for a region; NaN where nothing is."""

    mean: float
    sd: float
    """Standard deviation over cases (n - 1); NaN for fewer than two."""
    num_cases: int
    floor: float = math.nan
    """Dice that calling the whole brain the region would give; NaN without images to tell where the brain is."""
    median: float = math.nan
    low: float = math.nan
    """Lower end of the 95 % interval of the mean, subjects resampled."""
    high: float = math.nan
    """Upper end of the interval."""


class Comparison(NamedTuple):
    """A paired test of two sets of predictions on the same cases, at one label ratio: first minus second."""

    metric: str
    region: str
    ratio: float
    first: str
    second: str
    difference: float
    low: float
    high: float
    p_bootstrap: float
    p_sign_flip: float
    num_cases: int
    num_subjects: int
    num_one_sided: int
    """Cases left out because the metric is defined for one of the two only."""
    p_bootstrap_holm: float = math.nan
    p_sign_flip_holm: float = math.nan


class OverviewRow(NamedTuple):
    """One metric of one set of predictions in one region, over cases: a row of OUT/scores.tsv."""

    predictions: str
    ratio: float
    """Share of the labels that was trained on."""
    metric: str
    """``Dice`` or ``HD95 (mm)``."""
    region: str
    cases: int
    mean: float
    sd: float
    median: float
    low: float
    high: float
    floor: float

    @property
    def trainer(self) -> str:
        """What trained, at whatever ratio: the name of the predictions less its ``_r10``."""
        return self.predictions if self.ratio == 1 else self.predictions.replace(f"_r{round(100 * self.ratio)}", "", 1)


@dataclass(frozen=True)
class SegmentationScores:
    """What one set of predictions reached.

    Attributes:
        cases: case -> region -> Dice; NaN where it is not defined.
        summary: region -> Dice over cases.
        pretraining_overlap: what of the test subjects the encoder has seen in pretraining
            (``leakage.check_test_scans``).
        hd95: case -> region -> 95th percentile of the Hausdorff distance in mm; NaN where it is not defined.
        hd95_summary: region -> HD95 over cases.
        subject_of: case -> subject; cases of one subject are drawn together.
        checkpoint: which checkpoint made the predictions, and how that is known.
        notes: name -> text: how the numbers are defined, and what holds for empty masks.
    """

    cases: Mapping[str, Mapping[str, float]]
    summary: Mapping[str, RegionSummary]
    pretraining_overlap: str = UNKNOWN
    hd95: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    hd95_summary: Mapping[str, RegionSummary] = field(default_factory=dict)
    subject_of: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = UNKNOWN
    notes: Mapping[str, str] = field(default_factory=dict)


def write_scores(scores: SegmentationScores, out_dir: str | Path) -> None:
    """Write ``scores.json`` (summaries and cases, null where undefined) and ``scores.tsv`` (one row per case)."""
    write_json(
        Path(out_dir) / "scores.json",
        {
            "version": FORMAT_VERSION,
            "metric": "Dice",
            "undefined": EMPTY_NOTE,
            "floor": FLOOR_NOTE,
            **scores.notes,
            "checkpoint": scores.checkpoint,
            "pretraining_overlap": scores.pretraining_overlap,
            "regions": {name: _summary_entry(row) for name, row in scores.summary.items()},
            "regions_hd95_mm": {name: _summary_entry(row) for name, row in scores.hd95_summary.items()},
            "subjects": dict(scores.subject_of),
            "cases": _cases_entry(scores.cases),
            "cases_hd95_mm": _cases_entry(scores.hd95),
        },
    )
    regions = list(scores.summary)
    columns = ["case", "subject", *(f"{name} Dice" for name in regions), *(f"{name} HD95 (mm)" for name in regions)]
    rows = [
        [
            case,
            scores.subject_of.get(case, case),
            *(number_text(row[name], ".4f") for name in regions),
            *(number_text(scores.hd95.get(case, {}).get(name, math.nan), ".2f") for name in regions),
        ]
        for case, row in scores.cases.items()
    ]
    write_table(Path(out_dir) / "scores.tsv", columns, rows)


def write_overview(scores: Mapping[str, SegmentationScores], ratios: Mapping[str, float], path: str | Path) -> None:
    """Write a row per set of predictions, metric and region.

    Args:
        scores: by the name of the predictions.
        ratios: name -> share of the labels that was trained on.
        path: the table.
    """
    rows = [
        [
            name,
            f"{ratios[name]:g}",
            metric,
            region,
            row.num_cases,
            *(number_text(getattr(row, key), ".4f") for key in _NUMBERS),
        ]
        for name, each in scores.items()
        for metric, summary in (("Dice", each.summary), ("HD95 (mm)", each.hd95_summary))
        for region, row in summary.items()
    ]
    write_table(path, ["predictions", "label_ratio", "metric", "region", "cases", *_NUMBERS], rows)


def read_overview(path: str | Path) -> list[OverviewRow]:
    """The rows of OUT/scores.tsv.

    Raises:
        ValueError: it is another table; names the file and the line.
    """
    table = read_table(path, ["predictions", "label_ratio", "metric", "region", "cases", *_NUMBERS])
    return [
        OverviewRow(
            row["predictions"],
            _number(path, line, row["label_ratio"]),
            row["metric"],
            row["region"],
            int(_number(path, line, row["cases"])),
            **{name: _number(path, line, row[name]) for name in _NUMBERS},
        )
        for line, row in zip(table.lines, table.rows, strict=True)
    ]


def read_comparisons(path: str | Path) -> list[Comparison]:
    """The rows of OUT/comparison.tsv; errors as for ``read_overview``."""
    table = read_table(path, Comparison._fields)
    rows = []
    for line, row in zip(table.lines, table.rows, strict=True):
        values: dict[str, Any] = {
            name: row[name] if name in ("metric", "region", "first", "second") else _number(path, line, row[name])
            for name in Comparison._fields
        }
        values |= {name: int(values[name]) for name in ("num_cases", "num_subjects", "num_one_sided")}
        rows.append(Comparison(**values))
    return rows


def write_comparisons(rows: Sequence[Comparison], path: str | Path) -> None:
    """Write a row per paired test."""
    cells = [[number_text(v, ".5f") if isinstance(v, float) else v for v in row] for row in rows]
    write_table(path, Comparison._fields, cells)


def read_scores(path: str | Path) -> SegmentationScores:
    """The scores in a ``scores.json`` of this version or an older one.

    Raises:
        ValueError: it is another file, or of a newer version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] not in READABLE_VERSIONS:
            raise ValueError(
                f"format version {content['version']}; this program reads versions "
                f"{' and '.join(map(str, READABLE_VERSIONS))}"
            )
        return SegmentationScores(
            cases=_cases(content["cases"]),
            summary=_summaries(content["regions"]),
            pretraining_overlap=content.get("pretraining_overlap", UNKNOWN),
            hd95=_cases(content.get("cases_hd95_mm", {})),
            hd95_summary=_summaries(content.get("regions_hd95_mm", {})),
            subject_of=dict(content.get("subjects", {})),
            checkpoint=content.get("checkpoint", UNKNOWN),
            notes={name: text for name, text in content.items() if isinstance(text, str) and name not in _NOT_NOTES},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; expected the file that `braindino segment-eval` writes") from error


def format_mean(mean: float, sd: float) -> str:
    """``0.812 ± 0.044``; without deviation for one case, a dash where no case has a Dice."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f}" + ("" if math.isnan(sd) else f" ± {sd:.3f}")


_NOT_NOTES = ("metric", "checkpoint", "pretraining_overlap")
_NUMBERS = ("mean", "sd", "median", "low", "high", "floor")


def _summary_entry(row: RegionSummary) -> dict[str, Any]:
    return {"cases": row.num_cases} | {name: _or_null(getattr(row, name)) for name in _NUMBERS}


def _summaries(entries: Mapping[str, Any]) -> dict[str, RegionSummary]:
    return {
        name: RegionSummary(num_cases=row["cases"], **{number: _or_nan(row.get(number)) for number in _NUMBERS})
        for name, row in entries.items()
    }


def _cases_entry(cases: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    return {case: {name: _or_null(value) for name, value in row.items()} for case, row in cases.items()}


def _cases(entries: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {case: {name: _or_nan(value) for name, value in row.items()} for case, row in entries.items()}


def _number(path: str | Path, line: int, text: str) -> float:
    try:
        return math.nan if text == NOT_DEFINED else float(text)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {line}: found {text!r}; expected a number, as `braindino segment-eval` writes it"
        ) from error


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
