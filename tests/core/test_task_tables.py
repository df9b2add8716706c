"""The tables beside summary.tsv come back as they were written."""

import math

import pytest

from braindino.resampling import p_text
from braindino.task_tables import (
    CalibrationRow,
    ComparisonRow,
    SurvivalRow,
    SurvivalStep,
    read_predictions,
    read_rows,
    write_rows,
)

COMPARISON = ComparisonRow(
    ratio=0.1, variant="k=5", stratum="85+", first="ours", second="theirs", what="auc", difference=-0.125, low=-0.25,
    high=math.nan, p=0.0, p_holm=0.012, n=19, method="paired bootstrap",
)  # fmt: skip


def test_rows_come_back_as_they_were_written(tmp_path):
    write_rows(tmp_path / "comparisons.tsv", ComparisonRow, [COMPARISON])
    assert (tmp_path / "comparisons.tsv").read_text().splitlines()[1] == (
        "0.1\tk=5\t85+\tours\ttheirs\tauc\t-0.125\t-0.250\tn/a\t<0.0005\t0.012\t19\tpaired bootstrap"
    )
    (row,) = read_rows(tmp_path / "comparisons.tsv", ComparisonRow)
    assert math.isnan(row.high) and (row.p, row.p_holm, row.n) == (0.0, 0.012, 19)
    assert (row.ratio, row.variant, row.difference) == (0.1, "k=5", -0.125)


def test_a_median_that_is_never_reached_stays_infinite(tmp_path):
    row = SurvivalRow(
        encoder="e", ratio=1.0, group="low risk", cases=3, events=1, median=math.inf, median_low=2.0,
        median_high=math.inf, chi_squared=1.5, p=0.22, method="log-rank",
    )  # fmt: skip
    write_rows(tmp_path / "survival.tsv", SurvivalRow, [row])
    assert read_rows(tmp_path / "survival.tsv", SurvivalRow) == [row]


def test_times_keep_their_digits(tmp_path):
    step = SurvivalStep(
        encoder="e",
        ratio=0.4,
        group="high risk",
        time=1234.5,
        at_risk=3,
        events=1,
        left=0,
        survival=0.5,
        low=0.25,
        high=0.75,
    )
    write_rows(tmp_path / "survival_curves.tsv", SurvivalStep, [step])
    assert read_rows(tmp_path / "survival_curves.tsv", SurvivalStep) == [step]


def test_a_damaged_table_is_named_with_its_line(tmp_path):
    path = tmp_path / "comparisons.tsv"
    write_rows(path, ComparisonRow, [COMPARISON])
    path.write_text(path.read_text().replace("-0.125", "less"))
    with pytest.raises(ValueError, match=r"comparisons\.tsv, line 2: difference: found 'less'; expected a number"):
        read_rows(path, ComparisonRow)
    with pytest.raises(ValueError, match=r"columns .*intercept.* are missing.*`braindino evaluate` writes"):
        read_rows(path, CalibrationRow)


def test_predictions_that_are_cut_short_or_another_table_are_named(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text("split,seed,ratio,variant,case,subject,target,predicted\n0,0,1,,a,s,T1,T2\n")
    assert read_predictions(path)[0]["predicted"] == "T2"
    path.write_text(path.read_text() + "0,0,1,,b\n")
    with pytest.raises(ValueError, match=r"predictions\.csv, line 3: expected as many cells as in the header"):
        read_predictions(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"predictions\.csv: columns .*'split'.* are missing"):
        read_predictions(path)


def test_p_is_written_with_two_digits_and_never_as_zero():
    assert [p_text(p) for p in (0.0, 0.00021, 0.0123, 1.0, math.nan)] == ["<0.0005", "2.1e-04", "0.012", "1", "n/a"]
