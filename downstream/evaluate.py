"""``python downstream/evaluate.py TASK --features DIR... --out EVAL``: numbers from frozen features, in minutes."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
import tyro

from braindino.downstream.config import EvaluateConfig
from braindino.downstream.evaluation import Cases, Split, make_split, run_trials, select_cases
from braindino.downstream.results import data_note, format_summary, hash_scans, summarise, write_seed
from braindino.downstream.tasks import TASKS, KnnProbe
from braindino.feature_table import FeatureTable
from braindino.label_table import labels_of, read_labels
from braindino.leakage import Crosswalk, check_test_scans, exposure_of_encoder
from braindino.provenance import versions
from braindino.splits import read_subjects, shared_persons
from braindino.task_summary import write_task_summary


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the results are written, 1 on an error."""
    config = tyro.cli(EvaluateConfig, args=argv)
    try:
        _run(config, command=["braindino", "evaluate", *(sys.argv[1:] if argv is None else argv)])
    except (ValueError, OSError) as error:
        print(f"braindino evaluate: {error}", file=sys.stderr)
        return 1
    return 0


def _run(config: EvaluateConfig, *, command: list[str]) -> None:
    if config.task not in TASKS:
        raise ValueError(f"no task {config.task!r}; choose one of {', '.join(TASKS)}")
    task = TASKS[config.task]
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    tables = _open_tables(config)

    # All encoders are compared on the scans that all of them have.
    first = next(iter(tables.values()))
    common = set.intersection(*({scan.scan_id for scan in table.scans} for table in tables.values()))
    scans = [scan for scan in first.scans if scan.scan_id in common]
    for name, table in tables.items():
        if len(table) > len(scans):
            print(f"evaluate: {len(table) - len(scans)} scans of {name} are left out: not all encoders have them")
    labels = {}
    if task.target != "sequence":
        if not config.labels:
            raise ValueError(f"task {task.name} needs --labels: a BIDS folder or a table with a column {task.target!r}")
        labels = labels_of(scans, read_labels(config.labels, task.target))
    cases = select_cases(task, scans, labels)
    cohorts = ", ".join(sorted({scan.cohort for scan in cases.scans}))
    print(
        f"evaluate {task.name} (paper sec. {task.section}): {len(cases.scans)} scans of {len(set(cases.subjects))} "
        f"subjects; cohorts {cohorts}; {data_note(cases.scans)}".rstrip("; ")
    )
    for reason, count in cases.left_out.items():
        print(f"left out: {count} scans, {reason}")

    crosswalk = Crosswalk(config.crosswalk)
    test_subjects = read_subjects(config.test_subjects) if config.test_subjects else None
    splits = [
        make_split(
            task,
            cases,
            seed=seed,
            ratios=config.ratios,
            test_fraction=config.test_fraction,
            test_subjects=test_subjects,
            person_of=crosswalk.person_of(cases.subjects),
        )
        for seed in config.seeds
    ]
    stamps = _overlap_stamps(config, tables, cases, splits, crosswalk)
    trials_of_encoder = {}
    for name, table in tables.items():
        row_of_scan = {scan.scan_id: row for row, scan in enumerate(table.scans)}
        features = table.features[[row_of_scan[scan.scan_id] for scan in cases.scans]]
        trials_of_encoder[name] = run_trials(task, features, cases, splits, device=device)
        provenance = {
            "command": command,
            "features_dir": str(table.table_dir.resolve()),
            "features": asdict(table.meta),
            "cases_sha256": hash_scans(cases.scans),
            "versions": versions(),
        }
        for split in splits:
            trials = [trial for trial in trials_of_encoder[name] if trial.seed == split.seed]
            folder = config.out / task.name / name / f"seed_{split.seed}"
            write_seed(folder, task, cases, split, trials, provenance=provenance, pretraining_overlap=stamps[name])
        num_far = sum(trial.num_far_outside for trial in trials_of_encoder[name])
        if num_far:
            print(f"warning: {name}: {num_far} predictions lie beyond the training range by more than half its width")
    rows = summarise(task, cases, trials_of_encoder, pretraining_overlap=stamps)
    write_task_summary(config.out / task.name / "summary.tsv", rows)
    print(format_summary(rows))
    if isinstance(task.head, KnnProbe):
        for ratio in config.ratios:
            shown = {row["variant"] for row in rows if row["ratio"] == f"{ratio:g}"}
            missing = [str(k) for k in task.head.neighbours if f"k={k}" not in shown]
            if missing:
                print(f"ratio {ratio:g}: left out k = {', '.join(missing)}, larger than the memory bank")
    print(f"means over {len(splits)} seed(s); {config.out / task.name / 'summary.tsv'}")


def _overlap_stamps(
    config: EvaluateConfig,
    tables: Mapping[str, FeatureTable],
    cases: Cases,
    splits: Sequence[Split],
    crosswalk: Crosswalk,
) -> dict[str, str]:
    """Return encoder name -> what of the test subjects was seen before, in pretraining or under another id.

    Raises:
        ValueError: something was, and it was not allowed.
    """
    leaks = sorted(
        {
            subject
            for split in splits
            for subject in shared_persons(split.train, split.test, crosswalk.person_of(cases.subjects))
        }
    )
    if leaks and not config.allow_subject_leak:
        raise ValueError(
            f"{len(leaks)} test subjects are also trained on, under another id: {', '.join(leaks[:10])}"
            f"{' ...' if len(leaks) > 10 else ''}. Put all ids of a person on the test list, or go on with "
            "--allow-subject-leak, which marks the results"
        )
    tested = {subject for split in splits for subject in split.test}
    scans = [scan for scan in cases.scans if scan.subject_key in tested]
    stamps = {}
    for name, table in tables.items():
        stamp = check_test_scans(
            exposure_of_encoder(table.table_dir),
            scans,
            model=f"encoder {name}",
            allow_overlap=config.allow_overlap,
            crosswalk=crosswalk,
        )
        print(f"pretraining overlap of {name}: {stamp}")
        stamps[name] = stamp + (f"; subject leak: {len(leaks)} trained on under another id" if leaks else "")
    return stamps


def _open_tables(config: EvaluateConfig) -> dict[str, FeatureTable]:
    """Return encoder name -> table; an encoder is called by the name of its feature folder."""
    names = [path.resolve().name for path in config.features]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--features: found folders called {names}; expected one or more, each with a name of its own")
    return {name: FeatureTable(path) for name, path in zip(names, config.features, strict=True)}


if __name__ == "__main__":
    raise SystemExit(main())
