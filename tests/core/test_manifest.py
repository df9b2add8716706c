"""Rows of scans.tsv, identities, and brains read back through their masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from braindino.manifest import COLUMNS, Scan, load_brain, mask_path, read_scans, write_scans
from braindino.volume import save_array, save_mask_like

SCAN = Scan(path="/raw/a b/sub-1_T1w.nii.gz", cohort="ixi", subject="1", session="2", sequence="T1", num_slices=5)


def test_the_columns_are_those_that_others_script_against() -> None:
    first = "path cohort subject session sequence status reason num_slices seconds"
    assert " ".join(COLUMNS) == f"{first} source content_hash appearance_hash"


def test_rows_survive_a_round_trip(tmp_path: Path) -> None:
    rows = [SCAN, replace(SCAN, subject="é", status="quarantined", reason="unreadable: a\ttab, a\nbreak", seconds=1.25)]
    write_scans(tmp_path / "scans.tsv", rows)
    back = read_scans(tmp_path / "scans.tsv")
    assert back[0] == SCAN
    assert back[1].reason == "unreadable: a tab, a break" and back[1].seconds == 1.25 and back[1].subject == "é"


def test_a_damaged_table_names_file_and_line(tmp_path: Path) -> None:
    write_scans(tmp_path / "scans.tsv", [SCAN])
    text = (tmp_path / "scans.tsv").read_text()
    (tmp_path / "scans.tsv").write_text(text.replace("\t5\t", "\tfive\t"))
    with pytest.raises(ValueError, match=r"scans.tsv, line 2: .*five"):
        read_scans(tmp_path / "scans.tsv")
    (tmp_path / "scans.tsv").write_text(text.replace("cohort", "dataset"))
    with pytest.raises(ValueError, match=r"columns \['cohort'\] are missing"):
        read_scans(tmp_path / "scans.tsv")


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match="found 'lost'; expected one of"):
        replace(SCAN, status="lost")


def test_identity_ignores_the_folder_and_the_outcome_but_nothing_else() -> None:
    assert SCAN.scan_id == replace(SCAN, path="/elsewhere/sub-1_T1w.nii.gz", status="skipped", reason="x").scan_id
    others = [
        replace(SCAN, cohort="x"),
        replace(SCAN, subject="x"),
        replace(SCAN, session="x"),
        replace(SCAN, sequence="T2"),
        replace(SCAN, path="/raw/other.nii.gz"),
    ]
    assert len({SCAN.scan_id, *(other.scan_id for other in others)}) == 6
    assert len(SCAN.scan_id) == 16 and SCAN.subject_key == "ixi/1"


def test_a_brain_is_read_through_its_mask_when_there_is_one(tmp_path: Path) -> None:
    data = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 4)
    path = tmp_path / "scan.nii.gz"
    save_array(data, np.diag([-1.0, -1, 1, 1]), path, dtype=np.float32)  # LPS
    scan = replace(SCAN, path=str(path))
    np.testing.assert_array_equal(load_brain(tmp_path, scan).data, data[::-1, ::-1])
    mask = data[::-1, ::-1] > 12
    save_mask_like(mask, path, mask_path(tmp_path, scan))
    np.testing.assert_array_equal(load_brain(tmp_path, scan).data, np.where(mask, data[::-1, ::-1], 0))
    save_array(np.ones((2, 2, 2)), np.eye(4), mask_path(tmp_path, scan), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"grid \(2, 2, 2\) differs"):
        load_brain(tmp_path, scan)
