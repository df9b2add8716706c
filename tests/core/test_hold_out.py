"""``braindino split``: subjects that a model has seen are not held out, and a person stays on one side."""

from dataclasses import replace
from pathlib import Path

import pytest

from braindino import hold_out
from braindino.leakage import Exposure, write_exposure
from braindino.manifest import Scan, read_scans, write_scans
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


def key(number: int, visit: int = 11) -> str:
    return f"upenn/UPENN-GBM-{number:05d}_{visit}"


def test_subjects_that_a_model_has_seen_under_any_name_are_not_drawn(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert split(prepared) == 0
    drawn = [number for number in range(10) if key(number) in read_subjects(prepared / "held.txt")]
    seen_as_brats = drawn[0]
    seen_by_name = next(number for number in range(3) if number != seen_as_brats)
    exposure = (Scan("", "brats", "BraTS2021_00077"), Scan("", "upenn", f"UPENN-GBM-{seen_by_name:05d}_21"))
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure(exposure))
    (tmp_path / "map.csv").write_text(f"TCIA PatientID,BraTS2021 ID\nUPENN-GBM-{seen_as_brats:05d},BraTS2021_00077\n")
    options = ("--pretrained-on", str(tmp_path / "encoder"), "--crosswalk", str(tmp_path / "map.csv"))
    seen = {subject for number in (seen_as_brats, seen_by_name) for subject in (key(number), key(number, 21))}
    for seed in range(10):
        capsys.readouterr()
        assert split(prepared, *options, "--seed", str(seed)) == 0
        held = read_subjects(prepared / "held.txt")
        # Four of ten persons, as if nobody had been seen.
        assert not seen & set(held) and len({subject[:-3] for subject in held}) == 4
    printed = capsys.readouterr().out
    num_seen = sum(number < 3 for number in (seen_as_brats, seen_by_name)) + 2
    assert f"{num_seen} of 13 subjects are left to train on (--allow-overlap draws from them, too): " in printed
    assert "same_subject 1" in printed and "same_subject_by_crosswalk" in printed
    assert f"pretraining overlap with {tmp_path / 'encoder'}: none" in printed
    first = (prepared / "held.txt").read_text().splitlines()[0]
    assert f"; {num_seen} subjects that were pretrained on are not among them; pretraining overlap with" in first
    assert "encoder: none; " in first

    assert split(prepared, *options, "--allow-overlap") == 0
    assert {key(seen_as_brats)} <= set(read_subjects(prepared / "held.txt"))
    first = (prepared / "held.txt").read_text().splitlines()[0]
    assert "test subjects: same_subject" in first and "are not among them" not in first


def test_other_ids_of_a_person_whose_scan_was_seen_are_not_drawn_either(prepared: Path, tmp_path: Path) -> None:
    # The baseline's voxels are known from another cohort; nothing but the person joins the follow-up to them.
    scans = [replace(scan, content_hash=f"hash {scan.subject}") for scan in read_scans(prepared / "scans.tsv")]
    write_scans(prepared / "scans.tsv", scans)
    seen = tuple(Scan("", "gli", f"x{n}", content_hash=f"hash UPENN-GBM-{n:05d}_11") for n in range(3))
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure(seen))
    for seed in range(5):
        assert split(prepared, "--pretrained-on", str(tmp_path / "encoder"), "--seed", str(seed)) == 0
        held = read_subjects(prepared / "held.txt")
        assert len(held) == 4 and not any(key(n, visit) in held for n in range(3) for visit in (11, 21))


def test_too_few_subjects_that_were_not_seen_are_an_error_with_numbers(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--pretrained-on", str(tmp_path / "encoder"))
    exposure = [Scan("", "upenn", f"UPENN-GBM-{number:05d}_11") for number in range(10)]
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure(tuple(exposure[:6])))
    assert split(prepared, *options) == 0
    assert read_subjects(prepared / "held.txt") == [key(number) for number in range(6, 10)], "all that are there"
    (prepared / "held.txt").unlink()
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure(tuple(exposure[:7])))
    assert split(prepared, *options) == 1
    error = capsys.readouterr().err
    assert "3 of 10 subjects may be tested on, and a test fraction of 0.4 asks for 4; take a smaller fraction" in error
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure(tuple(exposure)))
    assert split(prepared, *options) == 1
    error = capsys.readouterr().err
    assert "none of the 13 subjects can be held out" in error and "--allow-overlap, which marks the list" in error
    assert not (prepared / "held.txt").exists()


def test_what_is_not_known_of_a_model_is_said_in_the_list(prepared: Path, tmp_path: Path) -> None:
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure((), ("began from weights of nobody knows",)))
    assert split(prepared, "--pretrained-on", str(tmp_path / "encoder")) == 0
    first = (prepared / "held.txt").read_text().splitlines()[0]
    assert first.endswith("; pretraining overlap with encoder: unknown; began from weights of nobody knows")


def test_groups_are_divided_in_proportion_though_some_of_one_were_seen(prepared: Path, tmp_path: Path) -> None:
    names = [subject.removeprefix("upenn/") for n in range(10) for subject in (key(n), key(n, 21))]
    rows = [f"{name}\t{'left' if int(name[10:15]) % 2 else 'right'}" for name in names]
    (tmp_path / "participants.tsv").write_text("\n".join(["participant_id\tside", *rows]) + "\n")
    # Three of the five on the left: the two others are held out, and two on the right.
    seen = tuple(Scan("", "upenn", f"UPENN-GBM-{number:05d}_11") for number in (1, 3, 5))
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure(seen))
    options = ("--participants", str(tmp_path / "participants.tsv"), "--strata", "side")
    for seed in range(5):
        assert split(prepared, *options, "--pretrained-on", str(tmp_path / "encoder"), "--seed", str(seed)) == 0
        people = {int(subject[-8:-3]) for subject in read_subjects(prepared / "held.txt")}
        assert {number for number in people if number % 2} == {7, 9} and len(people) == 4
