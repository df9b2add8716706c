from pathlib import Path

import numpy as np
import pytest
import yaml

from braindino.downstream import strata
from braindino.downstream.strata import Stratum, assign_strata, strata_of_bins

ADNI_AGES = strata_of_bins([(55, 64), (65, 74), (75, 84), (85, None)])
BRAIN_AGES = strata_of_bins([(0, 9), (10, 29), (30, 49), (50, 69), (70, None)])


def test_a_bin_holds_whole_units_and_the_last_one_may_be_open():
    assert ADNI_AGES[0] == Stratum("55-64", 55.0, 65.0) and ADNI_AGES[3] == Stratum("85+", 85.0, np.inf)
    assert [stratum.name for stratum in BRAIN_AGES] == ["0-9", "10-29", "30-49", "50-69", "70+"]


@pytest.mark.parametrize(("task", "paper"), [("adni_cn_ad", ADNI_AGES), ("brain_age", BRAIN_AGES)])
def test_the_task_table_divides_ages_as_the_paper_does(task: str, paper: tuple[Stratum, ...]):
    table = yaml.safe_load(Path(strata.__file__).with_name("tasks").joinpath(f"{task}.yaml").read_text())
    ages = np.arange(0, 120, 0.25)
    found = assign_strata(ages, strata_of_bins([(low, high) for low, high in table["strata"]["bins"]]))
    expected = assign_strata(ages, paper)
    for rows, rows_of_paper in zip(found.rows.values(), expected.rows.values(), strict=True):
        np.testing.assert_array_equal(rows, rows_of_paper)
    np.testing.assert_array_equal(found.outside, expected.outside)


def test_every_case_is_in_its_stratum_or_said_to_be_outside():
    ages = [64.99, 65, 54.9, 85, 101.5, np.nan, 55.0, 74.999]
    assignment = assign_strata(ages, ADNI_AGES)
    found = {name: rows.tolist() for name, rows in assignment.rows.items()}
    assert found == {"55-64": [0, 6], "65-74": [1, 7], "75-84": [], "85+": [3, 4]}
    assert assignment.outside.tolist() == [2, 5]
    nobody = assign_strata([], BRAIN_AGES)
    assert all(not len(rows) for rows in nobody.rows.values()) and not len(nobody.outside)


def test_bins_that_are_empty_overlap_or_are_missing_are_refused():
    with pytest.raises(ValueError, match="bin 10-9 is empty; expected the lowest value first"):
        strata_of_bins([(10, 9)])
    with pytest.raises(ValueError, match="bin 9-20 begins within or below 0-9"):
        strata_of_bins([(0, 9), (9, 20)])
    with pytest.raises(ValueError, match="found no bins"):
        strata_of_bins([])
