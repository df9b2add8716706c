"""``python downstream/evaluate.py TASK --features DIR... --out EVAL``: numbers from frozen features, in minutes."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import tyro

from braindino.downstream.cases import Cases, select_cases
from braindino.downstream.config import EvaluateConfig
from braindino.downstream.finetuning import FineTuner
from braindino.downstream.protocols import Split, make_jobs, make_splits
from braindino.downstream.results import (
    data_note,
    format_differences,
    format_summary,
    hash_features,
    write_run,
    write_tables,
)
from braindino.downstream.scoring import check_metrics
from braindino.downstream.sweep import run_sweep
from braindino.downstream.task_table import Protocol, Task, load_task
from braindino.downstream.trials import case_features
from braindino.feature_table import FeatureTable
from braindino.file_digest import file_digest
from braindino.leakage import Crosswalk, check_test_scans, exposure_of_encoder
from braindino.manifest import Scan
from braindino.provenance import code_commit, versions
from braindino.splits import read_subjects, shared_persons


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the results are written, 1 on an error, 130 on Ctrl-C."""
    try:
        config = tyro.cli(EvaluateConfig, args=argv, prog="braindino evaluate")
        _run(config, command=["braindino", "evaluate", *(sys.argv[1:] if argv is None else argv)])
    except (ValueError, OSError) as error:
        print(f"braindino evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("braindino evaluate: interrupted; finished trainings of --finetune are kept", file=sys.stderr)
        return 130
    return 0


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _run(config: EvaluateConfig, *, command: list[str]) -> None:
    task = load_task(config.task)
    check_metrics(task)
    protocol = _protocol(config, task.protocol)
    device = choose_device(config.device)
    tables = _open_tables(config)
    cases = select_cases(task, _common_scans(tables), config.labels)
    _introduce(task, cases)

    crosswalk = Crosswalk(config.crosswalk)
    splits = make_splits(
        task,
        cases,
        protocol=protocol,
        test_subjects=read_subjects(config.test_subjects) if config.test_subjects else None,
        person_of=crosswalk.person_of(cases.subjects),
        by_scan=config.split_by_scan,
    )
    jobs = make_jobs(cases, splits, ratios=config.ratios, seeds=config.seeds, by_scan=config.split_by_scan)
    warnings = _warnings(config, cases, splits, crosswalk)
    tested = {row for job in jobs for row in job.test}
    test_scans = [scan for row in sorted(tested) for scan in cases.scans[row]]
    tuner = _open_tuner(config, task, cases, tables, device) if config.finetune else None
    sources: dict[str, str | Path] = {name: table.table_dir for name, table in tables.items()}
    sources |= {tuner.name: config.finetune} if tuner else {}
    overlaps = _overlaps(config, sources, test_scans, crosswalk)

    features = {name: case_features(task, cases, table) for name, table in tables.items()}
    folder = config.out / task.name
    write_run(
        folder,
        task,
        cases,
        splits,
        jobs,
        settings={
            "protocol": asdict(protocol),
            "ratios": config.ratios,
            "seeds": config.seeds,
            "permutations": config.permutations,
            "labels_sha256": [file_digest(path) for path in config.labels if path.is_file()],
        },
        encoders={
            name: {
                "features_dir": str(table.table_dir.resolve()),
                "identity": asdict(table.identity),
                "features_sha256": hash_features(features[name]),
            }
            for name, table in tables.items()
        }
        | ({tuner.name: tuner.about} if tuner else {}),
        provenance={
            "command": command,
            "versions": versions(),
            "code_commit": code_commit(),
            "device": str(device),
            "pretraining_overlap": overlaps,
            "warnings": warnings,
        },
        by_scan=config.split_by_scan,
        replace=config.replace,
    )
    results = run_sweep(
        task,
        cases,
        jobs,
        features,
        {tuner.name: tuner.train(jobs, keep_in=folder / tuner.name / "jobs")} if tuner else {},
        permutations=config.permutations,
        device=device,
    )
    rows = write_tables(folder, task, cases, results, overlaps=overlaps, warnings=warnings)
    print("", format_summary(rows), sep="\n")
    for text in filter(None, (format_differences(results.differences), _left_out_neighbours(task, rows))):
        print("", text, sep="\n")
    for line in sorted({row["warnings"] for row in rows if row["warnings"]}):
        print(f"warning: {line}")
    print(f"\n{protocol.kind}, {len(splits)} test set(s), {len(config.seeds)} seed(s); {folder}")


def _protocol(config: EvaluateConfig, own: Protocol) -> Protocol:
    """The task's protocol, or the user's."""
    kind = config.protocol or ("holdout" if config.test_subjects else own.kind)
    if kind == "holdout":
        count = 1 if config.num_splits is None else config.num_splits
    else:
        count = config.num_splits or (own.num_splits if own.num_splits > 1 else 5)
    fraction = own.test_fraction if config.test_fraction is None else config.test_fraction
    return Protocol(kind=kind, num_splits=count, test_fraction=fraction)


def _open_tables(config: EvaluateConfig) -> dict[str, FeatureTable]:
    """Encoder name -> table; an encoder is called by the name of its feature folder."""
    names = [path.resolve().name for path in config.features]
    if len(set(names)) < len(names):
        raise ValueError(f"--features: found folders called {names}; expected one or more, each with a name of its own")
    return {name: FeatureTable(path) for name, path in zip(names, config.features, strict=True)}


def _common_scans(tables: Mapping[str, FeatureTable]) -> list[Scan]:
    """The scans that all encoders have: they are compared on the same cases."""
    first = next(iter(tables.values()))
    common = set.intersection(*({scan.scan_id for scan in table.scans} for table in tables.values()))
    for name, table in tables.items():
        if len(table) > len(common):
            print(f"evaluate: {len(table) - len(common)} scans of {name} are left out: not all encoders have them")
    return [scan for scan in first.scans if scan.scan_id in common]


def _open_tuner(
    config: EvaluateConfig, task: Task, cases: Cases, tables: Mapping[str, FeatureTable], device: torch.device
) -> FineTuner:
    """What ``--finetune`` asks for."""
    assert config.prepared is not None
    return FineTuner(
        task,
        cases,
        encoder=config.finetune,
        prepared_dir=config.prepared,
        settings=config.finetuning,
        beside={name: table.identity for name, table in tables.items()},
        device=device,
    )


def _introduce(task: Task, cases: Cases) -> None:
    cohorts = sorted({scan.cohort for scan in cases.all_scans})
    section = f" (paper sec. {task.section})" if task.section else ""
    note = data_note(cases.all_scans)
    print(
        f"{task.name}{section}: {task.title}\n{len(cases)} cases of {len(set(cases.subjects))} subjects, "
        f"{len(cases.all_scans)} scans; cohorts {', '.join(cohorts)}{'; ' + note if note else ''}"
    )
    others = [cohort for cohort in cohorts if task.cohorts and cohort not in task.cohorts]
    if others:
        print(f"not the paper's cohorts ({', '.join(task.cohorts)}): {', '.join(others)}")
    for reason, count in cases.left_out.items():
        print(f"left out: {count}, {reason}")


def _warnings(config: EvaluateConfig, cases: Cases, splits: Sequence[Split], crosswalk: Crosswalk) -> list[str]:
    """What makes every number of the run doubtful and was allowed.

    Raises:
        ValueError: something was not allowed.
    """
    if config.split_by_scan:
        return ["DIVIDED BY SCAN: subjects are trained and tested on"]
    person_of = crosswalk.person_of(cases.subjects)
    leaks = sorted({each for split in splits for each in shared_persons(split.train, split.test, person_of)})
    if leaks and not config.allow_subject_leak:
        raise ValueError(
            f"{len(leaks)} test subjects are also trained on, under another id: {', '.join(leaks[:10])}"
            f"{' ...' if len(leaks) > 10 else ''}. Put all ids of a person on the test list, or go on with "
            "--allow-subject-leak, which marks the results"
        )
    return [f"subject leak: {len(leaks)} trained on under another id"] if leaks else []


def _overlaps(
    config: EvaluateConfig, sources: Mapping[str, str | Path], test_scans: Sequence[Scan], crosswalk: Crosswalk
) -> dict[str, str]:
    """Encoder -> what of the test scans it saw in pretraining; ``sources``: its features, or itself.

    Raises:
        ValueError: it saw some, and that was not allowed.
    """
    stamps = {}
    for name, source in sources.items():
        stamps[name] = check_test_scans(
            exposure_of_encoder(source),
            test_scans,
            model=f"encoder {name}",
            allow_overlap=config.allow_overlap,
            crosswalk=crosswalk,
        )
        print(f"pretraining overlap of {name}: {stamps[name]}")
    return stamps


def _left_out_neighbours(task: Task, rows: Sequence[Mapping[str, str]]) -> str:
    if task.knn is None:
        return ""
    lines = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        shown = {row["variant"] for row in rows if row["ratio"] == ratio}
        missing = [str(k) for k in task.knn.neighbours if f"k={k}" not in shown]
        if missing:
            lines.append(f"ratio {ratio}: left out k = {', '.join(missing)}, larger than the memory bank")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
