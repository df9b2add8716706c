"""RUN/progress.png: how a run is going, in one picture."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from braindino.atomic import replace_file

MAX_POINTS = 2000


def draw_progress(rows: list[dict[str, Any]], path: Path, *, num_prototypes: int, title: str) -> None:
    """Draw losses (with the values expected at the start), schedules and collapse indicators from rows of metrics."""
    rows_of_probes = rows
    rows = rows[:: max(1, math.ceil(len(rows) / MAX_POINTS))]
    if not rows:
        return
    log_k = math.log(num_prototypes)
    iteration = np.array([row["iteration"] for row in rows])
    probed = [row for row in rows_of_probes if "probe_knn_sequence" in row]
    figure = Figure(figsize=(17 if probed else 13, 7), layout="constrained")
    figure.suptitle(title)
    (loss, total, spread, *more), (rates, gradients, speed, *below) = figure.subplots(
        2, 4 if probed else 3, sharex=True
    )

    def draw(axes: Axes, *names: str, scale: float = 1.0) -> None:
        for name in names:
            values = np.array([row[name] for row in rows]) * scale
            axes.plot(iteration, values, marker="." if len(rows) < 30 else "", label=name.replace("_", " "))

    draw(loss, "dino_global", "dino_local", "ibot")
    loss.axhline(log_k, color="0.6", linestyle="--", linewidth=1, label="start of DINO: ln K")
    loss.axhline(0.5 * log_k, color="0.6", linestyle=":", linewidth=1, label="start of iBOT: 0.5 ln K")
    loss.set(title="Cross-entropies", ylabel="nats")
    draw(total, "loss")
    expected = rows[0].get("expected_initial_loss")
    if expected is not None:
        total.axhline(expected, color="0.6", linestyle="--", linewidth=1, label="expected at start")
    total.set(title="Objective", ylabel="nats")
    draw(spread, "teacher_entropy", "prototype_entropy", scale=1 / log_k)
    draw(spread, "feature_std")
    rank = spread.twinx()
    draw(rank, "feature_rank")
    rank.lines[0].set_color("C3")
    rank.set_ylabel("feature rank", color="C3")
    rank.set_ylim(bottom=0)
    spread.set(title="Spread (0 = collapsed)", ylabel="entropy / ln K; feature std", ylim=(0, 1.05))
    draw(rates, "lr")
    rates.set(title="Learning rate", xlabel="iteration", ylim=(0, None))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    draw(gradients, "grad_norm_encoder", "grad_norm_dino_head", "grad_norm_ibot_head")
    gradients.set(title="Gradient norms before clipping", xlabel="iteration", yscale="log")
    draw(speed, "koleo")
    speed.set(title="KoLeo (both global crops)", xlabel="iteration")
    if probed:
        _draw_probes(more[0], below[0], probed)
    for axes in (loss, total, spread, rates, gradients, *more):
        axes.legend(fontsize="small")
    for axes in (loss, total, spread, rates, gradients, speed, *more, *below):
        axes.grid(alpha=0.3)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=90)


def _draw_probes(accuracy: Axes, distance: Axes, rows: list[dict[str, Any]]) -> None:
    """Nearest neighbours for the sequence type over time, with what intensities and the floor reach."""
    iteration = [row["iteration"] for row in rows]
    accuracy.plot(iteration, [row["probe_knn_sequence"] for row in rows], marker=".", label="CLS features")
    for name, style in (("intensity", "--"), ("floor", ":")):
        value = rows[-1][f"probe_knn_sequence_{name}"]
        accuracy.axhline(value, color="0.6", linestyle=style, linewidth=1, label=name)
    accuracy.set(title="Sequence by nearest neighbours", ylabel="accuracy", ylim=(0, 1.02))
    distance.plot(iteration, [row["probe_neighbour_distance"] for row in rows], marker=".")
    distance.set(title="Cosine distance to the nearest", xlabel="iteration", ylim=(0, None))
