"""What an evaluation leaves on disk, so that anyone can read it, check it and repeat it. Format version 2::

OUT/<task>/summary.tsv        every number beside its baselines (``braindino.task_summary``)
           comparisons.tsv    the first encoder against the others, over all cases and by stratum
           strata.tsv         the main metric by stratum (tasks with strata)
           survival.tsv       Kaplan-Meier medians above and below the training median risk, log-rank (survival)
           survival_curves.tsv   the curves themselves, a row per time
           calibration.tsv    calibration lines (two classes, numbers)
           reliability.tsv    predicted probabilities beside observed shares (two classes)
           <encoder>/predictions.csv   every test case of every trial
           <encoder>-finetuned/jobs/   outputs of each training of an encoder, with which a killed run goes on
           run.json           task, settings, encoders, hashes, versions, command
           cases.tsv          every case: its scans and its target
           splits.json        who trained and who was tested on, split by split, seed by seed, ratio by ratio
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from braindino import task_tables
from braindino.atomic import plain, write_json
from braindino.downstream.calibration import Calibration
from braindino.downstream.cases import Cases
from braindino.downstream.intervals import Estimate
from braindino.downstream.protocols import Job, Split
from braindino.downstream.scoring import METRICS, Difference, Score, StratumScore, Survival
from braindino.downstream.survival import SurvivalCurve
from braindino.downstream.sweep import Results
from braindino.downstream.task_table import Task, as_plain
from braindino.downstream.trials import Trial
from braindino.manifest import Scan
from braindino.records import read_json
from braindino.resampling import p_text
from braindino.tables import align, interval_text, number_text, read_table, write_table
from braindino.task_summary import write_task_summary
from braindino.task_tables import (
    CALIBRATION_FILE,
    COMPARISONS_FILE,
    HIGH_RISK,
    LOW_RISK,
    PREDICTIONS_FILE,
    RELIABILITY_FILE,
    STRATA_FILE,
    SURVIVAL_CURVES_FILE,
    SURVIVAL_FILE,
    CalibrationRow,
    ComparisonRow,
    ReliabilityRow,
    StratumRow,
    SurvivalRow,
    SurvivalStep,
    write_rows,
)

FORMAT_VERSION = 2
SIMULATED = "SIMULATED data"


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
        write_predictions(folder / encoder / "predictions.csv", task, cases, {"": trials})
    write_rows(folder / COMPARISONS_FILE, ComparisonRow, map(_comparison_row, results.differences))
    if results.strata:
        write_rows(folder / STRATA_FILE, StratumRow, map(_stratum_row, results.strata))
    if results.survival:
        write_rows(folder / SURVIVAL_FILE, SurvivalRow, _survival_rows(results))
        write_rows(folder / SURVIVAL_CURVES_FILE, SurvivalStep, _survival_steps(results))
    if results.calibration:
        rows_of = (_calibration_row(encoder, each) for encoder, each in results.calibration.items())
        write_rows(folder / CALIBRATION_FILE, CalibrationRow, rows_of)
    if results.reliability:
        write_rows(folder / RELIABILITY_FILE, ReliabilityRow, _reliability_rows(task, results))
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
        before = read_json(path)
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
    content = read_json(path)
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
    content = read_json(folder / "splits.json")
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
    return task_tables.read_predictions(folder / encoder / PREDICTIONS_FILE)


def write_predictions(path: Path, task: Task, cases: Cases, trials_of: Mapping[str, Sequence[Trial]]) -> None:
    """Write every test case of every trial; under several conditions with a first column that names them.

    Args:
        path: the file.
        task: row of the table of tasks.
        cases: of the task.
        trials_of: condition -> trials; "" alone where there are no conditions.
    """
    alone = list(trials_of) == [""]
    task_tables.write_predictions(
        path,
        (
            cells if alone else {"condition": condition} | cells
            for condition, trials in trials_of.items()
            for cells in _predictions(task, cases, trials)
        ),
    )


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


def metric_label(task: Task, metric: str) -> str:
    """``mae (years)``: a metric with the unit that it has."""
    return f"{metric} ({task.target.unit})" if task.target.unit and metric in ("mae", "rmse") else metric


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
    return align([header, *lines])


def format_differences(differences: Sequence[Difference]) -> str:
    """Comparisons over all cases as a text table for a terminal; empty where there are none."""
    chosen = [difference for difference in differences if not difference.stratum]
    if not chosen:
        return ""
    header = ("comparison", "ratio", "", "of", "difference [95 %]", "p", "p (Holm)", "")
    return align(
        [
            header,
            *(
                (
                    f"{d.first} - {d.second}",
                    f"{d.cell.ratio:g}",
                    d.cell.variant,
                    d.comparison.what,
                    interval_text(d.comparison.difference, d.comparison.low, d.comparison.high),
                    p_text(d.comparison.p),
                    p_text(d.p_holm),
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
            content = read_json(description)
            return any(source.get("Name") == "braindino simulate" for source in content.get("GeneratedBy", ()))
    return False


def _summary_row(task: Task, cases: Cases, encoder: str, score: Score, results: Results) -> dict[str, str]:
    names = ("estimate", "low", "high")
    row = {
        "encoder": encoder,
        "ratio": f"{score.cell.ratio:g}",
        "variant": score.cell.variant,
        "metric": metric_label(task, score.metric),
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
        row["permutation_p"] = p_text(permuted.p)
    return row


def _comparison_row(difference: Difference) -> ComparisonRow:
    c = difference.comparison
    return ComparisonRow(
        ratio=difference.cell.ratio,
        variant=difference.cell.variant,
        stratum=difference.stratum,
        first=difference.first,
        second=difference.second,
        what=c.what,
        difference=c.difference,
        low=c.low,
        high=c.high,
        p=c.p,
        p_holm=difference.p_holm,
        n=c.n,
        method=c.method,
    )


def _stratum_row(score: StratumScore) -> StratumRow:
    return StratumRow(
        encoder=score.encoder,
        ratio=score.cell.ratio,
        variant=score.cell.variant,
        stratum=score.stratum,
        metric=score.metric,
        estimate=score.value.estimate,
        low=score.value.low,
        high=score.value.high,
        subjects=score.value.n,
        method=score.value.method,
    )


def _survival_rows(results: Results) -> list[SurvivalRow]:
    rows = []
    for found in results.survival:
        test = found.groups.log_rank
        for name, curve in _risk_groups(found):
            rows.append(
                SurvivalRow(
                    encoder=found.encoder,
                    ratio=found.cell.ratio,
                    group=name,
                    cases=0 if curve is None else curve.n,
                    events=0 if curve is None else int(curve.num_events.sum()),
                    median=np.nan if curve is None else curve.median,
                    median_low=np.nan if curve is None else curve.median_low,
                    median_high=np.nan if curve is None else curve.median_high,
                    chi_squared=test.statistic,
                    p=test.p,
                    method=test.method,
                )
            )
    return rows


def _survival_steps(results: Results) -> list[SurvivalStep]:
    rows = []
    for found in results.survival:
        for name, curve in _risk_groups(found):
            if curve is None:
                continue
            after = np.append(curve.at_risk[1:], 0)
            for place, time in enumerate(curve.times.tolist()):
                rows.append(
                    SurvivalStep(
                        encoder=found.encoder,
                        ratio=found.cell.ratio,
                        group=name,
                        time=time,
                        at_risk=int(curve.at_risk[place]),
                        events=int(curve.num_events[place]),
                        left=int(curve.at_risk[place] - curve.num_events[place] - after[place]),
                        survival=float(curve.survival[place]),
                        low=float(curve.low[place]),
                        high=float(curve.high[place]),
                    )
                )
    return rows


def _risk_groups(found: Survival) -> tuple[tuple[str, SurvivalCurve | None], tuple[str, SurvivalCurve | None]]:
    return (HIGH_RISK, found.groups.high_risk), (LOW_RISK, found.groups.low_risk)


def _calibration_row(encoder: str, found: Calibration) -> CalibrationRow:
    return CalibrationRow(
        encoder=encoder,
        what=found.what,
        intercept=found.intercept.estimate,
        intercept_low=found.intercept.low,
        intercept_high=found.intercept.high,
        slope=found.slope.estimate,
        slope_low=found.slope.low,
        slope_high=found.slope.high,
        subjects=found.n,
        method=found.method,
    )


def _reliability_rows(task: Task, results: Results) -> list[ReliabilityRow]:
    return [
        ReliabilityRow(
            encoder=encoder,
            positive=task.target.classes[1],
            low=each.low,
            high=each.high,
            n=each.n,
            mean_predicted=each.mean_predicted,
            observed_share=each.observed_share,
        )
        for encoder, bins in results.reliability.items()
        for each in bins
    ]


def _predictions(task: Task, cases: Cases, trials: Sequence[Trial]) -> Iterator[dict[str, object]]:
    """Column -> cell, a test case of a trial after the other."""
    for trial in trials:
        prediction, clinical = trial.prediction, trial.beside.clinical
        shown = prediction.targets.reshape(len(prediction.rows), -1)
        for index, row in enumerate(prediction.rows):
            cells: dict[str, object] = {
                "split": trial.job.split,
                "seed": trial.job.seed,
                "ratio": f"{trial.job.ratio:g}",
                "variant": trial.variant,
                "case": cases.ids[row],
                "subject": cases.subjects[row],
            }
            targets = ("time", "event") if task.target.kind == "survival" else ("target",)
            cells |= {name: _target_text(task, value) for name, value in zip(targets, shown[index], strict=True)}
            cells["predicted"] = _predicted_text(task, prediction.predicted[index])
            if prediction.probabilities is not None:
                names = (f"probability_{name}" for name in task.target.classes)
                cells |= {n: f"{p:.9g}" for n, p in zip(names, prediction.probabilities[index], strict=True)}
            cells["baseline"] = _predicted_text(task, trial.beside.trivial.predicted[index])
            cells["clinical"] = "" if clinical is None else _predicted_text(task, clinical.predicted[index])
            if task.target.kind == "survival":
                cells["above_cut"] = f"{prediction.predicted[index] - trial.risk_cut:.9g}"
            yield cells


def _target_text(task: Task, value: float) -> str:
    return task.target.classes[int(value)] if task.target.kind == "class" else f"{value:.17g}"


def _predicted_text(task: Task, value: float) -> str:
    return task.target.classes[int(value)] if task.target.kind == "class" else f"{value:.9g}"


def _interval(estimate: Estimate) -> tuple[str, str, str]:
    return number_text(estimate.estimate), number_text(estimate.low), number_text(estimate.high)
