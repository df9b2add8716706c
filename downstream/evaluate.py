"""``python downstream/evaluate.py TASK --features DIR... --out EVAL``: numbers from frozen features, in minutes."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import tyro

from braindino.command_line import command_line
from braindino.devices import choose_device
from braindino.downstream.cases import Cases
from braindino.downstream.config import EvaluateConfig
from braindino.downstream.feature_folders import common_scans, open_tables
from braindino.downstream.finetuning import FineTuner
from braindino.downstream.plan import check_overlaps, make_plan
from braindino.downstream.results import (
    format_differences,
    format_summary,
    hash_features,
    write_run,
    write_tables,
)
from braindino.downstream.scoring import check_metrics
from braindino.downstream.sweep import run_sweep
from braindino.downstream.task_table import Task, load_task
from braindino.downstream.trials import case_features
from braindino.feature_table import FeatureTable
from braindino.file_digest import file_digest
from braindino.provenance import code_commit, versions


@command_line("evaluate", interrupted="finished trainings of --finetune are kept")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the results are written, 1 on an error."""
    config = tyro.cli(EvaluateConfig, args=argv, prog="braindino evaluate")
    _run(config, command=["braindino", "evaluate", *(sys.argv[1:] if argv is None else argv)])
    return 0


def _run(config: EvaluateConfig, *, command: list[str]) -> None:
    task = load_task(config.task)
    check_metrics(task)
    device = choose_device(config.device)
    tables = open_tables(config.features)
    plan = make_plan(config, task, common_scans(tables, verb="evaluate"), ratios=config.ratios)
    cases, jobs = plan.cases, plan.jobs
    tuner = _open_tuner(config, task, cases, tables, device) if config.finetune else None
    sources: dict[str, str | Path] = {name: table.table_dir for name, table in tables.items()}
    sources |= {tuner.name: config.finetune} if tuner else {}
    overlaps = check_overlaps(config, plan, sources)

    features = {name: case_features(task, cases, table) for name, table in tables.items()}
    folder = config.out / task.name
    write_run(
        folder,
        task,
        cases,
        plan.splits,
        jobs,
        settings={
            "protocol": asdict(plan.protocol),
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
            "warnings": plan.warnings,
        },
        by_scan=plan.by_scan,
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
    rows = write_tables(folder, task, cases, results, overlaps=overlaps, warnings=plan.warnings)
    print("", format_summary(rows), sep="\n")
    for text in filter(None, (format_differences(results.differences), _left_out_neighbours(task, rows))):
        print("", text, sep="\n")
    for line in sorted({row["warnings"] for row in rows if row["warnings"]}):
        print(f"warning: {line}")
    print(f"\n{plan.protocol.kind}, {len(plan.splits)} test set(s), {len(config.seeds)} seed(s); {folder}")


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
