"""What a question amounts to on the scans at hand: its cases, who is trained and who is tested on, and what would make
the numbers doubtful."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from braindino.downstream.cases import Cases, select_cases
from braindino.downstream.config import QuestionConfig
from braindino.downstream.protocols import Job, Split, make_jobs, make_splits
from braindino.downstream.results import data_note
from braindino.downstream.task_table import Protocol, Task
from braindino.leakage import Crosswalk, check_test_scans, exposure_of_encoder
from braindino.manifest import Scan
from braindino.splits import read_subjects, shared_persons


@dataclass(frozen=True)
class Plan:
    """Cases, splits and jobs of a task.

    Attributes:
        task: row of the table of tasks.
        protocol: the task's own, or the user's.
        cases: what is predicted.
        splits: who trains and who is tested on.
        jobs: every split, seed and ratio.
        by_scan: whether scans were divided instead of subjects.
        warnings: what makes every number of the run doubtful and was allowed.
        crosswalk: which ids are one person.
    """

    task: Task
    protocol: Protocol
    cases: Cases
    splits: list[Split]
    jobs: list[Job]
    by_scan: bool
    warnings: list[str]
    crosswalk: Crosswalk

    @property
    def tested(self) -> list[int]:
        """Indices of all cases that some job tests on."""
        return sorted({int(row) for job in self.jobs for row in job.test})


def make_plan(config: QuestionConfig, task: Task, scans: Sequence[Scan], *, ratios: Sequence[float]) -> Plan:
    """The plan for a task on these scans; says on standard output what it is about.

    Args:
        config: the user's wishes.
        task: row of the table of tasks.
        scans: that have features.
        ratios: shares of the training subjects.

    Raises:
        ValueError: no cases, one side of a split would be empty, or a test subject is trained on under another id and
            that was not allowed.
    """
    cases = select_cases(task, scans, config.labels)
    _introduce(task, cases)
    crosswalk = Crosswalk(config.crosswalk)
    protocol = _protocol(config, task.protocol)
    splits = make_splits(
        task,
        cases,
        protocol=protocol,
        test_subjects=read_subjects(config.test_subjects) if config.test_subjects else None,
        person_of=crosswalk.person_of(cases.subjects),
        by_scan=config.split_by_scan,
    )
    jobs = make_jobs(cases, splits, ratios=ratios, seeds=config.seeds, by_scan=config.split_by_scan)
    warnings = _warnings(config, cases, splits, crosswalk)
    return Plan(task, protocol, cases, splits, jobs, config.split_by_scan, warnings, crosswalk)


def check_overlaps(config: QuestionConfig, plan: Plan, sources: Mapping[str, str | Path]) -> dict[str, str]:
    """Encoder -> what of the test scans it saw in pretraining; ``sources``: its features, or itself.

    Raises:
        ValueError: it saw some, and that was not allowed.
    """
    test_scans = [scan for row in plan.tested for scan in plan.cases.scans[row]]
    stamps = {}
    for name, source in sources.items():
        stamps[name] = check_test_scans(
            exposure_of_encoder(source),
            test_scans,
            model=f"encoder {name}",
            allow_overlap=config.allow_overlap,
            crosswalk=plan.crosswalk,
        )
        print(f"pretraining overlap of {name}: {stamps[name]}")
    return stamps


def _protocol(config: QuestionConfig, own: Protocol) -> Protocol:
    """The task's protocol, or the user's."""
    kind = config.protocol or ("holdout" if config.test_subjects else own.kind)
    if kind == "holdout":
        count = 1 if config.num_splits is None else config.num_splits
    else:
        count = config.num_splits or (own.num_splits if own.num_splits > 1 else 5)
    fraction = own.test_fraction if config.test_fraction is None else config.test_fraction
    return Protocol(kind=kind, num_splits=count, test_fraction=fraction)


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


def _warnings(config: QuestionConfig, cases: Cases, splits: Sequence[Split], crosswalk: Crosswalk) -> list[str]:
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
