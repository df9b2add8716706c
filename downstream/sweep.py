"""A task on all its encoders: every trial, and every number made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from braindino.downstream.calibration import (
    Calibration,
    ReliabilityBin,
    calibrate_probabilities,
    calibrate_values,
    reliability_table,
)
from braindino.downstream.cases import Cases
from braindino.downstream.comparisons import LabelPermutation
from braindino.downstream.protocols import Job
from braindino.downstream.scoring import (
    Difference,
    Score,
    StratumScore,
    Survival,
    by_cell,
    compare_encoders,
    score_encoders,
    score_permutations,
    score_strata,
    score_survival,
    subjects_of,
)
from braindino.downstream.task_table import Task
from braindino.downstream.trials import Prediction, Trial, permuted_predictions, references_of, run_trials, trials_of


@dataclass(frozen=True)
class Results:
    """Everything that was computed.

    Attributes:
        trials: encoder -> its trials, in the order of the jobs.
        scores: encoder -> every metric of every cell.
        differences: the first encoder against the others, over all cases and in every stratum.
        strata: the first metric in every group of cases.
        survival: groups of risk.
        permutations: encoder -> the first metric beside permuted labels; empty where none were asked for.
        calibration: encoder -> of the cell with the most labels; for two classes and for numbers.
        reliability: encoder -> of that cell, predicted probability beside observed share; for two classes.
    """

    trials: Mapping[str, list[Trial]]
    scores: Mapping[str, list[Score]]
    differences: list[Difference]
    strata: list[StratumScore]
    survival: list[Survival]
    permutations: Mapping[str, LabelPermutation]
    calibration: Mapping[str, Calibration]
    reliability: Mapping[str, tuple[ReliabilityBin, ...]]


def run_sweep(
    task: Task,
    cases: Cases,
    jobs: Sequence[Job],
    features_of: Mapping[str, np.ndarray],
    outputs_of: Mapping[str, np.ndarray],
    *,
    permutations: int,
    device: torch.device,
) -> Results:
    """Train, predict and score.

    Args:
        task: row of the table of tasks.
        cases: n cases.
        jobs: splits, seeds and ratios.
        features_of: encoder -> (n, D) or (n, S, D) features of the cases.
        outputs_of: encoder that was trained itself -> (jobs, n, K) outputs of its heads.
        permutations: trainings on permuted labels, per encoder of features.
        device: where heads are trained.
    """
    references = references_of(task, cases, jobs)
    trials: dict[str, list[Trial]] = {}
    tested: dict[str, LabelPermutation] = {}
    for encoder, features in features_of.items():
        trials[encoder] = run_trials(task, features, cases, jobs, references, device=device)
        print(f"{encoder}: {len(trials[encoder])} trials")
        if permutations:
            # All training subjects of the first split and seed, and the smallest neighbourhood.
            fullest = max(trials[encoder], key=lambda trial: trial.job.ratio)
            dealt = permuted_predictions(task, features, cases, fullest, count=permutations, device=device)
            tested[encoder] = score_permutations(task, fullest.prediction, dealt)
    for encoder, outputs in outputs_of.items():
        trials[encoder] = trials_of(task, outputs, cases, jobs, references)
    strata, within = score_strata(task, cases, trials)
    return Results(
        trials=trials,
        scores=score_encoders(task, cases, trials),
        differences=[*compare_encoders(task, cases, trials), *within],
        strata=strata,
        survival=score_survival(task, cases, trials),
        permutations=tested,
        calibration={
            encoder: calibration
            for encoder, of_encoder in trials.items()
            if (calibration := calibrate(task, cases, of_encoder)) is not None
        },
        reliability={
            encoder: bins for encoder, of_encoder in trials.items() if (bins := bin_probabilities(task, of_encoder))
        },
    )


def calibrate(task: Task, cases: Cases, trials: Sequence[Trial]) -> Calibration | None:
    """Calibration over the trials with the most labels; None for what has none: several classes, risks, neighbours."""
    predictions = _at_most_labels(trials)
    subjects = subjects_of(cases, predictions)
    if task.target.kind == "number":
        targets = np.concatenate([prediction.targets for prediction in predictions])
        return calibrate_values(targets, np.concatenate([p.predicted for p in predictions]), subjects)
    if not _has_one_probability(task):
        return None
    return calibrate_probabilities(*_outcomes(predictions), subjects)


def bin_probabilities(task: Task, trials: Sequence[Trial]) -> tuple[ReliabilityBin, ...]:
    """Predicted probability beside observed share over the trials with the most labels; empty but for two classes."""
    return reliability_table(*_outcomes(_at_most_labels(trials))) if _has_one_probability(task) else ()


def _at_most_labels(trials: Sequence[Trial]) -> list[Prediction]:
    cells = by_cell(trials)
    return [trial.prediction for trial in cells[max(cells)]]


def _has_one_probability(task: Task) -> bool:
    """Whether a prediction is the probability of one of two classes."""
    return task.knn is None and len(task.target.classes) == 2


def _outcomes(predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool whether a case is of the second class, and (n,) the probability of it."""
    positive = np.concatenate([p.probabilities[:, 1] for p in predictions if p.probabilities is not None])
    return np.concatenate([prediction.targets for prediction in predictions]) == 1, positive
