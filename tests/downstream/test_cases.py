import numpy as np
import pytest

from braindino.downstream.cases import select_cases
from braindino.downstream.protocols import make_jobs, make_splits
from braindino.downstream.task_table import Protocol, load_task
from braindino.manifest import SEQUENCES, Scan


def scan(subject, session="", cohort="c", sequence="T1"):
    return Scan(f"/{subject}{session}{sequence}.nii.gz", cohort, subject, session, sequence)


def test_an_age_in_days_is_refused_with_its_place(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tage\n01\t14600\n02\t40\n")
    with pytest.raises(ValueError, match=r"line 2: age_years 14600 is outside 0 to 120 years; is the column in"):
        select_cases(load_task("brain_age"), [scan("01"), scan("02")], [tmp_path / "t.tsv"])


def test_an_age_that_is_no_number_is_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tage\n01\t89+\n")
    with pytest.raises(ValueError, match=r"age_years '89\+'; expected a number in years, or n/a"):
        select_cases(load_task("brain_age"), [scan("01")], [tmp_path / "t.tsv"])


def test_scans_without_a_label_or_of_another_sequence_are_counted(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tage\n01\t30\n02\t40\n03\tn/a\n")
    scans = [scan("02"), scan("01"), scan("03"), scan("04"), scan("01", sequence="T2")]
    cases = select_cases(load_task("brain_age"), scans, [tmp_path / "t.tsv"])
    assert [case.subject for case in cases.all_scans] == ["01", "02"]
    assert cases.targets.tolist() == [30.0, 40.0]
    assert cases.left_out == {"sequence T2": 1, "no age_years": 2}


def test_the_sequence_task_reads_the_scan_itself():
    scans = [scan("01", sequence=name) for name in ("T2", "T1", "unknown", "FLAIR", "T1c")]
    cases = select_cases(load_task("sequence"), scans, [])
    assert [(case.sequence, target) for case, target in zip(cases.all_scans, cases.targets, strict=True)] == [
        ("FLAIR", 3), ("T1", 0), ("T1c", 1), ("T2", 2)
    ]  # fmt: skip
    assert cases.left_out == {"sequence unknown": 1}


def test_values_that_are_not_part_of_a_task_are_counted_and_unknown_ones_refused(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("subject\tdiagnosis\n01\tCN\n02\tMCI\n03\tAD\n")
    scans = [scan("01"), scan("02"), scan("03")]
    cases = select_cases(load_task("adni_cn_ad"), scans, [table])
    assert cases.targets.tolist() == [0, 1]
    assert cases.left_out == {"diagnosis MCI is not part of the task": 1}
    table.write_text("subject\tdiagnosis\n01\tCN\n02\tDementia\n")
    with pytest.raises(ValueError, match=r"line 3: diagnosis 'Dementia'; expected one of CN, AD, or n/a"):
        select_cases(load_task("adni_cn_ad"), scans, [table])


def test_codes_that_a_spreadsheet_wrote_as_decimals_are_the_classes_meant(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tdementia\n01\t0.0\n02\t1.0\n")
    assert select_cases(load_task("oasis"), [scan("01"), scan("02")], [tmp_path / "t.tsv"]).targets.tolist() == [0, 1]


def test_days_after_the_stroke_beyond_the_range_of_the_task_are_left_out(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tdays_after_stroke\n01\t3\n02\t180\n03\t2000\n")
    scans = [scan("01"), scan("02"), scan("03")]
    cases = select_cases(load_task("atlas"), scans, [tmp_path / "t.tsv"])
    assert cases.targets.tolist() == [3.0, 180.0]
    assert cases.left_out == {"days_after_stroke outside 0 to 180 days": 1}
    assert len(select_cases(load_task("atlas_all"), scans, [tmp_path / "t.tsv"])) == 3


def test_the_event_decides_what_survival_means(tmp_path):
    (tmp_path / "t.tsv").write_text(
        "subject\tos_days\tdeath\tdeath_within_365_days\n01\t100\t1\t1\n02\t500\t1\t0\n03\t200\t0\tn/a\n"
    )
    scans = [scan(subject, sequence=sequence) for subject in ("01", "02", "03") for sequence in SEQUENCES]
    real = select_cases(load_task("os_cox"), scans, [tmp_path / "t.tsv"])
    assert real.targets.tolist() == [[100, 1], [500, 1], [200, 0]]
    assert real.ids == ["c/01", "c/02", "c/03"] and {len(group) for group in real.scans} == {4}
    paper = select_cases(load_task("os_cox_365"), scans, [tmp_path / "t.tsv"])
    assert paper.targets.tolist() == [[100, 1], [500, 0]] and paper.left_out == {"no death_within_365_days": 1}


def test_a_subject_has_one_survival_however_many_sessions(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tos_days\tdeath\n01\t100\t1\n02\t500\t0\n")
    scans = [scan("01", session=s, sequence=q) for s in ("a", "b") for q in SEQUENCES]
    scans += [scan("02", sequence=q) for q in SEQUENCES]
    cases = select_cases(load_task("os_cox"), scans, [tmp_path / "t.tsv"])
    assert cases.ids == ["c/01/a", "c/02"]
    assert cases.left_out == {"a later session of the same subject, who dies once": 1}


def test_nested_subsets_and_test_subjects_never_meet_whatever_the_split_and_seed():
    scans = [Scan(f"/{s}{q}{v}.nii", "c", f"s{s}", f"v{v}", q) for s in range(9) for q in SEQUENCES for v in range(2)]
    task = load_task("sequence")
    cases = select_cases(task, scans, [])
    person_of = {subject: subject for subject in cases.subjects}
    protocol = Protocol(kind="repeated", num_splits=5, test_fraction=0.3)
    splits = make_splits(task, cases, protocol=protocol, test_subjects=None, person_of=person_of)
    jobs = make_jobs(cases, splits, ratios=(0.2, 0.6, 1.0), seeds=(0, 1))
    assert len(jobs) == 30 and len({tuple(split.test) for split in splits}) > 1
    for small, middle, full in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        assert set(small.train) < set(middle.train) < set(full.train)
        assert not set(full.train) & set(full.test) and len(full.train) + len(full.test) == len(scans)
        assert np.array_equal(small.test, full.test)


def test_classes_are_divided_in_proportion(tmp_path):
    scans = [scan(f"{number:03d}") for number in range(100)]
    rows = [f"{number:03d}\t{('CN', 'AD')[number % 5 == 0]}" for number in range(100)]
    (tmp_path / "t.tsv").write_text("\n".join(["subject\tdiagnosis", *rows, ""]))
    task = load_task("adni_cn_ad")
    cases = select_cases(task, scans, [tmp_path / "t.tsv"])
    person_of = {subject: subject for subject in cases.subjects}
    for protocol in (Protocol(test_fraction=0.2), Protocol(kind="kfold", num_splits=5)):
        for split in make_splits(task, cases, protocol=protocol, test_subjects=None, person_of=person_of):
            tested = cases.targets[cases.rows_of(cases.subjects, split.test)]
            assert (len(tested), tested.sum()) == (20, 4)
