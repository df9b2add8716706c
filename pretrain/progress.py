"""RUN/progress.png: how a run is going, in one picture."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from braindino.atomic import replace_file
from braindino.pretrain.cohort_loss import PREFIX as COHORT_PREFIX

MAX_POINTS = 2000
MAX_COHORTS_NAMED = 8
Rows = Sequence[dict[str, Any]]


def draw_progress(rows: Rows, path: Path, *, num_prototypes: int, title: str) -> None:
    """Draw losses (with the values expected at the start), schedules, collapse indicators and probes from rows of
    metrics; a panel for each that they hold."""
    if not rows:
        return
    thinned = rows[:: max(1, math.ceil(len(rows) / MAX_POINTS))]
    panels = [
        _panel(_draw_cross_entropies, thinned, math.log(num_prototypes)),
        _panel(_draw_objective, thinned),
        _panel(_draw_spread, thinned, math.log(num_prototypes)),
        _panel(_draw_rates, thinned),
        _panel(_draw_gradients, thinned),
        _panel(_draw_koleo, thinned),
        _panel(_draw_speed, thinned),
    ]
    cohorts = sorted({name for row in thinned for name in row if name.startswith(COHORT_PREFIX)})
    if cohorts:
        panels.append(_panel(_draw_cohorts, thinned, cohorts))
    probed = [row for row in rows if "probe_neighbour_distance" in row]
    if probed:
        panels.append(_panel(_draw_neighbours, probed))
        for kind, draw in (("knn", _draw_accuracies), ("mae", _draw_errors)):
            names = sorted(name for name in probed[-1] if name.startswith(f"probe_{kind}_") and _is_answer(name))
            if names:
                panels.append(_panel(draw, probed, names))
    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(4.3 * columns, 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, columns, sharex=True).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis)
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(fontsize="small")
    for axis in axes[columns:]:
        axis.set_xlabel("iteration")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=90)


def _panel(draw: Callable[..., None], rows: Rows, *arguments: Any) -> Callable[[Axes], None]:
    return lambda axes: draw(axes, rows, *arguments)


def _line(
    axes: Axes,
    rows: Rows,
    name: str,
    *,
    scale: float = 1.0,
    label: str = "",
    color: str | None = None,
    width: float | None = None,
) -> None:
    """One column of the rows that have it."""
    points = [(row["iteration"], row[name] * scale) for row in rows if name in row]
    label = label or name.replace("_", " ")
    axes.plot(*np.array(points).T, marker="." if len(points) < 30 else "", label=label, color=color, linewidth=width)


def _draw_cross_entropies(axes: Axes, rows: Rows, log_k: float) -> None:
    for name in ("dino_global", "dino_local", "ibot"):
        _line(axes, rows, name)
    axes.axhline(log_k, color="0.6", linestyle="--", linewidth=1, label="start of DINO: ln K")
    axes.axhline(0.5 * log_k, color="0.6", linestyle=":", linewidth=1, label="start of iBOT: 0.5 ln K")
    axes.set(title="Cross-entropies", ylabel="nats")


def _draw_objective(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "loss")
    expected = rows[0].get("expected_initial_loss")
    if expected is not None:
        axes.axhline(expected, color="0.6", linestyle="--", linewidth=1, label="expected at start")
    axes.set(title="Objective", ylabel="nats")


def _draw_spread(axes: Axes, rows: Rows, log_k: float) -> None:
    for name in ("teacher_entropy", "prototype_entropy"):
        _line(axes, rows, name, scale=1 / log_k)
    for name in ("feature_std", "neighbour_distance"):
        _line(axes, rows, name)
    rank = axes.twinx()
    _line(rank, rows, "feature_rank", color="C4")
    rank.set_ylabel("feature rank", color="C4")
    rank.set_ylim(bottom=0)
    axes.set(title="Spread (0 = collapsed)", ylabel="entropy / ln K; std and distance", ylim=(0, None))


def _draw_rates(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "lr")
    axes.set(title="Learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _draw_gradients(axes: Axes, rows: Rows) -> None:
    for name in ("encoder", "dino_head", "ibot_head"):
        _line(axes, rows, f"grad_norm_{name}", label=name.replace("_", " "))
    axes.set(title="Gradient norms before clipping", yscale="log")


def _draw_koleo(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "koleo")
    axes.set(title="KoLeo (both global crops)", ylabel="nats")


def _draw_speed(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "slices_per_second")
    axes.set(title="Speed", ylabel="slices / s", ylim=(0, None))


def _draw_cohorts(axes: Axes, rows: Rows, names: Sequence[str]) -> None:
    """Of many cohorts those with the largest and the smallest loss at the end are named."""
    last = {name: next(row[name] for row in reversed(rows) if name in row) for name in names}
    ordered = sorted(names, key=last.__getitem__)
    half = MAX_COHORTS_NAMED // 2
    named = ordered if len(ordered) <= MAX_COHORTS_NAMED else [*ordered[:half], *ordered[-half:]]
    for name in ordered:
        grey = name not in named
        label = "_" if grey else name.removeprefix(COHORT_PREFIX)
        _line(axes, rows, name, label=label, color="0.85" if grey else None)
    axes.set(title="DINO by cohort", ylabel="nats")


def _draw_neighbours(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "probe_neighbour_distance")
    axes.set(title="Cosine distance to the nearest, teacher", ylim=(0, None))


def _draw_accuracies(axes: Axes, rows: Rows, names: Sequence[str]) -> None:
    _draw_answers(axes, rows, names)
    axes.set(title="Nearest neighbours: classes", ylabel="accuracy", ylim=(0, 1.02))


def _draw_errors(axes: Axes, rows: Rows, names: Sequence[str]) -> None:
    _draw_answers(axes, rows, names)
    axes.set(title="Nearest neighbours: numbers", ylabel="mean absolute error", ylim=(0, None))


def _draw_answers(axes: Axes, rows: Rows, names: Sequence[str]) -> None:
    """Each answer over time, of the CLS token and (thin) the patch tokens, with what raw intensities (dashed) and the
    floor (dotted) reach in its colour."""
    for number, name in enumerate(names):
        color = f"C{number}"
        _line(axes, rows, name, label=name.split("_", 2)[2], color=color)
        # Runs that began before patch tokens were asked have rows without them.
        if (of_patches := f"{name}_patches") in rows[-1]:
            label = f"{name.split('_', 2)[2]}, patch tokens" if len(names) == 1 else "_"
            _line(axes, rows, of_patches, label=label, color=color, width=0.7)
        for reference, style in (("intensity", "--"), ("floor", ":")):
            label = reference if len(names) == 1 else "_"
            axes.axhline(rows[-1][f"{name}_{reference}"], color=color, linestyle=style, linewidth=1, label=label)


def _is_answer(name: str) -> bool:
    return not name.endswith(("_patches", "_intensity", "_floor"))
