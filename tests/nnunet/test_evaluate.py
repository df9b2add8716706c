"""From predictions to the table: Dice and HD95 worked out by hand, what is refused, what is written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from braindino import cli as front_door
from braindino.segmentation_scores import RegionSummary, SegmentationScores, read_scores
from braindino.tables import read_table
from braindino.volume import save_array
from nnunet_braindino import overlay, segment_eval
from nnunet_braindino.evaluate import EmptyRules, score_region
from nnunet_braindino.predictions import find_predictions, label_ratio, write_prediction_source
from nnunet_braindino.score_tables import draw_curves, label_curves

SHAPE = (6, 5, 4)
SPACING = (1.0, 2.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])
DIAGONAL = math.hypot(6, 10, 12)
REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": [3]}
Voxels = Mapping[tuple[int, int, int], int]
CASE_A: Voxels = {(1, 1, 1): 2, (2, 1, 1): 1}
CASE_B: Voxels = {(0, 0, 0): 1, (1, 0, 0): 2}
# Case a: whole 2*2/(3+2) = 0.8, core 2*1/(2+1) = 2/3, enhancing 0 for one empty side.
PREDICTED_A: Voxels = {(1, 1, 1): 3, (2, 1, 1): 1, (4, 4, 3): 2}


def write_labels(path: Path, voxels: Voxels, *, shape: tuple[int, int, int] = SHAPE) -> None:
    labels = np.zeros(shape, dtype=np.uint8)
    for voxel, value in voxels.items():
        labels[voxel] = value
    save_array(labels, AFFINE, path, dtype=np.uint8)


def write_regions(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": REGIONS}))


@pytest.fixture(autouse=True)
def no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    predictions, references = tmp_path / "predictions", tmp_path / "labelsTs"
    write_labels(references / "a.nii.gz", CASE_A)
    write_labels(predictions / "a.nii.gz", PREDICTED_A)
    # Case b: perfect, without an enhancing part in either.
    for folder in (predictions, references):
        write_labels(folder / "b.nii.gz", CASE_B)
    write_regions(predictions)
    return predictions, references


def evaluate(*arguments: object) -> int:
    return segment_eval.main([str(argument) for argument in arguments])


def write_images(tmp_path: Path, cases: str = "ab") -> None:
    image = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    for case in cases:
        save_array(image, AFFINE, tmp_path / "imagesTs" / f"{case}_0000.nii.gz", dtype=np.float32)


def test_scores_equal_the_hand_worked_values(folders: tuple[Path, Path], tmp_path: Path, capsys):
    predictions, references = folders
    write_images(tmp_path)
    assert evaluate(predictions, "--references", references, "--out", tmp_path / "out") == 0
    scores = read_scores(tmp_path / "out" / "predictions" / "scores.json")
    assert scores.cases["a"] == pytest.approx({"whole tumor": 0.8, "tumor core": 2 / 3, "enhancing tumor": 0.0})
    assert scores.cases["b"] == pytest.approx(
        {"whole tumor": 1.0, "tumor core": 1.0, "enhancing tumor": math.nan}, nan_ok=True
    )
    # Whole: (4,4,3) is sqrt(2^2 + 6^2 + 6^2) from the nearest reference voxel, the two others 0; 95th percentile of
    # 0, 0, d is 0.9 d. Core: (1,1,1) is 1 mm from (2,1,1); 95th percentile of 0, 1 is 0.95.
    far = math.sqrt(76)
    assert scores.hd95["a"] == pytest.approx(
        {"whole tumor": 0.9 * far, "tumor core": 0.95, "enhancing tumor": DIAGONAL}
    )
    assert scores.hd95["b"] == pytest.approx(
        {"whole tumor": 0.0, "tumor core": 0.0, "enhancing tumor": math.nan}, nan_ok=True
    )
    whole = scores.summary["whole tumor"]
    assert whole.mean == pytest.approx(0.9) and whole.median == pytest.approx(0.9)
    assert whole.sd == pytest.approx(0.2 / math.sqrt(2)) and whole.num_cases == 2
    assert (whole.low, whole.high) == pytest.approx((0.8, 1.0))
    # The image has 119 non-zero voxels: 2*2/(119+2) in case a; in case b one labelled voxel is the zero one.
    assert whole.floor == pytest.approx((4 / 121 + 2 / 121) / 2)
    enhancing = scores.summary["enhancing tumor"]
    assert (enhancing.mean, enhancing.num_cases) == (0.0, 1) and math.isnan(enhancing.sd)
    assert scores.subject_of == {"a": "a", "b": "b"}
    out = capsys.readouterr().out
    assert "| predictions | 100% | 0.900 ± 0.141 [0.800, 1.000] |" in out and "(n = 1)" in out
    assert "Every case is its own subject here" in out and "final, nnU-Net's default (not recorded" in out
    assert (tmp_path / "out" / "table.md").read_text() in out


def test_everything_is_written_and_says_how_it_is_defined(folders: tuple[Path, Path], tmp_path: Path):
    predictions, references = folders
    write_images(tmp_path)
    assert evaluate(predictions, "--references", references, "--out", tmp_path / "out") == 0
    folder = tmp_path / "out" / "predictions"
    written = json.loads((folder / "scores.json").read_text())
    assert written["version"] == 2 and written["cases"]["b"]["enhancing tumor"] is None
    assert "surface voxels" in written["hd95"] and "subjects resampled" in written["interval"]
    assert "not counted" in written["undefined"] and "the diagonal" in written["missed"]
    assert written["pretraining_overlap"].startswith("unknown: the dataset was converted without")
    assert (folder / "scores.tsv").read_text().splitlines()[:2] == [
        "case\tsubject\twhole tumor Dice\ttumor core Dice\tenhancing tumor Dice"
        "\twhole tumor HD95 (mm)\ttumor core HD95 (mm)\tenhancing tumor HD95 (mm)",
        "a\ta\t0.8000\t0.6667\t0.0000\t7.85\t0.95\t16.73",
    ]
    overview = read_table(tmp_path / "out" / "scores.tsv").rows
    assert overview[0] == {
        "predictions": "predictions", "label_ratio": "1", "metric": "Dice", "region": "whole tumor", "cases": "2",
        "mean": "0.9000", "sd": "0.1414", "median": "0.9000", "low": "0.8000", "high": "1.0000", "floor": "0.0248",
    }  # fmt: skip
    assert len(overview) == 6 and overview[3]["metric"] == "HD95 (mm)" and overview[3]["floor"] == "n/a"
    assert (folder / "overlay.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "comparison.tsv").exists(), "there is nothing to compare with"


def test_scores_of_version_1_are_still_read(tmp_path: Path):
    old = {
        "version": 1, "metric": "Dice", "undefined": "...", "floor": "...", "pretraining_overlap": "none",
        "regions": {"WT": {"mean": 0.5, "sd": None, "cases": 1, "floor": None}}, "cases": {"a": {"WT": 0.5}},
    }  # fmt: skip
    (tmp_path / "scores.json").write_text(json.dumps(old))
    scores = read_scores(tmp_path / "scores.json")
    assert scores.cases == {"a": {"WT": 0.5}} and scores.summary["WT"].mean == 0.5 and scores.hd95 == {}
    assert math.isnan(scores.summary["WT"].low) and scores.checkpoint == "unknown"


def test_rules_for_empty_masks():
    empty, full = np.zeros(SHAPE, bool), np.ones(SHAPE, bool)
    plain, brats = EmptyRules(), EmptyRules(both_empty="perfect")
    assert all(math.isnan(value) for value in score_region(empty, empty, SPACING, plain))
    assert score_region(empty, empty, SPACING, brats) == (1.0, 0.0)
    for pair in ((empty, full), (full, empty)):
        assert score_region(*pair, SPACING, plain) == pytest.approx((0.0, DIAGONAL))
        missed, distance = score_region(*pair, SPACING, EmptyRules(one_empty="undefined"))
        assert missed == 0.0 and math.isnan(distance)
    assert "Dice 1, HD95 0 mm" in brats.notes()["undefined"] and "diagonal" in brats.notes()["missed"]


def test_the_rules_are_options_and_stated(folders: tuple[Path, Path], tmp_path: Path):
    predictions, references = folders
    options = ("--both-empty", "perfect", "--one-empty", "undefined")
    assert evaluate(predictions, "--references", references, "--out", tmp_path / "out", *options) == 0
    scores = read_scores(tmp_path / "out" / "predictions" / "scores.json")
    assert scores.cases["b"]["enhancing tumor"] == 1.0 and scores.hd95["b"]["enhancing tumor"] == 0.0
    assert math.isnan(scores.hd95["a"]["enhancing tumor"])
    assert scores.notes["undefined"].endswith("Dice 1, HD95 0 mm")


@pytest.mark.fault
def test_a_missing_prediction_and_another_grid_are_errors(folders: tuple[Path, Path], tmp_path: Path, capsys):
    predictions, references = folders
    write_labels(references / "c.nii.gz", {(0, 0, 0): 1})
    arguments = (predictions, "--references", references, "--out", tmp_path / "out")
    assert evaluate(*arguments) == 1
    assert "1 of 3 cases have no prediction, e.g. c.nii.gz" in capsys.readouterr().err
    write_labels(predictions / "c.nii.gz", {(0, 0, 0): 1}, shape=(6, 5, 5))
    assert evaluate(*arguments) == 1
    assert "c.nii.gz: grid (6, 5, 5) differs" in capsys.readouterr().err
    assert evaluate("--out", tmp_path / "out") == 1
    assert "found no predictions" in capsys.readouterr().err
    assert evaluate(predictions, "--out", tmp_path / "out") == 1
    assert "needs --references" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- Model folders ---------------------------------------------------------------------------------------------------

CASES = {f"p{number}_{time}": f"cohort/p{number}" for number in range(8) for time in (1, 2)}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of a dataset of eight patients with two time points: folder for ``write_model``."""
    raw = tmp_path / "raw" / "Dataset007_Tumor"
    for case in CASES:
        write_labels(raw / "labelsTr" / f"{case}.nii.gz", BLOCK)
        image = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
        save_array(image, AFFINE, raw / "imagesTr" / f"{case}_0000.nii.gz", dtype=np.float32)
    rows = [f"{case}\t{subject}\ttraining\t\t\tx" for case, subject in CASES.items()]
    (raw / "cases.tsv").write_text("\n".join(["case\tsubject\tpart\tcode\treason\tlabels", *rows]) + "\n")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return tmp_path / "results" / "Dataset007_Tumor"


BLOCK: Voxels = {
    (x, y, z): 3 if y == 1 else 1 if y == 2 else 2 for x in range(1, 5) for y in range(1, 4) for z in (1, 2)
}


def write_model(results: Path, trainer: str, *, missed: Mapping[str, int], folds: tuple[int, ...] = (0,)) -> Path:
    """Validation predictions that miss the first ``missed[case]`` voxels (1 where the case is not named)."""
    folder = results / f"{trainer}__nnUNetPlans__2d"
    write_regions(folder)
    names = list(CASES)
    for number, fold in enumerate(folds):
        for case in names[number :: len(folds)]:
            voxels = dict(list(BLOCK.items())[missed.get(case, 1) :])
            write_labels(folder / f"fold_{fold}" / "validation" / f"{case}.nii.gz", voxels)
        (folder / f"fold_{fold}" / "checkpoint_final.pth").write_bytes(b"")
    return folder


def test_validation_predictions_of_a_model_are_scored_by_patient(models: Path, tmp_path: Path, capsys):
    missed = {case: 6 if case.startswith("p0") else 1 for case in CASES}
    model = write_model(models, "nnUNetTrainerA", missed=missed, folds=(0, 1))
    assert evaluate(model, "--out", tmp_path / "out") == 0
    scores = read_scores(tmp_path / "out" / "nnUNetTrainerA" / "scores.json")
    assert scores.subject_of == CASES
    assert "validation of fold_0, fold_1" in scores.checkpoint
    whole = scores.summary["whole tumor"]
    good, bad = 2 * 23 / 47, 2 * 18 / 42
    assert whole.mean == pytest.approx((14 * good + 2 * bad) / 16)
    # By patient, p0 is drawn k of 8 times; the 2.5th percentile of the mean is that of Binomial(8, 1/8): k = 3.
    assert whole.low == pytest.approx((5 * good + 3 * bad) / 8) and whole.high == pytest.approx(good)
    assert "16 cases of 8 subjects" in capsys.readouterr().out
    assert evaluate(model, "--folds", "1", "--out", tmp_path / "one") == 0
    assert len(read_scores(tmp_path / "one" / "nnUNetTrainerA" / "scores.json").cases) == 8
    for path in (model / "fold_0", model / "fold_0" / "validation"):
        assert find_predictions(path).files.keys() == {name for name in list(CASES)[::2]}


def test_patients_that_were_trained_on_at_another_time_point_are_told(models: Path, tmp_path: Path, capsys):
    model = write_model(models, "nnUNetTrainerA", missed={}, folds=(0, 1))
    names, splits = list(CASES), tmp_path / "raw" / "Dataset007_Tumor" / "splits_final.json"
    # Fold 0 is validated on every first time point and trained on the second of p3 and p5; fold 1 is not scored.
    folds = [{"train": ["p5_2", "p3_2"], "val": names[::2]}, {"train": names[::2], "val": names[1::2]}]
    splits.write_text(json.dumps(folds))
    assert evaluate(model / "fold_0", "--out", tmp_path / "out") == 0
    text = "2 of 8 subjects were also trained on, at another time point: too good on them (cohort/p3, cohort/p5)"
    assert f"- WARNING: {text}." in capsys.readouterr().out
    assert read_scores(tmp_path / "out" / "nnUNetTrainerA" / "scores.json").notes["time_points"] == text
    folds[0]["train"] = []
    splits.write_text(json.dumps(folds))
    assert evaluate(model / "fold_0", "--out", tmp_path / "out") == 0
    assert "WARNING" not in capsys.readouterr().out


def test_the_subjects_may_come_from_a_table(models: Path, tmp_path: Path):
    model = write_model(models, "nnUNetTrainerA", missed={})
    (tmp_path / "subjects.tsv").write_text("case\tsubject\n" + "".join(f"{case}\tone\n" for case in CASES))
    assert evaluate(model, "--out", tmp_path / "out", "--subjects", tmp_path / "subjects.tsv") == 0
    assert set(read_scores(tmp_path / "out" / "nnUNetTrainerA" / "scores.json").subject_of.values()) == {"one"}


def test_trainers_are_compared_on_the_same_cases_with_holm_over_regions_and_pairs(models: Path, tmp_path: Path):
    sets = [
        write_model(models, "nnUNetTrainerA", missed={}),
        write_model(models, "nnUNetTrainerB", missed={case: 5 + number % 3 for number, case in enumerate(CASES)}),
        write_model(models, "nnUNetTrainerC", missed={case: 1 + 2 * (number % 2) for number, case in enumerate(CASES)}),
    ]
    assert evaluate(*sets, "--out", tmp_path / "out", "--jobs", "2") == 0
    rows = read_table(tmp_path / "out" / "comparison.tsv").rows
    assert len(rows) == 2 * 3 * 3
    pairs = [(row["first"][-1], row["second"][-1]) for row in rows if row["metric"] == "Dice"]
    assert pairs == [pair for pair in [("A", "B"), ("A", "C"), ("B", "C")] for _ in range(3)]
    first = rows[0]
    scores = {name: read_scores(tmp_path / "out" / f"nnUNetTrainer{name}" / "scores.json") for name in "AB"}
    difference = np.mean(
        [scores["A"].cases[case]["whole tumor"] - scores["B"].cases[case]["whole tumor"] for case in CASES]
    )
    assert float(first["difference"]) == pytest.approx(difference, abs=1e-5)
    assert (first["num_cases"], first["num_subjects"]) == ("16", "8")
    # A is better in every patient: only all signs alike are as extreme, 2 of 2^8.
    assert float(first["p_sign_flip"]) == pytest.approx(2 / 256, abs=1e-5)
    family = sorted(float(row["p_sign_flip"]) for row in rows if row["metric"] == "Dice")
    assert float(first["p_sign_flip_holm"]) == pytest.approx(min(1, 9 * family[0]), abs=1e-3)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| Dice | whole tumor | 100% | nnUNetTrainerA | nnUNetTrainerB | +0." in table
    assert "| floor: the whole brain | |" in table
    assert (tmp_path / "out" / "overlay.png").exists()


def test_label_ratios_make_curves_and_pairs_are_at_equal_ratio(models: Path, tmp_path: Path):
    sets = []
    for trainer, better in (("nnUNetTrainerA", 0), ("nnUNetTrainerB", 2)):
        for suffix, miss in (("_r10", 7), ("_r40", 4), ("", 2)):
            sets.append(write_model(models, trainer + suffix, missed=dict.fromkeys(CASES, miss + better)))
    assert evaluate(*sets, "--out", tmp_path / "out", "--images", tmp_path / "none") == 0
    rows = [row for row in read_table(tmp_path / "out" / "label_ratios.tsv").rows if row["region"] == "whole tumor"]
    curve = {(row["predictions"], row["label_ratio"]): float(row["mean"]) for row in rows if row["metric"] == "Dice"}
    assert curve == pytest.approx(
        {
            (f"nnUNetTrainer{name}{suffix}", ratio): 2 * (24 - miss - better) / (48 - miss - better)
            for name, better in (("A", 0), ("B", 2))
            for suffix, ratio, miss in (("_r10", "0.1", 7), ("_r40", "0.4", 4), ("", "1", 2))
        },
        abs=1e-4,
    )
    assert (tmp_path / "out" / "label_ratios.png").read_bytes().startswith(b"\x89PNG")
    pairs = {(row["first"], row["second"]) for row in read_table(tmp_path / "out" / "comparison.tsv").rows}
    assert pairs == {(f"nnUNetTrainerA{s}", f"nnUNetTrainerB{s}") for s in ("_r10", "_r40", "")}
    assert "| nnUNetTrainerA | 10% |" in (tmp_path / "out" / "table.md").read_text()


def test_curves_show_the_means_and_intervals_of_the_table():
    rows = {0.1: (0.5, 0.4, 0.6), 1.0: (0.8, 0.7, 0.85)}
    scores = {
        name: SegmentationScores({}, {"WT": RegionSummary(mean, 0.1, 9, low=low, high=high)})
        for name, (mean, low, high) in zip(("T_r10", "T"), rows.values(), strict=True)
    }
    curves = label_curves(["T", "T_r10", "U"])
    assert {trainer: [point.ratio for point in points] for trainer, points in curves.items()} == {"T": [0.1, 1.0]}
    (panel,) = draw_curves(curves, scores).axes
    (line,) = panel.lines
    np.testing.assert_allclose(line.get_xydata(), [[10, 0.5], [100, 0.8]])
    assert panel.get_title() == "WT" and line.get_label() == "T"
    corners = panel.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners.round(6)} >= {(10.0, 0.4), (10.0, 0.6), (100.0, 0.7), (100.0, 0.85)}


def test_a_ratio_is_read_from_a_name():
    assert label_ratio("nnUNetTrainerX_r10") == ("nnUNetTrainerX", 0.1)
    assert label_ratio("nnUNetTrainerX_r40_10epochs") == ("nnUNetTrainerX_10epochs", 0.4)
    assert label_ratio("nnUNetTrainerX_r100") == ("nnUNetTrainerX_r100", 1.0)
    assert label_ratio("nnUNetTrainerX_10epochs") == ("nnUNetTrainerX_10epochs", 1.0)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_refused_unless_asked_for_and_then_marked(models: Path, tmp_path: Path, capsys):
    model = write_model(models, "nnUNetTrainerA", missed={})
    validation = model / "fold_0" / "validation"
    write_prediction_source(validation, "checkpoint_best.pth")
    assert evaluate(model, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "predicted with checkpoint_best.pth, which was chosen on the validation cases" in error
    assert not (tmp_path / "out").exists()
    assert evaluate(model, "--out", tmp_path / "out", "--checkpoint", "final") == 1
    assert "--checkpoint final, but prediction_source.json beside the predictions says checkpoint_best.pth" in (
        capsys.readouterr().err
    )
    assert evaluate(model, "--out", tmp_path / "out", "--checkpoint", "best") == 0
    assert "Checkpoint of nnUNetTrainerA: BEST (recorded beside the predictions): chosen on" in capsys.readouterr().out
    scores = read_scores(tmp_path / "out" / "nnUNetTrainerA" / "scores.json")
    assert scores.checkpoint.startswith("BEST")
    write_prediction_source(validation, "checkpoint_final.pth")
    assert find_predictions(model).checkpoint == "final (recorded beside the predictions); validation of fold_0"
    (validation / "prediction_source.json").write_text('{"version": 9, "checkpoint": "x"}')
    with pytest.raises(ValueError, match=r"prediction_source.json: .*version 9; this program reads version 1"):
        find_predictions(model)


def test_predictions_that_call_themselves_best_are_refused_too(folders: tuple[Path, Path], tmp_path: Path):
    predictions, references = folders
    renamed = predictions.rename(tmp_path / "predictions_Best")
    with pytest.raises(ValueError, match=r"predicted with checkpoint_best.pth, by its name"):
        find_predictions(renamed, references=references)
    stated = find_predictions(renamed, references=references, checkpoint="final")
    assert stated.checkpoint == "final (stated with --checkpoint)"


@pytest.mark.fault
def test_unfinished_trainings_and_incomplete_validations_are_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = write_model(models, "nnUNetTrainerA", missed={})
    preprocessed = tmp_path / "preprocessed" / "Dataset007_Tumor"
    preprocessed.mkdir(parents=True)
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": [], "val": [*CASES, "p9_1"]}]))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
    with pytest.raises(ValueError, match=r"1 of 17 cases have no prediction, e.g. p9_1; the validation was cut short"):
        find_predictions(model)
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": [], "val": list(CASES)}]))
    assert len(find_predictions(model).files) == 16
    with pytest.raises(ValueError, match=r"validation predictions of folds \[0\]; expected those of folds \[3\]"):
        find_predictions(model, folds=(3,))
    (model / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint_final.pth: the training is not finished"):
        find_predictions(model)
    (model / "fold_0").rename(model / "fold_all")
    with pytest.raises(ValueError, match="fold_all was validated on what it was trained on"):
        find_predictions(model)


def test_sets_that_cannot_be_compared_are_refused(models: Path, tmp_path: Path, capsys):
    one = write_model(models, "nnUNetTrainerA", missed={})
    two = write_model(models, "nnUNetTrainerB", missed={}, folds=(0, 1))
    out = ("--out", tmp_path / "out", "--images", tmp_path / "none")
    assert evaluate(one, two / "fold_0", *out) == 1
    assert "8 cases were predicted by one of them only, e.g. p0_2; score the same folds" in capsys.readouterr().err
    assert evaluate(one, one, *out) == 1
    assert "two are called alike" in capsys.readouterr().err
    assert evaluate(one, two, *out, "--names", "a") == 1
    assert "--names: found 1 for 2 sets" in capsys.readouterr().err
    assert evaluate(one, two, *out, "--names", "a", "../b") == 1
    assert "--names: found ['../b']" in capsys.readouterr().err
    assert evaluate(one, two, *out, "--names", "a", "b") == 0
    (two / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "lesion": 1}}))
    assert evaluate(one, two, *out) == 1
    assert "have regions" in capsys.readouterr().err


def test_a_region_that_one_of_two_rightly_leaves_empty_is_told(models: Path, tmp_path: Path, capsys):
    """References without the region: A finds nothing (no Dice), B something (Dice 0)."""
    a = write_model(models, "nnUNetTrainerA", missed={})
    b = write_model(models, "nnUNetTrainerB", missed={})
    for case in CASES:
        no_enhancing = {voxel: 1 if value == 3 else value for voxel, value in BLOCK.items()}
        write_labels(
            Path(models.parent.parent / "raw" / "Dataset007_Tumor" / "labelsTr" / f"{case}.nii.gz"), no_enhancing
        )
        write_labels(a / "fold_0" / "validation" / f"{case}.nii.gz", no_enhancing)
    options = ("--out", tmp_path / "out", "--images", tmp_path / "none")
    assert evaluate(a, b, *options) == 0
    assert "In 16 comparisons of a case the Dice is defined for one side only" in capsys.readouterr().out
    assert evaluate(a, b, *options, "--both-empty", "perfect") == 0
    assert "defined for one side only" not in capsys.readouterr().out
    rows = read_table(tmp_path / "out" / "comparison.tsv").rows
    assert next(row["difference"] for row in rows if row["region"] == "enhancing tumor") == "1.00000"


# --- Overlays --------------------------------------------------------------------------------------------------------


def test_overlays_show_the_worst_the_median_and_the_best_case():
    cases = {f"c{i}": {"r": i / 10} for i in range(9)} | {"empty": {"r": math.nan}}
    scores = SegmentationScores(cases, {})
    assert overlay.chosen_cases(scores) == {"worst": "c0", "median": "c4", "best": "c8"}
    assert overlay.chosen_cases(SegmentationScores({"a": {"r": 0.5}}, {})) == {"worst": "a"}
    assert overlay.chosen_cases(SegmentationScores({"a": {"r": math.nan}}, {})) == {}


def test_contours_have_their_colours_where_the_masks_end():
    """A bright square as reference, a smaller one as prediction; the drawn pixels are looked up through the axes."""
    truth, prediction = np.zeros((40, 50), bool), np.zeros((40, 50), bool)
    truth[8:30, 10:40], prediction[14:24, 16:34] = True, True
    contours = [(truth, overlay.TRUTH_COLOR, 2.0), (prediction, overlay.PREDICTION_COLORS[0], 2.0)]
    panel = overlay.Panel("WT", np.ones((40, 50), np.float32), 1.0, contours)
    figure = overlay.draw_panels([[panel, panel._replace(contours=[])]], {"reference": overlay.TRUTH_COLOR})
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255
    first, second = figure.axes

    def colour(axis, column: float, row: float) -> np.ndarray:
        x, y = axis.transData.transform((column, row))
        return pixels[pixels.shape[0] - 1 - round(y - 0.5), round(x - 0.5)]

    # A mask of rows 8 to 29 ends half a pixel before the centre of row 8 and half a pixel behind that of row 29.
    for column, row in ((25, 7.5), (25, 29.5), (9.5, 18), (39.5, 18)):
        np.testing.assert_allclose(colour(first, column, row), to_rgb(overlay.TRUTH_COLOR), atol=0.15)
        assert np.ptp(colour(second, column, row)) < 0.05, "without contours the panel is grey"
    for column, row in ((25, 13.5), (25, 23.5), (15.5, 18), (33.5, 18)):
        np.testing.assert_allclose(colour(first, column, row), to_rgb(overlay.PREDICTION_COLORS[0]), atol=0.15)
    for column, row in ((25, 18), (12, 11), (4, 4)):
        assert np.ptp(colour(first, column, row)) < 0.05


def test_overlay_panels_are_axial_with_the_patients_right_on_the_left(models: Path, tmp_path: Path):
    model = write_model(models, "nnUNetTrainerA", missed={})
    found = find_predictions(model)
    case = next(iter(CASES))
    scores = SegmentationScores({case: {"whole tumor": 0.5, "tumor core": 0.4, "enhancing tumor": math.nan}}, {})
    images = found.references.parent / "imagesTr"
    (row,) = overlay.set_panels(found, scores, images, {"best": case})
    assert [panel.title for panel in row] == ["", "whole tumor  0.500", "tumor core  0.400", "enhancing tumor  n/a"]
    assert row[0].caption == f"best: {case}" and row[0].aspect == 2.0
    truth = row[1].contours[0][0]
    assert truth.shape == (SHAPE[1], SHAPE[0])
    # In RAS+ the block fills x 1-4, y 1-3 of 6 x 5: mirrored both ways, rows 1-3 and columns 1-4.
    expected = np.zeros((5, 6), bool)
    expected[1:4, 1:5] = True
    np.testing.assert_array_equal(truth, expected)
    enhancing = np.zeros((5, 6), bool)
    enhancing[3, 1:5] = True  # y = 1 lies at the back: the lower of the three rows
    np.testing.assert_array_equal(row[3].contours[0][0], enhancing)
    other = find_predictions(model, name="other")
    rows = overlay.comparison_panels([found, other], {found.name: scores, "other": scores}, images, {"best": case})
    assert [[panel.title for panel in each][1:] for each in rows][1] == [
        "reference, tumor core", "nnUNetTrainerA  0.400", "other  0.400",
    ]  # fmt: skip
    assert [len(panel.contours) for panel in rows[0]] == [0, 1, 2, 2]
    overlay.write_overlays([found, other], {found.name: scores, "other": scores}, images, tmp_path / "o")
    picture = matplotlib.image.imread(tmp_path / "o" / "overlay.png")[..., :3]
    for colour in (overlay.TRUTH_COLOR, *overlay.PREDICTION_COLORS[:2]):
        assert (np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.1).sum() > 20, colour


def test_it_is_a_verb_of_the_front_door(folders: tuple[Path, Path], tmp_path: Path, capsys):
    predictions, references = folders
    arguments = ["segment-eval", predictions, "--references", references, "--out", tmp_path / "out"]
    assert front_door.main([str(argument) for argument in arguments]) == 0
    assert "no overlay and no floor: there is no folder" in capsys.readouterr().out
    assert not (tmp_path / "out" / "predictions" / "overlay.png").exists()
