"""Figures of evaluated tasks: curves over label ratios and over k, strata, calibration (paper Figs. 3 and 6b).

Functions of typed rows; ``TaskRun`` holds those of one task, as ``braindino evaluate`` wrote them.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from braindino.report.curve_panels import CurvePanel, CurvePoint, CurveTest, curve_figure, small_print
from braindino.report.figures import NEUTRAL, SOFT
from braindino.report.print_style import (
    COLUMN_MM,
    PAGE_MM,
    STYLE,
    Drawing,
    add_foot,
    inches,
    lettered,
    looks_of,
    series_handles,
    short,
    stars,
)
from braindino.task_summary import read_task_summary
from braindino.task_tables import (
    CALIBRATION_FILE,
    COMPARISONS_FILE,
    PREDICTIONS_FILE,
    RELIABILITY_FILE,
    STRATA_FILE,
    CalibrationRow,
    ComparisonRow,
    ReliabilityRow,
    StratumRow,
    read_predictions,
    read_rows,
)

SUMMARY_FILE = "summary.tsv"
MAX_DOTS = 3000
"""Predictions drawn in a panel; more are thinned evenly, and the caption says so."""


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One number of a task beside its floor: a row of summary.tsv, as numbers."""

    encoder: str
    ratio: float
    variant: str
    metric: str
    estimate: float
    low: float
    high: float
    baseline: float
    baseline_name: str
    train_subjects: int
    test_subjects: int
    interval: str
    data: str


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """The tables of one task."""

    name: str
    folder: Path
    scores: Sequence[ScoreRow]
    comparisons: Sequence[ComparisonRow]
    strata: Sequence[StratumRow]

    @property
    def metric(self) -> str:
        """The main metric, by which encoders are compared."""
        return self.scores[0].metric


@dataclass(frozen=True, kw_only=True)
class PredictedValue:
    """A number predicted for a test case, mean over seeds."""

    encoder: str
    case: str
    target: float
    predicted: float


def read_task_run(folder: Path) -> TaskRun:
    """The tables in EVAL/TASK.

    Raises:
        ValueError: it is no such folder, or a table is damaged; names the file.
    """
    path = folder / SUMMARY_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {SUMMARY_FILE}; expected a task's folder as `braindino evaluate` writes it, OUT/TASK"
        )
    comparisons, strata = folder / COMPARISONS_FILE, folder / STRATA_FILE
    try:
        scores = [_score_row(row) for row in read_task_summary(path)]
    except ValueError as error:
        raise ValueError(error if str(path) in str(error) else f"{path}: {error}") from error
    return TaskRun(
        name=folder.resolve().name,
        folder=folder,
        scores=scores,
        comparisons=read_rows(comparisons, ComparisonRow) if comparisons.is_file() else [],
        strata=read_rows(strata, StratumRow) if strata.is_file() else [],
    )


def ratio_figure(
    runs: Sequence[TaskRun], *, metric: str | None = None, encoders: Collection[str] | None = None
) -> Drawing:
    """A metric over the share of the labels that was trained on, a panel per task (paper Fig. 3b to l).

    Args:
        runs: tasks.
        metric: name, without its unit; None for each task's main metric.
        encoders: to show; None for all.

    Raises:
        ValueError: a task has no such rows.
    """
    panels, table = [], []
    looks = looks_of(row.encoder for run in runs for row in run.scores if encoders is None or row.encoder in encoders)
    for run, title in zip(runs, _titles(runs), strict=True):
        rows = [row for row in _chosen(run, metric, encoders) if not row.variant]
        if not rows:
            raise ValueError(
                f"{run.folder / SUMMARY_FILE}: every row is of a variant ({run.scores[0].variant}); expected label "
                "ratios of one head; draw neighbours with `braindino figure knn`"
            )
        tests = _tests(run, rows[0].metric, encoders)
        points = [_point(row, 100 * row.ratio) for row in rows]
        full = max(rows, key=lambda row: row.ratio)
        panels.append(
            CurvePanel(
                title=title,
                xlabel=f"labels (%)\n100 % = {_subjects_at_all(rows)}; tested on {full.test_subjects:,}",
                ylabel=axis_label(rows[0].metric),
                points=points,
                tick_labels={100 * row.ratio: f"{100 * row.ratio:g}" for row in rows},
                tests=[CurveTest(series=c.second, x=100 * c.ratio, p=c.p_holm) for c in tests if not c.variant],
                floor=full.baseline,
            )
        )
        table += _score_lines(run, rows, tests)
    first = _first(runs)
    words = small_print(panels, short(first), "Holm over the others")
    caption = f"Metric over the share of labelled subjects. {_simulated(runs)}Dotted: a predictor without image."
    floors = {row.baseline_name for run in runs for row in _chosen(run, metric, encoders)}
    floor_name = floors.pop() if len(floors) == 1 else "without image"
    figure = curve_figure(panels, looks, small_print=words, floor_name=floor_name)
    return Drawing(figure, _SCORE_COLUMNS, table, caption)


def knn_figure(runs: Sequence[TaskRun], *, encoders: Collection[str] | None = None) -> Drawing:
    """Accuracy of nearest neighbours over k with all labels, a panel per task (paper Fig. 6b, left).

    Raises:
        ValueError: a task is not one of nearest neighbours.
    """
    panels, table = [], []
    looks = looks_of(row.encoder for run in runs for row in run.scores if encoders is None or row.encoder in encoders)
    for run, title in zip(runs, _titles(runs), strict=True):
        rows = [row for row in _chosen(run, None, encoders) if row.variant.startswith("k=")]
        if not rows:
            raise ValueError(
                f"{run.folder / SUMMARY_FILE}: no row of a variant k=...; expected a task of nearest neighbours, "
                "such as knn_adni"
            )
        ratio = max(row.ratio for row in rows)
        rows = [row for row in rows if row.ratio == ratio]
        tests = [c for c in _tests(run, rows[0].metric, encoders) if c.ratio == ratio and c.variant.startswith("k=")]
        panels.append(
            CurvePanel(
                title=title,
                xlabel=f"k\nneighbours among {rows[0].train_subjects:,} subjects; tested on {rows[0].test_subjects:,}",
                ylabel=axis_label(rows[0].metric),
                points=[_point(row, _k(row.variant)) for row in rows],
                tick_labels={_k(row.variant): f"{_k(row.variant):g}" for row in rows},
                tests=[CurveTest(series=c.second, x=_k(c.variant), p=c.p_holm) for c in tests],
                floor=rows[0].baseline,
            )
        )
        table += _score_lines(run, rows, tests)
    words = small_print(panels, short(_first(runs)), "exact McNemar, Holm over k")
    caption = f"Accuracy of k nearest neighbours. {_simulated(runs)}Dotted: the most frequent class."
    figure = curve_figure(panels, looks, small_print=words, floor_name="most frequent class")
    return Drawing(figure, _SCORE_COLUMNS, table, caption)


def strata_figure(runs: Sequence[TaskRun], *, encoders: Collection[str] | None = None) -> Drawing:
    """The main metric in every stratum at the most labels, a panel per task (paper Fig. 3k and m).

    Raises:
        ValueError: a task has no strata.
    """
    panels, table = [], []
    looks = looks_of(row.encoder for run in runs for row in run.strata if encoders is None or row.encoder in encoders)
    for run, title in zip(runs, _titles(runs), strict=True):
        rows = [row for row in run.strata if encoders is None or row.encoder in encoders]
        if not rows:
            raise ValueError(f"{run.folder}: no rows in {STRATA_FILE}; expected a task with strata, such as brain_age")
        ratio = max(row.ratio for row in rows)
        rows = [row for row in rows if row.ratio == ratio and row.variant == rows[0].variant]
        names = list(dict.fromkeys(row.stratum for row in rows))
        subjects = {name: max(row.subjects for row in rows if row.stratum == name) for name in names}
        place = {name: float(number) for number, name in enumerate(names)}
        tests = [
            c
            for c in run.comparisons
            if c.stratum in place and c.ratio == ratio and (encoders is None or c.second in encoders)
        ]
        panels.append(
            CurvePanel(
                title=title,
                xlabel=f"age group, years; {100 * ratio:g} % of the labels" if _of_age(names) else "group",
                ylabel=axis_label(run.metric),
                points=[
                    CurvePoint(
                        series=row.encoder, x=place[row.stratum], estimate=row.estimate, low=row.low, high=row.high
                    )
                    for row in rows
                ],
                tick_labels={place[name]: f"{name.replace('-', '–')}\nn = {subjects[name]}" for name in names},
                tests=[CurveTest(series=c.second, x=place[c.stratum], p=c.p_holm) for c in tests],
                joined=False,
            )
        )
        p_of = {(c.second, c.stratum): c.p_holm for c in tests}
        for row in rows:
            p = p_of.get((row.encoder, row.stratum), math.nan)
            table.append(
                (
                    run.name,
                    row.encoder,
                    f"{row.ratio:g}",
                    row.stratum,
                    row.metric,
                    *_cells(row.estimate, row.low, row.high),
                    row.subjects,
                    _cell(p),
                    stars(p),
                    row.method,
                )
            )
    words = small_print(panels, short(_first(runs)), "Holm within the group")
    caption = f"By group. {_simulated(runs)}n: subjects of the group."
    columns = (
        "task",
        "encoder",
        "ratio",
        "stratum",
        "metric",
        "estimate",
        "low",
        "high",
        "subjects",
        "p_holm",
        "mark",
        "method",
    )
    return Drawing(curve_figure(panels, looks, small_print=words), columns, table, caption)


def reliability_figure(name: str, bins: Sequence[ReliabilityRow], lines: Sequence[CalibrationRow]) -> Drawing:
    """Predicted probability beside the observed share of the positive class, and how many predictions each bin holds.

    Args:
        name: of the task.
        bins: of every encoder.
        lines: intercept and slope of every encoder.

    Raises:
        ValueError: no bin.
    """
    if not bins:
        raise ValueError(f"{name}: no bin; expected the rows of {RELIABILITY_FILE}")
    looks = looks_of(row.encoder for row in bins)
    slope_of = {line.encoder: line for line in lines}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(inches(COLUMN_MM), inches(88)), layout="constrained")
        axes, counts = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        axes.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=(0, (1, 2)), linewidth=1)
        for number, (encoder, look) in enumerate(looks.items()):
            rows = [row for row in bins if row.encoder == encoder]
            filled = [row for row in rows if row.n]
            axes.plot(
                [row.mean_predicted for row in filled],
                [row.observed_share for row in filled],
                color=look.colour,
                marker=look.marker,
                linestyle=look.dashes,
                gid=f"series {encoder}",
                markeredgecolor="white",
                markeredgewidth=0.3,
            )
            width = 0.8 * (rows[0].high - rows[0].low) / len(looks)
            left = [row.low + 0.1 * (row.high - row.low) + width * number for row in rows]
            counts.bar(
                left,
                [row.n for row in rows],
                width=width,
                align="edge",
                color=look.colour,
                hatch=look.hatch,
                edgecolor="white",
                linewidth=0.3,
            )
        positive = bins[0].positive
        axes.set(
            ylabel=f"observed share of class {short(positive)}",
            xlim=(0, 1),
            ylim=(-0.02, 1.02),
            title=name.replace("_", " "),
        )
        counts.set(xlabel=f"predicted probability of class {short(positive)}", ylabel="predictions")
        for each in (axes, counts):
            each.grid(axis="y")
        counts.locator_params(axis="y", nbins=3)
        named = {_with_slope(encoder, slope_of.get(encoder)): look for encoder, look in looks.items()}
        add_foot(
            figure,
            series_handles(named),
            "Dotted: perfect. Slope below 1: predictions too extreme. All seeds and splits together.",
        )
    columns = (
        "task",
        "encoder",
        "positive",
        "low",
        "high",
        "n",
        "mean_predicted",
        "observed_share",
        "intercept",
        "slope",
    )
    table = [
        (
            name,
            row.encoder,
            row.positive,
            f"{row.low:g}",
            f"{row.high:g}",
            row.n,
            *_cells(row.mean_predicted, row.observed_share),
            *_line_cells(slope_of.get(row.encoder)),
        )
        for row in bins
    ]
    caption = "Predicted probabilities beside observed shares, at the most labels; dotted: perfect calibration."
    return Drawing(figure, columns, table, caption)


def agreement_figure(
    name: str, unit: str, values: Sequence[PredictedValue], lines: Sequence[CalibrationRow]
) -> Drawing:
    """Predicted beside true numbers, a panel per encoder, with the line through them.

    Args:
        name: of the task.
        unit: of the numbers.
        values: of every encoder.
        lines: predicted = intercept + slope x true.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError(f"{name}: no prediction; expected the rows of {PREDICTIONS_FILE}")
    looks = looks_of(value.encoder for value in values)
    line_of = {line.encoder: line for line in lines}
    columns = min(4, len(looks))
    rows_of_panels = math.ceil(len(looks) / columns)
    width = COLUMN_MM if columns <= 2 else PAGE_MM
    low = min(min(value.target, value.predicted) for value in values)
    high = max(max(value.target, value.predicted) for value in values)
    margin = 0.04 * (high - low or 1)
    of_unit = f", {unit}" if unit else ""
    table: list[tuple[object, ...]] = []
    with mpl.rc_context(STYLE):
        side = width / columns
        figure = Figure(figsize=(inches(width), inches(rows_of_panels * (side + 5) + 5)), layout="constrained")
        grid = figure.subplots(rows_of_panels, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for number, (axes, (encoder, look)) in enumerate(zip(grid, looks.items(), strict=False)):
            chosen = [value for value in values if value.encoder == encoder]
            chosen = chosen[:: math.ceil(len(chosen) / MAX_DOTS)]
            axes.plot([low, high], [low, high], color=NEUTRAL, linestyle=(0, (1, 2)), linewidth=1)
            axes.plot(
                [value.target for value in chosen],
                [value.predicted for value in chosen],
                look.marker,
                color=look.colour,
                markersize=2.6,
                alpha=0.6,
                markeredgewidth=0,
                gid=f"series {encoder}",
            )
            line = line_of.get(encoder)
            if line is not None and math.isfinite(line.slope):
                ends = np.array([min(v.target for v in chosen), max(v.target for v in chosen)])
                axes.plot(ends, line.intercept + line.slope * ends, color=look.colour, linewidth=1.2)
                axes.text(
                    0.03,
                    0.97,
                    f"slope {line.slope:.2f}\n[{line.slope_low:.2f}, {line.slope_high:.2f}]",
                    transform=axes.transAxes,
                    va="top",
                    fontsize=5.5,
                    color=SOFT,
                )
            axes.set_title(lettered(number, short(encoder, 22)))
            axes.set(
                xlabel=f"true{of_unit}" if number >= len(looks) - columns else "",
                ylabel=f"predicted{of_unit}" if number % columns == 0 else "",
            )
            axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
            axes.locator_params(nbins=5)
            axes.grid()
            table += [(name, v.encoder, v.case, *_cells(v.target, v.predicted)) for v in chosen]
        for axes in grid[len(looks) :]:
            axes.set_visible(False)
        cases = len({value.case for value in values})
        add_foot(
            figure,
            [],
            f"n = {cases} cases, mean over seeds. Dotted: equal. Line: fitted, with its slope and 95 % interval.",
        )
    caption = "Predicted beside true values, at the most labels; dotted: equal; line: calibration."
    return Drawing(figure, ("task", "encoder", "case", "target", "predicted"), table, caption)


def calibration_drawing(folder: Path) -> Drawing:
    """The calibration of a task: probabilities of two classes, or numbers.

    Raises:
        ValueError: the task is neither, or its tables are damaged.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {CALIBRATION_FILE}; expected a task with two classes or of numbers")
    lines = read_rows(path, CalibrationRow)
    name = folder.resolve().name
    if (folder / RELIABILITY_FILE).is_file():
        return reliability_figure(name, read_rows(folder / RELIABILITY_FILE, ReliabilityRow), lines)
    unit = read_task_run(folder).metric.partition("(")[2].rstrip(")")
    values = [value for line in lines for value in read_values(folder / line.encoder / PREDICTIONS_FILE, line.encoder)]
    return agreement_figure(name, unit, values, lines)


def read_values(path: Path, encoder: str) -> list[PredictedValue]:
    """Target and prediction of every test case at the most labels, mean over seeds and splits.

    Raises:
        ValueError: the targets are no numbers, as of classes with the tables of an older version.
    """
    rows = read_predictions(path)
    ratio = max((float(row["ratio"]) for row in rows), default=0.0)
    of_case: dict[str, list[tuple[float, float]]] = {}
    try:
        for row in rows:
            if float(row["ratio"]) == ratio:
                of_case.setdefault(row["case"], []).append((float(row["target"]), float(row["predicted"])))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: {error}; expected numbers in target and predicted; of two classes, {RELIABILITY_FILE} is drawn, "
            "which `braindino evaluate` writes since version 1 of it: evaluate again"
        ) from error
    return [
        PredictedValue(
            encoder=encoder, case=case, target=pairs[0][0], predicted=float(np.mean([pair[1] for pair in pairs]))
        )
        for case, pairs in of_case.items()
    ]


def axis_label(metric: str) -> str:
    """``MAE (years), lower is better``."""
    name, _, unit = metric.partition(" ")
    words = _METRIC_WORDS.get(name, name.replace("_", " "))
    return f"{words}{' ' + unit if unit else ''}" + (", lower is better" if name in ("mae", "rmse") else "")


_METRIC_WORDS = {
    "auc": "AUC",
    "macro_auc": "macro-AUC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "c_index": "C-index",
}
_SCORE_COLUMNS = (
    "task", "encoder", "ratio", "train_subjects", "variant", "metric", "estimate", "low", "high", "baseline",
    "baseline_name", "test_subjects", "p_holm", "mark", "test", "interval", "data",
)  # fmt: skip


def _score_row(row: Mapping[str, str]) -> ScoreRow:
    def number(name: str) -> float:
        return math.nan if row[name] == "n/a" else float(row[name])

    return ScoreRow(
        encoder=row["encoder"],
        ratio=number("ratio"),
        variant=row["variant"],
        metric=row["metric"],
        estimate=number("estimate"),
        low=number("low"),
        high=number("high"),
        baseline=number("baseline"),
        baseline_name=row["baseline_name"],
        train_subjects=int(row["train_subjects"]),
        test_subjects=int(row["test_subjects"]),
        interval=row["interval"],
        data=row["data"],
    )


def _chosen(run: TaskRun, metric: str | None, encoders: Collection[str] | None) -> list[ScoreRow]:
    wanted = run.metric if metric is None else metric
    rows = [row for row in run.scores if row.metric == wanted or row.metric.partition(" ")[0] == wanted]
    if not rows:
        found = ", ".join(dict.fromkeys(row.metric for row in run.scores))
        raise ValueError(f"{run.folder / SUMMARY_FILE}: no row of metric {wanted}; found {found}")
    kept = [row for row in rows if encoders is None or row.encoder in encoders]
    if not kept:
        found = ", ".join(dict.fromkeys(row.encoder for row in rows))
        raise ValueError(f"{run.folder / SUMMARY_FILE}: no row of the encoders asked for; found {found}")
    return kept


def _tests(run: TaskRun, metric: str, encoders: Collection[str] | None) -> list[ComparisonRow]:
    """Comparisons over all cases, which are of the main metric; of several splits the corrected test alone, since the
    plain one takes splits for independent."""
    if metric != run.metric:
        return []
    rows = [c for c in run.comparisons if not c.stratum and (encoders is None or c.second in encoders)]
    corrected = [c for c in rows if c.method.startswith("corrected")]
    return corrected or rows


def _point(row: ScoreRow, x: float) -> CurvePoint:
    return CurvePoint(series=row.encoder, x=x, estimate=row.estimate, low=row.low, high=row.high)


def _score_lines(run: TaskRun, rows: Sequence[ScoreRow], tests: Sequence[ComparisonRow]) -> list[tuple[object, ...]]:
    test_of = {(c.second, c.ratio, c.variant): c for c in tests}
    lines: list[tuple[object, ...]] = []
    for row in rows:
        test = test_of.get((row.encoder, row.ratio, row.variant))
        p = math.nan if test is None else test.p_holm
        lines.append(
            (
                run.name,
                row.encoder,
                f"{row.ratio:g}",
                row.train_subjects,
                row.variant,
                row.metric,
                *_cells(row.estimate, row.low, row.high, row.baseline),
                row.baseline_name,
                row.test_subjects,
                _cell(p),
                stars(p),
                "" if test is None else test.method,
                row.interval,
                row.data,
            )
        )
    return lines


def _titles(runs: Sequence[TaskRun]) -> list[str]:
    """Names of the tasks; with the folder of the run where a task is there twice."""
    names = [run.name for run in runs]
    return [
        run.name.replace("_", " ") + (f" ({run.folder.resolve().parent.name})" if names.count(run.name) > 1 else "")
        for run in runs
    ]


def _first(runs: Sequence[TaskRun]) -> str:
    """The encoder that the others are compared with."""
    firsts = list(dict.fromkeys(c.first for run in runs for c in run.comparisons))
    return firsts[0] if len(firsts) == 1 else "the first encoder"


def _simulated(runs: Sequence[TaskRun]) -> str:
    told = list(dict.fromkeys(row.data for run in runs for row in run.scores if row.data))
    return "".join(f"{text}. " for text in told)


def _subjects_at_all(rows: Sequence[ScoreRow]) -> str:
    full = max(rows, key=lambda row: row.ratio)
    return f"{round(full.train_subjects / full.ratio):,} subjects"


def _of_age(names: Sequence[str]) -> bool:
    return all(name[:1].isdigit() for name in names)


def _k(variant: str) -> float:
    return float(variant.removeprefix("k="))


def _with_slope(encoder: str, line: CalibrationRow | None) -> str:
    if line is None or not math.isfinite(line.slope):
        return encoder
    return f"{short(encoder, 20)}, slope {line.slope:.2f}"


def _line_cells(line: CalibrationRow | None) -> tuple[str, str]:
    return ("n/a", "n/a") if line is None else (_cell(line.intercept), _cell(line.slope))


def _cells(*values: float) -> tuple[str, ...]:
    return tuple(_cell(value) for value in values)


def _cell(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.6g}"
