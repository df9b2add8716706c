"""Paper figures: what is drawn are the numbers of the tables, and series can be told apart without colour."""

import csv
import math
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from braindino.patch_maps import AxialSlice, SimilarityPanels, SlicePoint
from braindino.report import figure
from braindino.report.curve_panels import CurvePanel, CurvePoint, CurveTest, curve_figure
from braindino.report.print_style import LOOKS, MAX_SERIES, Drawing, looks_of, p_words, short, stars
from braindino.report.representation_figures import cka_figure, similarity_figure
from braindino.report.robustness_figures import perturbation_figure
from braindino.report.segmentation_figures import contour_figure, cut_case, dice_ratio_figure
from braindino.report.survival_figures import survival_figure
from braindino.report.task_figures import (
    PredictedValue,
    agreement_figure,
    knn_figure,
    ratio_figure,
    read_task_run,
    reliability_figure,
    strata_figure,
)
from braindino.representation_tables import CkaRow, write_cka
from braindino.robustness_table import RobustnessRow, write_robustness
from braindino.segmentation_scores import (
    Comparison,
    OverviewRow,
    RegionSummary,
    SegmentationScores,
    read_comparisons,
    read_overview,
    write_comparisons,
    write_overview,
)
from braindino.task_summary import COLUMNS, write_task_summary
from braindino.task_tables import (
    CalibrationRow,
    ComparisonRow,
    ReliabilityRow,
    StratumRow,
    SurvivalRow,
    SurvivalStep,
    write_rows,
)
from braindino.volume import save_array

NAN = math.nan


def write_task(folder: Path, rows: list[dict], comparisons=(), strata=()) -> Path:
    """EVAL/TASK with a summary of the given rows; what they leave out is the same in all."""
    shared = dict.fromkeys(COLUMNS, "") | {
        "ratio": "1",
        "metric": "auc",
        "baseline": "0.500",
        "baseline_low": "0.500",
        "baseline_high": "0.500",
        "baseline_name": "chance",
        "train_subjects": "48",
        "test_subjects": "20",
        "seeds": "3",
        "interval": "bootstrap",
        "pretraining_overlap": "none",
        "clinical": "n/a",
        "clinical_low": "n/a",
        "clinical_high": "n/a",
        "splits": "1",
        "permutation_p": "n/a",
    }
    folder.mkdir(parents=True)
    write_task_summary(folder / "summary.tsv", [shared | row for row in rows])
    write_rows(folder / "comparisons.tsv", ComparisonRow, comparisons)
    if strata:
        write_rows(folder / "strata.tsv", StratumRow, strata)
    return folder


def compared(second: str, p: float, *, ratio=1.0, variant="", stratum="", method="paired bootstrap") -> ComparisonRow:
    return ComparisonRow(
        ratio=ratio,
        variant=variant,
        stratum=stratum,
        first="ours",
        second=second,
        what="auc",
        difference=0.1,
        low=0.0,
        high=0.2,
        p=p,
        p_holm=p,
        n=20,
        method=method,
    )


@pytest.fixture
def ratio_task(tmp_path) -> Path:
    rows = [
        {
            "encoder": name,
            "ratio": ratio,
            "train_subjects": str(round(48 * float(ratio))),
            "estimate": estimate,
            "low": low,
            "high": high,
        }
        for name, ratio, estimate, low, high in (
            ("ours", "0.1", "0.700", "0.600", "0.800"),
            ("theirs", "0.1", "0.600", "0.550", "0.650"),
            ("ours", "1", "0.900", "0.850", "0.950"),
            ("theirs", "1", "n/a", "n/a", "n/a"),
        )
    ]
    return write_task(tmp_path / "eval" / "adni", rows, [compared("theirs", 0.004, ratio=0.1), compared("theirs", 0.2)])


def series(axes, name: str) -> list[tuple[float, float]]:
    """The points of a series, as they are drawn."""
    (line,) = [line for line in axes.lines if line.get_gid() == f"series {name}"]
    return list(zip(*(np.asarray(values, dtype=float).tolist() for values in line.get_data()), strict=True))


def table_of(drawing: Drawing) -> list[dict[str, str]]:
    return [dict(zip(drawing.columns, map(str, row), strict=True)) for row in drawing.rows]


def words(drawing: Drawing) -> str:
    found = drawing.figure.findobj(mpl.text.Text)
    return "\n".join(text.get_text() for text in found)


def prose(drawing: Drawing) -> str:
    """All words without the breaks of lines."""
    return " ".join(words(drawing).split())


def test_ratio_curves_are_drawn_at_the_numbers_of_the_table(ratio_task):
    drawing = ratio_figure([read_task_run(ratio_task)])
    (axes,) = drawing.figure.axes
    assert [y for _, y in series(axes, "ours")] == [0.7, 0.9]
    assert [y for _, y in series(axes, "theirs")] == [0.6]
    intervals = {tuple(line.get_ydata()) for line in axes.lines if len(set(line.get_xdata())) == 1}
    assert {(0.6, 0.8), (0.55, 0.65), (0.85, 0.95)} <= intervals
    assert [row["estimate"] for row in table_of(drawing)] == ["0.7", "0.6", "0.9", "n/a"]


def test_stars_stand_where_the_tests_are_and_say_what_they_mean(ratio_task):
    drawing = ratio_figure([read_task_run(ratio_task)])
    marks = {text.xy[0]: text.get_text() for text in drawing.figure.axes[0].texts if text.get_text() in ("**", "ns")}
    assert marks == {10.0: "**", 100.0: "ns"}
    assert "ours against the marked" in prose(drawing)
    assert [row["mark"] for row in table_of(drawing)] == ["", "**", "", "ns"]
    assert "100 % = 48 subjects; tested on 20" in prose(drawing)


def test_a_missing_number_is_shown_as_missing(ratio_task):
    drawing = ratio_figure([read_task_run(ratio_task)])
    (hollow,) = [line for line in drawing.figure.axes[0].lines if line.get_gid() == "missing theirs"]
    assert hollow.get_xdata()[0] == 100.0 and hollow.get_fillstyle() == "none"
    assert "Hollow on the axis: no value." in prose(drawing)


def test_the_corrected_test_is_marked_where_splits_share_subjects(tmp_path):
    folder = write_task(
        tmp_path / "adni",
        [{"encoder": name, "estimate": "0.7", "low": "0.6", "high": "0.8"} for name in ("ours", "theirs")],
        [compared("theirs", 0.001, method="paired t"), compared("theirs", 0.03, method="corrected resampled t test")],
    )
    assert [row["mark"] for row in table_of(ratio_figure([read_task_run(folder)]))] == ["", "*"]


def test_neighbours_are_drawn_over_k_at_the_most_labels(tmp_path):
    rows = [
        {
            "encoder": name,
            "ratio": ratio,
            "variant": f"k={k}",
            "metric": "accuracy",
            "estimate": f"{value}",
            "low": "0.5",
            "high": "0.9",
        }
        for ratio, k, name, value in (
            ("0.1", 1, "ours", 0.1),
            ("1", 1, "ours", 0.6),
            ("1", 50, "ours", 0.8),
            ("1", 1, "b", 0.5),
            ("1", 50, "b", 0.7),
        )
    ]
    folder = write_task(tmp_path / "knn_adni", rows, [compared("b", 0.0, variant="k=50")])
    drawing = knn_figure([read_task_run(folder)])
    (axes,) = drawing.figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "50"]
    assert [y for _, y in series(axes, "ours")] == [0.6, 0.8]
    assert [row["mark"] for row in table_of(drawing)] == ["", "", "", "***"]
    with pytest.raises(ValueError, match=r"summary\.tsv: every row is of a variant \(k=1\); expected label ratios"):
        ratio_figure([read_task_run(folder)])


def test_strata_show_their_subjects_and_no_lines_between_them(tmp_path):
    strata = [
        StratumRow(
            encoder=name,
            ratio=1.0,
            variant="",
            stratum=stratum,
            metric="auc",
            estimate=value,
            low=value - 0.1,
            high=value + 0.1,
            subjects=n,
            method="bootstrap",
        )
        for name, stratum, value, n in (
            ("ours", "55-64", 0.7, 31),
            ("ours", "85+", 0.6, 4),
            ("b", "55-64", 0.65, 31),
            ("b", "85+", 0.66, 4),
        )
    ]
    rows = [{"encoder": name, "estimate": "0.7", "low": "0.6", "high": "0.8"} for name in ("ours", "b")]
    tests = [compared("b", 0.02, stratum="55-64"), compared("b", 1.0, stratum="85+")]
    drawing = strata_figure([read_task_run(write_task(tmp_path / "adni", rows, tests, strata))])
    (axes,) = drawing.figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["55–64\nn = 31", "85+\nn = 4"]
    assert [y for _, y in series(axes, "b")] == [0.65, 0.66]
    assert {line.get_linestyle() for line in axes.lines if (line.get_gid() or "").startswith("series")} == {"None"}
    assert [row["mark"] for row in table_of(drawing)] == ["", "", "*", "ns"]


def survival_tables() -> tuple[list[SurvivalRow], list[SurvivalStep]]:
    """Two groups of three, by hand: high risk dies at 1 and 2, low risk at 4; the others leave."""
    high = [(1.0, 3, 1, 0, 2 / 3), (2.0, 2, 1, 0, 1 / 3), (3.0, 1, 0, 1, 1 / 3)]
    low = [(2.0, 3, 0, 1, 1.0), (4.0, 2, 1, 0, 0.5), (5.0, 1, 0, 1, 0.5)]
    steps = [
        SurvivalStep(
            encoder="ours",
            ratio=1.0,
            group=group,
            time=time,
            at_risk=n,
            events=d,
            left=c,
            survival=s,
            low=max(0.0, s - 0.3),
            high=min(1.0, s + 0.3),
        )
        for group, curve in (("high risk", high), ("low risk", low))
        for time, n, d, c, s in curve
    ]
    groups = [
        SurvivalRow(
            encoder="ours",
            ratio=1.0,
            group=group,
            cases=3,
            events=events,
            median=median,
            median_low=1.0,
            median_high=math.inf,
            chi_squared=3.1,
            p=0.031,
            method="log-rank",
        )
        for group, events, median in (("high risk", 2, 2.0), ("low risk", 1, 4.0))
    ]
    return groups, steps


def test_survival_curves_step_at_their_times_with_numbers_at_risk_p_and_medians():
    drawing = survival_figure(*survival_tables(), unit="days")
    (axes,) = drawing.figure.axes
    (curve,) = [line for line in axes.lines if line.get_gid() == "curve high risk"]
    assert curve.get_drawstyle() == "steps-post"
    assert list(curve.get_xdata()) == [0, 1, 2, 3] and list(curve.get_ydata()) == pytest.approx(
        [1, 2 / 3, 1 / 3, 1 / 3]
    )
    (censored,) = [line for line in axes.lines if line.get_gid() == "censored low risk"]
    assert list(censored.get_xdata()) == [2, 5] and list(censored.get_ydata()) == [1.0, 0.5]
    assert "p = 0.031 *\nmedian 2 / 4" in words(drawing)
    below = {(text.xy[0], text.get_position()[1]): text.get_text() for text in axes.texts if text.get_text().isdigit()}
    heights = sorted({height for _, height in below}, reverse=True)
    ticks = sorted({x for x, _ in below})
    # Under observation just before each tick: of those who leave or die at it too.
    assert [[below[x, height] for x in ticks] for height in heights] == [
        [str(sum(time >= x for time in times)) for x in ticks] for times in ((1, 2, 3), (2, 4, 5))
    ]


def test_a_survival_figure_may_end_early_and_says_so():
    drawing = survival_figure(*survival_tables(), until=3)
    assert drawing.figure.axes[0].get_xlim() == (0, 3) and "The axis ends at 3 days." in words(drawing).replace(
        "\n", " "
    )
    with pytest.raises(ValueError, match=r"none of the encoders and ratios asked for; found ours at 1"):
        survival_figure(*survival_tables(), encoders=["theirs"])


def robustness_rows() -> list[RobustnessRow]:
    return [
        RobustnessRow(
            task="adni",
            encoder=name,
            metric="auc",
            better="higher",
            perturbation=kind,
            severity=severity,
            clean=severity == 0,
            n_subjects=20,
            n_cases=25,
            estimate=value,
            low=value - 0.05,
            high=value + 0.05,
            p=NAN if severity == 0 else 0.0005,
        )
        for name, drop in (("ours", 0.1), ("theirs", 0.3))
        for kind in ("gibbs", "bias_field")
        for severity in (0.0, 0.2, 0.4)
        for value in [0.9 - drop * severity]
    ]


def test_perturbation_bars_are_as_high_as_the_estimates_and_differ_in_hatching():
    rows = robustness_rows()
    drawing = perturbation_figure(rows)
    first = drawing.figure.axes[0]
    heights = {patch.get_gid(): patch.get_height() for patch in first.patches}
    assert heights == {f"{row.encoder} {row.severity:g}": row.estimate for row in rows if row.perturbation == "gibbs"}
    assert len({patch.get_hatch() for patch in first.patches}) == 2
    assert [label.get_text() for label in first.get_xticklabels()] == ["0\nclean", "0.2", "0.4"]
    assert sum(text.get_text() == "***" for text in first.texts) == 4
    lines = perturbation_figure(rows, style="lines")
    assert [y for _, y in series(lines.figure.axes[0], "theirs")] == pytest.approx([0.9, 0.84, 0.78])
    assert table_of(lines) == table_of(drawing)


def test_a_condition_without_a_value_is_crossed():
    rows = [row for row in robustness_rows() if (row.encoder, row.severity) != ("theirs", 0.4)]
    first = perturbation_figure(rows).figure.axes[0]
    assert [text.get_text() for text in first.texts].count("×") == 1


def cka_rows() -> list[CkaRow]:
    return [
        CkaRow(
            group=group,
            unit="scan",
            depth=depth,
            encoder_a="ours",
            encoder_b=other,
            n=40,
            subjects=20,
            dim_a=4,
            dim_b=4,
            cka=value,
            low=value - 0.1,
            high=value + 0.05,
            debiased=value - 0.2,
            debiased_low=NAN,
            debiased_high=NAN,
            method="jackknife",
        )
        for group, shift in (("ixi", 0.0), ("brats", -0.3))
        for other, start in (("dinov3", 0.8), ("bm-mae", 0.4))
        for depth, more in (("early", 0.0), ("mid", 0.05), ("late", 0.1))
        for value in [start + more + shift]
    ]


def test_cka_is_drawn_over_depth_for_every_cohort_and_from_either_side():
    drawing = cka_figure(cka_rows())
    ixi, brats = drawing.figure.axes
    assert [y for _, y in series(ixi, "dinov3")] == pytest.approx([0.8, 0.85, 0.9])
    assert [y for _, y in series(brats, "bm-mae")] == pytest.approx([0.1, 0.15, 0.2])
    assert "n = 40 scans" in ixi.get_xlabel()
    turned = cka_figure(cka_rows(), reference="dinov3")
    assert [y for _, y in series(turned.figure.axes[0], "ours")] == pytest.approx([0.8, 0.85, 0.9])
    unbiased = cka_figure(cka_rows(), debiased=True).figure.axes[0]
    assert [y for _, y in series(unbiased, "dinov3")] == pytest.approx([0.6, 0.65, 0.7])
    with pytest.raises(ValueError, match=r"no encoder 'x'; found ours, dinov3, bm-mae"):
        cka_figure(cka_rows(), reference="x")


def similarity() -> SimilarityPanels:
    image = np.zeros((40, 40), dtype=np.float32)
    image[5:35, 8:32] = 1 + np.arange(24) / 24
    maps = np.full((3, 2, 40, 40), 0.5, dtype=np.float32)
    maps[0, 0, 20, 20], maps[1, 1, 20, 20] = 0.97, -0.42
    maps[2] = np.nan
    points = (SlicePoint("tumour", 10.0, 12.0), SlicePoint("CSF", 30.0, 20.0))
    axial = AxialSlice(image, 7, np.eye(4))
    return SimilarityPanels(axial, points, ("ours", "theirs", "blind"), maps, np.zeros((3, 40, 40, 3)), np.zeros(3))


def test_similarity_panels_have_one_scale_and_the_points_at_one_place():
    drawing = similarity_figure(similarity())
    panels = [
        axes for axes in drawing.figure.axes if any((line.get_gid() or "").startswith("point") for line in axes.lines)
    ]
    assert len(panels) == 8
    scales = {axes.images[0].get_clim() for axes in panels[2:] if axes.images}
    assert scales == {(-0.5, 1)}
    places = {
        line.get_gid(): (line.get_xdata()[0], line.get_ydata()[0])
        for axes in panels
        for line in axes.lines
        if line.get_gid()
    }
    # The panels are cut to the tissue with four pixels around it.
    assert places == {"point tumour": (12 - 4, 10 - 1), "point CSF": (20 - 4, 30 - 1)}
    assert words(drawing).count("not seen") == 2
    rows = {(row["encoder"], row["point"]): row for row in table_of(drawing)}
    assert rows["ours", "tumour"]["max"] == "0.97" and rows["theirs", "CSF"]["min"] == "-0.42"
    assert rows["blind", "CSF"]["pixels"] == "0" and rows["blind", "CSF"]["median"] == "n/a"


def test_similarity_colours_keep_their_order_in_grey():
    colours = mpl.colormaps["viridis"](np.linspace(0, 1, 64))[:, :3]
    assert (np.diff(colours @ (0.2126, 0.7152, 0.0722)) > 0).all()


def write_case(folder: Path) -> dict[str, Path]:
    """8 x 8 x 3 voxels; the reference has 8 voxels on slice 1, the prediction 6 of them and 2 others."""
    image = np.arange(1, 193, dtype=np.float32).reshape(8, 8, 3)
    reference, prediction = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    reference[2:4, 2:6, 1] = 1
    reference[2, 2, 1] = 2
    prediction[2:4, 3:7, 1] = 1
    paths = {"image": image, "reference": reference, "prediction": prediction}
    for name, data in paths.items():
        save_array(data, np.eye(4), folder / f"{name}.nii.gz", dtype=data.dtype)
    return {name: folder / f"{name}.nii.gz" for name in paths}


def test_contours_are_those_of_the_slice_with_most_of_the_reference_and_dice_is_of_the_case(tmp_path):
    paths = write_case(tmp_path)
    cut = cut_case("c", paths["image"], paths["reference"], {"p": paths["prediction"]}, {"WT": (1, 2), "ET": (2,)})
    assert cut.index == 1 and cut.masks["reference"]["WT"].sum() == 8
    assert cut.dice["p"]["WT"] == 2 * 6 / 16 and cut.dice["p"]["ET"] == 0
    # Row 0 is anterior (high y), column 0 the patient's right (low x in RAS): both axes are turned.
    np.testing.assert_array_equal(
        cut.masks["reference"]["WT"].any(axis=1), [False, False, True, True, True, True, False, False]
    )
    drawing = contour_figure([cut])
    assert [row["dice"] for row in table_of(drawing)] == ["0.750", "0.000"]
    assert len(drawing.figure.axes) == 3 and "0.750\n0.000" in words(drawing)


def test_a_prediction_on_another_grid_is_refused(tmp_path):
    paths = write_case(tmp_path)
    save_array(np.zeros((4, 8, 3), np.uint8), np.eye(4), tmp_path / "small.nii.gz", dtype=np.uint8)
    with pytest.raises(ValueError, match=r"small\.nii\.gz: grid \(4, 8, 3\) differs from that of .*reference\.nii\.gz"):
        cut_case("c", paths["image"], paths["reference"], {"p": tmp_path / "small.nii.gz"}, {"WT": (1, 2)})


def overview() -> tuple[list[OverviewRow], list[Comparison]]:
    rows = [
        OverviewRow(name, ratio, "Dice", "WT", 5, mean, 0.1, mean, mean - 0.05, mean + 0.05, 0.08)
        for name, ratio, mean in (
            ("ours_r10", 0.1, 0.6),
            ("theirs_r10", 0.1, 0.5),
            ("ours", 1.0, 0.8),
            ("theirs", 1.0, 0.7),
        )
    ]
    return rows, [
        Comparison("Dice", "WT", 0.1, "ours_r10", "theirs_r10", 0.1, 0.0, 0.2, 0.01, 0.02, 5, 5, 0, 0.04, 0.05)
    ]


def test_dice_over_label_ratios_joins_the_predictions_of_one_trainer():
    drawing = dice_ratio_figure(*overview())
    (axes,) = drawing.figure.axes
    assert [y for _, y in series(axes, "ours")] == [0.6, 0.8] and [y for _, y in series(axes, "theirs")] == [0.5, 0.7]
    assert [row["mark"] for row in table_of(drawing)] == ["", "*", "", ""]


def test_tables_of_segmentation_scores_are_read_as_they_were_written(tmp_path):
    rows, comparisons = overview()
    summary = {"WT": RegionSummary(0.6, 0.1, 5, 0.08, 0.6, 0.55, 0.65)}
    write_overview({"ours_r10": SegmentationScores({}, summary)}, {"ours_r10": 0.1}, tmp_path / "scores.tsv")
    assert read_overview(tmp_path / "scores.tsv") == [rows[0]._replace(low=0.55, high=0.65)]
    write_comparisons(comparisons, tmp_path / "comparison.tsv")
    assert read_comparisons(tmp_path / "comparison.tsv") == comparisons
    text = (tmp_path / "scores.tsv").read_text().replace("0.5500", "much")
    (tmp_path / "scores.tsv").write_text(text)
    with pytest.raises(ValueError, match=r"scores\.tsv, line 2: found 'much'; expected a number"):
        read_overview(tmp_path / "scores.tsv")


def calibration(encoder: str, slope: float) -> CalibrationRow:
    return CalibrationRow(
        encoder=encoder,
        what="w",
        intercept=1.0,
        intercept_low=0.0,
        intercept_high=2.0,
        slope=slope,
        slope_low=slope - 0.1,
        slope_high=slope + 0.1,
        subjects=9,
        method="m",
    )


def test_calibration_shows_the_filled_bins_and_the_slope():
    bins = [
        ReliabilityRow(
            encoder="ours", positive="AD", low=low, high=low + 0.5, n=n, mean_predicted=mean, observed_share=share
        )
        for low, n, mean, share in ((0.0, 4, 0.2, 0.25), (0.5, 0, NAN, NAN))
    ]
    drawing = reliability_figure("adni", bins, [calibration("ours", 0.7)])
    assert series(drawing.figure.axes[0], "ours") == [(0.2, 0.25)]
    assert [patch.get_height() for patch in drawing.figure.axes[1].patches] == [4, 0]
    assert "ours, slope 0.70" in words(drawing)


def test_numbers_are_drawn_beside_the_truth():
    values = [PredictedValue(encoder="ours", case=f"{n}", target=20.0 + n, predicted=25.0 + n / 2) for n in range(5)]
    drawing = agreement_figure("brain_age", "years", values, [calibration("ours", 0.5)])
    assert series(drawing.figure.axes[0], "ours") == [(value.target, value.predicted) for value in values]
    assert "slope 0.50\n[0.40, 0.60]" in words(drawing) and "n = 5 cases" in prose(drawing)


def test_series_are_told_apart_in_grey_by_marker_dashes_and_hatching():
    for part in ("marker", "dashes", "hatch", "colour"):
        assert len({str(getattr(look, part)) for look in LOOKS}) == MAX_SERIES == len(LOOKS)
    luminance = [np.dot(to_rgb(look.colour), (0.2126, 0.7152, 0.0722)) for look in LOOKS]
    assert max(luminance) < 0.62, "lines on white need to be dark enough"


def test_more_series_than_can_be_told_apart_are_refused():
    with pytest.raises(ValueError, match=r"9 series in one figure .*expected at most 8.*--encoders"):
        looks_of(map(str, range(9)))


def test_marks_follow_the_tiers_of_the_paper():
    assert [stars(p) for p in (0.0, 0.0009, 0.001, 0.009, 0.01, 0.049, 0.05, 1.0, NAN)] == [
        "***",
        "***",
        "**",
        "**",
        "*",
        "*",
        "ns",
        "ns",
        "",
    ]
    assert [p_words(p) for p in (0.0, 0.0004, 0.0123, 0.5, NAN)] == [
        "p < 0.001",
        "p < 0.001",
        "p = 0.012",
        "p = 0.50",
        "p n/a",
    ]
    assert short("a" * 40) == "a" * 13 + "…" + "a" * 14 and short("b") == "b"


@pytest.mark.parametrize("names", [["ours"], [f"a-rather-long-name-of-an-encoder-{n}" for n in range(8)]])
def test_nothing_overlaps_and_nothing_leaves_the_figure(names):
    panels = [
        CurvePanel(
            title="task",
            xlabel="labels (%)",
            ylabel="AUC",
            tick_labels={x: f"{x:g}" for x in (10.0, 20.0, 100.0)},
            floor=0.5,
            points=[
                CurvePoint(series=name, x=x, estimate=0.6 + 0.03 * n, low=0.55, high=0.9)
                for n, name in enumerate(names)
                for x in (10.0, 20.0, 100.0)
            ],
            tests=[CurveTest(series=name, x=x, p=0.0) for name in names[1:] for x in (10.0, 20.0)],
        )
    ] * 2
    figure_ = curve_figure(panels, looks_of(names), small_print="Bars: 95 % intervals. " * 6)
    figure_.set_dpi(300)
    canvas = FigureCanvasAgg(figure_)
    canvas.draw()
    width, height = canvas.get_width_height()
    # Ticks beyond the ends of an axis have a text that is not drawn.
    unseen = {
        label
        for axes in figure_.axes
        for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not ends[0] <= tick.get_loc() <= ends[1] or not label.get_visible()
    }
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in figure_.findobj(lambda each: isinstance(each, mpl.text.Text) and each.get_visible())
        if text.get_text().strip() and text not in unseen
    ]
    for said, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, said
    for place, (said, box) in enumerate(boxes):
        for other, second in boxes[place + 1 :]:
            overlap = min(box.x1, second.x1) - max(box.x0, second.x0), min(box.y1, second.y1) - max(box.y0, second.y0)
            assert min(overlap) < 3, f"{said!r} lies on {other!r}"
    for axes in figure_.axes:
        left, right = axes.get_xlim()
        for name in names:
            assert all(left <= x <= right for x, _ in series(axes, name))


def test_four_files_are_written_with_their_fonts_and_are_the_same_every_time(ratio_task, tmp_path, capsys):
    for name in ("one", "two"):
        assert figure.main(["ratios", str(ratio_task), "--out", str(tmp_path / name / "fig.3")]) == 0
    said = capsys.readouterr().out
    for ending in ("tsv", "pdf", "svg", "png"):
        assert f"fig.3.{ending}" in said
        assert (tmp_path / "one" / f"fig.3.{ending}").read_bytes() == (
            tmp_path / "two" / f"fig.3.{ending}"
        ).read_bytes()
    pdf = (tmp_path / "one" / "fig.3.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Subtype /Type3" not in pdf and b"CreationDate" not in pdf
    with Image.open(tmp_path / "one" / "fig.3.png") as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert image.width == pytest.approx(89 / 25.4 * 300, abs=1)
    with (tmp_path / "one" / "fig.3.tsv").open() as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert [(row["encoder"], row["ratio"], row["estimate"]) for row in rows][:2] == [
        ("ours", "0.1", "0.7"),
        ("theirs", "0.1", "0.6"),
    ]


def test_every_figure_from_tables_has_its_verb(tmp_path):
    write_cka(tmp_path / "cka.tsv", cka_rows())
    write_robustness(robustness_rows(), tmp_path / "robustness.tsv")
    groups, steps = survival_tables()
    write_rows(tmp_path / "os" / "survival.tsv", SurvivalRow, groups)
    write_rows(tmp_path / "os" / "survival_curves.tsv", SurvivalStep, steps)
    for arguments in (
        ["cka", str(tmp_path / "cka.tsv")],
        ["robustness", str(tmp_path / "robustness.tsv"), "--style", "lines"],
        ["survival", str(tmp_path / "os"), "--until", "4"],
    ):
        assert figure.main([*arguments, "--out", str(tmp_path / "f" / arguments[0])]) == 0
        assert (tmp_path / "f" / f"{arguments[0]}.pdf").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ratios", "{here}"], r"no summary\.tsv; expected a task's folder as `braindino evaluate` writes it"),
        (["survival", "{here}"], r"no survival\.tsv; expected a survival task"),
        (["calibration", "{here}"], r"no calibration\.tsv; expected a task with two classes or of numbers"),
        (["cka", "{here}/table.tsv"], r"table\.tsv: columns .* are missing"),
        (["robustness", "{here}/table.tsv"], r"table\.tsv: columns .* are missing"),
        (["dice", "{here}"], r"no scores\.tsv; expected a folder that `braindino segment-eval` wrote"),
        (["strata", "{task}"], r"no rows in strata\.tsv; expected a task with strata"),
        (["knn", "{task}"], r"no row of a variant k=\.\.\.; expected a task of nearest neighbours"),
        (["ratios", "{task}", "--metric", "mae"], r"no row of metric mae; found auc"),
        (["ratios", "{task}", "--encoders", "x"], r"no row of the encoders asked for; found ours, theirs"),
        (["contours", "{here}", "--images", "{here}", "--references", "{here}", "--cases", "c"], r"no dataset\.json"),
    ],
)
def test_wrong_inputs_are_named_with_what_was_expected(ratio_task, tmp_path, capsys, arguments, message):
    (tmp_path / "table.tsv").write_text("a\tb\n1\t2\n")
    filled = [text.format(here=tmp_path, task=ratio_task) for text in arguments]
    assert figure.main([*filled, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert (re.search(message, error) and str(tmp_path) in error) or "found" in error
    assert re.search(message, error)
    assert not (tmp_path / "out.pdf").exists()


@pytest.fixture(scope="module")
def labelled_scan(tmp_path_factory) -> tuple[str, str]:
    """An ellipsoid of 4 mm voxels with two parts on its middle slice, and its labels: paths."""
    folder = tmp_path_factory.mktemp("labelled")
    index = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 48, 36)), indexing="ij"), axis=-1)
    inside = np.linalg.norm(index / 0.9, axis=-1) < 1
    values = np.where(inside, 200 + 100 * index[..., 0] + 50 * np.sin(9 * index[..., 1]), 0)
    labels = np.zeros(values.shape, dtype=np.int16)
    labels[8:14, 20:26, 18] = 1
    labels[24:32, 20:24, 18] = 2
    labels[24:32, 24:28, 18] = 3
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    save_array(values, affine, folder / "scan.nii.gz", dtype=np.float32)
    save_array(labels, affine, folder / "labels.nii.gz", dtype=np.int16)
    return str(folder / "scan.nii.gz"), str(folder / "labels.nii.gz")


def test_points_of_similarity_are_found_by_rule_in_tissues_or_where_one_says(labelled_scan, tmp_path):
    scan, labels = labelled_scan
    encoders = ["--encoders", "random=untrained:vit_tiny"]

    def points_of(*arguments: str) -> list[str]:
        assert figure.main(["similarity", scan, *encoders, *arguments, "--out", str(tmp_path / "f")]) == 0
        with (tmp_path / "f.tsv").open() as handle:
            return list(dict.fromkeys(row["point"] for row in csv.DictReader(handle, delimiter="\t")))

    assert points_of("--labels", labels) == ["tumour", "darkest", "brightest"]
    both = ["--tissues", "left part=1", "right part=2,3", "--points", "mine=100,120.5"]
    assert points_of("--labels", labels, *both) == ["left part", "right part", "mine"]
    assert points_of("--points", "here=128,128") == ["here"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tissues", "CSF=1"], r"--tissues: they are parts of a segmentation; give it as --labels"),
        (["--labels", "{labels}", "--tissues", "CSF"], r"--tissues: found 'CSF'; expected NAME=LABEL"),
        (["--labels", "{labels}", "--tissues", "CSF=9"], r"CSF: no pixel of this slice has label 9; found 0, 1, 2, 3"),
        (["--points", "CSF=120"], r"--points: found 'CSF=120'; expected NAME=ROW,COLUMN"),
        (["--points", "CSF=120,256"], r"--points: CSF=120,256 lies beside the slice, which has 256 x 256 pixels"),
        (["--points", "CSF=nan,3"], r"--points: CSF=nan,3 lies beside the slice"),
    ],
)
def test_wrong_points_of_similarity_are_named(labelled_scan, tmp_path, capsys, arguments, message):
    scan, labels = labelled_scan
    given = [text.format(labels=labels) for text in arguments]
    command = ["similarity", scan, "--encoders", "random=untrained:vit_tiny", *given, "--out", str(tmp_path / "f")]
    assert figure.main(command) == 1
    assert re.search(message, capsys.readouterr().err)
