"""What an evaluation leaves on disk, so that anyone can read it, check it and repeat it. Format version 2::

OUT/<task>/summary.tsv        every number beside its baselines (``braindino.task_summary``)
           comparisons.tsv    the first encoder against the others, over all cases and by stratum
           strata.tsv         the main metric by stratum (tasks with strata)
           survival.tsv       Kaplan-Meier medians above and below the training median risk, log-rank (survival)
           calibration.tsv    calibration lines (two classes, numbers)
           <encoder>/predictions.csv   every test case of every trial
           <encoder>-finetuned/jobs/   outputs of each training of an encoder, with which a killed run goes on
           run.json           task, settings, encoders, hashes, versions, command
           cases.tsv          every case: its scans and its target
           splits.json        who trained and who was tested on, split by split, seed by seed, ratio by ratio
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from braindino.atomic import plain, write_json, write_text
from braindino.downstream.cases import Cases
from braindino.downstream.intervals import Estimate
from braindino.downstream.protocols import Job, Split
from braindino.downstream.scoring import METRICS, Cell, Difference, Score
from braindino.downstream.sweep import Results
from braindino.downstream.task_table import Task, as_plain
from braindino.downstream.trials import Trial
from braindino.manifest import Scan
from braindino.resampling import ITERATIONS
from braindino.tables import read_table, write_table
from braindino.task_summary import write_task_summary

FORMAT_VERSION = 2
SIMULATED = "SIMULATED data"
_COMPARISON_COLUMNS = (
    "ratio", "variant", "stratum", "first", "second", "what", "difference", "low", "high", "p", "p_holm", "n", "method",
)  # fmt: skip
_SURVIVAL_COLUMNS = (
    "encoder", "ratio", "group", "cases", "events", "median", "median_low", "median_high", "chi_squared", "p", "method",
)  # fmt: skip
_CALIBRATION_COLUMNS = (
    "encoder", "what", "intercept", "intercept_low", "intercept_high", "slope", "slope_low", "slope_high", "subjects",
    "method",
)  # fmt: skip


def write_tables(
    folder: Path, task: Task, cases: Cases, results: Results, *, overlaps: Mapping[str, str], warnings: Sequence[str]
) -> list[dict[str, str]]:
    """Write all that was computed; the rows of summary.tsv.

    Args:
        folder: OUT/<task>.
        task: row of the table of tasks.
        cases: of the task.
        results: what was computed.
        overlaps: encoder -> what it saw of the test subjects in pretraining (``leakage.check_test_scans``).
        warnings: what a reader must know before believing any of the numbers.
    """
    rows = summary_rows(task, cases, results, overlaps=overlaps, warnings=warnings)
    for encoder, trials in results.trials.items():
        write_text(folder / encoder / "predictions.csv", _predictions(task, cases, trials))
    write_table(folder / "comparisons.tsv", _COMPARISON_COLUMNS, map(_comparison_row, results.differences))
    if results.strata:
        write_table(
            folder / "strata.tsv",
            ("encoder", "ratio", "variant", "stratum", "metric", "estimate", "low", "high", "subjects", "method"),
            (
                (s.encoder, *_cell(s.cell), s.stratum, s.metric, *_interval(s.value), s.value.n, s.value.method)
                for s in results.strata
            ),
        )
    if results.survival:
        write_table(
            folder / "survival.tsv",
            _SURVIVAL_COLUMNS,
            _survival_rows(results),
        )
    if results.calibration:
        write_table(
            folder / "calibration.tsv",
            _CALIBRATION_COLUMNS,
            (
                (encoder, c.what, *_interval(c.intercept), *_interval(c.slope), c.n, c.method)
                for encoder, c in results.calibration.items()
            ),
        )
    # Last: a folder with a summary has everything.
    write_task_summary(folder / "summary.tsv", rows)
    return rows


def write_run(
    folder: Path,
    task: Task,
    cases: Cases,
    splits: Sequence[Split],
    jobs: Sequence[Job],
    *,
    settings: Mapping[str, Any],
    encoders: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, Any],
    by_scan: bool,
    replace: bool,
) -> None:
    """Write what is needed to repeat the evaluation, before it begins.

    Args:
        folder: OUT/<task>.
        task: row of the table of tasks, as it was used.
        cases: of the task.
        splits: who is tested on.
        jobs: what is trained.
        settings: all that decides the numbers besides task, cases and splits.
        encoders: name -> features folder, identity and the digest of the features that are used.
        provenance: command, versions and the like, which do not decide them.
        by_scan: whether scans were divided.
        replace: replace a run with other settings.

    Raises:
        ValueError: the folder holds results of other settings, and they are not to be replaced.
    """
    units = cases.ids if by_scan else cases.subjects
    decisive = {
        "task": as_plain(task),
        "settings": plain(dict(settings)),
        "encoders": plain({name: dict(encoder) for name, encoder in encoders.items()}),
        "cases_sha256": hash_cases(cases),
        "divided_by": "scan" if by_scan else "subject",
    }
    path = folder / "run.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key, value in decisive.items() if before.get(key) != value]
        if changed and not replace:
            raise ValueError(
                f"{folder}: holds results of other {', '.join(changed)}; choose another --out, or give --replace to "
                "lose them"
            )
        if changed:
            # Stopped from here on, the folder must not show the old numbers as those of the new settings.
            for old in (*folder.glob("*.tsv"), *folder.glob("*/predictions.csv")):
                old.unlink()
    columns = ("time", "event") if task.target.kind == "survival" else ("target",)
    shown = cases.targets.reshape(len(cases), -1)
    write_table(
        folder / "cases.tsv",
        ("case", "subject", "scans", *columns, *cases.facts),
        (
            (
                cases.ids[row],
                cases.subjects[row],
                " ".join(scan.scan_id for scan in cases.scans[row]),
                *(_target_text(task, value) for value in shown[row]),
                *(values[row] for values in cases.facts.values()),
            )
            for row in range(len(cases))
        ),
    )
    write_json(
        folder / "splits.json",
        {
            "format_version": FORMAT_VERSION,
            "divided_by": decisive["divided_by"],
            "splits": [{"train": split.train, "test": split.test} for split in splits],
            "jobs": [
                {
                    "split": job.split,
                    "seed": job.seed,
                    "ratio": job.ratio,
                    "train": sorted({units[row] for row in job.train}),
                }
                for job in jobs
            ],
        },
    )
    write_json(
        path,
        {
            "format_version": FORMAT_VERSION,
            **decisive,
            "data": data_note(cases.all_scans),
            "num_cases": len(cases),
            "left_out": cases.left_out,
            "provenance": dict(provenance),
        },
    )


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json.

    Raises:
        ValueError: there is none, or one of another version.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no run.json; expected a task's folder as `braindino evaluate` writes it, OUT/TASK")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: found version {content.get('format_version')}; expected {FORMAT_VERSION}; evaluate again"
        )
    return content


def read_cases(folder: Path, task: Task, scans: Sequence[Scan]) -> Cases:
    """The cases of a run, with the scans as a feature table lists them.

    Raises:
        ValueError: the table lacks a scan.
    """
    table = read_table(folder / "cases.tsv", ("case", "subject", "scans"))
    scan_of = {scan.scan_id: scan for scan in scans}
    targets_of, groups = [], []
    columns = ("time", "event") if task.target.kind == "survival" else ("target",)
    for row in table.rows:
        ids = row["scans"].split()
        missing = [scan_id for scan_id in ids if scan_id not in scan_of]
        if missing:
            raise ValueError(f"{folder / 'cases.tsv'}: scan {missing[0]} of {row['subject']} is not among the features")
        groups.append(tuple(scan_of[scan_id] for scan_id in ids))
        texts = [row[column] for column in columns]
        targets_of.append(
            task.target.classes.index(texts[0])
            if task.target.kind == "class"
            else float(texts[0])
            if len(texts) == 1
            else [float(text) for text in texts]
        )
    known = {"case", "subject", "scans", *columns}
    return Cases(
        ids=[row["case"] for row in table.rows],
        scans=groups,
        subjects=[row["subject"] for row in table.rows],
        targets=np.array(targets_of, dtype=np.int64 if task.target.kind == "class" else np.float64),
        facts={name: [row[name] for row in table.rows] for name in table.columns if name not in known},
        left_out={},
    )


def read_jobs(folder: Path, cases: Cases) -> list[Job]:
    """What was trained in a run, in its order."""
    content = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    units = cases.ids if content["divided_by"] == "scan" else cases.subjects
    tests = [cases.rows_of(units, split["test"]) for split in content["splits"]]
    return [
        Job(
            job["split"],
            job["seed"],
            job["ratio"],
            cases.rows_of(units, job["train"]),
            tests[job["split"]],
            len(job["train"]),
        )
        for job in content["jobs"]
    ]


def read_predictions(folder: Path, encoder: str) -> list[dict[str, str]]:
    """The rows of an encoder's predictions.csv."""
    with (folder / encoder / "predictions.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def summary_rows(
    task: Task, cases: Cases, results: Results, *, overlaps: Mapping[str, str], warnings: Sequence[str]
) -> list[dict[str, str]]:
    """The rows of summary.tsv: ratio by ratio, encoders side by side."""
    data = data_note(cases.all_scans)
    rows = []
    for encoder, scores in results.scores.items():
        notes = {trial.beside.clinical_note for trial in results.trials[encoder] if trial.beside.clinical_note}
        for score in scores:
            told = list(warnings)
            if score.num_far_outside:
                told.append(f"{score.num_far_outside} predictions far outside the training range")
            if score.clinical is None and notes:
                told.append(f"no clinical baseline: {min(notes)}")
            rows.append(
                _summary_row(task, cases, encoder, score, results)
                | {"data": data, "pretraining_overlap": overlaps[encoder], "warnings": "; ".join(told)}
            )
    order = {encoder: number for number, encoder in enumerate(results.scores)}
    # Stable: within a ratio and variant the metrics keep the task's order.
    cells = list(dict.fromkeys((row["ratio"], row["variant"]) for row in rows))
    return sorted(rows, key=lambda row: (cells.index((row["ratio"], row["variant"])), order[row["encoder"]]))


def format_summary(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a text table for a terminal."""
    header = (
        "encoder",
        "ratio",
        "train",
        "",
        "metric",
        "estimate [95 %]",
        "baseline [95 %]",
        "",
        "clinical",
        "permuted p",
    )
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
            row["clinical"],
            row["permutation_p"],
        )
        for row in rows
    ]
    return _aligned([header, *lines])


def format_differences(differences: Sequence[Difference]) -> str:
    """Comparisons over all cases as a text table for a terminal; empty where there are none."""
    chosen = [difference for difference in differences if not difference.stratum]
    if not chosen:
        return ""
    header = ("comparison", "ratio", "", "of", "difference [95 %]", "p", "p (Holm)", "")
    return _aligned(
        [
            header,
            *(
                (
                    f"{d.first} - {d.second}",
                    f"{d.cell.ratio:g}",
                    d.cell.variant,
                    d.comparison.what,
                    f"{_number(d.comparison.difference)} [{_number(d.comparison.low)}, {_number(d.comparison.high)}]",
                    _p(d.comparison.p),
                    _p(d.p_holm),
                    d.comparison.method.partition(",")[0].partition(";")[0],
                )
                for d in chosen
            ),
        ]
    )


def data_note(scans: Sequence[Scan]) -> str:
    """``SIMULATED data`` when a scan lies in a cohort that says so of itself, otherwise nothing."""
    return SIMULATED if any(_is_simulated(folder) for folder in {Path(scan.path).parent for scan in scans}) else ""


def hash_cases(cases: Cases) -> str:
    """SHA-256 over cases, their scans and their targets, in order: equal for evaluations of the same question."""
    digest = hashlib.sha256()
    for case, scans, target in zip(cases.ids, cases.scans, cases.targets.tolist(), strict=True):
        digest.update(json.dumps([case, [scan.scan_id for scan in scans], target]).encode())
    return digest.hexdigest()


def hash_features(features: np.ndarray) -> str:
    """SHA-256 over the features that heads are trained on, and their shape."""
    digest = hashlib.sha256(str(features.shape).encode())
    digest.update(np.ascontiguousarray(features, dtype=np.float32).tobytes())
    return digest.hexdigest()


@cache
def _is_simulated(folder: Path) -> bool:
    """Whether a BIDS description above ``folder`` names the simulator as its source."""
    for parent in (folder, *folder.parents):
        description = parent / "dataset_description.json"
        if description.is_file():
            content = json.loads(description.read_text(encoding="utf-8"))
            return any(source.get("Name") == "braindino simulate" for source in content.get("GeneratedBy", ()))
    return False


def _summary_row(task: Task, cases: Cases, encoder: str, score: Score, results: Results) -> dict[str, str]:
    in_unit = bool(task.target.unit) and score.metric in ("mae", "rmse")
    names = ("estimate", "low", "high")
    row = {
        "encoder": encoder,
        "ratio": f"{score.cell.ratio:g}",
        "variant": score.cell.variant,
        "metric": score.metric + (f" ({task.target.unit})" if in_unit else ""),
        **dict(zip(names, _interval(score.value), strict=True)),
        **dict(zip(("baseline", "baseline_low", "baseline_high"), _interval(score.baseline), strict=True)),
        "baseline_name": METRICS[score.metric].baseline_name,
        "train_subjects": str(score.num_train_units),
        "test_subjects": str(len({cases.subjects[row] for trial in results.trials[encoder] for row in trial.job.test})),
        "seeds": str(score.num_seeds),
        "splits": str(score.num_splits),
        "interval": score.value.method,
        "permutation_p": "n/a",
    }
    clinical = ("n/a",) * 3 if score.clinical is None else _interval(score.clinical)
    row |= dict(zip(("clinical", "clinical_low", "clinical_high"), clinical, strict=True))
    permuted = results.permutations.get(encoder)
    fullest = max(results.scores[encoder], key=lambda each: each.cell.ratio)
    if permuted is not None and (score.cell, score.metric) == (fullest.cell, task.metrics[0]):
        row["permutation_p"] = _p(permuted.p)
    return row


def _comparison_row(difference: Difference) -> tuple[object, ...]:
    c = difference.comparison
    return (
        f"{difference.cell.ratio:g}", difference.cell.variant, difference.stratum, difference.first, difference.second,
        c.what, _number(c.difference), _number(c.low), _number(c.high), _p(c.p), _p(difference.p_holm), c.n, c.method,
    )  # fmt: skip


def _survival_rows(results: Results) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for found in results.survival:
        groups, test = found.groups, found.groups.log_rank
        for name, curve in (("high risk", groups.high_risk), ("low risk", groups.low_risk)):
            numbers: tuple[object, ...] = (0, 0, "n/a", "n/a", "n/a")
            if curve is not None:
                medians = (curve.median, curve.median_low, curve.median_high)
                numbers = (curve.n, int(curve.num_events.sum()), *(_number(median) for median in medians))
            ends = (_number(test.statistic), _p(test.p), test.method)
            rows.append((found.encoder, f"{found.cell.ratio:g}", name, *numbers, *ends))
    return rows


def _predictions(task: Task, cases: Cases, trials: Sequence[Trial]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    targets = ("time", "event") if task.target.kind == "survival" else ("target",)
    with_probabilities = trials[0].prediction.probabilities is not None
    classes = [f"probability_{name}" for name in task.target.classes] if with_probabilities else []
    writer.writerow(
        (
            "split",
            "seed",
            "ratio",
            "variant",
            "case",
            "subject",
            *targets,
            "predicted",
            *classes,
            "baseline",
            "clinical",
        )
        + (("above_cut",) if task.target.kind == "survival" else ())
    )
    for trial in trials:
        prediction, clinical = trial.prediction, trial.beside.clinical
        shown = prediction.targets.reshape(len(prediction.rows), -1)
        for index, row in enumerate(prediction.rows):
            cells: list[object] = [trial.job.split, trial.job.seed, f"{trial.job.ratio:g}", trial.variant]
            cells += [cases.ids[row], cases.subjects[row], *(_target_text(task, value) for value in shown[index])]
            cells.append(_predicted_text(task, prediction.predicted[index]))
            if prediction.probabilities is not None:
                cells += [f"{p:.9g}" for p in prediction.probabilities[index]]
            cells.append(_predicted_text(task, trial.beside.trivial.predicted[index]))
            cells.append("" if clinical is None else _predicted_text(task, clinical.predicted[index]))
            if task.target.kind == "survival":
                cells.append(f"{prediction.predicted[index] - trial.risk_cut:.9g}")
            writer.writerow(cells)
    return buffer.getvalue()


def _target_text(task: Task, value: float) -> str:
    return task.target.classes[int(value)] if task.target.kind == "class" else f"{value:.17g}"


def _predicted_text(task: Task, value: float) -> str:
    return task.target.classes[int(value)] if task.target.kind == "class" else f"{value:.9g}"


def _cell(cell: Cell) -> tuple[str, str]:
    return f"{cell.ratio:g}", cell.variant


def _interval(estimate: Estimate) -> tuple[str, str, str]:
    return _number(estimate.estimate), _number(estimate.low), _number(estimate.high)


def _number(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{value:.3f}"


def _p(value: float) -> str:
    if value == 0:  # of a bootstrap
        return f"<{1 / ITERATIONS:g}"
    return "n/a" if np.isnan(value) else f"{value:.2g}" if value >= 0.001 else f"{value:.1e}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
