"""Datasets for nnU-Net: orientation, regions and labels, subjects kept on one side."""

import json
from pathlib import Path

import numpy as np
import pytest

from braindino.audit import add_fingerprints
from braindino.leakage import Exposure, write_exposure
from braindino.manifest import Scan
from braindino.tables import read_table
from braindino.volume import load_labels, load_volume, save_array
from nnunet_braindino import cli, convert, pretraining_overlap, raw_dataset
from nnunet_braindino.folds import subject_folds

SUFFIXES = {"T1": "T1w", "T1c": "ce-gadolinium_T1w", "T2": "T2w", "FLAIR": "FLAIR"}


def corner_phantom(shape: tuple[int, int, int] = (10, 12, 9)) -> np.ndarray:
    """RAS+: 1 everywhere, 9 in the right, anterior, superior corner, 5 in the left, anterior, superior one."""
    data = np.ones(shape, dtype=np.float32)
    data[-1, -1, -1] = 9
    data[0, -1, -1] = 5
    return data


def write_visit(bids: Path, subject: str, session: str, *, labelled: bool = True, offset: float = 0.0) -> None:
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    affine[:3, 3] = -4, -6, 10
    stem = f"sub-{subject}_ses-{session}"
    anat = Path(f"sub-{subject}") / f"ses-{session}" / "anat"
    for number, suffix in enumerate(SUFFIXES.values()):
        save_array(
            corner_phantom() + number + offset, affine, bids / anat / f"{stem}_{suffix}.nii.gz", dtype=np.float32
        )
    if labelled:
        labels = np.zeros((10, 12, 9), dtype=np.uint8)
        labels[2:6, 2:6, 2:6] = 2
        labels[3:5, 3:5, 3:5] = 1
        labels[4, 4, 4] = 3
        path = bids / "derivatives" / "tumor" / anat / f"{stem}_dseg.nii.gz"
        save_array(labels, affine, path, dtype=np.uint8)


@pytest.fixture
def cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.delenv("BRAINDINO_ENCODER", raising=False)
    bids = tmp_path / "cohort"
    for subject in ("01", "02", "03", "04"):
        write_visit(bids, subject, "1")
    write_visit(bids, "02", "2")
    write_visit(bids, "04", "2")
    write_visit(bids, "05", "1", labelled=False)
    return bids


def splits_of(folder: Path) -> list[dict[str, list[str]]]:
    return json.loads((folder / "splits_final.json").read_text())


def convert_bids(bids: Path, *options: str) -> int:
    return cli.main(["convert-bids", str(bids), "--dataset-id", "7", "--name", "Tumor", *options])


def test_images_are_stored_in_lps_so_that_nnunet_sees_axial_slices_front_first(cohort: Path, tmp_path: Path):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    assert convert_bids(cohort) == 0
    path = tmp_path / "raw" / "Dataset007_Tumor" / "imagesTr" / "sub-01_ses-1_0000.nii.gz"
    stored, properties = SimpleITKIO().read_images([str(path)])
    assert stored.shape == (1, 9, 12, 10)
    assert properties["spacing"] == pytest.approx([2.0, 1.5, 1.0])
    assert stored[0, -1, 0, 0] == 9  # last slice is superior, first row anterior, first column right
    assert stored[0, -1, 0, -1] == 5
    original = load_volume(cohort / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T1w.nii.gz")
    converted = load_volume(path)
    np.testing.assert_array_equal(converted.data, original.data)
    np.testing.assert_allclose(converted.affine, original.affine, atol=1e-6)


def test_channels_follow_the_sequences_and_healthy_visits_are_left_out(cohort: Path, tmp_path: Path):
    assert convert_bids(cohort, "--sequences", "FLAIR", "T1c") == 0
    folder = tmp_path / "raw" / "Dataset007_Tumor"
    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "FLAIR", "1": "T1c"}
    assert description["numTraining"] == 6
    assert load_volume(folder / "imagesTr" / "sub-01_ses-1_0000.nii.gz").data.min() == 4
    assert load_volume(folder / "imagesTr" / "sub-01_ses-1_0001.nii.gz").data.min() == 2
    assert not list(folder.glob("*/sub-05*"))


def test_visits_of_a_subject_stay_together_in_the_test_set_and_in_every_fold(cohort: Path, tmp_path: Path):
    held_out = tmp_path / "test.txt"
    held_out.write_text("# held out\ncohort/02\nother/03\n")
    assert convert_bids(cohort, "--test-subjects", str(held_out)) == 0
    folder = tmp_path / "raw" / "Dataset007_Tumor"
    assert sorted(path.name for path in (folder / "labelsTs").iterdir()) == [
        "sub-02_ses-1.nii.gz",
        "sub-02_ses-2.nii.gz",
    ]
    assert len(list((folder / "imagesTs").iterdir())) == 8
    splits = json.loads((folder / "splits_final.json").read_text())
    assert len(splits) == 3
    training = {"sub-01_ses-1", "sub-03_ses-1", "sub-04_ses-1", "sub-04_ses-2"}
    validated = []
    for split in splits:
        assert set(split["train"]) | set(split["val"]) == training
        assert not {name[:6] for name in split["train"]} & {name[:6] for name in split["val"]}
        validated += split["val"]
    assert sorted(validated) == sorted(training)


def test_predicted_regions_become_the_labels_they_came_from():
    """Every combination of labels, through nnU-Net's own label manager: labels -> regions -> labels."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    order = raw_dataset.regions_class_order(convert.TUMOR_REGIONS.values())
    assert order == [2, 1, 3]
    manager = LabelManager({"background": 0, **{k: list(v) for k, v in convert.TUMOR_REGIONS.items()}}, order)
    assert manager.foreground_regions == [(1, 2, 3), (1, 3), (3,)]
    labels = np.arange(4).reshape(1, 2, 2)
    regions = np.stack([np.isin(labels, values) for values in convert.TUMOR_REGIONS.values()])
    np.testing.assert_array_equal(manager.convert_probabilities_to_segmentation(regions.astype(np.float32)), labels)


def test_class_order_is_refused_for_regions_that_cannot_be_painted_one_over_the_other():
    assert raw_dataset.regions_class_order([(1, 2), 2]) == [1, 2]
    with pytest.raises(ValueError, match="from the largest to the smallest"):
        raw_dataset.regions_class_order([(3,), (1, 3), (1, 2, 3)])
    with pytest.raises(ValueError, match=r"\[1, 2, 3\] has \[1, 2\] of its own"):
        raw_dataset.regions_class_order([(1, 2, 3), (3,)])


def test_pairs_are_found_by_what_the_star_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    data = tmp_path / "oasis"
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    for case in ("1000", "1001", "1002"):
        save_array(corner_phantom()[::-1, ::-1], lps, data / f"{case}_SS.nii.gz", dtype=np.int16)
        save_array((corner_phantom() > 1)[::-1, ::-1], lps, data / f"{case}_tissues.nii.gz", dtype=np.uint8)
    held_out = tmp_path / "test.txt"
    held_out.write_text("oasis/1001\n")
    arguments = ["convert-pairs", "--images", f"{data}/*_SS.nii.gz", "--labels", f"{data}/*_tissues.nii.gz"]
    arguments += ["--dataset-id", "8", "--name", "Tissue", "--channels", "T1", "--label-names", "corner"]
    assert cli.main([*arguments, "--test-subjects", str(held_out)]) == 0
    folder = tmp_path / "raw" / "Dataset008_Tissue"
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "corner": 1}
    assert "regions_class_order" not in description
    assert sorted(path.name for path in folder.glob("labels*/*")) == ["1000.nii.gz", "1001.nii.gz", "1002.nii.gz"]
    labels, _ = load_labels(folder / "labelsTs" / "1001.nii.gz")
    np.testing.assert_array_equal(labels, corner_phantom() > 1)


def test_a_visit_whose_grids_differ_is_left_out_and_the_others_go_on(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = cohort / "sub-03" / "ses-1" / "anat" / "sub-03_ses-1_T2w.nii.gz"
    save_array(corner_phantom((10, 12, 8)), np.eye(4), path, dtype=np.float32)
    assert convert_bids(cohort) == 3
    message = capsys.readouterr().out
    assert "1 cases left out (grids_differ 1)" in message and "sub-03_ses-1_T2w.nii.gz: shape (10, 12, 8)" in message
    folder = tmp_path / "raw" / "Dataset007_Tumor"
    rows = read_table(folder / "cases.tsv").rows
    assert [row["case"] for row in rows if row["part"] == "training"] == [
        "sub-01_ses-1", "sub-02_ses-1", "sub-02_ses-2", "sub-04_ses-1", "sub-04_ses-2",
    ]  # fmt: skip
    (bad,) = [row for row in rows if row["part"] == "left_out"]
    assert (bad["case"], bad["subject"], bad["code"]) == ("sub-03_ses-1", "cohort/03", "grids_differ")
    assert "bring all images of a visit to one grid first" in bad["reason"]
    assert not list(folder.glob("*/sub-03*"))
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 5
    assert all("sub-03_ses-1" not in split["train"] + split["val"] for split in splits_of(folder))


@pytest.mark.fault
def test_a_missing_sequence_is_named(cohort: Path, capsys: pytest.CaptureFixture[str]):
    (cohort / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_ce-gadolinium_T1w.nii.gz").unlink()
    assert convert_bids(cohort) == 3
    message = capsys.readouterr().out
    assert "missing_channel 1" in message
    assert "found 0 T1c images [] for sub-01_ses-1_dseg.nii.gz; expected exactly one" in message


def test_a_label_map_with_a_value_that_was_not_declared_is_left_out(cohort: Path, capsys: pytest.CaptureFixture[str]):
    path = cohort / "derivatives" / "tumor" / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_dseg.nii.gz"
    labels, affine = load_labels(path)
    save_array(np.where(labels == 3, 4, labels), affine, path, dtype=np.uint8)  # BraTS before 2023 calls it 4
    assert convert_bids(cohort) == 3
    assert "holds label values [4]; expected only [0, 1, 2, 3]" in capsys.readouterr().out


def test_a_test_list_for_another_cohort_is_refused(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    held_out = tmp_path / "test.txt"
    held_out.write_text("brats/02\n")
    assert convert_bids(cohort, "--test-subjects", str(held_out)) == 1
    assert "names none of the subjects with labels" in capsys.readouterr().err
    assert convert_bids(cohort, "--test-subjects", str(held_out), "--cohort", "brats") == 0


def test_a_second_conversion_leaves_a_finished_dataset_as_it_is(cohort: Path, tmp_path: Path):
    assert convert_bids(cohort) == 0
    folder = next(tmp_path.rglob("Dataset007_Tumor"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert convert_bids(cohort) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_conversion_that_was_cut_short_is_finished(cohort: Path, tmp_path: Path):
    assert convert_bids(cohort) == 0
    folder = next(tmp_path.rglob("Dataset007_Tumor"))
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    untouched = folder / "imagesTr" / "sub-04_ses-1_0000.nii.gz"
    before = untouched.stat().st_mtime_ns
    (folder / "dataset.json").unlink()
    (folder / "imagesTr" / "sub-01_ses-1_0002.nii.gz").unlink()
    (folder / "labelsTr" / ".tmp-left-by-a-kill.nii.gz").write_bytes(b"half")
    assert convert_bids(cohort) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole
    assert untouched.stat().st_mtime_ns == before


def test_a_newer_source_is_converted_again_and_a_spoilt_one_is_taken_out(cohort: Path, tmp_path: Path):
    assert convert_bids(cohort) == 0
    folder = tmp_path / "raw" / "Dataset007_Tumor"
    source = cohort / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T1w.nii.gz"
    affine = load_volume(source).affine
    save_array(corner_phantom() + 40, affine, source, dtype=np.float32)
    assert convert_bids(cohort) == 0
    assert load_volume(folder / "imagesTr" / "sub-01_ses-1_0000.nii.gz").data.min() == 41
    source.write_bytes(source.read_bytes()[:60])
    assert convert_bids(cohort) == 3
    assert not list(folder.glob("*/sub-01*")) and json.loads((folder / "dataset.json").read_text())["numTraining"] == 5
    save_array(corner_phantom(), affine, source, dtype=np.float32)
    assert convert_bids(cohort) == 0, "repaired, it comes back"
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 6


def test_two_processes_write_the_same_files_as_one(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert convert_bids(cohort) == 0
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw2"))
    assert convert_bids(cohort, "--jobs", "2") == 0
    one, two = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "raw", tmp_path / "raw2")
    )
    assert one == two and len(one) == 6 * 5 + 4


def test_another_dataset_is_not_overwritten(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert convert_bids(cohort) == 0
    assert convert_bids(cohort, "--sequences", "T1", "T2") == 1
    assert "Dataset007_Tumor holds another dataset" in capsys.readouterr().err
    (cohort.parent / "test.txt").write_text("cohort/02\n")
    assert convert_bids(cohort, "--test-subjects", str(cohort.parent / "test.txt")) == 1
    assert "imagesTr/sub-02_ses-1_0000.nii.gz is none of the cases to be there" in capsys.readouterr().err


def test_a_folder_that_somebody_else_filled_is_not_touched(cohort: Path, tmp_path: Path, capsys):
    labels = tmp_path / "raw" / "Dataset007_Tumor" / "labelsTr"
    labels.mkdir(parents=True)
    (labels / "sub-01_ses-1.nii.gz").write_bytes(b"theirs")
    assert convert_bids(cohort) == 1
    assert "holds another dataset" in capsys.readouterr().err
    assert (labels / "sub-01_ses-1.nii.gz").read_bytes() == b"theirs"


def test_folds_need_two_subjects_and_use_no_more_than_there_are():
    with pytest.raises(ValueError, match=r"found 1 subject\(s\) to train on"):
        subject_folds({"a_1": "a", "a_2": "a"})
    assert [fold["val"] for fold in subject_folds({"a": "a", "b": "b"})] in ([["a"], ["b"]], [["b"], ["a"]])
    twelve = {str(i): str(i) for i in range(12)}
    assert len(subject_folds(twelve)) == 5
    assert subject_folds(twelve) == subject_folds(twelve, seed=0) != subject_folds(twelve, seed=1)


def test_patterns_without_one_star_and_files_without_a_partner_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="found 0 '\\*'; expected one"):
        convert.find_paired_cases([f"{tmp_path}/a.nii.gz"], f"{tmp_path}/*_seg.nii.gz", cohort="c")
    with pytest.raises(ValueError, match="matches no file"):
        convert.find_paired_cases([f"{tmp_path}/*_t1.nii.gz"], f"{tmp_path}/*_seg.nii.gz", cohort="c")
    (tmp_path / "x_t1.nii.gz").touch()
    found = convert.find_paired_cases([f"{tmp_path}/*_t1.nii.gz"], f"{tmp_path}/*_seg.nii.gz", cohort="c")
    assert not found.cases and found.left_out[0].code == "no_labels"
    assert "x_seg.nii.gz: not there; expected one for every case" in found.left_out[0].reason


def test_test_subjects_that_were_pretrained_on_are_refused_or_stamped_on_the_scores(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "test.txt").write_text("cohort/02\ncohort/03\n")
    # The same image under another name in another cohort: an image of subject 03.
    scan = add_fingerprints(Scan(str(cohort / "sub-03" / "ses-1" / "anat" / "sub-03_ses-1_T2w.nii.gz"), "gli", "x9"))
    write_exposure(tmp_path / "encoder" / "pretrained_on.tsv", Exposure((scan,)))
    # All phantoms are alike; these are to differ between subjects.
    write_visit(cohort, "02", "1", offset=20.0)
    write_visit(cohort, "02", "2", offset=30.0)
    options = ("--test-subjects", str(tmp_path / "test.txt"), "--pretrained-on", str(tmp_path / "encoder"))
    assert convert_bids(cohort, *options) == 1
    error = capsys.readouterr().err
    assert "1 of 2 test subjects were seen when" in error and "cohort/03 (same_voxels: gli/x9)" in error
    assert not (tmp_path / "raw").exists()
    assert convert_bids(cohort, *options, "--allow-overlap") == 0
    dataset = tmp_path / "raw" / "Dataset007_Tumor"
    assert pretraining_overlap.read_overlap(dataset) == "1 of 2 test subjects: same_voxels 1"
    (dataset / "pretraining_overlap.json").unlink()
    assert pretraining_overlap.read_overlap(dataset).startswith("unknown: the dataset was converted without")


def test_the_encoder_that_would_be_trained_with_is_compared_with_unless_another_is_named(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "test.txt").write_text("cohort/02\n")
    write_exposure(tmp_path / "seen" / "encoder" / "pretrained_on.tsv", Exposure((Scan("", "cohort", "sub-02"),)))
    write_exposure(tmp_path / "other" / "pretrained_on.tsv", Exposure((Scan("", "elsewhere", "x"),)))
    dataset = tmp_path / "raw" / "Dataset007_Tumor"
    options = ("--test-subjects", str(tmp_path / "test.txt"))

    monkeypatch.setenv("BRAINDINO_ENCODER", str(tmp_path / "seen" / "encoder"))
    assert convert_bids(cohort, *options) == 1
    error = capsys.readouterr().err
    assert f"1 of 1 test subjects were seen when {tmp_path}/seen/encoder was pretrained" in error
    assert "cohort/02 (same_subject: cohort/sub-02)" in error and "--allow-overlap" in error
    assert not dataset.exists()
    assert convert_bids(cohort, *options, "--allow-overlap") == 0
    assert pretraining_overlap.read_overlap(dataset) == "1 of 1 test subjects: same_subject 1"
    assert json.loads((dataset / "pretraining_overlap.json").read_text())["pretrained_on"].endswith("seen/encoder")

    assert convert_bids(cohort, *options, "--pretrained-on", str(tmp_path / "other")) == 0
    assert pretraining_overlap.read_overlap(dataset) == "none", "what is named counts"


@pytest.mark.parametrize(
    ("name", "stamp"),
    [
        ("facebook/dinov3-vitb16", "unknown: facebook/dinov3-vitb16 has no pretrained_on.tsv"),
        ("untrained:vit_tiny", "none"),
    ],
)
def test_an_encoder_that_does_not_say_what_it_has_seen_is_no_error(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stamp: str
):
    monkeypatch.setenv("BRAINDINO_ENCODER", name)
    monkeypatch.setattr(pretraining_overlap, "add_fingerprints", None)  # no image is read for a comparison with nothing
    assert convert_bids(cohort) == 0
    assert pretraining_overlap.read_overlap(tmp_path / "raw" / "Dataset007_Tumor") == stamp


def test_the_help_says_which_encoder_is_compared_with(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["convert-bids", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "By default the encoder that BRAINDINO_ENCODER names" in words
