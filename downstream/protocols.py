"""Who trains and who is tested on: test sets by subject, nested label ratios in what is left (paper sec. 4.3.1 and
4.3.2).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from braindino.downstream.cases import Cases
from braindino.downstream.task_table import Protocol, Task
from braindino.splits import check_disjoint, fold_subjects, nested_subsets, split_subjects

# Of the test set of a hold-out: the same for every seed and every task on the same subjects.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """A test set and all that trains, as names of units: subjects, or cases where scans were divided."""

    train: list[str]
    test: list[str]


@dataclass(frozen=True)
class Job:
    """One training set and its test set.

    Attributes:
        split: number of the split.
        seed: of the order of the training units (for the ratios), of the head's start and of its batches.
        ratio: share of the training units.
        train: indices of the cases that are trained on.
        test: indices of the cases that are tested on.
        num_train_units: training subjects (cases, where scans were divided).
    """

    split: int
    seed: int
    ratio: float
    train: np.ndarray
    test: np.ndarray
    num_train_units: int


def make_splits(
    task: Task,
    cases: Cases,
    *,
    protocol: Protocol,
    test_subjects: Sequence[str] | None,
    person_of: Mapping[str, str],
    by_scan: bool = False,
) -> list[Split]:
    """The splits of a task.

    For classes, subjects are stratified by the classes that they have; for survival, by whether the event was seen.

    Args:
        task: row of the table of tasks.
        cases: what is divided.
        protocol: how; the task's own, or the user's.
        test_subjects: fixed subjects to test on, for a hold-out; those without cases are passed over.
        person_of: subject -> person; all ids of a person land on one side.
        by_scan: divide cases and not subjects, which puts scans of one subject on both sides.

    Raises:
        ValueError: one side would be empty.
    """
    units = cases.ids if by_scan else cases.subjects
    unique = sorted(set(units))
    persons = {unit: unit for unit in unique} if by_scan else person_of
    if test_subjects is not None:
        if protocol.kind != "holdout" or by_scan:
            raise ValueError(
                f"a list of test subjects fixes one test set: found protocol {protocol.kind}"
                f"{', divided by scan' if by_scan else ''}; expected holdout by subject"
            )
        splits = [_listed(unique, test_subjects)]
    elif protocol.kind == "kfold":
        folds = fold_subjects(
            unique,
            num_folds=protocol.num_splits,
            seed=SPLIT_SEED,
            strata=_strata(task, cases, units),
            person_of=persons,
        )
        splits = [Split(sorted(set(unique) - set(fold)), fold) for fold in folds]
    else:
        splits = [
            Split(
                *split_subjects(
                    unique,
                    test_fraction=protocol.test_fraction,
                    seed=SPLIT_SEED + number,
                    strata=_strata(task, cases, units),
                    person_of=persons,
                )
            )
            for number in range(protocol.num_splits)
        ]
    for split in splits:
        check_disjoint(split.train, split.test)
    return splits


def make_jobs(
    cases: Cases, splits: Sequence[Split], *, ratios: Sequence[float], seeds: Sequence[int], by_scan: bool = False
) -> list[Job]:
    """Every split, seed and ratio, in this order; a smaller training set of a seed lies in its larger ones."""
    units = cases.ids if by_scan else cases.subjects
    jobs = []
    for number, split in enumerate(splits):
        test = cases.rows_of(units, split.test)
        for seed in seeds:
            for ratio, chosen in nested_subsets(split.train, ratios, seed=seed).items():
                jobs.append(Job(number, seed, ratio, cases.rows_of(units, chosen), test, len(chosen)))
    return jobs


def _listed(subjects: Sequence[str], listed: Sequence[str]) -> Split:
    wanted = set(listed)
    split = Split([s for s in subjects if s not in wanted], [s for s in subjects if s in wanted])
    if not split.test or not split.train:
        raise ValueError(
            f"test subjects: the list holds {len(split.test)} of the {len(subjects)} subjects with cases and leaves "
            f"{len(split.train)} to train on; expected some on both sides. Subjects here are written like "
            f"{subjects[0]!r}"
        )
    return split


def _strata(task: Task, cases: Cases, units: Sequence[str]) -> dict[str, str] | None:
    if task.target.kind == "number":
        return None
    values = cases.targets[:, 1] if task.target.kind == "survival" else cases.targets
    seen = defaultdict(set)
    for unit, value in zip(units, values, strict=True):
        seen[unit].add(int(value))
    return {unit: "+".join(map(str, sorted(of_unit))) for unit, of_unit in seen.items()}
