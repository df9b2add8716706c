"""One task on one or several encoders: cases, splits, heads or kNN, and every number with an interval beside a
baseline."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from braindino.downstream.heads import MlpHead, train_classifiers, train_regressors
from braindino.downstream.intervals import Estimate, bootstrap_interval
from braindino.downstream.knn import knn_predict
from braindino.downstream.metrics import accuracy, macro_auc, mean_absolute_error
from braindino.downstream.tasks import KnnProbe, Task
from braindino.label_table import Label
from braindino.manifest import Scan
from braindino.splits import check_disjoint, nested_subsets, split_subjects

FAR_OUTSIDE = 0.5


@dataclass(frozen=True)
class Cases:
    """The scans of a task and what is to be predicted of them.

    Attributes:
        scans: n scans, sorted by subject, session, sequence.
        targets: (n,) class indices or values.
        left_out: reason -> number of scans that are not cases.
    """

    scans: list[Scan]
    targets: np.ndarray
    left_out: dict[str, int]

    @property
    def subjects(self) -> list[str]:
        """Subject key of each case."""
        return [scan.subject_key for scan in self.scans]

    def rows(self, subjects: Sequence[str]) -> np.ndarray:
        """Return the indices of all cases of some subjects."""
        wanted = set(subjects)
        return np.array([row for row, subject in enumerate(self.subjects) if subject in wanted], dtype=np.int64)


@dataclass(frozen=True)
class Split:
    """Who trains and who is tested on under one seed.

    Attributes:
        seed: of the split, of the order of the training subjects and of the heads.
        train: all training subjects.
        test: test subjects.
        subsets: label ratio -> training subjects.
    """

    seed: int
    train: list[str]
    test: list[str]
    subsets: dict[float, list[str]]


@dataclass(frozen=True)
class Prediction:
    """What was predicted of the cases of a test set.

    Attributes:
        rows: (n,) indices of the cases.
        targets: (n,) class indices or values.
        predicted: (n,) class indices or values.
        probabilities: (n, K) of classes; None for values and for kNN.
    """

    rows: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray | None = None


@dataclass(frozen=True)
class Trial:
    """One head, or one k, trained on one subset of one split.

    Attributes:
        seed: of the split.
        ratio: label ratio.
        variant: ``k=5`` for kNN, empty otherwise.
        prediction: of the test cases.
        baseline: what the trivial predictor says of the same cases: the majority class or the mean of the same
            training cases.
        num_train_subjects: training subjects.
        num_train_scans: training cases.
        num_far_outside: predicted values beyond the training range by more than half its width.
    """

    seed: int
    ratio: float
    variant: str
    prediction: Prediction
    baseline: Prediction
    num_train_subjects: int
    num_train_scans: int
    num_far_outside: int


@dataclass(frozen=True)
class Score:
    """A metric with its interval, and the same of the trivial predictor.

    Attributes:
        metric: name in METRICS.
        value: of the encoder.
        baseline_name: what the trivial predictor does.
        baseline: its value on the same cases.
    """

    metric: str
    value: Estimate
    baseline_name: str
    baseline: Estimate


@dataclass(frozen=True)
class Metric:
    """A row of METRICS.

    Attributes:
        of: maps a prediction and case weights (B, n) to values (B,).
        baseline_name: what the trivial predictor amounts to under this metric.
    """

    of: Callable[[Prediction, np.ndarray], np.ndarray]
    baseline_name: str


def _macro_auc(prediction: Prediction, weights: np.ndarray) -> np.ndarray:
    assert prediction.probabilities is not None
    # A class that the test set lacks has no AUC; the mean goes over those it has.
    tested, targets = np.unique(prediction.targets, return_inverse=True)
    return macro_auc(targets, prediction.probabilities[:, tested], weights=weights)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": Metric(lambda p, weights: accuracy(p.targets, p.predicted, weights=weights), "majority class"),
        "macro_auc": Metric(_macro_auc, "chance"),
        "mae": Metric(lambda p, weights: mean_absolute_error(p.targets, p.predicted, weights=weights), "training mean"),
    }
)


def select_cases(task: Task, scans: Sequence[Scan], labels: Mapping[str, Label]) -> Cases:
    """Return the scans that the task is about, with their targets; the others are counted by reason.

    Args:
        task: row of the task table.
        scans: scans that have features.
        labels: scan_id -> label; not used when the target is the scan's own sequence.

    Raises:
        ValueError: a label that is no class of the task, no number, or outside the range of its unit; or nothing is
            left.
    """
    left_out: Counter[str] = Counter()
    kept: list[Scan] = []
    targets: list[float] = []
    for scan in sorted(scans, key=lambda scan: (scan.subject_key, scan.session, scan.sequence, scan.scan_id)):
        if scan.sequence not in task.inputs:
            left_out[f"sequence {scan.sequence}"] += 1
        elif task.target == "sequence":
            kept.append(scan)
            targets.append(task.classes.index(scan.sequence))
        elif scan.scan_id not in labels:
            left_out[f"no {task.target}"] += 1
        else:
            kept.append(scan)
            targets.append(_target(task, labels[scan.scan_id]))
    if not kept:
        raise ValueError(f"task {task.name}: none of {len(scans)} scans can be used; left out: {dict(left_out)}")
    if len(set(targets)) < 2:
        raise ValueError(f"task {task.name}: all {len(kept)} scans have the same {task.target}; nothing to tell apart")
    dtype = np.int64 if task.classes else np.float64
    return Cases(kept, np.array(targets, dtype=dtype), dict(left_out))


def make_split(
    task: Task,
    cases: Cases,
    *,
    seed: int,
    ratios: Sequence[float],
    test_fraction: float,
    test_subjects: Sequence[str] | None,
    person_of: Mapping[str, str] | None = None,
) -> Split:
    """Return a split by subject with nested label ratios.

    For classes, subjects are stratified by the classes that they have, so that a subject with all sequences and
    subjects with one are divided in the same proportion.

    Args:
        task: row of the task table.
        cases: what is divided.
        seed: of the split and of the order of the training subjects.
        ratios: shares of the training subjects.
        test_fraction: share of the subjects to test on, unless they are given.
        test_subjects: fixed subjects to test on; those without cases are passed over.
        person_of: subject -> person, where some subjects are one person under two ids; a drawn split keeps a person
            on one side.

    Raises:
        ValueError: one side would be empty.
    """
    subjects = sorted(set(cases.subjects))
    if test_subjects is not None:
        test = [subject for subject in subjects if subject in set(test_subjects)]
        train = [subject for subject in subjects if subject not in set(test_subjects)]
        if not test or not train:
            raise ValueError(
                f"test subjects: the list holds {len(test)} of the {len(subjects)} subjects with cases and leaves "
                f"{len(train)} to train on; expected some on both sides. Subjects here are written like {subjects[0]!r}"
            )
    else:
        strata = None
        if task.classes:
            classes = defaultdict(set)
            for subject, target in zip(cases.subjects, cases.targets, strict=True):
                classes[subject].add(task.classes[int(target)])
            strata = {subject: "+".join(sorted(values)) for subject, values in classes.items()}
        train, test = split_subjects(
            subjects, test_fraction=test_fraction, seed=seed, strata=strata, person_of=person_of
        )
    check_disjoint(train, test)
    return Split(seed, train, test, nested_subsets(train, ratios, seed=seed))


def run_trials(
    task: Task, features: np.ndarray, cases: Cases, splits: Sequence[Split], *, device: torch.device
) -> list[Trial]:
    """Return a trial for every split, ratio and (for kNN) k, in this order.

    A k larger than the memory bank of a ratio under any split is left out there.

    Args:
        task: row of the task table.
        features: (n, D) float32, a row per case.
        cases: n cases.
        splits: one per seed.
        device: where heads are trained.
    """
    jobs = [
        _Job(split, ratio, cases.rows(split.subsets[ratio]), cases.rows(split.test))
        for split in splits
        for ratio in split.subsets
    ]
    if isinstance(task.head, KnnProbe):
        predictions = _predict_with_knn(task, task.head, features, cases, jobs)
    else:
        predictions = _predict_with_heads(task, task.head, features, cases, jobs, device=device)
    return [
        Trial(
            seed=job.split.seed,
            ratio=job.ratio,
            variant=variant,
            prediction=prediction,
            baseline=_baseline(task, cases, job),
            num_train_subjects=len(job.split.subsets[job.ratio]),
            num_train_scans=len(job.train),
            num_far_outside=0 if task.classes else count_far_outside(cases.targets[job.train], prediction),
        )
        for job, variants in zip(jobs, predictions, strict=True)
        for variant, prediction in variants.items()
    ]


def score_trials(task: Task, cases: Cases, trials: Sequence[Trial]) -> list[Score]:
    """Return the task's metrics over one trial, or the mean over several that differ in their seed.

    The interval resamples subjects; a subject tested under several seeds is drawn for all of them at once, since it
    is one subject however often it is predicted.
    """
    subjects = np.concatenate([np.array(cases.subjects)[trial.prediction.rows] for trial in trials])
    borders = np.cumsum([len(trial.prediction.rows) for trial in trials])[:-1]

    def mean_over_trials(metric: Metric, predictions: Sequence[Prediction]) -> Callable[[np.ndarray], np.ndarray]:
        def statistic(weights: np.ndarray) -> np.ndarray:
            parts = np.split(weights, borders, axis=1)
            return np.mean([metric.of(p, w) for p, w in zip(predictions, parts, strict=True)], axis=0)

        return statistic

    scores = []
    for name in task.metrics:
        metric = METRICS[name]
        value = bootstrap_interval(mean_over_trials(metric, [trial.prediction for trial in trials]), subjects)
        baseline = bootstrap_interval(mean_over_trials(metric, [trial.baseline for trial in trials]), subjects)
        scores.append(Score(name, value, metric.baseline_name, baseline))
    return scores


def count_far_outside(train_targets: np.ndarray, prediction: Prediction) -> int:
    """Return how many predicted values lie beyond the range of the training targets by more than half its width."""
    low, high = train_targets.min(), train_targets.max()
    margin = FAR_OUTSIDE * (high - low)
    return int(((prediction.predicted < low - margin) | (prediction.predicted > high + margin)).sum())


def _target(task: Task, label: Label) -> float:
    if task.classes:
        if label.text not in task.classes:
            raise ValueError(f"{label.place}: {task.target} {label.text!r}; expected one of {task.classes}, or n/a")
        return task.classes.index(label.text)
    try:
        value = float(label.text)
    except ValueError as error:
        raise ValueError(
            f"{label.place}: {task.target} {label.text!r}; expected a number in {task.unit}, or n/a"
        ) from error
    if task.target_range is not None and not task.target_range[0] <= value <= task.target_range[1]:
        low, high = task.target_range
        raise ValueError(
            f"{label.place}: {task.target} {value:g} is outside {low:g} to {high:g} {task.unit}; "
            f"is the column in another unit, such as days or months? Convert it to {task.unit}, or write n/a"
        )
    return value


class _Job(NamedTuple):
    """One training set and its test set, as indices of cases."""

    split: Split
    ratio: float
    train: np.ndarray
    test: np.ndarray


def _predict_with_knn(
    task: Task, probe: KnnProbe, features: np.ndarray, cases: Cases, jobs: Sequence[_Job]
) -> list[dict[str, Prediction]]:
    """Return ``k=...`` -> prediction of the test cases for every job."""
    bank_of_ratio: dict[float, int] = {}
    for job in jobs:
        bank_of_ratio[job.ratio] = min(len(job.train), bank_of_ratio.get(job.ratio, len(job.train)))
    results = []
    for job in jobs:
        by_k = knn_predict(
            features[job.train],
            cases.targets[job.train],
            features[job.test],
            neighbours=[k for k in probe.neighbours if k <= bank_of_ratio[job.ratio]],
            num_classes=len(task.classes),
        )
        targets = cases.targets[job.test]
        results.append({f"k={k}": Prediction(job.test, targets, predicted) for k, predicted in by_k.items()})
    return results


def _predict_with_heads(
    task: Task,
    head: MlpHead,
    features: np.ndarray,
    cases: Cases,
    jobs: Sequence[_Job],
    *,
    device: torch.device,
) -> list[dict[str, Prediction]]:
    """Return the prediction of the test cases for every job, all heads trained at once."""
    x = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)).to(device)
    subsets, seeds = [job.train for job in jobs], [job.split.seed for job in jobs]
    if not task.classes:
        y = torch.from_numpy(cases.targets.astype(np.float32)).to(device)
        values = train_regressors(x, y, subsets=subsets, seeds=seeds, head=head)
        return [
            {"": Prediction(job.test, cases.targets[job.test], v[job.test])}
            for job, v in zip(jobs, values, strict=True)
        ]
    y = torch.from_numpy(cases.targets).to(device)
    probabilities = train_classifiers(x, y, subsets=subsets, seeds=seeds, num_classes=len(task.classes), head=head)
    return [
        {"": Prediction(job.test, cases.targets[job.test], p[job.test].argmax(axis=1), p[job.test])}
        for job, p in zip(jobs, probabilities, strict=True)
    ]


def _baseline(task: Task, cases: Cases, job: _Job) -> Prediction:
    """Return what the training targets alone say: the same of every test case."""
    train, targets = cases.targets[job.train], cases.targets[job.test]
    if not task.classes:
        return Prediction(job.test, targets, np.full(len(targets), train.mean()))
    shares = np.bincount(train, minlength=len(task.classes)) / len(train)
    return Prediction(job.test, targets, np.full(len(targets), shares.argmax()), np.tile(shares, (len(targets), 1)))
