import math
from dataclasses import replace

import pytest

from braindino.robustness_table import (
    COLUMNS,
    RobustnessRow,
    format_robustness,
    read_robustness,
    write_robustness,
)

CLEAN = RobustnessRow(
    task="adni",
    encoder="ours",
    metric="macro_auc",
    better="higher",
    perturbation="gamma",
    severity=1.0,
    clean=True,
    n_subjects=20,
    n_cases=31,
    estimate=0.69,
    low=0.61,
    high=0.77,
    method="95 % percentile bootstrap",
)
DARK = replace(
    CLEAN,
    severity=2.0,
    clean=False,
    n_cases=30,
    n_missing=1,
    estimate=0.63,
    change=-0.0612345678,
    change_low=-0.1,
    change_high=-0.02,
    p=0.0,
    warnings="two\tlines\nof doubt",
)


def test_rows_come_back_as_they_were_to_six_digits(tmp_path):
    write_robustness([CLEAN, DARK], tmp_path / "robustness.tsv")
    clean, dark = read_robustness(tmp_path / "robustness.tsv")
    assert math.isnan(clean.change)
    assert math.isnan(clean.p)
    assert replace(clean, change=0, change_low=0, change_high=0, p=0) == replace(
        CLEAN, change=0, change_low=0, change_high=0, p=0
    )
    assert dark == replace(DARK, change=-0.0612346, warnings="two lines of doubt")


def test_the_table_has_a_column_for_every_field_in_order(tmp_path):
    write_robustness([CLEAN], tmp_path / "robustness.tsv")
    header, line = (tmp_path / "robustness.tsv").read_text().splitlines()
    assert tuple(header.split("\t")) == COLUMNS
    assert line.split("\t")[:9] == ["adni", "ours", "1", "", "macro_auc", "higher", "gamma", "1", "1"]
    assert "n/a" in line.split("\t")


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("clean", "yes", "line 2: clean: found 'yes'; expected 0 or 1"),
        ("better", "more", "line 2: better: found 'more'; expected higher or lower"),
        ("n_cases", "n/a", "line 2: n_cases: found 'n/a'; expected a number"),
        ("estimate", "good", "line 2: estimate: found 'good'; expected a number"),
    ],
)
def test_a_cell_of_another_kind_is_named_with_its_line(tmp_path, column, text, message):
    path = tmp_path / "robustness.tsv"
    write_robustness([CLEAN], path)
    header, line = path.read_text().splitlines()
    cells = line.split("\t")
    cells[COLUMNS.index(column)] = text
    path.write_text("\n".join([header, "\t".join(cells), ""]))
    with pytest.raises(ValueError, match=message):
        read_robustness(path)


def test_a_table_without_rows_or_columns_is_refused(tmp_path):
    write_robustness([], tmp_path / "none.tsv")
    with pytest.raises(ValueError, match="no row; expected the table that `braindino robustness` writes"):
        read_robustness(tmp_path / "none.tsv")
    (tmp_path / "other.tsv").write_text("task\tencoder\n")
    with pytest.raises(ValueError, match=r"columns .* are missing"):
        read_robustness(tmp_path / "other.tsv")


def test_the_text_for_a_terminal_tells_clean_from_perturbed_and_what_is_missing():
    header, clean, dark = format_robustness([CLEAN, DARK]).splitlines()
    assert header.startswith("encoder")
    assert "1 (clean)" in clean
    assert clean.endswith("0.690 [0.610, 0.770]")
    assert "30 (1 missing)" in dark
    assert "-0.061 [-0.100, -0.020]" in dark
    assert dark.endswith("<0.0005")
