"""``braindino reproduce OUT/TASK``: the same numbers again, from what an evaluation left."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from braindino.command_line import EXIT_DIFFERENT, EXIT_DONE, command_line
from braindino.devices import choose_device
from braindino.downstream.cases import Cases
from braindino.downstream.config import ReproduceConfig
from braindino.downstream.finetuning import FineTuner, settings_from
from braindino.downstream.results import (
    hash_cases,
    hash_features,
    read_cases,
    read_jobs,
    read_predictions,
    read_run,
    summary_rows,
)
from braindino.downstream.sweep import run_sweep
from braindino.downstream.task_table import Task, task_from
from braindino.downstream.trials import Trial, case_features
from braindino.feature_table import FeatureTable
from braindino.provenance import versions
from braindino.task_summary import read_task_summary


@command_line("reproduce")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when everything is the same, 4 when something differs, 1 on an error."""
    found = reproduce(tyro.cli(ReproduceConfig, args=argv, prog="braindino reproduce"))
    for line in found:
        print(f"different: {line}")
    print("reproduced: every prediction and every number is the same" if not found else "not reproduced")
    return EXIT_DIFFERENT if found else EXIT_DONE


def reproduce(config: ReproduceConfig) -> list[str]:
    """Repeat a run; what differs, line by line.

    Raises:
        ValueError: cases or features are no longer those of the run.
    """
    run = read_run(config.run)
    if "conditions" in run["settings"]:
        raise ValueError(
            f"{config.run}: results of `braindino robustness`; its command in run.json gives them again, with another "
            "--out to compare"
        )
    task = task_from(run["task"])
    tables = _open_tables(config, run["encoders"])
    cases = read_cases(config.run, task, next(iter(tables.values())).scans)
    if hash_cases(cases) != run["cases_sha256"]:
        raise ValueError(f"{config.run / 'cases.tsv'}: changed since the run; its cases are other ones")
    features = {}
    for encoder, table in tables.items():
        features[encoder] = case_features(task, cases, table)
        if hash_features(features[encoder]) != run["encoders"][encoder]["features_sha256"]:
            raise ValueError(
                f"{table.table_dir}: other features than the run used (encoder {encoder}); give the folder that has "
                f"them with --features {encoder}=FOLDER, or extract them again with the encoder of run.json"
            )
    for name, number in versions().items():
        before = run["provenance"]["versions"].get(name)
        if before != number:
            print(f"note: {name} {number}; the run had {before}")
    jobs = read_jobs(config.run, cases)
    results = run_sweep(
        task,
        cases,
        jobs,
        features,
        {tuner.name: tuner.train(jobs, keep_in=None) for tuner in _open_tuners(config, run, task, cases, tables)},
        permutations=run["settings"]["permutations"],
        device=choose_device(config.device),
    )
    different = [
        line
        for encoder, trials in results.trials.items()
        for line in _compare_predictions(config.run, task, cases, encoder, trials, tolerance=config.tolerance)
    ]
    provenance = run["provenance"]
    rows = summary_rows(
        task, cases, results, overlaps=provenance["pretraining_overlap"], warnings=provenance["warnings"]
    )
    return different + _compare_summaries(read_task_summary(config.run / "summary.tsv"), rows)


def _open_tables(config: ReproduceConfig, encoders: Mapping[str, Mapping[str, Any]]) -> dict[str, FeatureTable]:
    moved = {}
    for text in config.features:
        name, equals, folder = text.partition("=")
        if not equals or name not in encoders:
            raise ValueError(f"--features: found {text!r}; expected ENCODER=FOLDER with one of {', '.join(encoders)}")
        moved[name] = folder
    return {
        name: FeatureTable(Path(moved.get(name, about["features_dir"])))
        for name, about in encoders.items()
        if "features_dir" in about
    }


def _open_tuners(
    config: ReproduceConfig, run: Mapping[str, Any], task: Task, cases: Cases, tables: Mapping[str, FeatureTable]
) -> list[FineTuner]:
    """The encoders that were fine-tuned: none or one.

    Raises:
        ValueError: weights or scans are no longer those of the run.
    """
    tuners = []
    for name, about in run["encoders"].items():
        if "features_dir" in about:
            continue
        tuner = FineTuner(
            task,
            cases,
            encoder=config.finetune or about["encoder"],
            prepared_dir=config.prepared or Path(about["prepared_dir"]),
            settings=settings_from(about),
            beside={other: table.identity for other, table in tables.items()},
            device=choose_device(config.device),
        )
        changed = tuner.differs_from(about)
        if changed:
            raise ValueError(
                f"{name}: other {', '.join(changed)} than in the run; give the encoder and the prepared folder that "
                "were used with --finetune and --prepared"
            )
        tuners.append(tuner)
    return tuners


def _compare_predictions(
    run: Path, task: Task, cases: Cases, encoder: str, trials: Sequence[Trial], *, tolerance: float
) -> list[str]:
    """What differs between predictions.csv and the trials."""
    before = read_predictions(run, encoder)
    ids = [cases.ids[row] for trial in trials for row in trial.prediction.rows]
    if [row["case"] for row in before] != ids:
        return [f"{encoder}: other cases in predictions.csv, or in another order"]
    if trials[0].prediction.probabilities is not None:
        columns = [f"probability_{name}" for name in task.target.classes]
        now = np.concatenate([t.prediction.probabilities for t in trials if t.prediction.probabilities is not None])
    elif task.target.kind == "class":
        texts = [task.target.classes[int(value)] for trial in trials for value in trial.prediction.predicted]
        changed = sum(row["predicted"] != text for row, text in zip(before, texts, strict=True))
        return [f"{encoder}: {changed} of {len(texts)} predicted classes"] if changed else []
    else:
        columns = ["predicted"]
        now = np.concatenate([trial.prediction.predicted for trial in trials])[:, None]
    then = np.array([[float(row[column]) for column in columns] for row in before])
    largest = float(np.abs(now - then).max())
    if largest > tolerance * np.abs(then).max():
        return [f"{encoder}: predictions by up to {largest:.3g}"]
    print(f"{encoder}: {len(then)} predictions, largest difference {largest:.2g}")
    return []


def _compare_summaries(before: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]) -> list[str]:
    if len(before) != len(now):
        return [f"summary.tsv: {len(before)} rows, now {len(now)}"]
    return [
        f"summary.tsv, {then['encoder']}, ratio {then['ratio']}, {then['metric']}: {column} {then[column]}, now "
        f"{row[column]}"
        for then, row in zip(before, now, strict=True)
        for column in then
        if then[column] != row[column]
    ]


if __name__ == "__main__":
    raise SystemExit(main())
