"""``python downstream/robustness.py TASK --features CLEAN... --conditions DIR --out OUT``: what heads that were trained
on clean features make of perturbed scans (paper sec. 4.5). Leaves, beside what ``results`` describes of cases.tsv,
splits.json and run.json::

OUT/<task>/robustness.tsv            every metric under every condition (``braindino.robustness_table``)
           missing.tsv               tested cases that a condition lacks, where there are any
           <encoder>/predictions.csv every test case of every trial, clean and under every condition
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from braindino.command_line import command_line
from braindino.devices import choose_device
from braindino.downstream.cases import Cases
from braindino.downstream.comparisons import Comparison
from braindino.downstream.config import RobustnessConfig
from braindino.downstream.feature_folders import common_scans, open_tables
from braindino.downstream.plan import Plan, check_overlaps, make_plan
from braindino.downstream.results import data_note, hash_features, metric_label, write_predictions, write_run
from braindino.downstream.scoring import METRICS, by_cell, check_metrics, compare_trials, estimate_metric
from braindino.downstream.task_table import Task, load_task
from braindino.downstream.trials import OtherFeatures, Trial, case_features, references_of, run_trials_on
from braindino.feature_table import FeatureTable
from braindino.file_digest import file_digest
from braindino.perturbations import CLEAN, PERTURBATIONS, Condition, read_condition
from braindino.provenance import code_commit, versions
from braindino.robustness_table import RobustnessRow, format_robustness, write_robustness
from braindino.tables import write_table


@dataclass(frozen=True)
class Perturbed:
    """The features of one condition.

    Attributes:
        condition: of the scans.
        tables: encoder -> its features.
        rows: (q,) indices of the tested cases all of whose scans every encoder has.
        missing: indices of the other tested cases.
    """

    condition: Condition
    tables: Mapping[str, FeatureTable]
    rows: np.ndarray
    missing: list[int]


@command_line("robustness", interrupted="nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the results are written, 1 on an error."""
    config = tyro.cli(RobustnessConfig, args=argv, prog="braindino robustness")
    _run(config, command=["braindino", "robustness", *(sys.argv[1:] if argv is None else argv)])
    return 0


def _run(config: RobustnessConfig, *, command: list[str]) -> None:
    task = load_task(config.task)
    check_metrics(task)
    device = choose_device(config.device)
    clean = open_tables(config.features)
    plan = make_plan(config, task, common_scans(clean, verb="robustness"), ratios=(config.ratio,))
    cases = plan.cases
    perturbed = [_open(config.conditions, condition, clean, plan) for condition in find_conditions(config.conditions)]
    overlaps = check_overlaps(config, plan, {name: table.table_dir for name, table in clean.items()})

    features = {name: case_features(task, cases, table) for name, table in clean.items()}
    others = {name: [_other_features(task, cases, each, name) for each in perturbed] for name in clean}
    folder = config.out / task.name
    write_run(
        folder,
        task,
        cases,
        plan.splits,
        plan.jobs,
        settings={
            "protocol": asdict(plan.protocol),
            "ratio": config.ratio,
            "seeds": config.seeds,
            "conditions": [each.condition.name for each in perturbed],
            "labels_sha256": [file_digest(path) for path in config.labels if path.is_file()],
        },
        encoders={
            name: {
                "features_dir": str(table.table_dir.resolve()),
                "identity": asdict(table.identity),
                "features_sha256": hash_features(features[name]),
                "conditions": {
                    each.condition.name: {
                        "features_dir": str(each.tables[name].table_dir.resolve()),
                        "features_sha256": hash_features(other.features),
                        "missing_cases": [cases.ids[row] for row in each.missing],
                    }
                    for each, other in zip(perturbed, others[name], strict=True)
                },
            }
            for name, table in clean.items()
        },
        provenance={
            "command": command,
            "versions": versions(),
            "code_commit": code_commit(),
            "device": str(device),
            "pretraining_overlap": overlaps,
            "warnings": plan.warnings,
        },
        by_scan=plan.by_scan,
        replace=config.replace,
    )
    references = references_of(task, cases, plan.jobs)
    rows: list[RobustnessRow] = []
    for name in clean:
        on_clean, *on_others = run_trials_on(
            task, features[name], cases, plan.jobs, references, others=others[name], device=device
        )
        print(f"{name}: {len(on_clean)} trials on clean scans, each asked under {len(perturbed)} conditions")
        trials = {each.condition: of_condition for each, of_condition in zip(perturbed, on_others, strict=True)}
        write_predictions(
            folder / name / "predictions.csv",
            task,
            cases,
            {CLEAN: on_clean} | {condition.name: of_condition for condition, of_condition in trials.items()},
        )
        rows += [
            replace(
                row,
                encoder=name,
                pretraining_overlap=overlaps[name],
                warnings="; ".join([*plan.warnings, *filter(None, [row.warnings])]),
            )
            for row in score_conditions(task, cases, on_clean, trials, num_tested=len(plan.tested))
        ]
    _write_missing(folder / "missing.tsv", cases, perturbed)
    # Last: a folder with the table has everything.
    write_robustness(rows, folder / "robustness.tsv")
    print("", format_robustness(rows), sep="\n")
    for each in perturbed:
        if each.missing:
            print(f"{each.condition.name}: {len(each.missing)} of {len(plan.tested)} tested cases are missing")
    print(f"\n{plan.protocol.kind}, {len(plan.splits)} test set(s), {len(config.seeds)} seed(s); {folder}")


def find_conditions(folder: Path) -> list[Condition]:
    """The conditions that the folders in ``folder`` are called after, perturbation by perturbation, mildest first.

    Raises:
        ValueError: there is none, or a folder is called like a perturbation and has no severity of it.
    """
    if not folder.is_dir():
        raise ValueError(f"--conditions {folder}: no such folder")
    found, passed = [], []
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name == CLEAN:
            continue
        if path.name.rpartition("-")[0] in PERTURBATIONS:
            found.append(read_condition(path.name))
        else:
            passed.append(path.name)
    found = [condition for condition in found if not condition.is_clean]
    if not found:
        raise ValueError(
            f"--conditions {folder}: found {', '.join(passed) or 'no folder'}; expected folders such as gamma-0.5 with "
            "a folder of features for every encoder"
        )
    if passed:
        print(f"robustness: passed over {', '.join(passed)} in {folder}: no condition")
    names = list(PERTURBATIONS)
    return sorted(found, key=lambda condition: (names.index(condition.perturbation), condition.severity))


def score_conditions(
    task: Task,
    cases: Cases,
    clean: Sequence[Trial],
    perturbed: Mapping[Condition, Sequence[Trial]],
    *,
    num_tested: int,
) -> list[RobustnessRow]:
    """Every metric of the task in every cell and under every condition, with its change against the clean scans.

    Estimates are those of ``evaluate``. The change is perturbed minus clean, on the same heads, splits, seeds and
    cases, tested as encoders are tested against each other; with several test sets by the corrected t test, since their
    training sets overlap.

    Args:
        task: row of the table of tasks.
        cases: of the task.
        clean: trials on clean scans, of one encoder.
        perturbed: condition -> the same trials on perturbed scans; cases may be missing.
        num_tested: cases that are tested on.
    """
    rows = []
    cells = {condition: by_cell(trials) for condition, trials in perturbed.items()}
    for cell, on_clean in by_cell(clean).items():
        for metric in task.metrics:
            for name in dict.fromkeys(condition.perturbation for condition in perturbed):
                identity = Condition(name, PERTURBATIONS[name].identity)
                on = {identity: on_clean} | {
                    condition: of_condition[cell]
                    for condition, of_condition in cells.items()
                    if condition.perturbation == name
                }
                for condition in sorted(on):
                    row = _row(task, cases, metric, condition, on[condition], num_tested=num_tested)
                    if not condition.is_clean:
                        change = _change(task, cases, metric, on[condition], on_clean)
                        row = replace(
                            row,
                            change=change.difference,
                            change_low=change.low,
                            change_high=change.high,
                            p=change.p,
                            method=f"{row.method}; change: {change.method}",
                        )
                    rows.append(replace(row, ratio=cell.ratio, variant=cell.variant))
    return rows


def _row(
    task: Task, cases: Cases, metric: str, condition: Condition, trials: Sequence[Trial], *, num_tested: int
) -> RobustnessRow:
    """The metric under one condition, without its change."""
    tested = sorted({int(row) for trial in trials for row in trial.prediction.rows})
    value = estimate_metric(task, cases, metric, trials)
    far = sum(trial.num_far_outside for trial in trials)
    return RobustnessRow(
        task=task.name,
        encoder="",
        metric=metric_label(task, metric),
        better="higher" if METRICS[metric].higher_is_better else "lower",
        perturbation=condition.perturbation,
        severity=condition.severity,
        clean=condition.is_clean,
        n_subjects=len({cases.subjects[row] for row in tested}),
        n_cases=len(tested),
        n_missing=num_tested - len(tested),
        estimate=value.estimate,
        low=value.low,
        high=value.high,
        method=value.method,
        data=data_note([scan for row in tested for scan in cases.scans[row]]),
        warnings=f"{far} predictions far outside the training range" if far else "",
    )


def _change(task: Task, cases: Cases, metric: str, perturbed: Sequence[Trial], clean: Sequence[Trial]) -> Comparison:
    """Perturbed minus clean on the cases that both have."""
    of_job = {(trial.job.split, trial.job.seed): trial for trial in clean}
    partners = [of_job[trial.job.split, trial.job.seed] for trial in perturbed]
    paired = [
        replace(partner, prediction=partner.prediction.about(trial.prediction.rows))
        for trial, partner in zip(perturbed, partners, strict=True)
    ]
    # The last of several is the corrected test.
    return compare_trials(task, cases, metric, perturbed, paired)[-1]


def _open(folder: Path, condition: Condition, clean: Mapping[str, FeatureTable], plan: Plan) -> Perturbed:
    """
    Raises:
        ValueError: an encoder has no features there, those of another encoder, or none of the tested scans.
    """
    tables = {}
    for name, table in clean.items():
        path = folder / condition.name / name
        if not (path / "features.json").exists():
            raise ValueError(
                f"{path}: no features of encoder {name} under {condition.name}; run `braindino extract` on that "
                "condition's prepared scans, with the encoder and options of the clean ones"
            )
        tables[name] = FeatureTable(path)
        if tables[name].meta.key != table.meta.key:
            raise ValueError(
                f"{path}: features of another encoder, preparation, reading or precision than {table.table_dir}; "
                "extract both with the same weights and options"
            )
    ids = set.intersection(*({scan.scan_id for scan in table.scans} for table in tables.values()))
    there: list[int] = []
    missing: list[int] = []
    for row in plan.tested:
        complete = all(scan.scan_id in ids for scan in plan.cases.scans[row])
        (there if complete else missing).append(row)
    if not there:
        cohorts = sorted({scan.cohort for table in tables.values() for scan in table.scans})
        ours = sorted({scan.cohort for row in plan.tested for scan in plan.cases.scans[row]})
        raise ValueError(
            f"{folder / condition.name}: none of the {len(plan.tested)} tested cases is there. Its scans are of cohort "
            f"{', '.join(cohorts) or 'none'}, the clean ones of {', '.join(ours)}: prepare the condition with the "
            "--cohort or --cohort-name of the clean scans"
        )
    return Perturbed(condition, tables, np.array(there, dtype=np.int64), missing)


def _other_features(task: Task, cases: Cases, perturbed: Perturbed, encoder: str) -> OtherFeatures:
    features = case_features(task, cases.among(perturbed.rows), perturbed.tables[encoder])
    return OtherFeatures(perturbed.rows, features)


def _write_missing(path: Path, cases: Cases, perturbed: Sequence[Perturbed]) -> None:
    rows = list(_missing(cases, perturbed))
    if rows:
        write_table(path, ("condition", "case", "subject", "scans"), rows)
    else:
        path.unlink(missing_ok=True)


def _missing(cases: Cases, perturbed: Sequence[Perturbed]) -> Iterator[tuple[str, str, str, str]]:
    for each in perturbed:
        for row in each.missing:
            scans = " ".join(scan.path for scan in cases.scans[row])
            yield each.condition.name, cases.ids[row], cases.subjects[row], scans


if __name__ == "__main__":
    raise SystemExit(main())
