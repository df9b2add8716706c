"""``braindino split``: subjects that a model has seen are not held out, and a person stays on one side."""

from pathlib import Path

import pytest

from braindino import hold_out
from braindino.leakage import Exposure, write_exposure
from braindino.manifest import Scan, write_scans
from braindino.splits import read_subjects


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Ten people of UPENN-GBM, the first three with a follow-up that is a subject of its own."""
    names = [f"UPENN-GBM-{n:05d}_11" for n in range(10)] + [f"UPENN-GBM-{n:05d}_21" for n in range(3)]
    write_scans(tmp_path / "scans.tsv", [Scan(f"/x/{name}.nii", "upenn", name, sequence="T1") for name in names])
    return tmp_path


def split(folder: Path, *options: str) -> int:
    arguments = ["--prepared", str(folder), "--out", str(folder / "held.txt"), "--test-fraction", "0.4", *options]
    return hold_out.main(arguments)


def test_baseline_and_follow_up_of_a_person_are_held_out_together(prepared: Path) -> None:
    for seed in range(5):
        assert split(prepared, "--seed", str(seed)) == 0
        held = read_subjects(prepared / "held.txt")
        assert len({key[:-3] for key in held}) == 4
        for number in range(3):
            assert len({f"upenn/UPENN-GBM-{number:05d}_{visit}" in held for visit in (11, 21)}) == 1


def test_subjects_that_were_pretrained_on_are_refused_by_name_or_said_in_the_list(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert split(prepared) == 0
    held = read_subjects(prepared / "held.txt")
    number = held[0].removeprefix("upenn/UPENN-GBM-")[:5]
    # Seen as a BraTS case, which a table tells.
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure((Scan("", "brats", "BraTS2021_00077"),)))
    (tmp_path / "map.csv").write_text(f"TCIA PatientID,BraTS2021 ID\nUPENN-GBM-{number},BraTS2021_00077\n")
    options = ("--pretrained-on", str(tmp_path / "encoder"))
    assert split(prepared, *options) == 0
    capsys.readouterr()
    options += ("--crosswalk", str(tmp_path / "map.csv"))
    (prepared / "held.txt").unlink()
    assert split(prepared, *options) == 1
    error = capsys.readouterr().err
    assert f"{held[0]} (same_subject_by_crosswalk: brats/BraTS2021_00077)" in error and "--allow-overlap" in error
    assert not (prepared / "held.txt").exists()
    assert split(prepared, *options, "--allow-overlap") == 0
    assert read_subjects(prepared / "held.txt") == held
    assert "test subjects: same_subject_by_crosswalk " in (prepared / "held.txt").read_text().splitlines()[0]
