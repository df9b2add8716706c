"""Dice and HD95 of predictions on perturbed scans beside those on clean ones (paper sec. 4.5)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from braindino.perturbations import CLEAN, PERTURBATIONS, Condition, read_condition
from braindino.robustness_table import RobustnessRow
from braindino.segmentation_scores import RegionSummary, SegmentationScores
from nnunet_braindino.evaluate import INTERVAL_NOTE, EmptyRules, score_predictions
from nnunet_braindino.paired_tests import PairedTest, paired_test
from nnunet_braindino.predictions import Checkpoint, PredictionSet, find_predictions, label_ratio

CHANGE_NOTE = (
    "change: mean over the cases defined on both sides, paired bootstrap by subject; p twice the smaller share beyond 0"
)

# Model -> condition (its name, or ``clean``) -> what it predicted.
ConditionSets = Mapping[str, Mapping[str, PredictionSet]]


def find_condition_sets(folder: Path, *, references: Path, checkpoint: Checkpoint | None) -> ConditionSets:
    """The predictions in ``folder/<condition>/<model>`` and ``folder/clean/<model>``.

    Under a condition, cases may be missing: scans that could not be read.

    Raises:
        ValueError: a model has no clean predictions, or not all of the reference cases there; there is no condition;
            or what ``find_predictions`` says.
    """
    sets: dict[str, dict[str, PredictionSet]] = defaultdict(dict)
    if not folder.is_dir():
        raise ValueError(f"--conditions {folder}: no such folder")
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if place.name != CLEAN and place.name.rpartition("-")[0] not in PERTURBATIONS:
            raise ValueError(f"{place}: expected folders called {CLEAN} or like gamma-0.5 in {folder}")
        if place.name != CLEAN:
            read_condition(place.name)
        for model_dir in sorted(path for path in place.iterdir() if path.is_dir()):
            sets[model_dir.name][place.name] = find_predictions(
                model_dir.resolve(),
                name=f"{model_dir.name}/{place.name}",
                references=references,
                checkpoint=checkpoint,
                complete=place.name == CLEAN,
            )
    for model, of_model in sets.items():
        if CLEAN not in of_model or len(of_model) < 2:
            raise ValueError(
                f"{folder}: model {model} has predictions under {', '.join(of_model)}; expected some on {CLEAN} scans, "
                f"{folder / CLEAN / model}, and under one condition or more"
            )
    if not sets:
        raise ValueError(
            f"{folder}: no predictions in it; expected CONDITION/MODEL/*.nii.gz and {CLEAN}/MODEL/*.nii.gz"
        )
    return sets


def score_condition_sets(
    sets: ConditionSets, *, subject_of: Mapping[str, str], rules: EmptyRules, pretraining_overlap: str, jobs: int
) -> dict[str, dict[str, SegmentationScores]]:
    """Model -> condition -> scores; arguments as for ``score_predictions``. Every reference is read once where all
    sets have the same cases."""
    groups: dict[tuple[str, ...], list[PredictionSet]] = defaultdict(list)
    for of_model in sets.values():
        for predictions in of_model.values():
            groups[tuple(predictions.files)].append(predictions)
    scores: dict[str, dict[str, SegmentationScores]] = {model: {} for model in sets}
    for group in groups.values():
        found = score_predictions(
            group, subject_of=subject_of, rules=rules, pretraining_overlap=pretraining_overlap, jobs=jobs
        )
        for name, each in found.items():
            model, _, condition = name.rpartition("/")
            scores[model][condition] = each
    return scores


def robustness_rows(task: str, scores: Mapping[str, Mapping[str, SegmentationScores]]) -> list[RobustnessRow]:
    """A row for every model, metric, region and condition; every perturbation begins with the clean scans.

    Args:
        task: name of the dataset.
        scores: model -> condition -> scores.
    """
    rows = []
    for model, of_model in scores.items():
        conditions = [read_condition(name) for name in of_model if name != CLEAN]
        for metric in ("Dice", "HD95 (mm)"):
            for region in of_model[CLEAN].summary:
                for name in [n for n in PERTURBATIONS if any(c.perturbation == n for c in conditions)]:
                    chosen = [Condition(name, PERTURBATIONS[name].identity)]
                    chosen += [condition for condition in conditions if condition.perturbation == name]
                    rows += [
                        _row(task, model, of_model, metric=metric, region=region, condition=condition)
                        for condition in sorted(chosen)
                    ]
    return rows


def _row(
    task: str,
    model: str,
    scores: Mapping[str, SegmentationScores],
    *,
    metric: str,
    region: str,
    condition: Condition,
) -> RobustnessRow:
    clean, own = scores[CLEAN], scores[CLEAN if condition.is_clean else condition.name]
    summary = _summary(own, metric)[region]
    trainer, ratio = label_ratio(model)
    values = _values(own, metric, region, list(own.cases))
    defined = {own.subject_of[case] for case, value in zip(own.cases, values, strict=True) if not np.isnan(value)}
    change = None if condition.is_clean else _change(own, clean, metric, region)
    return RobustnessRow(
        task=task,
        encoder=trainer,
        ratio=ratio,
        metric=f"{region} {metric}",
        better="higher" if metric == "Dice" else "lower",
        perturbation=condition.perturbation,
        severity=condition.severity,
        clean=condition.is_clean,
        n_subjects=len(defined),
        n_cases=summary.num_cases,
        n_missing=len(clean.cases) - len(own.cases),
        estimate=summary.mean,
        low=summary.low,
        high=summary.high,
        change=change.difference if change else np.nan,
        change_low=change.low if change else np.nan,
        change_high=change.high if change else np.nan,
        p=change.p_bootstrap if change else np.nan,
        method=INTERVAL_NOTE + (f"; {CHANGE_NOTE}" if change else ""),
        pretraining_overlap=own.pretraining_overlap,
        warnings="; ".join(_warnings(own)),
    )


def _change(own: SegmentationScores, clean: SegmentationScores, metric: str, region: str) -> PairedTest:
    cases = list(own.cases)
    subjects = [own.subject_of[case] for case in cases]
    return paired_test(_values(own, metric, region, cases), _values(clean, metric, region, cases), subjects)


def _values(scores: SegmentationScores, metric: str, region: str, cases: Sequence[str]) -> np.ndarray:
    table = scores.cases if metric == "Dice" else scores.hd95
    return np.array([table[case][region] for case in cases])


def _summary(scores: SegmentationScores, metric: str) -> Mapping[str, RegionSummary]:
    return scores.summary if metric == "Dice" else scores.hd95_summary


def _warnings(scores: SegmentationScores) -> list[str]:
    notes = [scores.checkpoint] if scores.checkpoint.startswith("BEST") else []
    return notes + [scores.notes[name] for name in ("time_points",) if name in scores.notes]
