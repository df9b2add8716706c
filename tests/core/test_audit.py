"""``braindino audit``: one volume under many names in two cohorts is found with the right kind."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from braindino.audit import add_fingerprints, main, read_downstream
from braindino.leakage import Exposure, write_exposure
from braindino.manifest import Scan, write_scans
from braindino.volume import save_array

SHAPE = (64, 76, 60)


def brain(seed: int) -> np.ndarray:
    """An ellipsoid with a bright rim, common to all, and an inside of its own: int16."""
    grids = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in SHAPE), indexing="ij")
    radius = np.sqrt(sum(grid**2 for grid in grids))
    own = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), 5)
    return np.where(radius < 1, 500 + 300 * radius + 60 * own / own.std(), 0).astype(np.int16)


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining cohort of two brains, and a folder with one of them in many forms."""
    root = tmp_path_factory.mktemp("audit")
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    rows = []
    for number in range(2):
        path = root / "a" / f"sub-{number}_T1w.nii.gz"
        save_array(brain(number), affine, path, dtype=np.int16)
        rows.append(add_fingerprints(Scan(str(path), "a", f"{number}", sequence="T1")))
    write_exposure(root / "encoder" / "pretrained_on.tsv", Exposure(tuple(rows)))

    data, other = brain(1), root / "b"
    other.mkdir()
    shutil.copy(rows[1].path, other / "renamed.nii.gz")
    raw = gzip.decompress(Path(rows[1].path).read_bytes())
    (other / "recompressed.nii.gz").write_bytes(gzip.compress(raw, compresslevel=1))
    save_array(data, affine, other / "float.nii", dtype=np.float32)
    to_lps = affine @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, -1, 0, SHAPE[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    save_array(data[::-1, ::-1], to_lps, other / "lps.nii.gz", dtype=np.int16)
    inside = data != 0
    small = ndimage.zoom(data.astype(np.float32), 0.8, order=1) * (
        ndimage.zoom(inside.astype(np.float32), 0.8, order=1) > 0.5
    )
    save_array(small, np.diag([2.5, 2.5, 2.5, 1]), other / "resampled.nii.gz", dtype=np.float32)
    save_array(np.where(ndimage.binary_erosion(inside), data, 0), affine, other / "stripped.nii.gz", dtype=np.int16)
    save_array(brain(7), affine, other / "stranger.nii.gz", dtype=np.int16)
    return root


def test_a_volume_under_many_names_is_found_with_the_right_kind(cohorts, tmp_path, capsys):
    files = sorted(path.name for path in (cohorts / "b").iterdir())
    table = cohorts / "b.csv"
    table.write_text("path\n" + "".join(f"b/{name}\n" for name in files))
    assert main([str(cohorts / "encoder"), str(table), "--out", str(tmp_path / "overlaps.tsv")]) == 3
    with (tmp_path / "overlaps.tsv").open(newline="") as handle:
        found = {Path(row["path"]).name: row for row in csv.DictReader(handle, delimiter="\t")}
    kinds = {name: row["kind"] for name, row in found.items()}
    exact = ("renamed.nii.gz", "recompressed.nii.gz", "float.nii", "lps.nii.gz")
    near = ("resampled.nii.gz", "stripped.nii.gz")
    assert kinds == {name: "same_voxels" for name in exact} | {name: "looks_the_same" for name in near}
    assert {(row["seen_cohort"], row["seen_subject"]) for row in found.values()} == {("a", "1")}
    assert all(0 < int(found[name]["distance"]) <= 128 for name in near)
    out = capsys.readouterr().out
    assert "pretrained on 2 scans; to test on 7 scans of 7 subjects" in out
    assert "OVERLAP: 6 of 7 subjects" in out
    assert "not checked: 7 of 7 scans to test on have no subject: ids cannot be compared" in out


def test_nothing_in_common_is_said_and_passes(cohorts, capsys):
    table = cohorts / "clean.tsv"
    table.write_text("path\tcohort\tsubject\nb/stranger.nii.gz\tb\t1\n")
    assert main([str(cohorts / "encoder"), str(table)]) == 0
    assert capsys.readouterr().out.endswith("no overlap found\n")


def test_ids_alone_are_compared_and_what_they_cannot_decide_is_told(cohorts, tmp_path, capsys):
    seen = [Scan("", "gli", f"BraTS-GLI-0000{n}-000", content_hash=f"c{n}", appearance_hash="0" * 128) for n in (1, 2)]
    write_exposure(tmp_path / "pretrained_on.tsv", Exposure(tuple(seen)))
    (tmp_path / "t.csv").write_text("cohort,subject\nbrats,BraTS2021_00002\nUPENN,UPENN-GBM-00001_11\n")
    assert main([str(tmp_path), str(tmp_path / "t.csv"), "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert result["counts"] == {
        "same_voxels": 0, "looks_the_same": 0, "same_subject": 0, "same_subject_by_crosswalk": 1,
    }  # fmt: skip
    (overlap,) = result["overlaps"]
    assert (overlap["subject"], overlap["seen_subject"], overlap["certainty"]) == (
        "BraTS2021_00002", "BraTS-GLI-00002-000", "probable",
    )  # fmt: skip
    assert any("brats-gli against upenn-gbm" in line for line in result["not_checked"])
    assert any(line.startswith("2 of 2 scans to test on have no content hash") for line in result["not_checked"])
    # The table that joins the two collections: one more is found, certain where the year's number is.
    (tmp_path / "map.csv").write_text("TCIA PatientID,BraTS2021 ID\nUPENN-GBM-00001,BraTS2021_00001\n")
    main([str(tmp_path), str(tmp_path / "t.csv"), "--json", "--crosswalk", str(tmp_path / "map.csv")])
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["same_subject_by_crosswalk"] == 2
    assert not any("brats-gli against upenn-gbm" in line for line in result["not_checked"])


def test_a_prepared_folder_brings_its_fingerprints_and_only_its_done_scans(tmp_path):
    done = Scan("/gone/1.nii.gz", "a", "1", content_hash="c", appearance_hash="0" * 128)
    write_scans(tmp_path / "scans.tsv", [done, Scan("/gone/2.nii.gz", "a", "2", status="skipped", reason="r")])
    assert read_downstream(tmp_path) == ([done], [])


def test_a_scan_that_cannot_be_read_is_told_and_the_rest_go_on(cohorts, capsys):
    (cohorts / "broken.nii.gz").write_bytes(b"\x1f\x8bnothing")
    table = cohorts / "some.csv"
    table.write_text("path,cohort,subject\nbroken.nii.gz,b,1\nb/renamed.nii.gz,b,2\ngone.nii.gz,a,0\n")
    assert main([str(cohorts / "encoder"), str(table)]) == 3
    out = capsys.readouterr().out
    assert "not checked: not read: " in out and "broken.nii.gz: " in out
    # A subject is compared by its id even where its file is gone.
    assert "same_subject (certain): a/0 = a/0 T1" in out and "OVERLAP: 2 of 3" in out


def test_a_scan_with_its_skull_gets_no_appearance(tmp_path):
    rng = np.random.default_rng(0)
    save_array(rng.integers(1, 900, (20, 22, 18)), np.eye(4), tmp_path / "head.nii", dtype=np.int16)
    scan = add_fingerprints(Scan(str(tmp_path / "head.nii"), "a", "1"))
    assert len(scan.content_hash) == 32 and scan.appearance_hash == ""


def test_mistakes_end_in_one_message(cohorts, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("file\nx\n")
    assert main([str(cohorts / "encoder"), str(tmp_path / "t.csv")]) == 1
    assert "found columns ['file']; expected path, or cohort and subject, or both" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("path\n")
    assert main([str(cohorts / "encoder"), str(tmp_path / "t.csv")]) == 1
    assert "no scan in it" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "t.csv")]) == 1
    assert "nobody wrote down" in capsys.readouterr().err
