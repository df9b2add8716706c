import pytest

from braindino.downstream.evaluation import select_cases
from braindino.downstream.tasks import TASKS
from braindino.label_table import labels_of, read_labels
from braindino.manifest import Scan


def scan(subject, session="", cohort="c", sequence="T1"):
    return Scan(f"/{subject}{session}{sequence}.nii.gz", cohort, subject, session, sequence)


def ages(scans, *sources):
    return [label.text for label in labels_of(scans, read_labels(sources, "age")).values()]


def test_a_session_label_goes_before_its_subject_in_a_bids_folder(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\nsub-02\t50\nsub-03\tn/a\n")
    (tmp_path / "sub-01" / "ses-b").mkdir(parents=True)
    (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-a\t40.5\n")
    (tmp_path / "sub-01" / "ses-b" / "sessions.tsv").write_text("age\n42\n")
    scans = [scan("01", "a"), scan("01", "b"), scan("01", "c"), scan("sub-02", "ses-a"), scan("03")]
    assert ages(scans, tmp_path) == ["40.5", "42", "40", "50"]


def test_a_csv_with_subject_and_session_is_read(tmp_path):
    (tmp_path / "t.csv").write_text("subject,session,age\n01,a,40\n01,b,41\n")
    assert ages([scan("01", "b"), scan("01", "a"), scan("01", "c")], tmp_path / "t.csv") == ["41", "40"]


def test_rows_that_contradict_each_other_are_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tage\n01\t40\n01\t41\n")
    with pytest.raises(ValueError, match=r"line 3: age '41' of subject '01'.* contradicts '40' in .*line 2"):
        read_labels([tmp_path / "t.tsv"], "age")


def test_a_label_that_fits_two_cohorts_is_refused_until_the_table_names_them(tmp_path):
    scans = [scan("01", cohort="ixi"), scan("01", cohort="pixar")]
    (tmp_path / "t.tsv").write_text("subject\tage\n01\t40\n")
    with pytest.raises(ValueError, match=r"subject '01' is a subject of each of the cohorts \['ixi', 'pixar'\]"):
        ages(scans, tmp_path / "t.tsv")
    (tmp_path / "t.tsv").write_text("cohort\tsubject\tage\nixi\t01\t40\npixar\t01\t7\n")
    assert ages(scans, tmp_path / "t.tsv") == ["40", "7"]


def test_a_missing_column_or_folder_is_named(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tAge\n01\t40\n")
    with pytest.raises(ValueError, match=r"no label table has a column 'age': .*t.tsv has \['subject', 'Age'\]"):
        read_labels([tmp_path / "t.tsv"], "age")
    with pytest.raises(
        ValueError, match=r"expected a label table \(.tsv, .csv\) or a BIDS folder with participants.tsv"
    ):
        read_labels([tmp_path / "empty"], "age")
    (tmp_path / "t.tsv").write_text("patient\tage\n01\t40\n")
    with pytest.raises(ValueError, match=r"line 2: no subject; expected a column subject or participant_id"):
        read_labels([tmp_path / "t.tsv"], "age")


def test_an_age_in_days_is_refused_with_its_place(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tage\n01\t14600\n02\t40\n")
    scans = [scan("01"), scan("02")]
    labels = labels_of(scans, read_labels([tmp_path / "t.tsv"], "age"))
    with pytest.raises(ValueError, match=r"line 2: age 14600 is outside 0 to 120 years; is the column in another unit"):
        select_cases(TASKS["brain_age"], scans, labels)


def test_an_age_that_is_no_number_is_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tage\n01\t89+\n")
    labels = labels_of([scan("01")], read_labels([tmp_path / "t.tsv"], "age"))
    with pytest.raises(ValueError, match=r"age '89\+'; expected a number in years, or n/a"):
        select_cases(TASKS["brain_age"], [scan("01")], labels)


def test_scans_without_a_label_or_of_another_sequence_are_counted(tmp_path):
    (tmp_path / "t.tsv").write_text("subject\tage\n01\t30\n02\t40\n03\tn/a\n")
    scans = [scan("02"), scan("01"), scan("03"), scan("04"), scan("01", sequence="T2")]
    cases = select_cases(TASKS["brain_age"], scans, labels_of(scans, read_labels([tmp_path / "t.tsv"], "age")))
    assert [case.subject for case in cases.scans] == ["01", "02"]
    assert cases.targets.tolist() == [30.0, 40.0]
    assert cases.left_out == {"no age": 2, "sequence T2": 1}


def test_the_sequence_task_reads_the_scan_itself():
    scans = [scan("01", sequence=name) for name in ("T2", "T1", "unknown", "FLAIR", "T1c")]
    cases = select_cases(TASKS["sequence"], scans, {})
    assert [(case.sequence, target) for case, target in zip(cases.scans, cases.targets, strict=True)] == [
        ("FLAIR", 3), ("T1", 0), ("T1c", 1), ("T2", 2)
    ]  # fmt: skip
    assert cases.left_out == {"sequence unknown": 1}
