"""How encoders see the same scans: alignment over depth, and similarity with reference points (paper Fig. 6)."""

import math
from collections.abc import Collection, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from braindino.patch_maps import SimilarityPanels, edge
from braindino.report.curve_panels import CurvePanel, CurvePoint, curve_figure
from braindino.report.figures import SOFT
from braindino.report.print_style import PAGE_MM, STYLE, Drawing, add_foot, inches, looks_of, short
from braindino.representation_tables import ALL, CkaRow

SIMILARITY_COLOURS = "viridis"
"""Its lightness rises evenly, so that a grey print keeps the order."""
DEPTHS = ("early", "mid", "late")
_CKA_COLUMNS = (
    "group", "unit", "reference", "encoder", "depth", "n", "subjects", "cka", "low", "high", "debiased", "debiased_low",
    "debiased_high", "method",
)  # fmt: skip


def cka_figure(
    rows: Sequence[CkaRow],
    *,
    reference: str | None = None,
    encoders: Collection[str] | None = None,
    unit: str = "scan",
    debiased: bool = False,
) -> Drawing:
    """Linear CKA of one encoder with each other one over depth, a panel per cohort (paper Fig. 6b, right).

    Args:
        rows: of ``cka.tsv``.
        reference: the one encoder; None for the first of the table.
        encoders: the other ones; None for all.
        unit: ``scan``, as in the paper, or ``subject``.
        debiased: the estimate that is around 0 for features without a relation.

    Raises:
        ValueError: no row is left, or the reference is not in the table.
    """
    names = list(dict.fromkeys(name for row in rows for name in (row.encoder_a, row.encoder_b)))
    first = reference if reference is not None else (names[0] if names else "")
    if first not in names:
        raise ValueError(f"cka: no encoder {first!r}; found {', '.join(names) or 'no row at all'}")
    pairs = []
    for row in rows:
        if row.unit != unit or first not in (row.encoder_a, row.encoder_b) or row.encoder_a == row.encoder_b:
            continue
        other = row.encoder_b if row.encoder_a == first else row.encoder_a
        if encoders is None or other in encoders:
            pairs.append((other, row))
    if not pairs:
        raise ValueError(f"cka: no row of unit {unit} with {first} and another encoder; found {', '.join(names)}")
    looks = looks_of(other for other, _ in pairs)
    place = {depth: float(number) for number, depth in enumerate(DEPTHS)}
    groups = list(dict.fromkeys(row.group for _, row in pairs))
    groups.sort(key=lambda group: group == ALL)
    panels = []
    for group in groups:
        of_group = [(other, row) for other, row in pairs if row.group == group]
        least, most = min(row.n for _, row in of_group), max(row.n for _, row in of_group)
        panels.append(
            CurvePanel(
                title="all cohorts" if group == ALL else group,
                xlabel=f"depth; n = {least if least == most else f'{least} to {most}'} {unit}s",
                ylabel=f"CKA with {short(first, 20)}" + (", debiased" if debiased else ""),
                points=[
                    CurvePoint(series=other, x=place[row.depth], estimate=estimate, low=low, high=high)
                    for other, row in of_group
                    for estimate, low, high in [
                        (row.debiased, row.debiased_low, row.debiased_high)
                        if debiased
                        else (row.cka, row.low, row.high)
                    ]
                ],
                tick_labels={number: depth for depth, number in place.items()},
                limits=None if debiased else (0, 1.02),
            )
        )
    table = [
        (
            row.group,
            row.unit,
            first,
            other,
            row.depth,
            row.n,
            row.subjects,
            *_cells(row.cka, row.low, row.high, row.debiased, row.debiased_low, row.debiased_high),
            row.method,
        )
        for other, row in pairs
    ]
    words = "Bars: 95 % jackknife over subjects." if any(math.isfinite(row.low) for _, row in pairs) else ""
    caption = f"Linear CKA of {first} with other encoders, by depth and cohort."
    return Drawing(curve_figure(panels, looks, small_print=words), _CKA_COLUMNS, table, caption)


def similarity_figure(panels: SimilarityPanels, *, title: str = "") -> Drawing:
    """The slice with its reference points, and below it each encoder's similarity with each of them (paper Fig. 6a).

    All maps have one colour scale, and the points are at the same place in all.

    Args:
        panels: maps of one slice.
        title: what the slice is.

    Raises:
        ValueError: no encoder sees the slice.
    """
    tissue = panels.axial.image != 0
    values = panels.maps[..., tissue]
    if not np.isfinite(values).any():
        raise ValueError("similarity: no encoder sees this slice; expected one inside the brain")
    low = math.floor(10 * float(np.nanmin(values))) / 10
    rows, columns = np.flatnonzero(tissue.any(axis=1)), np.flatnonzero(tissue.any(axis=0))
    box = slice(max(0, rows[0] - 4), rows[-1] + 5), slice(max(0, columns[0] - 4), columns[-1] + 5)
    aspect = _aspect(panels)
    count = len(panels.encoders)
    width = min(PAGE_MM, 22 + 34 * len(panels.points))
    side = (width - 22) / len(panels.points)
    ratio = aspect * (box[0].stop - box[0].start) / (box[1].stop - box[1].start)
    table = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(inches(width), inches(side * ratio * (count + 1) + 7)), layout="constrained")
        grid = figure.subplots(count + 1, len(panels.points), squeeze=False)
        image = panels.axial.image
        dark, bright = np.percentile(image[tissue], (1, 99))
        mapped = None
        for column, point in enumerate(panels.points):
            axes = grid[0, column]
            axes.imshow(
                np.where(tissue, image, dark)[box], cmap="gray", vmin=dark, vmax=max(bright, dark + 1e-6), aspect=aspect
            )
            axes.set_title(point.name, fontweight="normal", loc="center")
            for row, encoder in enumerate(panels.encoders):
                shown = np.where(tissue, panels.maps[row, column], np.nan)[box]
                axes = grid[row + 1, column]
                if np.isfinite(shown).any():
                    mapped = axes.imshow(shown, cmap=SIMILARITY_COLOURS, vmin=low, vmax=1, aspect=aspect)
                    outline = np.where(edge(tissue)[box], 0.25, np.nan)
                    axes.imshow(outline, cmap="gray", vmin=0, vmax=1, aspect=aspect)
                else:
                    axes.text(0.5, 0.5, "not seen", transform=axes.transAxes, ha="center", va="center", color=SOFT)
                inside = panels.maps[row, column][tissue]
                inside = inside[np.isfinite(inside)]
                cut = np.quantile(inside, (0, 0.25, 0.5, 0.75, 1)) if len(inside) else np.full(5, np.nan)
                table.append((encoder, point.name, f"{point.row:g}", f"{point.column:g}", len(inside), *_cells(*cut)))
            for axes in grid[:, column]:
                y, x = point.row - box[0].start, point.column - box[1].start
                axes.plot([x], [y], "+", color="black", markersize=7, markeredgewidth=2.2)
                axes.plot([x], [y], "+", color="white", markersize=6, markeredgewidth=0.9, gid=f"point {point.name}")
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set_visible(False)
        grid[0, 0].set_ylabel("slice", fontweight="bold")
        for row, encoder in enumerate(panels.encoders):
            grid[row + 1, 0].set_ylabel(short(encoder, 20), fontweight="bold")
        assert mapped is not None, "some encoder sees the slice"
        bar = figure.colorbar(mapped, ax=grid[1:, :].ravel().tolist(), shrink=0.6, aspect=22, pad=0.02)
        bar.set_label("cosine similarity with the marked token")
        bar.outline.set_visible(False)
        said = f"{title + '. ' if title else ''}Cross: reference point, the same in every panel. One colour scale."
        add_foot(figure, [], said)
    columns_of_table = ("encoder", "point", "row", "column", "pixels", "min", "q25", "median", "q75", "max")
    caption = (
        f"{title + ': ' if title else ''}similarity of patch tokens with reference points; the table summarises the "
        "tissue."
    )
    return Drawing(figure, columns_of_table, table, caption)


def _aspect(panels: SimilarityPanels) -> float:
    """Height of a pixel over its width."""
    row, column = (np.linalg.norm(panels.axial.affine[:3, axis]) for axis in (0, 1))
    return float(row / column)


def _cells(*values: float) -> tuple[str, ...]:
    return tuple("n/a" if math.isnan(value) else f"{value:.6g}" for value in values)
