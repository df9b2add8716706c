"""Sources: every NIfTI-looking file is found once, with the right cohort, and told apart from its namesakes."""

from pathlib import Path

import pytest

from braindino.preprocessing.discovery import describe_inputs, find_inputs


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(*sources: Path | str, out: Path) -> list[str]:
    return [str(item.path) for item in find_inputs([str(source) for source in sources], exclude_dir=out)]


def test_folders_files_and_patterns_find_each_file_once(tmp_path):
    touch(tmp_path, "a/p1/t1.nii.gz", "a/p1/t2.nii", "a/p2/T1.NII.GZ", "a/p2/notes.txt", "b/t1.nii.gz")
    expected = [str(tmp_path / name) for name in ("a/p1/t1.nii.gz", "a/p1/t2.nii", "a/p2/T1.NII.GZ", "b/t1.nii.gz")]
    out = tmp_path / "out"
    assert found(tmp_path, tmp_path / "a", out=out) == expected
    assert found(tmp_path / "b/t1.nii.gz", f"{tmp_path}/a/*/t?.nii*", out=out) == [
        expected[0],
        expected[1],
        expected[3],
    ]
    assert found(f"{tmp_path}/**/t1.nii.gz", out=out) == [expected[0], expected[3]]
    assert found(f"{tmp_path}/a/p[2]", out=out) == [expected[2]]


def test_results_inside_a_source_are_no_inputs(tmp_path):
    touch(tmp_path, "p1/t1.nii.gz", "prepared/masks/0011_mask.nii.gz")
    assert found(tmp_path, out=tmp_path / "prepared") == [str(tmp_path / "p1/t1.nii.gz")]


def test_version_control_inside_a_source_is_no_data_and_hidden_folders_are_left_with_why(tmp_path):
    touch(tmp_path, ".git/annex/objects/MD5E-s1--0.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz", ".trash/sub-02_T1w.nii.gz")
    scans, skipped = describe_inputs(find_inputs([str(tmp_path)], exclude_dir=tmp_path / "out"))
    assert [scan.subject for scan in scans] == ["sub-01"]
    assert [(scan.subject, scan.reason.partition(":")[0]) for scan in skipped] == [("sub-02", "hidden_file")]


def test_linked_folders_are_followed_once(tmp_path):
    touch(tmp_path, "real/p1/t1.nii.gz")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/p1/loop").symlink_to(tmp_path / "real")
    assert found(tmp_path / "source", out=tmp_path / "o") == [str(tmp_path / "source/link/p1/t1.nii.gz")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("empty", "empty: no file ending in .nii or .nii.gz"),
        ("empty/*.nii", "no file ending in .nii or .nii.gz"),
        ("notes.txt", "expected a folder, a pattern, or a file ending in"),
    ],
)
def test_a_wrong_source_is_an_error_that_names_it(tmp_path, source, message):
    touch(tmp_path, "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message.replace("*", r"\*").replace(".", r"\.")):
        found(tmp_path / source, out=tmp_path / "out")


def test_a_bids_dataset_gives_its_name_even_from_one_of_its_folders(tmp_path):
    touch(
        tmp_path / "ds1",
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-1/dwi/sub-01_ses-1_dwi.nii.gz",
        "derivatives/tumor/sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz",
    )
    for source in (tmp_path / "ds1", tmp_path / "ds1/sub-01/ses-1/anat"):
        inputs = find_inputs([str(source)], exclude_dir=tmp_path / "out")
        scans, skipped = describe_inputs(inputs)
        assert [(s.cohort, s.subject, s.session, s.sequence) for s in scans] == [("ds1", "sub-01", "ses-1", "T1")]
        assert len(scans) + len(skipped) == len(inputs)
    whole, left = describe_inputs(find_inputs([str(tmp_path / "ds1")], exclude_dir=tmp_path / "out"), cohort="Study")
    assert [s.cohort for s in (*whole, *left)] == ["Study"] * 3
    assert sorted(s.reason.partition(":")[0] for s in left) == ["derivative", "other_modality"]


def test_visits_that_only_their_folders_tell_apart_become_sessions(tmp_path):
    touch(tmp_path / "c", "P1/2019/T1.nii.gz", "P1/2020/T1.nii.gz", "P2/2019/T1.nii.gz")
    scans, _ = describe_inputs(find_inputs([str(tmp_path / "c")], exclude_dir=tmp_path / "out"))
    assert [(s.subject, s.session) for s in scans] == [("P1", "2019"), ("P1", "2020"), ("P2", "")]
    assert len({s.scan_id for s in scans}) == 3


def test_namesakes_that_nothing_tells_apart_are_refused(tmp_path):
    touch(tmp_path, "one/raw/P1_T1.nii.gz", "two/raw/P1_T1.nii.gz")
    inputs = find_inputs([str(tmp_path / "one/raw"), str(tmp_path / "two/raw")], exclude_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"one/raw/P1_T1.* and .*two/raw/P1_T1.* would both be .*--cohort"):
        describe_inputs(inputs)
