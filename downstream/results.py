"""What an evaluation leaves on disk beside its summary (``braindino.task_summary``). Format version 1::

OUT/<task>/<encoder>/seed_<k>/metrics.json      every number of one seed, with where it comes from
                              predictions.csv   every test case
                              splits.json       who trained, who was tested on
"""

import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from braindino.atomic import write_json, write_text
from braindino.downstream.evaluation import Cases, Prediction, Score, Split, Trial, score_trials
from braindino.downstream.tasks import Task
from braindino.manifest import Scan

FORMAT_VERSION = 1
SIMULATED = "SIMULATED data"


def write_seed(
    folder: Path,
    task: Task,
    cases: Cases,
    split: Split,
    trials: Sequence[Trial],
    *,
    provenance: Mapping[str, Any],
    pretraining_overlap: str,
) -> None:
    """Write the three files of one encoder under one seed.

    Args:
        folder: of that encoder and seed.
        task: row of the task table.
        cases: of the task.
        split: under that seed.
        trials: of that encoder and seed.
        provenance: where the numbers come from.
        pretraining_overlap: what of the test subjects the encoder has seen before (``leakage.check_test_scans``).
    """
    results = [
        {
            "ratio": trial.ratio,
            "variant": trial.variant,
            "num_train_subjects": trial.num_train_subjects,
            "num_train_scans": trial.num_train_scans,
            "num_test_scans": len(trial.prediction.rows),
            "num_far_outside_training_range": trial.num_far_outside,
            **_score_entry(score),
        }
        for trial in trials
        for score in score_trials(task, cases, [trial])
    ]
    write_json(
        folder / "metrics.json",
        {
            "format_version": FORMAT_VERSION,
            "task": asdict(task),
            "data": data_note(cases.scans),
            "pretraining_overlap": pretraining_overlap,
            "seed": split.seed,
            "num_cases": len(cases.scans),
            "left_out": cases.left_out,
            "results": results,
            "provenance": dict(provenance),
        },
    )
    write_json(
        folder / "splits.json",
        {
            "format_version": FORMAT_VERSION,
            "seed": split.seed,
            "test": split.test,
            "train": split.train,
            "train_by_ratio": {str(ratio): subjects for ratio, subjects in split.subsets.items()},
        },
    )
    write_text(folder / "predictions.csv", _predictions_csv(task, cases, trials))


def summarise(
    task: Task,
    cases: Cases,
    trials_of_encoder: Mapping[str, Sequence[Trial]],
    *,
    pretraining_overlap: Mapping[str, str],
) -> list[dict[str, str]]:
    """Return the rows of ``summary.tsv``: ratio by ratio, encoders side by side, each number the mean over the seeds,
    with what each encoder has seen of the test subjects before."""
    groups: dict[tuple[float, str], dict[str, list[Trial]]] = defaultdict(dict)
    for encoder, trials in trials_of_encoder.items():
        for trial in trials:
            groups[trial.ratio, trial.variant].setdefault(encoder, []).append(trial)
    rows = []
    for (ratio, variant), by_encoder in groups.items():
        for encoder, trials in by_encoder.items():
            for score in score_trials(task, cases, trials):
                rows.append(
                    {
                        "encoder": encoder,
                        "ratio": f"{ratio:g}",
                        "variant": variant,
                        "metric": score.metric + (f" ({task.unit})" if task.unit else ""),
                        "estimate": _number(score.value.estimate),
                        "low": _number(score.value.low),
                        "high": _number(score.value.high),
                        "baseline": _number(score.baseline.estimate),
                        "baseline_low": _number(score.baseline.low),
                        "baseline_high": _number(score.baseline.high),
                        "baseline_name": score.baseline_name,
                        "train_subjects": str(trials[0].num_train_subjects),
                        "test_subjects": str(score.value.n),
                        "seeds": str(len(trials)),
                        "data": data_note(cases.scans),
                        "pretraining_overlap": pretraining_overlap[encoder],
                    }
                )
    return rows


def format_summary(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the rows as a text table for a terminal."""
    header = ("encoder", "ratio", "train", "", "metric", "estimate [95 %]", "baseline [95 %]", "")
    lines = [
        (
            row["encoder"],
            row["ratio"],
            row["train_subjects"],
            row["variant"],
            row["metric"],
            f"{row['estimate']} [{row['low']}, {row['high']}]",
            f"{row['baseline']} [{row['baseline_low']}, {row['baseline_high']}]",
            row["baseline_name"],
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *lines]
    )


def data_note(scans: Sequence[Scan]) -> str:
    """Return ``SIMULATED data`` when a scan lies in a cohort that says so of itself, otherwise nothing."""
    return SIMULATED if any(_is_simulated(folder) for folder in {Path(scan.path).parent for scan in scans}) else ""


def hash_scans(scans: Sequence[Scan]) -> str:
    """Return a SHA-256 over the identities of the scans, in order: equal for evaluations on the same cases."""
    return hashlib.sha256("\n".join(scan.scan_id for scan in scans).encode()).hexdigest()


@cache
def _is_simulated(folder: Path) -> bool:
    """Whether a BIDS description above ``folder`` names the simulator as its source."""
    for parent in (folder, *folder.parents):
        description = parent / "dataset_description.json"
        if description.is_file():
            content = json.loads(description.read_text(encoding="utf-8"))
            return any(source.get("Name") == "braindino simulate" for source in content.get("GeneratedBy", ()))
    return False


def _score_entry(score: Score) -> dict[str, Any]:
    return {
        "metric": score.metric,
        **_finite(asdict(score.value)),
        "baseline": {"name": score.baseline_name, **_finite(asdict(score.baseline))},
    }


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """NaN is not JSON: a number that is not defined becomes null."""
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in record.items()}


def _number(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{value:.3f}"


def _predictions_csv(task: Task, cases: Cases, trials: Sequence[Trial]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    with_probabilities = trials[0].prediction.probabilities is not None
    probability_columns = [f"probability_{name}" for name in task.classes] if with_probabilities else []
    writer.writerow(
        [
            *("ratio", "variant", "scan_id", "cohort", "subject", "session", "sequence"),
            *("target", "predicted", "baseline", *probability_columns),
        ]
    )
    for trial in trials:
        shown = _shown(task, trial.prediction)
        baseline = _shown(task, trial.baseline)
        for index, row in enumerate(trial.prediction.rows):
            scan = cases.scans[row]
            cells = [
                f"{trial.ratio:g}",
                trial.variant,
                scan.scan_id,
                scan.cohort,
                scan.subject,
                scan.session,
                scan.sequence,
            ]
            cells += [shown[index][0], shown[index][1], baseline[index][1]]
            if trial.prediction.probabilities is not None:
                cells += [f"{p:.6g}" for p in trial.prediction.probabilities[index]]
            writer.writerow(cells)
    return buffer.getvalue()


def _shown(task: Task, prediction: Prediction) -> list[tuple[str, str]]:
    """Targets and predictions as text: class names, or values."""
    if task.classes:
        return [
            (task.classes[t], task.classes[p]) for t, p in zip(prediction.targets, prediction.predicted, strict=True)
        ]
    return [(f"{t:.6g}", f"{p:.6g}") for t, p in zip(prediction.targets, prediction.predicted, strict=True)]
