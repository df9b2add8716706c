import pytest

from braindino.label_table import NoColumnError, labels_of, read_labels
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
    with pytest.raises(NoColumnError, match=r"no label table has a column 'age': .*t.tsv has \['subject', 'Age'\]"):
        read_labels([tmp_path / "t.tsv"], "age")
    with pytest.raises(
        ValueError, match=r"expected a label table \(.tsv, .csv\) or a BIDS folder with participants.tsv"
    ):
        read_labels([tmp_path / "empty"], "age")
    (tmp_path / "t.tsv").write_text("patient\tage\n01\t40\n")
    with pytest.raises(ValueError, match=r"line 2: no subject; expected a column subject or participant_id"):
        read_labels([tmp_path / "t.tsv"], "age")
