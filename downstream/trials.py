"""One encoder on one task: heads or nearest neighbours for every split, seed and label ratio, and what stands beside
them: the trivial predictor, clinical facts alone, and the same heads on permuted labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from braindino.downstream.cases import Cases
from braindino.downstream.clinical import predict_from_facts
from braindino.downstream.head_pool import train_many_heads
from braindino.downstream.knn import knn_predict
from braindino.downstream.protocols import Job
from braindino.downstream.survival import risk_cut
from braindino.downstream.task_table import Task
from braindino.feature_table import FeatureTable

FAR_OUTSIDE = 0.5


@dataclass(frozen=True)
class Prediction:
    """What is said of the cases of a test set.

    Attributes:
        rows: (n,) indices of the cases.
        targets: (n,) class indices or values, (n, 2) times and events.
        predicted: (n,) class indices, values, or risks (higher means an earlier event).
        probabilities: (n, K) of classes; None otherwise, and for nearest neighbours.
    """

    rows: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray | None = None

    def about(self, rows: np.ndarray) -> "Prediction":
        """What it says of those of its cases that are among ``rows``."""
        inside = np.isin(self.rows, rows)
        return Prediction(
            self.rows[inside],
            self.targets[inside],
            self.predicted[inside],
            None if self.probabilities is None else self.probabilities[inside],
        )


@dataclass(frozen=True)
class References:
    """What stands beside every encoder on one job.

    Attributes:
        trivial: what the training targets alone say of the test cases: the majority class, the mean, or nothing.
        clinical: what clinical facts alone say of them; None where the task has none, or they say nothing.
        clinical_note: why not, in the second case.
    """

    trivial: Prediction
    clinical: Prediction | None
    clinical_note: str


class OtherFeatures(NamedTuple):
    """Features of some of the cases as they are under other circumstances.

    Attributes:
        rows: (q,) indices of the cases, each once.
        features: (q, ...) as those of the cases.
    """

    rows: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Trial:
    """One head, or one k, on one job.

    Attributes:
        job: who trained and who was tested on.
        variant: ``k=5`` for nearest neighbours, empty otherwise.
        prediction: of the test cases.
        beside: what else is said of them.
        k: of nearest neighbours; 0 otherwise.
        risk_cut: median risk of the training cases, for survival.
        num_far_outside: predicted values beyond the training range by more than half its width.
    """

    job: Job
    variant: str
    prediction: Prediction
    beside: References
    k: int = 0
    risk_cut: float = 0.0
    num_far_outside: int = 0


def case_features(task: Task, cases: Cases, table: FeatureTable) -> np.ndarray:
    """(n, D) features of the cases, (n, S, D) for a head that pools slices itself; float32.

    With fusion a case is the mean of the features of those of its scans that are there (paper sec. 4.3.4).

    Raises:
        ValueError: the encoder does not have the task's pool.
    """
    scans, inputs = cases.all_scans, task.inputs
    if task.knn is None and task.head.kind == "attention":
        pool = "cls" if inputs.pool == "global" else inputs.pool
        features = table.slices(scans, pool=pool, slice_range=inputs.slice_range)
    elif inputs.pool != "global" and not table.has_slices and inputs.volume_pool:
        features = table.pooled(scans, pool=inputs.volume_pool)
    else:
        features = table.pooled(scans, pool=inputs.pool, slice_range=inputs.slice_range)
    case_of_scan = np.repeat(np.arange(len(cases)), [len(group) for group in cases.scans])
    fused = np.zeros((len(cases), *features.shape[1:]), dtype=np.float32)
    np.add.at(fused, case_of_scan, features)
    counts = np.bincount(case_of_scan, minlength=len(cases)).astype(np.float32)
    return fused / counts.reshape(-1, *[1] * (features.ndim - 1))


def references_of(task: Task, cases: Cases, jobs: Sequence[Job]) -> list[References]:
    """What stands beside every encoder, job by job."""
    return [References(trivial(task, cases, job), *predict_clinically(task, cases, job)) for job in jobs]


def run_trials(
    task: Task,
    features: np.ndarray,
    cases: Cases,
    jobs: Sequence[Job],
    references: Sequence[References],
    *,
    device: torch.device,
) -> list[Trial]:
    """A trial for every job and (for nearest neighbours) every k that fits each memory bank of its ratio.

    Args:
        task: row of the table of tasks.
        features: (n, D) or (n, S, D) float32, a row per case.
        cases: n cases.
        jobs: what to train.
        references: of each job.
        device: where heads are trained.
    """
    return run_trials_on(task, features, cases, jobs, references, others=[], device=device)[0]


def run_trials_on(
    task: Task,
    features: np.ndarray,
    cases: Cases,
    jobs: Sequence[Job],
    references: Sequence[References],
    *,
    others: Sequence[OtherFeatures],
    device: torch.device,
) -> list[list[Trial]]:
    """The trials of ``run_trials``, and after them for each of ``others`` what the very same heads, or nearest
    neighbours in the same memory banks, say of the test cases by their other features.

    The first are the same bit by bit, whatever the others are. A trial on others is about those of its job's test cases
    that the others have; one without any is left away.
    """
    # As many rows as there are cases, each in its place: a case whose features are the same gets the same output.
    asked = [features.copy() for _ in others]
    for other, rows in zip(others, asked, strict=True):
        rows[other.rows] = other.features
    if task.knn is not None:
        trials = [_knn_trials(task, features, cases, jobs, references, asked=rows) for rows in (features, *asked)]
    else:
        outputs = _train(task, features, cases.targets, jobs, queries=asked, device=device)
        own, *of_others = np.split(outputs, 1 + len(others), axis=1)
        trials = [trials_of(task, own, cases, jobs, references)]
        for output in of_others:
            # The median risk of the training cases is that of their own features.
            for number, job in enumerate(jobs):
                output[number, job.train] = own[number, job.train]
            trials.append(trials_of(task, output, cases, jobs, references))
    return [trials[0]] + [
        [_about(task, cases, trial, other.rows) for trial in each if np.isin(trial.prediction.rows, other.rows).any()]
        for other, each in zip(others, trials[1:], strict=True)
    ]


def trials_of(
    task: Task, outputs: np.ndarray, cases: Cases, jobs: Sequence[Job], references: Sequence[References]
) -> list[Trial]:
    """A trial for every job.

    Args:
        task: row of the table of tasks.
        outputs: (jobs, n, K) of the job's head for every case; those that it neither trained on nor tests are not read.
        cases: n cases.
        jobs: what was trained.
        references: of each job.
    """
    trials = []
    for job, output, beside in zip(jobs, outputs, references, strict=True):
        prediction = _prediction(task, cases, job, output[job.test])
        trial = Trial(job, "", prediction, beside)
        if task.target.kind == "survival":
            trial = replace(trial, risk_cut=risk_cut(output[job.train, 0]))
        elif task.target.kind == "number":
            trial = replace(trial, num_far_outside=count_far_outside(cases.targets[job.train], prediction.predicted))
        trials.append(trial)
    return trials


def permuted_predictions(
    task: Task, features: np.ndarray, cases: Cases, trial: Trial, *, count: int, device: torch.device
) -> list[Prediction]:
    """What the trial's head, or its k, says after training ``count`` times on labels that were dealt anew among the
    training cases.

    Where every subject has one and the same label, whole subjects are dealt, so that a permuted label is as constant
    within a subject as the real one.
    """
    job = trial.job
    dealt = np.stack([cases.targets] * count)
    for number, targets in enumerate(dealt):
        rng = np.random.default_rng([job.seed, number])
        targets[job.train] = targets[job.train][_deal(rng, cases, job.train)]
    if not trial.k:
        outputs = _train(task, features, dealt, [job] * count, device=device)
        return [_prediction(task, cases, job, output[job.test]) for output in outputs]
    predictions = []
    for targets in dealt:
        (predicted,) = _neighbours(task, features, targets, job, [trial.k], asked=features).values()
        predictions.append(Prediction(job.test, cases.targets[job.test], predicted))
    return predictions


def trivial(task: Task, cases: Cases, job: Job) -> Prediction:
    """What the training targets alone say: the same of every test case."""
    train, targets = cases.targets[job.train], cases.targets[job.test]
    if task.target.kind == "survival":
        return Prediction(job.test, targets, np.zeros(len(targets)))
    if task.target.kind == "number":
        return Prediction(job.test, targets, np.full(len(targets), train.mean()))
    shares = np.bincount(train, minlength=len(task.target.classes)) / len(train)
    return Prediction(job.test, targets, np.full(len(targets), shares.argmax()), np.tile(shares, (len(targets), 1)))


def predict_clinically(task: Task, cases: Cases, job: Job) -> tuple[Prediction | None, str]:
    """What the clinical facts alone say of the test cases, or None and why they say nothing."""
    facts = {name: cases.facts[name] for name in task.clinical if name in cases.facts}
    if not facts:
        return None, "no label table has any of " + ", ".join(task.clinical) if task.clinical else ""
    try:
        output = predict_from_facts(
            facts,
            cases.targets,
            kind=task.target.kind,
            num_classes=len(task.target.classes),
            train=job.train,
            test=job.test,
        )
    except ValueError as error:
        return None, str(error)
    return _prediction(task, cases, job, output), ""


def count_far_outside(train_targets: np.ndarray, predicted: np.ndarray) -> int:
    """How many predicted values lie beyond the range of the training targets by more than half its width."""
    low, high = train_targets.min(), train_targets.max()
    margin = FAR_OUTSIDE * (high - low)
    return int(((predicted < low - margin) | (predicted > high + margin)).sum())


def _about(task: Task, cases: Cases, trial: Trial, rows: np.ndarray) -> Trial:
    """The trial on those of its test cases that are among ``rows``."""
    prediction, beside = trial.prediction.about(rows), trial.beside
    clinical = None if beside.clinical is None else beside.clinical.about(rows)
    restricted = replace(
        trial, prediction=prediction, beside=References(beside.trivial.about(rows), clinical, beside.clinical_note)
    )
    if task.target.kind == "number":
        far = count_far_outside(cases.targets[trial.job.train], prediction.predicted)
        restricted = replace(restricted, num_far_outside=far)
    return restricted


def _train(
    task: Task,
    features: np.ndarray,
    targets: np.ndarray,
    jobs: Sequence[Job],
    *,
    queries: Sequence[np.ndarray] = (),
    device: torch.device,
) -> np.ndarray:
    """(jobs, n, K) outputs of all cases, and of the queries after them; arguments as for ``train_heads``."""
    return train_many_heads(
        features,
        targets,
        subsets=[job.train for job in jobs],
        seeds=[job.seed for job in jobs],
        num_outputs=task.target.num_outputs,
        head=task.head,
        training=task.training,
        queries=queries,
        device=device,
    )


def _prediction(task: Task, cases: Cases, job: Job, output: np.ndarray) -> Prediction:
    targets = cases.targets[job.test]
    if task.target.kind == "class":
        return Prediction(job.test, targets, output.argmax(axis=1), output)
    return Prediction(job.test, targets, output[:, 0])


def _knn_trials(
    task: Task,
    features: np.ndarray,
    cases: Cases,
    jobs: Sequence[Job],
    references: Sequence[References],
    *,
    asked: np.ndarray,
) -> list[Trial]:
    """A trial for every job and every k; the memory bank is of ``features``, the queries are of ``asked``."""
    assert task.knn is not None
    smallest: dict[float, int] = {}
    for job in jobs:
        smallest[job.ratio] = min(len(job.train), smallest.get(job.ratio, len(job.train)))
    return [
        Trial(job, f"k={k}", Prediction(job.test, cases.targets[job.test], predicted), beside, k=k)
        for job, beside in zip(jobs, references, strict=True)
        for k, predicted in _neighbours(
            task,
            features,
            cases.targets,
            job,
            [k for k in task.knn.neighbours if k <= smallest[job.ratio]],
            asked=asked,
        ).items()
    ]


def _neighbours(
    task: Task, features: np.ndarray, targets: np.ndarray, job: Job, neighbours: Sequence[int], *, asked: np.ndarray
) -> dict[int, np.ndarray]:
    """k -> classes of the job's test cases."""
    return knn_predict(
        features[job.train],
        targets[job.train],
        asked[job.test],
        neighbours=neighbours,
        num_classes=len(task.target.classes),
    )


def _deal(rng: np.random.Generator, cases: Cases, train: np.ndarray) -> np.ndarray:
    """(len(train),) positions in ``train`` whose labels are given to each."""
    subjects = np.array(cases.subjects)[train]
    names, first, subject_of_case = np.unique(subjects, return_index=True, return_inverse=True)
    targets = cases.targets[train]
    constant = (targets == targets[first][subject_of_case]).reshape(len(train), -1).all()
    if not constant:
        return rng.permutation(len(train))
    return first[rng.permutation(len(names))][subject_of_case]
