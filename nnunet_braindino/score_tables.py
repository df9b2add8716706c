"""Scores for readers: the paper's table in Markdown, and its curves over label ratios (paper Fig. 3a)."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from braindino.segmentation_scores import FLOOR_NOTE, Comparison, RegionSummary, SegmentationScores, format_mean
from nnunet_braindino.predictions import label_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#c0392b", "#2874a6", "#1e8449", "#7d3c98", "#b9770e", "#566573")
MARKERS = ("o", "s", "^", "D", "v", "P")


class CurvePoint(NamedTuple):
    """A trainer at one label ratio."""

    ratio: float
    name: str


def label_curves(names: Sequence[str]) -> dict[str, list[CurvePoint]]:
    """Trainer -> its label ratios, rising, of every trainer that has at least two."""
    points: dict[str, list[CurvePoint]] = {}
    for name in names:
        trainer, ratio = label_ratio(name)
        points.setdefault(trainer, []).append(CurvePoint(ratio, name))
    return {trainer: sorted(each) for trainer, each in points.items() if len(each) > 1}


def draw_curves(curves: Mapping[str, Sequence[CurvePoint]], scores: Mapping[str, SegmentationScores]) -> "Figure":
    """Mean Dice over the share of the labels, a panel per region, with the interval over subjects as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    regions = list(next(iter(scores.values())).summary)
    figure = Figure(figsize=(0.8 + 2.7 * len(regions), 3.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(regions), squeeze=False)[0]
    for panel, region in zip(panels, regions, strict=True):
        for number, (trainer, points) in enumerate(curves.items()):
            rows = [scores[point.name].summary[region] for point in points]
            percents = [100 * point.ratio for point in points]
            style = {"color": COLORS[number % len(COLORS)]}
            marker = MARKERS[number % len(MARKERS)]
            panel.plot(percents, [row.mean for row in rows], marker=marker, markersize=4, label=trainer, **style)
            band = [row.low for row in rows], [row.high for row in rows]
            panel.fill_between(percents, *band, alpha=0.15, linewidth=0, **style)
        panel.set(title=region, xlabel="labels trained on (%)", xticks=sorted({*percents, 100.0}))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean Dice")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def format_report(scores: Mapping[str, SegmentationScores], comparisons: Sequence[Comparison]) -> str:
    """All numbers in Markdown: Dice, HD95, paired tests, and what they mean."""
    first = next(iter(scores.values()))
    parts = ["# Segmentation scores", "", *_table(scores, "Dice"), "", *_table(scores, "HD95 (mm)"), ""]
    if comparisons:
        parts += [*_comparison_table(comparisons), ""]
    subjects = len(set(first.subject_of.values()))
    parts += [
        f"- {len(first.cases)} cases of {subjects} subjects. Mean ± standard deviation over cases [95 % interval of "
        "the mean]; the number of cases where it is not all.",
        f"- Interval: {first.notes['interval']}.",
        f"- Floor: {FLOOR_NOTE}.",
        f"- {first.notes['hd95']}.",
        f"- Undefined: {first.notes['undefined']}. Missed: {first.notes['missed']}.",
        *(f"- Checkpoint of {', '.join(names)}: {text}." for text, names in _by_checkpoint(scores).items()),
        f"- Pretraining overlap: {first.pretraining_overlap}.",
    ]
    if "time_points" in first.notes:
        parts.append(f"- WARNING: {first.notes['time_points']}.")
    if subjects == len(first.cases):
        parts.append("- Every case is its own subject here.")
    if comparisons:
        parts.append(
            "- Tests: first minus second on the same cases, at equal label ratio. p of the paired bootstrap (twice the "
            "share of resampled differences beyond zero; paper sec. 4.7) and of the sign-flip permutation, both by "
            "subject, both after Holm over the regions and pairs of the metric."
        )
        one_sided = sum(row.num_one_sided for row in comparisons if row.metric == "Dice")
        if one_sided:
            parts.append(
                f"- In {one_sided} comparisons of a case the Dice is defined for one side only (the other left an "
                "absent region empty, rightly): not counted, which favours the side that did not. "
                "`--both-empty perfect` counts them."
            )
    return "\n".join(parts) + "\n"


def _by_checkpoint(scores: Mapping[str, SegmentationScores]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, each in scores.items():
        names.setdefault(each.checkpoint, []).append(name)
    return names


def _table(scores: Mapping[str, SegmentationScores], metric: str) -> list[str]:
    summaries = {name: each.summary if metric == "Dice" else each.hd95_summary for name, each in scores.items()}
    num_cases = max(len(each.cases) for each in scores.values())
    digits = 3 if metric == "Dice" else 2
    regions = list(next(iter(summaries.values())))
    lines = [f"| {metric} | labels | {' | '.join(regions)} |", "|---" * (2 + len(regions)) + "|"]
    for name, summary in sorted(summaries.items(), key=lambda item: (label_ratio(item[0])[1],)):
        trainer, ratio = label_ratio(name)
        cells = [_cell(row, num_cases, digits) for row in summary.values()]
        lines.append(f"| {trainer} | {ratio:.0%} | {' | '.join(cells)} |")
    floors = next(iter(summaries.values()))
    if not all(math.isnan(row.floor) for row in floors.values()):
        cells = [format_mean(row.floor, math.nan) for row in floors.values()]
        lines.append(f"| floor: the whole brain | | {' | '.join(cells)} |")
    return lines


def _cell(row: RegionSummary, num_cases: int, digits: int) -> str:
    if math.isnan(row.mean):
        return "–"
    text = f"{row.mean:.{digits}f}" + ("" if math.isnan(row.sd) else f" ± {row.sd:.{digits}f}")
    if not math.isnan(row.low):
        text += f" [{row.low:.{digits}f}, {row.high:.{digits}f}]"
    return text + (f" (n = {row.num_cases})" if row.num_cases != num_cases else "")


def _comparison_table(rows: Sequence[Comparison]) -> list[str]:
    head = ["metric", "region", "labels", "first", "second", "difference [95 %]", "p bootstrap", "p sign-flip"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        difference = "–" if math.isnan(row.difference) else f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        cells = [row.metric, row.region, f"{row.ratio:.0%}", label_ratio(row.first)[0], label_ratio(row.second)[0]]
        cells += [difference, _p_value(row.p_bootstrap_holm), _p_value(row.p_sign_flip_holm)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _p_value(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
