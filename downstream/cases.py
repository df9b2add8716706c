"""The cases of a task: which scans make a case, what is predicted of it, and what is known of it besides."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from braindino.downstream.task_table import Target, Task
from braindino.label_table import Label, NoColumnError, labels_of, read_labels
from braindino.manifest import Scan


@dataclass(frozen=True)
class Cases:
    """What is predicted, case by case.

    Attributes:
        ids: of each of the n cases; unique.
        scans: of each case the scans that it is made of, in the order of the task's sequences.
        subjects: subject key of each case.
        targets: (n,) int64 class indices; (n,) float64 values; (n, 2) float64 time and event.
        facts: column -> text of each case, "" where unknown: clinical columns and the column of the strata.
        left_out: reason -> number of scans or sessions that are no cases.
    """

    ids: list[str]
    scans: list[tuple[Scan, ...]]
    subjects: list[str]
    targets: np.ndarray
    facts: dict[str, list[str]]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def all_scans(self) -> list[Scan]:
        """Every scan of every case."""
        return [scan for scans in self.scans for scan in scans]

    def among(self, rows: np.ndarray) -> "Cases":
        """The cases at these indices, in their order."""
        chosen = rows.tolist()
        return replace(
            self,
            ids=[self.ids[row] for row in chosen],
            scans=[self.scans[row] for row in chosen],
            subjects=[self.subjects[row] for row in chosen],
            targets=self.targets[rows],
            facts={name: [values[row] for row in chosen] for name, values in self.facts.items()},
        )

    def rows_of(self, units: Sequence[str], chosen: Sequence[str]) -> np.ndarray:
        """Indices of the cases whose unit (subject, or the case itself) is among the chosen ones."""
        wanted = set(chosen)
        return np.array([row for row, unit in enumerate(units) if unit in wanted], dtype=np.int64)


def select_cases(task: Task, scans: Sequence[Scan], tables: Sequence[Path]) -> Cases:
    """The cases of a task among scans that have features.

    Args:
        task: row of the table of tasks.
        scans: all that could be used.
        tables: label tables and BIDS folders; not needed where the scan itself knows the target.

    Raises:
        ValueError: no table has the target, a label is no class of the task, no number, or outside its range, or
            nothing is left to tell apart.
    """
    target = task.target
    if not target.is_sequence and not tables:
        raise ValueError(
            f"task {task.name} needs --labels: a BIDS folder or a table with a column {' or '.join(target.column)}"
        )
    labels = {} if target.is_sequence else read_column(tables, target.column, scans)
    events = read_column(tables, target.event, scans) if target.event else {}
    left_out: Counter[str] = Counter()
    kept: list[tuple[tuple[Scan, ...], float | tuple[float, float]]] = []
    for scans_of_case in _groups(task, scans, left_out):
        value = _target(target, scans_of_case, labels, events)
        if isinstance(value, str):
            left_out[value] += 1
        elif target.kind == "survival" and any(scans_of_case[0].subject_key == k[0].subject_key for k, _ in kept[-1:]):
            left_out["a later session of the same subject, who dies once"] += 1
        else:
            kept.append((scans_of_case, value))
    if not kept:
        raise ValueError(f"task {task.name}: none of {len(scans)} scans can be used; left out: {dict(left_out)}")
    targets = np.array([value for _, value in kept], dtype=np.int64 if target.kind == "class" else np.float64)
    _check_targets(task, targets)
    groups = [group for group, _ in kept]
    return Cases(
        ids=[_case_id(task, group) for group in groups],
        scans=groups,
        subjects=[group[0].subject_key for group in groups],
        targets=targets,
        facts=_facts(task, groups, tables),
        left_out=dict(left_out),
    )


def read_column(tables: Sequence[Path], names: Sequence[str], scans: Sequence[Scan]) -> dict[str, Label]:
    """scan_id -> label, from the column that is called by one of ``names``; the first that the tables have.

    Raises:
        ValueError: no table has any of them.
    """
    for name in names[:-1]:
        try:
            return labels_of(scans, read_labels(tables, name))
        except NoColumnError:
            continue
    return labels_of(scans, read_labels(tables, names[-1]))


def _groups(task: Task, scans: Sequence[Scan], left_out: Counter[str]) -> list[tuple[Scan, ...]]:
    """The scans of each case; what cannot be used is counted."""
    order = sorted(scans, key=lambda scan: (scan.subject_key, scan.session, scan.sequence, scan.scan_id))
    usable = []
    for scan in order:
        if scan.sequence in task.inputs.sequences:
            usable.append(scan)
        else:
            left_out[f"sequence {scan.sequence}"] += 1
    if task.inputs.fusion == "none":
        return [(scan,) for scan in usable]
    sessions: dict[tuple[str, str], dict[str, Scan]] = defaultdict(dict)
    for scan in usable:
        of_session = sessions[scan.subject_key, scan.session]
        if scan.sequence in of_session:
            left_out["another scan of the same sequence and session"] += 1
        else:
            of_session[scan.sequence] = scan
    groups = []
    for of_session in sessions.values():
        if task.inputs.complete and len(of_session) < len(task.inputs.sequences):
            left_out["a session without " + ", ".join(s for s in task.inputs.sequences if s not in of_session)] += 1
        else:
            groups.append(tuple(of_session[s] for s in task.inputs.sequences if s in of_session))
    return groups


def _case_id(task: Task, scans: tuple[Scan, ...]) -> str:
    if task.inputs.fusion == "none":
        return scans[0].scan_id
    return "/".join(filter(None, (scans[0].subject_key, scans[0].session)))


def _target(
    target: Target, scans: tuple[Scan, ...], labels: Mapping[str, Label], events: Mapping[str, Label]
) -> float | tuple[float, float] | str:
    """The value of a case, or the reason why it is none."""
    if target.is_sequence:
        sequence = scans[0].sequence
        return target.classes.index(sequence) if sequence in target.classes else f"sequence {sequence}"
    label = _label(scans, labels)
    if label is None:
        return f"no {target.column[0]}"
    if target.kind == "class":
        text = _class_text(label.text)
        if text in target.exclude:
            return f"{target.column[0]} {text} is not part of the task"
        if text not in target.classes:
            raise ValueError(
                f"{label.place}: {target.column[0]} {label.text!r}; expected one of {', '.join(target.classes)}, or n/a"
            )
        return target.classes.index(text)
    value = _number(target, label)
    if target.within is not None and not target.within[0] <= value <= target.within[1]:
        return f"{target.column[0]} outside {target.within[0]:g} to {target.within[1]:g} {target.unit}"
    if target.kind == "number":
        return value
    event = _label(scans, events)
    if event is None:
        return f"no {target.event[0]}"
    if _class_text(event.text) not in ("0", "1"):
        raise ValueError(
            f"{event.place}: {target.event[0]} {event.text!r}; expected 1 (it happened at {target.column[0]}), 0 (seen "
            "without it until then), or n/a"
        )
    return value, float(event.text)


def _label(scans: tuple[Scan, ...], labels: Mapping[str, Label]) -> Label | None:
    """What is known of a case; its scans are of one session and agree."""
    return next((labels[scan.scan_id] for scan in scans if scan.scan_id in labels), None)


def _class_text(text: str) -> str:
    """``1.0``, as spreadsheets write codes, is the class 1."""
    return text[:-2] if text.endswith(".0") and text[:-2].isdigit() else text


def _number(target: Target, label: Label) -> float:
    name = target.column[0]
    try:
        value = float(label.text)
    except ValueError as error:
        raise ValueError(f"{label.place}: {name} {label.text!r}; expected a number in {target.unit}, or n/a") from error
    low, high = target.range or (-np.inf, np.inf)
    if not low <= value <= high:
        raise ValueError(
            f"{label.place}: {name} {value:g} is outside {low:g} to {high:g} {target.unit}; is the column in another "
            f"unit, such as days or months? Convert it to {target.unit}, or write n/a"
        )
    return value


def _check_targets(task: Task, targets: np.ndarray) -> None:
    if task.target.kind == "survival":
        if not targets[:, 1].any():
            raise ValueError(f"task {task.name}: no event among {len(targets)} cases; nothing to learn of survival")
    elif len(np.unique(targets)) < 2:
        raise ValueError(
            f"task {task.name}: all {len(targets)} cases have the same {task.target.column[0]}; nothing to tell apart"
        )


def _facts(task: Task, groups: Sequence[tuple[Scan, ...]], tables: Sequence[Path]) -> dict[str, list[str]]:
    """Clinical columns, and the column of the strata; those that no table has are left away."""
    scans = [scan for group in groups for scan in group]
    columns: dict[str, tuple[str, ...]] = {name: (name,) for name in task.clinical}
    if task.strata is not None:
        columns |= {task.strata.column[0]: task.strata.column}
    facts: dict[str, list[str]] = {}
    for name, names in columns.items():
        try:
            labels = read_column(tables, names, scans) if tables else {}
        except NoColumnError:
            continue
        if labels:
            facts[name] = [label.text if (label := _label(group, labels)) else "" for group in groups]
    return facts
