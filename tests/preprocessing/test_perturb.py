"""Copies of cohorts under perturbations: every file accounted for, nothing combined, nothing lost, nothing redone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from braindino.manifest import read_scans
from braindino.perturbations import Condition, keep_background, perturb, subject_generator
from braindino.preprocessing import perturb as perturb_module
from braindino.preprocessing import prepare
from braindino.preprocessing.perturb import PerturbOptions, main
from braindino.tables import read_table
from braindino.volume import file_grid, load_volume, save_array

CONDITIONS = ("--conditions", "gamma-2", "gibbs-0.3", "bias_field-0.4")
FOLDERS = ("clean", "gamma-2", "gibbs-0.3", "bias_field-0.4")
LAS = np.array([[-4.0, 0, 0, 80], [0, 4.0, 0, -90], [0, 0, 4.0, -70], [0, 0, 0, 1]])


@pytest.fixture
def bids(tmp_path, make_phantom):
    """Two subjects, one stripped with T1 and T2, one with its skull on; masks, tables, a derivative, a BOLD run."""
    root = tmp_path / "study"
    first, second = make_phantom(1), make_phantom(2)
    for name, phantom in (("T1w", first), ("T2w", make_phantom(3))):
        path = root / "sub-01" / "anat" / f"sub-01_{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Stored with its first axis to the left, as OASIS is.
        save_array(phantom.stripped[::-1], LAS, path, dtype=np.int16)
    second.save(root / "sub-02" / "anat" / "sub-02_T1w.nii.gz", stripped=False)
    second.save(root / "sub-02" / "func" / "sub-02_bold.nii.gz", stripped=False)
    (root / "sub-01" / "anat" / "sub-01_T1w.json").write_text('{"RepetitionTime": 2}')
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t50\nsub-02\t60\n")
    (root / "notes.zip").write_bytes(b"PK")
    for path in ("sub-01/anat/sub-01_dseg.nii.gz", "derivatives/tumor/sub-01/anat/sub-01_dseg.nii.gz"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        save_array(first.brain[::-1], LAS, root / path, dtype=np.uint8)
    return root


def run(source, out, *more):
    return main([str(source), "--out", str(out), "--jobs", "0", *CONDITIONS, *map(str, more)])


def rows_of(out):
    return {row["file"]: row for row in read_table(out / "perturb.tsv").rows}


def files_below(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def times_of(folder):
    return {name: path.stat().st_mtime_ns for name, path in files_below(folder).items() if name[0] != "p"}


def test_every_condition_is_a_cohort_with_the_same_files(bids, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(bids, out) == 0
    taken = {
        "participants.tsv",
        "sub-01/anat/sub-01_T1w.json",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-01/anat/sub-01_dseg.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz",
        "derivatives/tumor/sub-01/anat/sub-01_dseg.nii.gz",
    }
    for folder in FOLDERS:
        assert set(files_below(out / folder)) == taken
    assert {path.name for path in out.iterdir()} == {*FOLDERS, "perturb.json", "perturb.tsv"}
    rows = rows_of(out)
    assert set(rows) == taken | {"notes.zip", "sub-02/func/sub-02_bold.nii.gz"}
    assert rows["sub-02/func/sub-02_bold.nii.gz"]["reason"].startswith("other_modality")
    assert rows["notes.zip"]["status"] == "left"
    assert rows["sub-01/anat/sub-01_dseg.nii.gz"]["reason"].startswith("label")
    assert rows["sub-01/anat/sub-01_T1w.nii.gz"]["subject"] == "study/sub-01"
    assert [row["background"] for row in rows.values() if row["status"] == "perturbed"] == ["kept", "kept", ""]
    printed = capsys.readouterr().out
    assert "9 files" in printed
    assert "3 scans under 3 conditions and clean, 4 files copied, 2 left" in printed
    assert "--cohort-name study" in printed


def test_clean_files_tables_and_labels_are_the_same_bytes_and_no_links(bids, tmp_path):
    out = tmp_path / "out"
    run(bids, out)
    for folder in FOLDERS:
        for name, path in files_below(out / folder).items():
            same = path.read_bytes() == (bids / name).read_bytes()
            scan = "dseg" not in name and name.endswith(".nii.gz")
            assert same == (folder == "clean" or not scan), path
            assert path.stat().st_nlink == 1
            assert not path.is_symlink()


def test_scans_are_perturbed_one_way_at_a_time_on_the_grid_of_the_source(bids, tmp_path):
    out = tmp_path / "out"
    run(bids, out)
    for name, key, stripped in (
        ("sub-01/anat/sub-01_T1w.nii.gz", "study/sub-01", True),
        ("sub-02/anat/sub-02_T1w.nii.gz", "study/sub-02", False),
    ):
        original = load_volume(bids / name)
        for condition in (Condition("gamma", 2.0), Condition("gibbs", 0.3), Condition("bias_field", 0.4)):
            expected = perturb(original.data, condition, subject_generator(0, key))
            if stripped:
                expected = keep_background(expected, original.data)
            path = out / condition.name / name
            np.testing.assert_array_equal(load_volume(path).data, expected)
            grid, own = file_grid(bids / name), file_grid(path)
            np.testing.assert_array_equal(own.affine, grid.affine)
            assert own[2:4] == grid[2:4]


def test_the_sequences_of_a_subject_share_their_bias_field(bids, tmp_path):
    out = tmp_path / "out"
    run(bids, out)
    ratios = []
    for sequence in ("T1w", "T2w"):
        name = f"sub-01/anat/sub-01_{sequence}.nii.gz"
        clean, biased = load_volume(bids / name).data, load_volume(out / "bias_field-0.4" / name).data
        ratios.append(np.divide(biased, clean, out=np.ones_like(clean), where=clean > 0))
    inside = (ratios[0] != 1) & (ratios[1] != 1)
    np.testing.assert_allclose(ratios[0][inside], ratios[1][inside], rtol=1e-5)
    assert np.ptp(ratios[0][inside]) > 0.2


def test_ringing_is_left_in_the_background_when_asked_for(bids, tmp_path):
    kept, left = tmp_path / "kept", tmp_path / "left"
    run(bids, kept)
    run(bids, left, "--background", "perturb")
    name = "sub-01/anat/sub-01_T1w.nii.gz"
    clean = load_volume(bids / name).data
    assert (load_volume(kept / "gibbs-0.3" / name).data[clean == 0] == 0).all()
    assert (load_volume(left / "gibbs-0.3" / name).data[clean == 0] != 0).mean() > 0.9
    # A gamma keeps zeros that are the minimum in either case.
    assert (load_volume(left / "gamma-2" / name).data[clean == 0] == 0).all()
    assert rows_of(left)[name]["background"] == ""


def test_prepare_gives_the_conditions_scans_the_identities_of_the_clean_ones(bids, tmp_path):
    out = tmp_path / "out"
    run(bids, out)
    found = {}
    for source in (bids, out / "clean", out / "gamma-2"):
        prepared = tmp_path / "prepared" / source.name
        arguments = [str(source), "--out", str(prepared), "--cohort-name", "study", "--jobs", "0"]
        assert prepare.main(arguments) == 0
        found[source.name] = {
            scan.scan_id: scan for scan in read_scans(prepared / "scans.tsv") if scan.status == "done"
        }
    assert len(found["study"]) == 3
    assert set(found["study"]) == set(found["clean"]) == set(found["gamma-2"])
    hashes = [{scan.content_hash for scan in found[name].values()} for name in ("study", "clean", "gamma-2")]
    assert hashes[0] == hashes[1]
    assert not hashes[0] & hashes[2]


def test_a_second_run_does_nothing_and_a_changed_scan_alone_is_done_again(bids, tmp_path, make_phantom):
    out = tmp_path / "out"
    run(bids, out)
    before = times_of(out)
    table = (out / "perturb.tsv").read_bytes()
    assert run(bids, out) == 0
    assert times_of(out) == before
    assert (out / "perturb.tsv").read_bytes() == table
    time.sleep(0.01)
    make_phantom(9).save(bids / "sub-02" / "anat" / "sub-02_T1w.nii.gz", stripped=False)
    assert run(bids, out) == 0
    changed = {name for name, stamp in times_of(out).items() if before[name] != stamp}
    assert changed == {f"{folder}/sub-02/anat/sub-02_T1w.nii.gz" for folder in FOLDERS}


def test_a_missing_file_is_written_again_and_conditions_can_be_added(bids, tmp_path):
    out = tmp_path / "out"
    run(bids, out)
    before = times_of(out)
    gone = "gamma-2/sub-01/anat/sub-01_T1w.nii.gz"
    content = (out / gone).read_bytes()
    (out / gone).unlink()
    assert run(bids, out, "gibbs-0.1") == 0
    assert (out / gone).read_bytes() == content
    after = times_of(out)
    assert {name for name in before if after[name] != before[name]} == {gone}
    assert len([name for name in after if name.startswith("gibbs-0.1/")]) == 7
    record = json.loads((out / "perturb.json").read_text())
    assert record["conditions"] == [*FOLDERS[1:], "gibbs-0.1"]
    assert set(record["definitions"]) == {"gamma", "gibbs", "bias_field"}
    assert record["settings"]["seed"] == 0


def test_other_settings_never_touch_what_is_there(bids, tmp_path, capsys):
    out = tmp_path / "out"
    run(bids, out)
    before = times_of(out)
    assert run(bids, out, "--seed", 1) == 1
    assert "holds scans made with another seed; give another --out" in capsys.readouterr().err
    assert times_of(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert run(bids, tmp_path / "mine") == 1
    assert "is not empty and holds no perturb.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_bad_scans_are_rows_with_a_reason_and_exit_code_3(bids, tmp_path, capsys, jobs):
    (bids / "sub-03" / "anat").mkdir(parents=True)
    broken = bids / "sub-03" / "anat" / "sub-03_T1w.nii.gz"
    broken.write_bytes((bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz").read_bytes()[:2000])
    disguised = bids / "sub-03" / "anat" / "sub-03_T2w.nii.gz"
    disguised.write_bytes((bids / "sub-01" / "anat" / "sub-01_dseg.nii.gz").read_bytes())
    (bids / "sub-03" / "anat" / "sub-03_FLAIR.nii.gz").symlink_to("nowhere.nii.gz")
    out = tmp_path / "out"
    assert main([str(bids), "--out", str(out), "--jobs", jobs, "--conditions", "gamma-2"]) == 3
    rows = rows_of(out)
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "quarantined"}
    assert reasons.keys() == {f"sub-03/anat/sub-03_{name}.nii.gz" for name in ("T1w", "T2w", "FLAIR")}
    assert reasons["sub-03/anat/sub-03_T1w.nii.gz"].startswith("truncated: the gzip stream breaks off")
    assert reasons["sub-03/anat/sub-03_T2w.nii.gz"].startswith("label_map: holds 2 distinct values")
    assert reasons["sub-03/anat/sub-03_FLAIR.nii.gz"] == "unreadable: No such file or directory"
    assert not (out / "gamma-2" / "sub-03").exists() or not files_below(out / "gamma-2" / "sub-03")
    assert len(files_below(out / "gamma-2")) == 7
    assert "3 that cannot be used" in capsys.readouterr().out


def test_a_file_named_by_pattern_is_copied_as_it_is(bids, tmp_path):
    out = tmp_path / "out"
    assert run(bids, out, "--unperturbed", "sub-01/*/*_T2w.nii.gz") == 0
    name = "sub-01/anat/sub-01_T2w.nii.gz"
    assert rows_of(out)[name]["reason"] == "unperturbed: by pattern"
    assert (out / "gamma-2" / name).read_bytes() == (bids / name).read_bytes()


def test_only_the_listed_subjects_are_perturbed(bids, tmp_path):
    (tmp_path / "held-out.txt").write_text("# test\nstudy/sub-02\n")
    out = tmp_path / "out"
    assert run(bids, out, "--subjects", tmp_path / "held-out.txt") == 0
    assert [name for name, row in rows_of(out).items() if row["status"] == "perturbed"] == [
        "sub-02/anat/sub-02_T1w.nii.gz"
    ]
    assert not (out / "clean" / "sub-01" / "anat" / "sub-01_T1w.nii.gz").exists()
    # Nor anything else of a subject that is not listed: a label map without its scan helps nobody.
    assert {row["subject"] for row in rows_of(out).values()} == {"", "study/sub-02"}
    assert not list((out / "clean").rglob("sub-01*.nii.gz"))
    (tmp_path / "others.txt").write_text("elsewhere/sub-02\n")
    assert run(bids, tmp_path / "none", "--subjects", tmp_path / "others.txt") == 1


def test_nnunet_images_share_the_field_of_their_case_and_labels_stay(tmp_path, make_phantom):
    root = tmp_path / "Dataset001_Tumour"
    for channel in range(2):
        make_phantom(channel).save(root / "imagesTs" / f"CASE_01_000{channel}.nii.gz")
    make_phantom(2).save(root / "imagesTs" / "CASE_02_0000.nii.gz")
    (root / "labelsTs").mkdir()
    save_array(make_phantom(0).brain, make_phantom(0).affine, root / "labelsTs" / "CASE_01.nii.gz", dtype=np.uint8)
    (root / "dataset.json").write_text("{}")
    out = tmp_path / "out"
    assert run(root, out) == 0
    rows = rows_of(out)
    assert {row["subject"] for row in rows.values()} == {"", "Dataset001_Tumour/CASE_01", "Dataset001_Tumour/CASE_02"}
    assert rows["labelsTs/CASE_01.nii.gz"]["status"] == "copied"
    # The folder of images alone, as nnUNetv2_predict takes it.
    assert run(root / "imagesTs", tmp_path / "images") == 0
    assert rows_of(tmp_path / "images")["CASE_01_0001.nii.gz"]["subject"] == "imagesTs/CASE_01"


def test_nnunet_cases_may_be_called_as_in_bids(tmp_path, make_phantom):
    """As those of `braindino nnunet convert-bids` are."""
    for channel in range(2):
        make_phantom(channel).save(tmp_path / "imagesTs" / f"sub-0003_ses-1_000{channel}.nii.gz")
    assert run(tmp_path / "imagesTs", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert {(row["status"], row["subject"]) for row in rows.values()} == {("perturbed", "imagesTs/sub-0003_ses-1")}
    assert len(rows) == 2


def test_what_is_no_nifti_is_to_be_converted_first(tmp_path, capsys):
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "1.dcm").write_bytes(b"\0" * 128 + b"DICM")
    assert run(tmp_path / "dicom", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "no scan to perturb among 1 files" in error
    assert "DICOM, HDF5 and Analyze are converted first" in error
    folder = tmp_path / "oasis" / "disc1" / "OAS1_0001_MR1" / "PROCESSED" / "MPRAGE" / "SUBJ_111"
    folder.mkdir(parents=True)
    for suffix in (".img", ".hdr"):
        (folder / f"OAS1_0001_MR1_mpr_n4_anon_sbj_111{suffix}").write_bytes(b"\0" * 348)
    assert run(tmp_path / "oasis", tmp_path / "out", "--cohort", "oasis-1") == 1
    assert "cohort oasis-1: 1 inputs are no NIfTI files, the first is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wishes_that_make_no_sense_are_refused(bids, tmp_path, capsys):
    cases = (
        ({"conditions": ("gamma-1",)}, "gamma-1: changes nothing; it is written anyway, as clean"),
        ({"conditions": ("blur-1",)}, "expected PERTURBATION-SEVERITY"),
        ({"jobs": -1}, "--jobs: found -1"),
        ({"subject_pattern": "("}, r"--subject-pattern '\('"),
    )
    for wishes, message in cases:
        with pytest.raises(ValueError, match=message):
            PerturbOptions(source=bids, out=tmp_path / "out", **wishes)
    assert main([str(bids / "sub-01"), "--out", str(bids)]) == 1
    assert "holds SOURCE" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_nothing_is_written_through_a_link_that_leads_out_of_the_folder(bids, tmp_path, capsys):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(bids, out)
    for path in files_below(out / "gamma-2").values():
        path.unlink()
    for folder in sorted((out / "gamma-2").rglob("*"), reverse=True):
        folder.rmdir()
    (out / "gamma-2").rmdir()
    (out / "gamma-2").symlink_to(elsewhere)
    assert run(bids, out) == 1
    assert "leads out of" in capsys.readouterr().err
    assert not files_below(elsewhere)


def test_a_killed_run_goes_on_where_it_was(bids, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    arguments = ["--jobs", "1", "--conditions", "gamma-2", "gibbs-0.3", "bias_field-0.4", "bias_field-0.1"]
    assert main([str(bids), "--out", str(undisturbed), *arguments]) == 0
    command = [sys.executable, perturb_module.__file__, str(bids), "--out", str(out), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(Path(out).glob("gibbs-0.3/sub-0*/anat/*.nii.gz")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = times_of(out)
    assert main([str(bids), "--out", str(out), *arguments]) == 0
    after = times_of(out)
    assert all(after[name] == stamp for name, stamp in kept.items() if name[0] not in "." and ".tmp-" not in name)
    one, two = files_below(undisturbed), files_below(out)
    assert one.keys() == two.keys()
    for name in one:
        if not name.startswith("perturb."):
            assert one[name].read_bytes() == two[name].read_bytes(), name
