"""The tasks as a table: one YAML file a task, which says what is predicted from which scans, how, and how it is scored.

A task needs no code. Those of the paper lie in ``tasks/``; a user's own file of the same form is named by its path, and
may start from another with ``extends``. Owner of the form (version 1): every key is described at the class it fills,
and an unknown key is an error.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from braindino.atomic import plain
from braindino.downstream.heads import Head, Training
from braindino.manifest import SEQUENCES
from braindino.records import read_yaml

TASKS_DIR = Path(__file__).with_name("tasks")
RATIOS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # paper sec. 4.3.1
NEIGHBOURS = (1, 3, 5, 10, 20, 50)  # paper sec. 4.6

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What of a subject goes into one case."""

    sequences: tuple[str, ...]
    """Sequences that are used."""
    fusion: Literal["none", "mean"] = "none"
    """``none``: every scan is a case. ``mean``: a session is a case, with the mean of the features of its scans (the
    paper's late fusion)."""
    complete: bool = False
    """With fusion: leave out sessions that lack one of the sequences, instead of averaging those that are there."""
    pool: Literal["global", "cls", "patches"] = "global"
    """``global``: the encoder's feature of a volume (of slices: the mean of their CLS tokens, paper sec. 4.3); ``cls``
    and ``patches``: the mean over ``slice_range`` of the CLS tokens or of the slices' mean patch tokens."""
    slice_range: tuple[float, float] = (0.0, 1.0)
    """Which slices count, by relative position: 0 the lowest, 1 the highest."""
    volume_pool: Literal["", "global"] = ""
    """What encoders of volumes give where ``pool`` is one of slices; empty refuses them."""

    def __post_init__(self) -> None:
        _one_of("inputs.sequences", self.sequences, SEQUENCES)
        if self.complete and self.fusion == "none":
            raise ValueError("inputs.complete: true without fusion; expected fusion: mean")
        low, high = self.slice_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"inputs.slice_range: found {self.slice_range}; expected 0 <= low < high <= 1")
        if self.pool == "global" and self.slice_range != (0.0, 1.0):
            raise ValueError("inputs.slice_range: expected pool: cls or pool: patches beside it")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is predicted, and where it stands."""

    kind: Literal["class", "number", "survival"]
    """Classes; a number; or a time with an event."""
    column: tuple[str, ...]
    """Column of the label tables, by the names it may have; the first that a table has counts. ``sequence`` is the
    scan's own."""
    classes: tuple[str, ...] = ()
    """Values of a class, in the order of the outputs; of two the second is the positive one."""
    exclude: tuple[str, ...] = ()
    """Values that are not part of the task: those cases are left out and counted. Any other value is an error."""
    unit: str = ""
    """Of a number or a time."""
    range: tuple[float, float] | None = None
    """Values outside are refused: they are in another unit, or wrong."""
    within: tuple[float, float] | None = None
    """Cases with a value outside are not part of the task: they are left out and counted."""
    event: tuple[str, ...] = ()
    """For survival: column with 1 where the event happened at the time, 0 where the case was seen without it until
    then."""

    def __post_init__(self) -> None:
        if (self.kind == "class") != bool(self.classes):
            raise ValueError(f"target.classes: found {self.classes} for kind {self.kind}; a class has two or more")
        if self.kind == "class" and len(set(self.classes)) < max(2, len(self.classes)):
            raise ValueError(f"target.classes: found {self.classes}; expected two or more different ones")
        if (self.kind == "survival") != bool(self.event):
            raise ValueError(f"target.event: found {self.event} for kind {self.kind}; survival has one, others none")
        if not self.column:
            raise ValueError("target.column: found none; expected the name of a column of the label tables")

    @property
    def num_outputs(self) -> int:
        """Of a head: one for each class, else one."""
        return len(self.classes) or 1

    @property
    def is_sequence(self) -> bool:
        """Whether the scan itself knows it, without a label table."""
        return self.column == ("sequence",)


@dataclass(frozen=True, kw_only=True)
class Knn:
    """Classification by the nearest training cases, without training (paper sec. 4.6)."""

    neighbours: tuple[int, ...] = NEIGHBOURS
    """The neighbourhood sizes k."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Who is tested on. All of them divide subjects (persons, where two ids are one person), never scans."""

    kind: Literal["holdout", "repeated", "kfold"] = "holdout"
    """``holdout``: one test set for all seeds, drawn once or given as a list. ``repeated``: several, drawn anew each
    time (the paper's ADNI protocol). ``kfold``: every subject is tested on once."""
    num_splits: int = 1
    """Test sets of ``repeated``, folds of ``kfold``."""
    test_fraction: float = 0.2
    """Share of the subjects in a test set; ``kfold`` needs none."""

    def __post_init__(self) -> None:
        if (self.num_splits == 1) != (self.kind == "holdout") or self.num_splits < 1:
            raise ValueError(
                f"protocol.num_splits: found {self.num_splits} for {self.kind}; expected 1 for holdout, 2 or more "
                "for the others"
            )
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"protocol.test_fraction: found {self.test_fraction}; expected a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Strata:
    """Groups of cases that are scored by themselves."""

    column: tuple[str, ...]
    """Column of the label tables with a number, by the names it may have."""
    bins: tuple[tuple[float, float | None], ...]
    """Lowest and highest value of each group, in whole units: ``[55, 64]`` holds 55.0 to 64.99, ``[85, null]`` 85.0
    and more."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row: what is predicted from which scans, how, and how well that went is measured."""

    name: str
    """Word on the command line and folder of the results."""
    title: str
    """In a reader's words."""
    section: str = ""
    """Of the paper."""
    cohorts: tuple[str, ...] = ()
    """The cohorts that the paper used; scans of any others are used as well, and named."""
    numbers: str = ""
    """How many the paper had."""
    notes: tuple[str, ...] = ()
    """What a user should know: where the paper contradicts itself, and what was chosen."""
    inputs: Inputs
    target: Target
    head: Head = field(default_factory=Head)
    """What stands on the frozen features."""
    training: Training = field(default_factory=Training)
    """Its loss, optimiser and length."""
    knn: Knn | None = None
    """Given: nearest neighbours instead of a head."""
    protocol: Protocol = field(default_factory=Protocol)
    metrics: tuple[str, ...]
    """Names of ``scoring.METRICS``; the first is compared between encoders."""
    clinical: tuple[str, ...] = ()
    """Columns of a baseline from clinical facts alone: Cox for survival, logistic or linear regression otherwise."""
    strata: Strata | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: found {self.name!r}; expected small letters, digits, - and _")
        losses = {"class": ("cross_entropy",), "number": ("squared_error", "log_mixed"), "survival": ("cox",)}
        if self.knn is None and self.training.loss not in losses[self.target.kind]:
            raise ValueError(
                f"training.loss: found {self.training.loss} for a target of kind {self.target.kind}; expected "
                f"{' or '.join(losses[self.target.kind])}"
            )
        if self.knn is not None and self.target.kind != "class":
            raise ValueError(f"knn: found a target of kind {self.target.kind}; nearest neighbours vote on classes")
        if not self.metrics:
            raise ValueError("metrics: found none; expected at least one")


def task_names() -> list[str]:
    """The tasks that come with the program."""
    return sorted(path.stem for path in TASKS_DIR.glob("*.yaml"))


def load_task(name_or_path: str | Path) -> Task:
    """A task of the table by its name, or a user's own by the path of its YAML file.

    Raises:
        ValueError: there is no such task, or the file has unknown keys or values that do not fit; names the file and
            the key.
    """
    path = _path_of(str(name_or_path))
    content = _read(path, seen=())
    try:
        return task_from(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def task_from(content: Mapping[str, Any]) -> Task:
    """The task of plain values, as YAML and JSON hold them (``as_plain`` makes them).

    Raises:
        ValueError: an unknown key, a missing one, or a value of another type; names the key.
    """
    task: Task = _fill(Task, content, "")
    return task


def as_plain(task: Task) -> dict[str, Any]:
    """A task as values that JSON can hold; ``task_from`` reads them back."""
    content: dict[str, Any] = plain(asdict(task))
    return content


def _path_of(name: str) -> Path:
    names = task_names()
    if name in names:
        return TASKS_DIR / f"{name}.yaml"
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected a task of your own, or one of {', '.join(names)}")
        return path
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"no task {name!r}{hint}; choose one of {', '.join(names)}, or name a YAML file of your own")


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a file laid over those of the task that it extends; sections are joined key by key."""
    if path.resolve() in seen:
        raise ValueError(f"{path}: extends goes round in a circle")
    content = read_yaml(path)
    content.setdefault("name", path.stem)
    if "extends" not in content:
        return content
    base = content.pop("extends")
    if str(base) not in task_names() and not Path(str(base)).is_absolute():
        base = path.parent / str(base)
    try:
        lower_path = _path_of(str(base))
    except ValueError as error:
        raise ValueError(f"{path}: extends: {error}") from error
    lower = _read(lower_path, seen=(*seen, path.resolve()))
    return _laid_over(lower, content)


def _laid_over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    joined = dict(lower)
    for key, value in upper.items():
        below = joined.get(key)
        joined[key] = _laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return joined


def _fill(kind: Any, content: Any, place: str) -> Any:
    """An instance of the dataclass ``kind`` from plain values, strictly."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{place or 'the file'}: found {content!r}; expected keys")
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"{_join(place, str(key))}: unknown key; {hint}known are {', '.join(known)}")
    missing = [
        name
        for name, each in known.items()
        if name not in content and each.default is MISSING and each.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{', '.join(_join(place, name) for name in missing)}: missing")
    values = {name: _value(hints[name], value, _join(place, name)) for name, value in content.items()}
    return kind(**values)


def _value(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not NoneType)
        return _value(hint, value, place)
    if is_dataclass(hint):
        return _fill(hint, value, place)
    if origin is Literal:
        _one_of(place, (value,), arguments)
        return value
    if origin is tuple:
        values = [value] if isinstance(value, str | int | float) else value
        if not isinstance(values, Sequence):
            raise ValueError(f"{place}: found {value!r}; expected a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_value(arguments[0], each, place) for each in values)
        if len(values) != len(arguments):
            raise ValueError(f"{place}: found {value!r}; expected {len(arguments)} values")
        return tuple(_value(each, one, place) for each, one in zip(arguments, values, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: found {value}; expected a finite number, or null where an end may be open")
    if type(value) is not hint:
        raise ValueError(f"{place}: found {value!r}; expected {hint.__name__}")
    return value


def _one_of(place: str, values: Sequence[Any], allowed: Sequence[Any]) -> None:
    bad = [value for value in values if value not in allowed]
    if bad or not values:
        raise ValueError(f"{place}: found {bad or 'nothing'}; expected of {', '.join(map(str, allowed))}")


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
