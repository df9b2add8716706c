"""What tasks still reach on perturbed scans: bars or curves over the severity (paper Fig. 5)."""

import math
from collections.abc import Collection, Sequence
from typing import Literal

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from braindino.report.curve_panels import CurvePanel, CurvePoint, CurveTest, curve_figure
from braindino.report.figures import INK
from braindino.report.print_style import (
    COLUMN_MM,
    NOT_SIGNIFICANT,
    PAGE_MM,
    STARS_NOTE,
    STYLE,
    Drawing,
    add_foot,
    inches,
    lettered,
    looks_of,
    short,
    stars,
)
from braindino.report.task_figures import axis_label
from braindino.robustness_table import RobustnessRow

_NAMES = {"gamma": "contrast (gamma)", "gibbs": "Gibbs ringing", "bias_field": "bias field"}
_SEVERITY = {"gamma": "gamma", "gibbs": "strength", "bias_field": "strength"}
_COLUMNS = (
    "task", "metric", "perturbation", "severity", "clean", "encoder", "ratio", "variant", "estimate", "low", "high",
    "change", "change_low", "change_high", "p", "mark", "subjects", "cases", "missing", "method", "data",
)  # fmt: skip
_NOTE = f"{STARS_NOTE}: perturbed against clean, paired, not adjusted. Bars: 95 % intervals."


def perturbation_figure(
    rows: Sequence[RobustnessRow],
    *,
    style: Literal["bars", "lines"] = "bars",
    encoders: Collection[str] | None = None,
) -> Drawing:
    """A panel per metric of a task (rows) and perturbation (columns).

    Args:
        rows: at one label ratio and variant each task; of several, the largest ratio and the first variant are shown.
        style: grouped bars, as the paper's figure, or curves.
        encoders: to show; None for all.

    Raises:
        ValueError: no row is left.
    """
    kept = [row for row in rows if encoders is None or row.encoder in encoders]
    if not kept:
        found = ", ".join(dict.fromkeys(row.encoder for row in rows)) or "no row at all"
        raise ValueError(f"robustness: no row of the encoders asked for; found {found}")
    ratio_of = {task: max(row.ratio for row in kept if row.task == task) for task in {row.task for row in kept}}
    variant_of = {row.task: row.variant for row in reversed(kept)}
    kept = [row for row in kept if row.ratio == ratio_of[row.task] and row.variant == variant_of[row.task]]
    draw = _bars if style == "bars" else _lines
    table = [
        (
            r.task,
            r.metric,
            r.perturbation,
            f"{r.severity:g}",
            int(r.clean),
            r.encoder,
            f"{r.ratio:g}",
            r.variant,
            *_cells(r.estimate, r.low, r.high, r.change, r.change_low, r.change_high, r.p),
            _mark(r),
            r.n_subjects,
            r.n_cases,
            r.n_missing,
            r.method,
            r.data,
        )
        for r in kept
    ]
    simulated = "".join(f"{text}. " for text in dict.fromkeys(row.data for row in kept if row.data))
    missing = "" if not any(row.n_missing for row in kept) else " Some conditions lack cases: see the table."
    caption = f"Test-time perturbations; the encoder and its heads know nothing of them. {simulated}{missing}"
    return Drawing(draw(kept), _COLUMNS, table, caption)


def _bars(rows: Sequence[RobustnessRow]) -> Figure:
    looks = looks_of(row.encoder for row in rows)
    measures = list(dict.fromkeys((row.task, row.metric) for row in rows))
    kinds = list(dict.fromkeys(row.perturbation for row in rows))
    width = COLUMN_MM if len(kinds) == 1 else PAGE_MM
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(inches(width), inches(14 + 40 * len(measures))), layout="constrained")
        axes = figure.subplots(len(measures), len(kinds), squeeze=False, sharey="row")
        for place, (axis, (measure, kind)) in enumerate(
            zip(axes.ravel(), ((m, k) for m in measures for k in kinds), strict=True)
        ):
            of_panel = [row for row in rows if (row.task, row.metric) == measure and row.perturbation == kind]
            severities = _severities(of_panel)
            bar = 0.84 / len(looks)
            for number, (encoder, look) in enumerate(looks.items()):
                for group, severity in enumerate(severities):
                    left = group - 0.42 + bar * number
                    row = next((r for r in of_panel if r.encoder == encoder and r.severity == severity), None)
                    if row is None or math.isnan(row.estimate):
                        axis.annotate(
                            "×",
                            (left + bar / 2, 0),
                            xycoords=("data", "axes fraction"),
                            ha="center",
                            va="bottom",
                            fontsize=5,
                            color=look.colour,
                        )
                        continue
                    axis.bar(
                        [left],
                        [row.estimate],
                        width=bar,
                        align="edge",
                        color=look.colour,
                        hatch=look.hatch,
                        edgecolor="white",
                        linewidth=0.3,
                        gid=f"{encoder} {severity:g}",
                    )
                    top = row.estimate
                    if math.isfinite(row.low) and math.isfinite(row.high):
                        axis.plot([left + bar / 2] * 2, [row.low, row.high], color=INK, linewidth=0.6)
                        top = max(top, row.high)
                    if _mark(row):
                        axis.annotate(
                            _mark(row),
                            (left + bar / 2, top),
                            xytext=(0, 1),
                            textcoords="offset points",
                            ha="center",
                            va="bottom",
                            fontsize=4.5,
                            rotation=90,
                        )
            axis.set_xticks(range(len(severities)), _severity_labels(of_panel, severities))
            axis.margins(x=0.02, y=0.14)
            axis.grid(axis="y")
            axis.locator_params(axis="y", nbins=5)
            axis.tick_params(axis="x", length=0, labelleft=True)
            if axis in axes[:, 0]:
                axis.set_ylabel(f"{_task_words(measure[0])}\n{axis_label(measure[1])}")
            if axis in axes[-1]:
                axis.set_xlabel(_SEVERITY.get(kind, "severity"))
            axis.set_title(lettered(place, _NAMES.get(kind, kind.replace("_", " "))))
        handles = [
            Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", label=short(name))
            for name, look in looks.items()
        ]
        add_foot(figure, handles, f"{_NOTE} ×: missing.")
    return figure


def _lines(rows: Sequence[RobustnessRow]) -> Figure:
    looks = looks_of(row.encoder for row in rows)
    panels = []
    for measure in dict.fromkeys((row.task, row.metric) for row in rows):
        for kind in dict.fromkeys(row.perturbation for row in rows):
            of_panel = [row for row in rows if (row.task, row.metric) == measure and row.perturbation == kind]
            severities = _severities(of_panel)
            labels = _severity_labels(of_panel, severities)
            panels.append(
                CurvePanel(
                    title=_NAMES.get(kind, kind.replace("_", " ")),
                    xlabel=_SEVERITY.get(kind, "severity"),
                    ylabel=f"{_task_words(measure[0])}\n{axis_label(measure[1])}",
                    points=[
                        CurvePoint(series=r.encoder, x=r.severity, estimate=r.estimate, low=r.low, high=r.high)
                        for r in of_panel
                    ],
                    tick_labels=dict(zip(severities, labels, strict=True)) or {0.0: "not scored"},
                    tests=[CurveTest(series=r.encoder, x=r.severity, p=r.p) for r in of_panel if not r.clean],
                )
            )
    columns = len({row.perturbation for row in rows})
    return curve_figure(panels, looks, small_print=_NOTE, columns=columns)


def _severities(rows: Sequence[RobustnessRow]) -> list[float]:
    return sorted({row.severity for row in rows})


def _severity_labels(rows: Sequence[RobustnessRow], severities: Sequence[float]) -> list[str]:
    clean = {row.severity for row in rows if row.clean}
    return [f"{severity:g}\nclean" if severity in clean else f"{severity:g}" for severity in severities]


def _mark(row: RobustnessRow) -> str:
    mark = "" if row.clean else stars(row.p)
    return "" if mark == NOT_SIGNIFICANT else mark


def _task_words(task: str) -> str:
    return short(task.replace("_", " "), 24)


def _cells(*values: float) -> tuple[str, ...]:
    return tuple("n/a" if math.isnan(value) else f"{value:.6g}" for value in values)
