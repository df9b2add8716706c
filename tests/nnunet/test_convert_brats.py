"""BraTS training sets as published, in small: names, labels, regions, time points, folds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from braindino import cli as front_door
from braindino.leakage import Exposure, write_exposure
from braindino.manifest import Scan
from braindino.process_map import map_in_processes
from braindino.tables import read_table
from braindino.volume import load_labels, load_volume, save_array
from nnunet_braindino import convert_brats, raw_dataset
from nnunet_braindino.brats_releases import RELEASES, Release
from nnunet_braindino.folds import leaking_subjects, paper_folds

SHAPE = (8, 10, 6)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# As published: release -> outermost folder, a case's folder, its files.
LAYOUTS = {
    "2021": ("RSNA_ASNR_MICCAI_BraTS2021_TrainingData", "BraTS2021_{:05d}", "_{}"),
    "2023-GLI": ("ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData", "BraTS-GLI-{:05d}-000", "-{}"),
    "2023-MEN": ("BraTS2023-MEN", "BraTS-MEN-{:05d}-000", "-{}"),
    "2023-MET": ("ASNR-MICCAI-BraTS2023-MET-Challenge-TrainingData", "BraTS-MET-{:05d}-000", "-{}"),
    "2023-PED": ("ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData", "BraTS-PED-{:05d}-000", "-{}"),
    "2023-SSA": ("ASNR-MICCAI-BraTS2023-SSA-Challenge-TrainingData_V2", "BraTS-SSA-{:05d}-000", "-{}"),
    "2024-GoAT": ("MICCAI2024-BraTS-GoAT-TrainingData-With-GroundTruth", "BraTS-GoAT-{:05d}", "-{}"),
}
CHANNELS = {release: ("t1n", "t1c", "t2w", "t2f") for release in LAYOUTS} | {"2021": ("t1", "t1ce", "t2", "flair")}


def write_case(folder: Path, release: str, *, labels: np.ndarray | None = None, enhancing: int | None = None) -> None:
    """One case in LPS as released: channel i is i + 1 in the brain, i + 101 in the first voxel of the file."""
    name, suffix = folder.name, LAYOUTS[release][2]
    for number, channel in enumerate(CHANNELS[release]):
        data = np.full(SHAPE, number + 1, dtype=np.int16)
        data[0, 0, 0] = number + 101
        save_array(data, LPS, folder / f"{name}{suffix.format(channel)}.nii.gz", dtype=np.int16)
    if labels is None:
        labels = np.zeros(SHAPE, dtype=np.uint8)
        labels[2:6, 2:7, 1:5] = 2
        labels[3:5, 3:5, 2:4] = 1
        labels[3, 3, 2] = enhancing if enhancing is not None else 4 if release == "2021" else 3
    save_array(labels, LPS, folder / f"{name}{suffix.format('seg')}.nii.gz", dtype=np.uint8)


def write_release(root: Path, release: str, numbers: tuple[int, ...] = (0, 2, 3)) -> Path:
    outer, case, _ = LAYOUTS[release]
    for number in numbers:
        write_case(root / outer / case.format(number), release)
    return root


@pytest.fixture(autouse=True)
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.delenv("BRAINDINO_ENCODER", raising=False)
    return tmp_path / "raw"


def convert(source: Path, release: str, *options: str) -> int:
    return convert_brats.main([str(source), "--release", release, "--dataset-id", "7", *options])


def dataset(raw: Path) -> Path:
    return next(raw.iterdir())


def rows(raw: Path) -> dict[str, dict[str, str]]:
    return {row["case"]: row for row in read_table(dataset(raw) / "cases.tsv").rows}


@pytest.mark.parametrize("release", LAYOUTS)
def test_every_release_is_found_in_its_published_layout(release: str, tmp_path: Path, raw: Path, capsys):
    source = write_release(tmp_path / "data", release)
    assert convert(source, release) == 0
    out = capsys.readouterr().out
    assert f"found 3 complete labelled cases; BraTS {release} has {RELEASES[release].num_labelled}" in out
    folder = dataset(raw)
    assert folder.name == f"Dataset007_{RELEASES[release].dataset}"
    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "T1", "1": "T1c", "2": "T2", "3": "FLAIR"}
    assert description["labels"] == {
        "background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": [3],
    }  # fmt: skip
    assert list(description["labels"])[1:] == ["whole tumor", "tumor core", "enhancing tumor"]
    assert description["regions_class_order"] == [2, 1, 3]
    assert description["braindino"]["release"] == f"BraTS {release}"
    name = LAYOUTS[release][1].format(2)
    images = [load_volume(folder / "imagesTr" / f"{name}_{i:04d}.nii.gz") for i in range(4)]
    assert [image.data.min() for image in images] == [1, 2, 3, 4]
    # The file's first voxel is right, anterior, inferior: the last, last, first in RAS+.
    assert [image.data[-1, -1, 0] for image in images] == [101, 102, 103, 104]
    labels, _ = load_labels(folder / "labelsTr" / f"{name}.nii.gz")
    assert np.bincount(labels.ravel())[1:].tolist() == [7, 72, 1], "enhancing tumour is 3, whatever it was"
    patient = name.removesuffix("-000")
    assert rows(raw)[name]["subject"] == f"{RELEASES[release].cohort}/{patient}"


def test_files_are_stored_as_nnunet_cuts_axial_slices_front_first(tmp_path: Path, raw: Path):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    assert convert(write_release(tmp_path / "data", "2021"), "2021") == 0
    stored, _ = SimpleITKIO().read_images([str(dataset(raw) / "imagesTr" / "BraTS2021_00000_0003.nii.gz")])
    assert stored.shape == (1, *SHAPE[::-1]) and stored[0, 0, 0, 0] == 104


def test_label_4_of_2021_becomes_3_and_the_way_back_is_written_down(tmp_path: Path, raw: Path):
    source = write_release(tmp_path / "data", "2021")
    assert convert(source, "2021") == 0
    note = json.loads((dataset(raw) / "dataset.json").read_text())["braindino"]
    assert note["label_in_release"] == {"1": 1, "2": 2, "3": 4}
    assert note["labels"]["3"] == "enhancing tumor" and "write 4 for 3" in note["to_map_back"]
    original, _ = load_labels(next(source.rglob("BraTS2021_00002_seg.nii.gz")))
    stored, _ = load_labels(dataset(raw) / "labelsTr" / "BraTS2021_00002.nii.gz")
    back = np.array([0, *(note["label_in_release"][str(value)] for value in (1, 2, 3))])
    np.testing.assert_array_equal(back[stored], original)
    release = RELEASES["2021"]
    form = release.form()
    for region, values in release.regions.items():
        np.testing.assert_array_equal(np.isin(original, values), np.isin(stored, form.labels[region]))


def test_regions_of_every_release_are_those_of_the_paper_in_its_own_labels():
    for release in RELEASES.values():
        enhancing = 4 if release.name == "2021" else 3
        assert release.labels[enhancing] == "enhancing tumor" and set(release.labels) == {1, 2, enhancing}
        assert release.regions == {
            "whole tumor": (1, 2, enhancing), "tumor core": (1, enhancing), "enhancing tumor": (enhancing,),
        }  # fmt: skip
        assert isinstance(release, Release) and release.source


def test_files_of_another_release_are_told_apart_by_name(tmp_path: Path, raw: Path, capsys):
    source = write_release(tmp_path / "data", "2021")
    assert convert(source, "2023-GLI") == 1
    error = capsys.readouterr().err
    assert "no file of BraTS 2023-GLI" in error and "names such as BraTS-GLI-00000-000-t1n.nii.gz" in error
    assert "15 files are named as in --release 2021" in error
    assert not raw.exists()
    write_release(source, "2023-GLI", numbers=(5,))
    assert convert(source, "2021") == 0
    assert "note: 5 files are named as in --release 2023-GLI: not of this release" in capsys.readouterr().out
    assert convert(source, "2022") == 1
    assert "found '2022'; expected one of 2021, 2023-GLI" in capsys.readouterr().err


def test_files_of_another_release_are_told_apart_by_their_labels(tmp_path: Path, raw: Path, capsys):
    source = write_release(tmp_path / "data", "2023-GLI")
    outer, case, _ = LAYOUTS["2023-GLI"]
    write_case(source / outer / case.format(4), "2023-GLI", enhancing=4)
    assert convert(source, "2023-GLI") == 3
    row = rows(raw)["BraTS-GLI-00004-000"]
    assert (row["part"], row["code"]) == ("left_out", "unexpected_label")
    assert "holds label values [4]; expected only [0, 1, 2, 3]: 4 is enhancing tumour in BraTS 2021" in row["reason"]
    assert json.loads((dataset(raw) / "dataset.json").read_text())["numTraining"] == 3
    capsys.readouterr()

    # The other way round, and throughout: nothing is converted, and the right release may follow in the same place.
    renamed = tmp_path / "renamed"
    for number in (0, 1, 2):
        write_case(renamed / f"BraTS2021_{number:05d}", "2021", enhancing=3)
    options = ("--dataset-id", "8", "--name", "X")
    assert convert(renamed, "2021", *options) == 1
    error = capsys.readouterr().err
    assert "none of 3 cases can be used" in error and "3 is enhancing tumour from BraTS 2023 on" in error
    assert not (raw / "Dataset008_X" / "dataset.json").exists()
    write_release(tmp_path / "right", "2024-GoAT")
    assert convert(tmp_path / "right", "2024-GoAT", *options) == 0


@pytest.mark.fault
def test_a_case_that_cannot_be_used_is_a_row_and_the_others_go_on(tmp_path: Path, raw: Path, capsys):
    source = write_release(tmp_path / "data", "2023-MEN", numbers=tuple(range(10)))
    folders = sorted(path for path in (source / LAYOUTS["2023-MEN"][0]).iterdir())

    def file(number: int, suffix: str) -> Path:
        return folders[number] / f"{folders[number].name}-{suffix}.nii.gz"

    save_array(np.zeros(SHAPE), LPS, file(0, "seg"), dtype=np.uint8)
    file(1, "t2w").unlink()
    file(2, "seg").unlink()
    save_array(np.ones((8, 10, 5)) + np.arange(5), LPS, file(3, "t1c"), dtype=np.int16)
    moved = LPS.copy()
    moved[0, 3] = 3
    save_array(np.arange(480).reshape(SHAPE), moved, file(4, "t1c"), dtype=np.int16)
    save_array(np.arange(960).reshape((*SHAPE, 2)), LPS, file(5, "t1n"), dtype=np.int16)
    save_array(np.arange(80).reshape(8, 10, 1), LPS, file(6, "t1n"), dtype=np.int16)
    file(7, "t2f").write_bytes(file(7, "t2f").read_bytes()[:50])
    copy = source / "again" / file(8, "t1n").name
    copy.parent.mkdir()
    copy.write_bytes(file(8, "t1n").read_bytes())
    write_case(source / "again" / "BraTS-MEN-00011-000", "2023-MEN")
    assert convert(source, "2023-MEN", "--jobs", "2") == 3
    codes = {name: row["code"] for name, row in rows(raw).items()}
    expected = [
        "empty_labels", "missing_channel", "no_labels", "grids_differ", "grids_differ", "four_dimensional",
        "two_dimensional", "truncated", "duplicate", "",
    ]  # fmt: skip
    assert codes == {f"BraTS-MEN-{i:05d}-000": code for i, code in enumerate(expected)} | {"BraTS-MEN-00011-000": ""}
    reasons = {name: row["reason"] for name, row in rows(raw).items()}
    assert "no voxel has a label" in reasons["BraTS-MEN-00000-000"]
    assert "expected one T2 file (t2w); found only seg, t1c, t1n, t2f" in reasons["BraTS-MEN-00001-000"]
    assert "again" in reasons["BraTS-MEN-00008-000"]
    out = capsys.readouterr().out
    assert "2 cases to train on" in out and "9 cases left out (duplicate 1, empty_labels 1, four_dimensional 1" in out
    assert sorted(path.name for path in (dataset(raw) / "labelsTr").iterdir()) == [
        "BraTS-MEN-00009-000.nii.gz", "BraTS-MEN-00011-000.nii.gz",
    ]  # fmt: skip


def test_a_set_without_labels_is_refused_and_says_so(tmp_path: Path, raw: Path, capsys):
    source = write_release(tmp_path / "data", "2023-SSA")
    for path in source.rglob("*-seg.nii.gz"):
        path.unlink()
    assert convert(source, "2023-SSA") == 1
    error = capsys.readouterr().err
    assert "none of 3 cases has a label map (*-seg.nii.gz), e.g. BraTS-SSA-00000-000" in error
    assert not raw.exists()
    assert convert(tmp_path / "nowhere", "2023-SSA") == 1
    assert "no such folder; expected the unpacked training set" in capsys.readouterr().err


@pytest.fixture
def time_points(tmp_path: Path) -> Path:
    """Twelve patients, four of them with a second time point."""
    source = write_release(tmp_path / "data", "2023-MET", numbers=tuple(range(12)))
    for number in (1, 4, 6, 9):
        write_case(source / LAYOUTS["2023-MET"][0] / f"BraTS-MET-{number:05d}-001", "2023-MET")
    return source


def test_time_points_of_a_patient_stay_on_one_side_of_every_fold(time_points: Path, raw: Path, capsys):
    assert convert(time_points, "2023-MET") == 0
    splits = json.loads((dataset(raw) / "splits_final.json").read_text())
    assert len(splits) == 5
    for split in splits:
        patients = [{name[:15] for name in split[side]} for side in ("train", "val")]
        assert not patients[0] & patients[1] and len(split["train"]) + len(split["val"]) == 16
    assert sorted(name for split in splits for name in split["val"]) == sorted(rows(raw))
    assert "WARNING" not in capsys.readouterr().out


def test_the_papers_folds_are_nnunets_own_and_name_the_patients_that_leak(time_points: Path, raw: Path, capsys):
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    assert convert(time_points, "2023-MET", "--fold0", "paper") == 0
    splits = json.loads((dataset(raw) / "splits_final.json").read_text())
    assert splits == json.loads(json.dumps(generate_crossval_split(sorted(rows(raw)))))
    validated = splits[0]["val"]
    both = [n for n in (1, 4, 6, 9) if len({f"BraTS-MET-{n:05d}-00{t}" in validated for t in (0, 1)}) == 2]
    out = capsys.readouterr().out
    assert both, "the example shows nothing"
    named = ", ".join(f"BraTS-MET-{number:05d}" for number in both)
    assert f"Fold 0 is validated on {len(both)} patients that it trains on, at another time point: {named}. " in out
    assert "the paper's folds are those of the whole release" in out


@pytest.mark.parametrize(
    ("release", "train", "val"),
    [("2021", 1000, 251), ("2023-MEN", 800, 200), ("2023-MET", 190, 48), ("2024-GoAT", 1080, 271)],
)
def test_the_papers_fold_0_has_the_papers_numbers(release: str, train: int, val: int):
    names = [LAYOUTS[release][1].format(number) for number in range(RELEASES[release].num_labelled)]
    split = paper_folds(names[::-1])[0]
    assert (len(split["train"]), len(split["val"])) == (train, val)
    assert leaking_subjects(split, {name: name for name in names}) == []


def test_the_papers_folds_need_five_cases(tmp_path: Path, capsys):
    assert convert(write_release(tmp_path / "data", "2021"), "2021", "--fold0", "paper") == 1
    assert "found 3 case(s) to train on; the paper's folds need at least 5" in capsys.readouterr().err


def test_held_out_patients_go_to_the_test_set_with_all_their_time_points(time_points: Path, tmp_path: Path, raw: Path):
    (tmp_path / "test.txt").write_text("brats2023-mets/BraTS-MET-00004\n")
    assert convert(time_points, "2023-MET", "--test-subjects", str(tmp_path / "test.txt")) == 0
    assert sorted(path.name for path in (dataset(raw) / "labelsTs").iterdir()) == [
        "BraTS-MET-00004-000.nii.gz", "BraTS-MET-00004-001.nii.gz",
    ]  # fmt: skip
    splits = (dataset(raw) / "splits_final.json").read_text()
    assert "00004" not in splits


def test_cases_that_an_encoder_has_seen_under_the_years_other_name_are_refused(tmp_path: Path, capsys):
    source = write_release(tmp_path / "data", "2021")
    seen = Scan("", "brats2025-gli-pre", "BraTS-GLI-00002", session="000")
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure((seen,)))
    assert convert(source, "2021", "--pretrained-on", str(tmp_path / "encoder")) == 1
    error = capsys.readouterr().err
    assert "1 of 3 test subjects were seen" in error and "brats2021/BraTS2021_00002" in error
    assert convert(source, "2021", "--pretrained-on", str(tmp_path / "encoder"), "--allow-overlap") == 0
    assert "1 of 3 test subjects: same_subject_by_crosswalk 1" in capsys.readouterr().out


@pytest.mark.fault
def test_a_run_that_was_stopped_leaves_whole_files_and_is_finished_by_the_next(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write_release(tmp_path / "data", "2021")
    assert convert(source, "2021") == 0
    whole = {path.relative_to(raw): path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    for path in sorted(raw.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    written = []

    def stop_at_the_eighth(data, affine, path, *, dtype):
        if len(written) == 7:
            raise KeyboardInterrupt
        save_array(data, affine, path, dtype=dtype)
        written.append(path)

    monkeypatch.setattr(raw_dataset, "save_array", stop_at_the_eighth)
    assert convert(source, "2021") == 130
    folder = dataset(raw)
    assert not (folder / "dataset.json").exists() and not list(folder.rglob(".tmp-*"))
    assert [path.name for path in (folder / "labelsTr").iterdir()] == ["BraTS2021_00000.nii.gz"]
    first = (folder / "labelsTr" / "BraTS2021_00000.nii.gz").stat().st_mtime_ns
    monkeypatch.setattr(raw_dataset, "save_array", save_array)
    assert convert(source, "2021") == 0
    assert {path.relative_to(raw): path.read_bytes() for path in raw.rglob("*") if path.is_file()} == whole
    assert (folder / "labelsTr" / "BraTS2021_00000.nii.gz").stat().st_mtime_ns == first


@pytest.mark.fault
def test_a_process_that_dies_ends_the_run_with_what_to_do():
    with pytest.raises(ValueError, match="convert: a process died, most likely for want of memory; run again with"):
        list(map_in_processes(os._exit, [9, 9], jobs=2, desc="convert"))


def test_links_to_folders_are_followed_and_no_folder_is_walked_twice(tmp_path: Path, raw: Path):
    source = write_release(tmp_path / "elsewhere", "2021")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(source, target_is_directory=True)
    (source / "round").symlink_to(tmp_path / "data", target_is_directory=True)
    assert convert(tmp_path / "data", "2021") == 0
    assert len(rows(raw)) == 3


def test_it_is_a_verb_of_the_front_door(tmp_path: Path, capsys):
    source = write_release(tmp_path / "data", "2023-PED")
    assert front_door.main(["convert-brats", str(source), "--release", "2023-PED", "--dataset-id", "9"]) == 0
    assert "next: nnUNetv2_plan_and_preprocess -d 9 -c 2d" in capsys.readouterr().out
