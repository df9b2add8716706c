"""Kaplan-Meier panels of risk groups: encoders by label ratios, log-rank p, medians, numbers at risk (paper Fig. 4)."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from braindino.report.figures import SOFT
from braindino.report.print_style import (
    COLUMN_MM,
    LOOKS,
    PAGE_MM,
    STYLE,
    Drawing,
    add_foot,
    inches,
    p_words,
    short,
    stars,
)
from braindino.task_tables import (
    HIGH_RISK,
    LOW_RISK,
    SURVIVAL_CURVES_FILE,
    SURVIVAL_FILE,
    SurvivalRow,
    SurvivalStep,
    read_rows,
)

GROUPS = {HIGH_RISK: LOOKS[1], LOW_RISK: LOOKS[0]}
MAX_TICKS = 5
_COLUMNS = (
    "encoder", "ratio", "group", "time", "at_risk", "events", "left", "survival", "low", "high", "log_rank_p", "mark",
    "median", "median_low", "median_high",
)  # fmt: skip


def read_survival(folder: Path) -> tuple[list[SurvivalRow], list[SurvivalStep]]:
    """The groups and the curves of EVAL/TASK.

    Raises:
        ValueError: the task is none of survival, or was evaluated before curves were kept.
    """
    for name in (SURVIVAL_FILE, SURVIVAL_CURVES_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: no {name}; expected a survival task as `braindino evaluate` writes it, such as OUT/os_cox; "
                "one that was evaluated by an older version has to be evaluated again"
            )
    return read_rows(folder / SURVIVAL_FILE, SurvivalRow), read_rows(folder / SURVIVAL_CURVES_FILE, SurvivalStep)


def survival_figure(
    groups: Sequence[SurvivalRow],
    steps: Sequence[SurvivalStep],
    *,
    unit: str = "days",
    until: float | None = None,
    ratios: Collection[float] | None = None,
    encoders: Collection[str] | None = None,
) -> Drawing:
    """Survival above and below the training cases' median risk, a row per encoder and a column per label ratio.

    Args:
        groups: the two groups of every encoder and ratio.
        steps: their curves.
        unit: of the times.
        until: end of the time axis; None for the last time.
        ratios: to show; None for all.
        encoders: to show; None for all.

    Raises:
        ValueError: nothing is left to show.
    """
    shown = [
        row
        for row in groups
        if (ratios is None or row.ratio in ratios) and (encoders is None or row.encoder in encoders)
    ]
    if not shown:
        found = ", ".join(dict.fromkeys(f"{row.encoder} at {row.ratio:g}" for row in groups)) or "no row at all"
        raise ValueError(f"survival: none of the encoders and ratios asked for; found {found}")
    names = list(dict.fromkeys(row.encoder for row in shown))
    columns = sorted({row.ratio for row in shown})
    end = 1.02 * max((step.time for step in steps), default=1.0) if until is None else until
    width = COLUMN_MM if len(columns) == 1 else PAGE_MM
    with mpl.rc_context(STYLE):
        height = 12 + len(names) * (48 if len(columns) <= 3 else 40)
        figure = Figure(figsize=(inches(width), inches(height)), layout="constrained")
        axes = figure.subplots(len(names), len(columns), squeeze=False, sharex=True, sharey=True)
        for line, encoder in zip(axes, names, strict=True):
            for axis, ratio in zip(line, columns, strict=True):
                of_panel = [row for row in shown if (row.encoder, row.ratio) == (encoder, ratio)]
                _panel(
                    axis, of_panel, [s for s in steps if (s.encoder, s.ratio) == (encoder, ratio)], end=end, unit=unit
                )
                axis.set_title(f"{100 * ratio:g} % of the labels" if axis in axes[0] else "", fontweight="normal")
            line[0].set_ylabel(f"{short(encoder, 18)}\nsurvival", linespacing=1.4)
            line[0].yaxis.label.set_fontweight("bold")
        cut = f" The axis ends at {end:g} {unit}." if until is not None else ""
        handles = [
            Line2D([], [], color=look.colour, linestyle=look.dashes, label=name) for name, look in GROUPS.items()
        ]
        handles.append(Line2D([], [], color=SOFT, marker="|", linestyle="none", label="censored"))
        add_foot(
            figure,
            handles,
            "Cut at the training cases' median risk. Bands: 95 % (Greenwood, log-log). p: two-sided log-rank. "
            f"Medians: high / low risk, Kaplan-Meier, {unit}. Below the axes: numbers at risk.{cut}",
        )
    group_of = {(row.encoder, row.ratio, row.group): row for row in shown}
    table = []
    for step in steps:
        row = group_of.get((step.encoder, step.ratio, step.group))
        if row is not None:
            table.append(
                (
                    step.encoder,
                    f"{step.ratio:g}",
                    step.group,
                    f"{step.time:g}",
                    step.at_risk,
                    step.events,
                    step.left,
                    *_cells(step.survival, step.low, step.high, row.p),
                    stars(row.p),
                    *_cells(row.median, row.median_low, row.median_high),
                )
            )
    caption = (
        f"Kaplan-Meier curves of {_num_cases(shown)} test cases above and below the training cases' median predicted "
        f"risk, log-rank p; numbers at risk below.{cut}"
    )
    return Drawing(figure, _COLUMNS, table, caption)


def _panel(axes: Axes, groups: Sequence[SurvivalRow], steps: Sequence[SurvivalStep], *, end: float, unit: str) -> None:
    if not groups:
        axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center", color=SOFT)
        return
    ticks = _ticks(end)
    medians = []
    for place, (name, look) in enumerate(GROUPS.items()):
        curve = sorted((step for step in steps if step.group == name), key=lambda step: step.time)
        row = next((row for row in groups if row.group == name), None)
        at_risk = [next((step.at_risk for step in curve if step.time >= tick), 0) for tick in ticks]
        for tick, count in zip(ticks, at_risk, strict=True):
            axes.annotate(
                f"{count}",
                (tick, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, -17 - 6.5 * place),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=5,
                color=look.colour,
                annotation_clip=False,
            )
        medians.append(
            "n/a" if row is None or math.isnan(row.median) else "–" if math.isinf(row.median) else f"{row.median:g}"
        )
        if not curve:
            continue
        x = np.array([0.0, *(step.time for step in curve)])
        y, low, high = (
            np.array([1.0, *(getattr(step, part) for step in curve)]) for part in ("survival", "low", "high")
        )
        axes.step(x, y, where="post", color=look.colour, linestyle=look.dashes, gid=f"curve {name}", linewidth=1.1)
        axes.fill_between(x, low, high, step="post", color=look.colour, alpha=0.13, linewidth=0)
        censored = [step for step in curve if step.left]
        axes.plot(
            [step.time for step in censored],
            [step.survival for step in censored],
            "|",
            color=look.colour,
            markersize=3.5,
            markeredgewidth=0.7,
            gid=f"censored {name}",
        )
        if row is not None and math.isfinite(row.median) and row.median <= end:
            axes.plot([row.median, row.median], [0, 0.5], color=look.colour, linewidth=0.6, linestyle=(0, (1, 1.5)))
    p = groups[0].p
    mark = stars(p)
    axes.text(
        0.97,
        0.97,
        f"{p_words(p)}{' ' + mark if mark.startswith('*') else ''}\nmedian {medians[0]} / {medians[1]}",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=5.5,
        linespacing=1.35,
    )
    offset = axes.figure.dpi_scale_trans  # type: ignore[union-attr]
    for place, look in enumerate(GROUPS.values()):
        shifted = axes.transAxes + ScaledTranslation(-9 / 72, (-17 - 6.5 * place) / 72, offset)
        axes.plot(
            [0, 0], [0, 0], color=look.colour, marker=look.marker, markersize=2.6, transform=shifted, clip_on=False
        )
    axes.set_xticks(ticks)
    axes.tick_params(labelbottom=True)
    axes.set(xlim=(0, end), ylim=(0, 1.02), yticks=(0, 0.5, 1))
    axes.grid(axis="y")


def _ticks(end: float) -> list[float]:
    """Round times from 0, so far apart that the numbers below them do not touch."""
    return [
        tick
        for tick in mpl.ticker.MaxNLocator(MAX_TICKS - 1, steps=[1, 2, 5, 10]).tick_values(0, end)
        if 0 <= tick <= end
    ]


def _num_cases(rows: Sequence[SurvivalRow]) -> int:
    first = rows[0]
    return sum(row.cases for row in rows if (row.encoder, row.ratio) == (first.encoder, first.ratio))


def _cells(*values: float) -> tuple[str, ...]:
    return tuple("n/a" if math.isnan(value) else f"{value:.6g}" for value in values)
