"""From trials to numbers: every metric with its interval beside its baselines, encoders compared, groups by themselves
(paper sec. 4.7)."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from braindino.downstream import comparisons, metrics
from braindino.downstream.cases import Cases
from braindino.downstream.comparisons import Comparison, LabelPermutation, label_permutation
from braindino.downstream.intervals import Estimate, bootstrap_interval, split_interval, value_of
from braindino.downstream.strata import assign_strata, strata_of_bins
from braindino.downstream.survival import RiskGroups, compare_risk_groups
from braindino.downstream.task_table import Task
from braindino.downstream.trials import Prediction, Trial
from braindino.label_table import number_of
from braindino.resampling import holm


@dataclass(frozen=True)
class Metric:
    """A row of METRICS.

    Attributes:
        of: maps a prediction and case weights (B, n) to values (B,).
        kinds: of targets that it is for.
        baseline_name: what the trivial predictor amounts to under this metric.
        higher_is_better: false for errors.
    """

    of: Callable[[Prediction, np.ndarray], np.ndarray]
    kinds: tuple[str, ...]
    baseline_name: str
    higher_is_better: bool = True


def _probabilities(prediction: Prediction) -> np.ndarray:
    assert prediction.probabilities is not None
    return prediction.probabilities


def _macro_auc(prediction: Prediction, weights: np.ndarray) -> np.ndarray:
    # A class that the test set lacks has no AUC; the mean goes over those it has.
    tested, targets = np.unique(prediction.targets, return_inverse=True)
    return metrics.macro_auc(targets, _probabilities(prediction)[:, tested], weights=weights)


def _auc(prediction: Prediction, weights: np.ndarray) -> np.ndarray:
    return metrics.binary_auc(prediction.targets == 1, _probabilities(prediction)[:, 1], weights=weights)


def _c_index(prediction: Prediction, weights: np.ndarray) -> np.ndarray:
    times, events = prediction.targets[:, 0], prediction.targets[:, 1].astype(bool)
    return metrics.concordance_index(times, events, prediction.predicted, weights=weights)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "auc": Metric(_auc, ("class",), "chance"),
        "macro_auc": Metric(_macro_auc, ("class",), "chance"),
        "accuracy": Metric(
            lambda p, weights: metrics.accuracy(p.targets, p.predicted, weights=weights), ("class",), "majority class"
        ),
        "balanced_accuracy": Metric(
            lambda p, weights: metrics.balanced_accuracy(p.targets, p.predicted, weights=weights), ("class",), "chance"
        ),
        "mae": Metric(
            lambda p, weights: metrics.mean_absolute_error(p.targets, p.predicted, weights=weights),
            ("number",),
            "training mean",
            higher_is_better=False,
        ),
        "rmse": Metric(
            lambda p, weights: metrics.root_mean_squared_error(p.targets, p.predicted, weights=weights),
            ("number",),
            "training mean",
            higher_is_better=False,
        ),
        "r2": Metric(
            lambda p, weights: metrics.r_squared(p.targets, p.predicted, weights=weights), ("number",), "training mean"
        ),
        "c_index": Metric(_c_index, ("survival",), "chance"),
    }
)


class Cell(NamedTuple):
    """What is averaged over seeds and splits."""

    ratio: float
    variant: str


@dataclass(frozen=True)
class Score:
    """A metric of an encoder with its interval, and the same of its baselines on the same cases.

    Attributes:
        cell: ratio and variant.
        metric: name in METRICS.
        value: of the encoder.
        baseline: of the trivial predictor.
        clinical: of clinical facts alone; None where the task has none.
        num_train_units: training subjects of the first trial.
        num_seeds: seeds that were averaged.
        num_splits: splits that were averaged.
        num_far_outside: predicted values far outside the training range, over all trials.
    """

    cell: Cell
    metric: str
    value: Estimate
    baseline: Estimate
    clinical: Estimate | None
    num_train_units: int
    num_seeds: int
    num_splits: int
    num_far_outside: int


@dataclass(frozen=True)
class Difference:
    """The first encoder minus another, with p adjusted by Holm for the family that it belongs to."""

    cell: Cell
    first: str
    second: str
    stratum: str
    comparison: Comparison
    p_holm: float


@dataclass(frozen=True)
class StratumScore:
    """The first metric in one group of cases."""

    cell: Cell
    encoder: str
    stratum: str
    metric: str
    value: Estimate


@dataclass(frozen=True)
class Survival:
    """Test cases above and below the median risk of the training cases (paper sec. 4.3.4, 4.7)."""

    cell: Cell
    encoder: str
    groups: RiskGroups


def check_metrics(task: Task) -> None:
    """Raise ValueError where a task names a metric that there is not, or that does not fit its target."""
    for name in task.metrics:
        if name not in METRICS:
            raise ValueError(f"task {task.name}: metrics: found {name!r}; expected of {', '.join(METRICS)}")
        fits = task.target.kind in METRICS[name].kinds
        if not fits or (name == "auc" and len(task.target.classes) != 2) or (task.knn and name.endswith("auc")):
            suited = [each for each, metric in METRICS.items() if task.target.kind in metric.kinds]
            raise ValueError(
                f"task {task.name}: metrics: {name} does not fit "
                f"{'nearest neighbours' if task.knn else 'a target of kind ' + task.target.kind} with "
                f"{len(task.target.classes)} classes; suited are {', '.join(suited)} (auc for two classes, none of the "
                "two AUCs for nearest neighbours)"
            )


def score_encoders(task: Task, cases: Cases, trials_of: Mapping[str, Sequence[Trial]]) -> dict[str, list[Score]]:
    """Encoder -> every metric of the task in every cell.

    With one test set the value is the mean over seeds and the interval resamples its subjects (one subject however
    often it is predicted); with several it is the mean over splits with Student's t interval over them.
    """
    # The references are the same for all encoders and, of nearest neighbours, for every k.
    known: dict[tuple[float, str], tuple[Estimate, Estimate | None]] = {}
    scores: dict[str, list[Score]] = {}
    for encoder, trials in trials_of.items():
        scores[encoder] = []
        for cell, of_cell in by_cell(trials).items():
            for name in task.metrics:
                estimate = _estimator(task, cases, name, of_cell)
                if (cell.ratio, name) not in known:
                    clinical = [t.beside.clinical for t in of_cell if t.beside.clinical is not None]
                    known[cell.ratio, name] = (
                        estimate([trial.beside.trivial for trial in of_cell]),
                        estimate(clinical) if len(clinical) == len(of_cell) else None,
                    )
                scores[encoder].append(
                    Score(
                        cell,
                        name,
                        estimate([trial.prediction for trial in of_cell]),
                        *known[cell.ratio, name],
                        of_cell[0].job.num_train_units,
                        len({trial.job.seed for trial in of_cell}),
                        len({trial.job.split for trial in of_cell}),
                        sum(trial.num_far_outside for trial in of_cell),
                    )
                )
    return scores


def compare_encoders(task: Task, cases: Cases, trials_of: Mapping[str, Sequence[Trial]]) -> list[Difference]:
    """The first encoder against every other one, cell by cell, by the first metric of the task (paper sec. 4.7).

    Several test sets: paired t over splits, plain and corrected (Nadeau-Bengio). One test set: paired bootstrap for
    classes and survival; paired t on subjects' absolute errors for numbers; exact McNemar for nearest neighbours. Holm
    over the other encoders of a cell; for nearest neighbours over the k of a pair of encoders (paper sec. 4.6).
    """
    names = list(trials_of)
    cells = {name: by_cell(trials) for name, trials in trials_of.items()}
    found: list[tuple[object, Cell, str, Comparison]] = []
    for cell, first in cells[names[0]].items():
        for other in names[1:]:
            second = cells[other][cell]
            for number, comparison in enumerate(compare_trials(task, cases, task.metrics[0], first, second)):
                family = (other, cell.ratio, number) if task.knn else (cell, number)
                found.append((family, cell, other, comparison))
    adjusted = holm([comparison.p for *_, comparison in found], strata=[family for family, *_ in found])
    return [
        Difference(cell, names[0], other, "", comparison, p)
        for (_, cell, other, comparison), p in zip(found, adjusted, strict=True)
    ]


def estimate_metric(task: Task, cases: Cases, name: str, trials: Sequence[Trial]) -> Estimate:
    """A metric of one cell with its interval, as ``score_encoders`` has it."""
    return _estimator(task, cases, name, trials)([trial.prediction for trial in trials])


def compare_trials(
    task: Task, cases: Cases, name: str, first: Sequence[Trial], second: Sequence[Trial]
) -> list[Comparison]:
    """Two sides of one cell by a metric, first minus second, on the same jobs and test cases.

    Several test sets: paired t over splits, plain and corrected. One test set: for the MAE paired t on subjects'
    absolute errors, for the accuracy of nearest neighbours exact McNemar, for everything else paired bootstrap.
    """
    splits = [trial.job.split for trial in first]
    predictions = [[trial.prediction for trial in trials] for trials in (first, second)]
    if len(set(splits)) > 1:
        values = [_values_of_splits(METRICS[name], each, splits) for each in predictions]
        num_test = len({cases.subjects[row] for row in first[0].job.test})
        return [
            comparisons.paired_t_over_splits(*values, what=name),
            comparisons.corrected_t_over_splits(
                *values, num_train=first[0].job.num_train_units, num_test=num_test, what=name
            ),
        ]
    if task.knn is not None and name == "accuracy":
        # Seeds differ in who is in the memory bank; the test is on the first.
        one, other = first[0].prediction, second[0].prediction
        subjects = [cases.subjects[row] for row in one.rows]
        return [
            comparisons.mcnemar(one.predicted == one.targets, other.predicted == other.targets, subjects, what=name)
        ]
    return [_compare_pooled(cases, name, *predictions, flip=False)]


def score_strata(
    task: Task, cases: Cases, trials_of: Mapping[str, Sequence[Trial]]
) -> tuple[list[StratumScore], list[Difference]]:
    """The first metric in every group of cases, and the first encoder against the others in it: paired bootstrap for
    classes and survival, sign-flip on absolute errors for numbers, Holm within the group (paper sec. 4.7)."""
    if task.strata is None or task.strata.column[0] not in cases.facts:
        return [], []
    values = [number_of(text) for text in cases.facts[task.strata.column[0]]]
    groups = assign_strata(values, strata_of_bins(task.strata.bins)).rows
    name = task.metrics[0]
    scores: list[StratumScore] = []
    found: list[tuple[object, Cell, str, str, Comparison]] = []
    cells = {encoder: by_cell(trials) for encoder, trials in trials_of.items()}
    encoders = list(trials_of)
    for cell in cells[encoders[0]]:
        for stratum, rows in groups.items():
            kept = {encoder: _restricted(cells[encoder][cell], rows) for encoder in encoders}
            if not kept[encoders[0]]:
                continue
            for encoder, predictions in kept.items():
                statistic, subjects = _pooled(cases, METRICS[name], predictions)
                scores.append(StratumScore(cell, encoder, stratum, name, bootstrap_interval(statistic, subjects)))
            for other in encoders[1:]:
                comparison = _compare_pooled(cases, name, kept[encoders[0]], kept[other], flip=True)
                found.append(((cell, stratum), cell, other, stratum, comparison))
    adjusted = holm([comparison.p for *_, comparison in found], strata=[family for family, *_ in found])
    return scores, [
        Difference(cell, encoders[0], other, stratum, comparison, p)
        for (_, cell, other, stratum, comparison), p in zip(found, adjusted, strict=True)
    ]


def score_survival(task: Task, cases: Cases, trials_of: Mapping[str, Sequence[Trial]]) -> list[Survival]:
    """For survival: the test cases above and below the training cases' median risk.

    Over several seeds a case's risk above the cut of its trial is averaged first, so that the cut is at 0. With several
    test sets the first counts: those of two test sets share subjects.
    """
    if task.target.kind != "survival":
        return []
    found = []
    for encoder, trials in trials_of.items():
        for cell, of_cell in by_cell(trials).items():
            chosen = [trial for trial in of_cell if trial.job.split == of_cell[0].job.split]
            above = np.mean([trial.prediction.predicted - trial.risk_cut for trial in chosen], axis=0)
            times, events = chosen[0].prediction.targets.T
            subjects = [cases.subjects[row] for row in chosen[0].prediction.rows]
            found.append(Survival(cell, encoder, compare_risk_groups(times, events > 0, above, subjects, cut=0.0)))
    return found


def score_permutations(task: Task, observed: Prediction, permuted: Sequence[Prediction]) -> LabelPermutation:
    """The first metric under true and under permuted training labels."""
    name = task.metrics[0]

    return label_permutation(
        _value(METRICS[name], observed),
        [_value(METRICS[name], prediction) for prediction in permuted],
        what=name,
        higher_is_better=METRICS[name].higher_is_better,
    )


def by_cell(trials: Iterable[Trial]) -> dict[Cell, list[Trial]]:
    """The trials of every ratio and variant, in their order."""
    cells: dict[Cell, list[Trial]] = defaultdict(list)
    for trial in trials:
        cells[Cell(trial.job.ratio, trial.variant)].append(trial)
    return dict(cells)


def subjects_of(cases: Cases, predictions: Iterable[Prediction]) -> np.ndarray:
    """Subject of every predicted case, one prediction after another."""
    return np.concatenate([np.array(cases.subjects)[prediction.rows] for prediction in predictions])


def _estimator(task: Task, cases: Cases, name: str, trials: Sequence[Trial]) -> "_Estimator":
    # The paper's interval of the kNN accuracy keeps the counts of the classes (sec. 4.7).
    return _Estimator(cases, METRICS[name], [trial.job.split for trial in trials], by_class=task.knn is not None)


class _Estimator:
    """The value and interval of one metric over the trials of a cell."""

    def __init__(self, cases: Cases, metric: Metric, splits: Sequence[int], *, by_class: bool) -> None:
        self.cases, self.metric, self.splits, self.by_class = cases, metric, splits, by_class

    def __call__(self, predictions: Sequence[Prediction]) -> Estimate:
        if len(set(self.splits)) > 1:
            return split_interval(_values_of_splits(self.metric, predictions, self.splits))
        statistic, subjects = _pooled(self.cases, self.metric, predictions)
        strata = np.concatenate([prediction.targets for prediction in predictions]) if self.by_class else None
        return bootstrap_interval(statistic, subjects, strata=strata)


def _value(metric: Metric, prediction: Prediction) -> float:
    return value_of(lambda weights: metric.of(prediction, weights), len(prediction.rows))


def _values_of_splits(metric: Metric, predictions: Sequence[Prediction], splits: Sequence[int]) -> list[float]:
    """The metric of every split, mean over its seeds."""
    values: dict[int, list[float]] = defaultdict(list)
    for prediction, split in zip(predictions, splits, strict=True):
        values[split].append(_value(metric, prediction))
    return [float(np.mean(of_split)) for of_split in values.values()]


def _pooled(
    cases: Cases, metric: Metric, predictions: Sequence[Prediction]
) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """The mean of a metric over predictions as one statistic, and the subject of each of its cases. A subject that
    several predictions are about is drawn for all of them at once."""
    subjects = subjects_of(cases, predictions)
    borders = np.cumsum([len(prediction.rows) for prediction in predictions])[:-1]

    def statistic(weights: np.ndarray) -> np.ndarray:
        parts = np.split(weights, borders, axis=1)
        return np.mean([metric.of(p, w) for p, w in zip(predictions, parts, strict=True)], axis=0)

    return statistic, subjects


def _compare_pooled(
    cases: Cases, name: str, first: Sequence[Prediction], second: Sequence[Prediction], *, flip: bool
) -> Comparison:
    if name == "mae":
        one, other = (np.concatenate([np.abs(p.predicted - p.targets) for p in each]) for each in (first, second))
        subjects = subjects_of(cases, first)
        test = comparisons.sign_flip if flip else comparisons.paired_t
        return test(one, other, subjects, what="absolute error")
    statistic, subjects = _pooled(cases, METRICS[name], first)
    return comparisons.paired_bootstrap(statistic, _pooled(cases, METRICS[name], second)[0], subjects, what=name)


def _restricted(trials: Sequence[Trial], rows: np.ndarray) -> list[Prediction]:
    """The predictions about some of the cases; those about none of them are left away."""
    return [about for trial in trials if len((about := trial.prediction.about(rows)).rows)]
