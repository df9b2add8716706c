"""Predictions on perturbed scans beside those on clean ones, by hand-worked scores."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from braindino.robustness_table import RobustnessRow, read_robustness
from braindino.segmentation_scores import read_scores
from braindino.volume import save_array
from nnunet_braindino import segment_eval
from nnunet_braindino.predictions import write_prediction_source

SHAPE = (6, 5, 4)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
REGIONS = {"background": 0, "tissue": 1, "lesion": 2}
CASES = ("a", "b", "c")
# A tissue of four voxels in a row; a condition finds some of them.
TRUTH = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)]


def write(path: Path, num_found: int, *, lesion: bool = False) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for voxel in TRUTH[:num_found]:
        labels[voxel] = 1
    if lesion:
        labels[0, 0, 0] = 2
    save_array(labels, AFFINE, path, dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """References, and predictions of two models, clean and under two conditions; only case a has a lesion."""
    references, conditions = tmp_path / "Dataset007_Tissue" / "labelsTs", tmp_path / "conditions"
    for case in CASES:
        write(references / f"{case}.nii.gz", 4, lesion=case == "a")
    found = {
        ("frozen", "clean"): {"a": 4, "b": 4, "c": 3},
        ("frozen", "gibbs-0.4"): {"a": 3, "b": 2, "c": 1},
        ("frozen", "gamma-0.5"): {"a": 4, "b": 4, "c": 3},
        ("linear_r10", "clean"): {"a": 2, "b": 2, "c": 2},
        ("linear_r10", "gibbs-0.4"): {"a": 1, "b": 1, "c": 1},
    }
    for (model, condition), numbers in found.items():
        folder = conditions / condition / model
        for case, number in numbers.items():
            write(folder / f"{case}.nii.gz", number, lesion=case == "a")
        (folder / "dataset.json").write_text(json.dumps({"labels": REGIONS}))
    return references, conditions


def run(references: Path, conditions: Path, out: Path, *more: object) -> int:
    arguments = ["--conditions", conditions, "--references", references, "--out", out, *more]
    return segment_eval.main([str(argument) for argument in arguments])


def rows_of(out: Path) -> dict[tuple[str, str, str, float], RobustnessRow]:
    return {
        (row.encoder, row.metric, row.perturbation, row.severity): row
        for row in read_robustness(out / "robustness.tsv")
    }


def dice(found: int) -> float:
    return 2 * found / (found + 4)


def test_dice_and_its_change_are_those_worked_out_by_hand(folders, tmp_path, capsys):
    assert run(*folders, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    clean, gibbs = (rows["frozen", "tissue Dice", "gibbs", severity] for severity in (0.0, 0.4))
    assert clean.clean
    assert clean.estimate == pytest.approx((1 + 1 + dice(3)) / 3, abs=1e-6)
    assert math.isnan(clean.change)
    assert gibbs.estimate == pytest.approx((dice(3) + dice(2) + dice(1)) / 3, abs=1e-6)
    differences = [dice(3) - 1, dice(2) - 1, dice(1) - dice(3)]
    assert gibbs.change == pytest.approx(np.mean(differences), abs=1e-6)
    assert gibbs.change_low == pytest.approx(min(differences), abs=1e-5)
    assert gibbs.change_high == pytest.approx(max(differences), abs=1e-5)
    # All three draws are below 0, whoever is drawn.
    assert gibbs.p == 0
    assert (gibbs.better, gibbs.n_cases, gibbs.n_subjects, gibbs.n_missing) == ("higher", 3, 3, 0)
    assert gibbs.task == "Dataset007_Tissue"
    assert "paired bootstrap by subject" in gibbs.method
    same = rows["frozen", "tissue Dice", "gamma", 0.5]
    assert (same.change, same.p) == (0, 1)
    assert rows["linear", "tissue Dice", "gibbs", 0.4].ratio == 0.1
    assert "tissue Dice" in capsys.readouterr().out


def test_distances_are_better_when_lower_and_undefined_cases_are_not_counted(folders, tmp_path):
    assert run(*folders, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    distance = rows["frozen", "tissue HD95 (mm)", "gibbs", 0.4]
    assert distance.better == "lower"
    # Voxels of 1 mm in a row: the 95th percentile over both surfaces' distances of case c (one of four found).
    assert distance.change > 0
    lesion = rows["frozen", "lesion Dice", "gibbs", 0.4]
    assert (lesion.n_cases, lesion.n_subjects, lesion.estimate) == (1, 1, 1)


def test_every_set_leaves_its_scores_and_every_perturbation_begins_clean(folders, tmp_path):
    out = tmp_path / "out"
    assert run(*folders, out) == 0
    assert read_scores(out / "frozen" / "gibbs-0.4" / "scores.json").cases["c"]["tissue"] == pytest.approx(dice(1))
    rows = [row for row in read_robustness(out / "robustness.tsv") if row.metric == "tissue Dice"]
    assert [(row.encoder, row.perturbation, row.severity, row.clean) for row in rows] == [
        ("frozen", "gamma", 0.5, False),
        ("frozen", "gamma", 1.0, True),
        ("frozen", "gibbs", 0.0, True),
        ("frozen", "gibbs", 0.4, False),
        ("linear", "gibbs", 0.0, True),
        ("linear", "gibbs", 0.4, False),
    ]


def test_cases_of_one_subject_are_drawn_together(folders, tmp_path):
    (tmp_path / "subjects.tsv").write_text("case\tsubject\na\tp1\nb\tp1\nc\tp2\n")
    assert run(*folders, tmp_path / "out", "--subjects", tmp_path / "subjects.tsv") == 0
    assert rows_of(tmp_path / "out")["frozen", "tissue Dice", "gibbs", 0.4].n_subjects == 2


def test_a_case_that_a_condition_lacks_is_counted_and_left_out_on_both_sides(folders, tmp_path):
    references, conditions = folders
    (conditions / "gibbs-0.4" / "frozen" / "c.nii.gz").unlink()
    assert run(references, conditions, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    gibbs = rows["frozen", "tissue Dice", "gibbs", 0.4]
    assert (gibbs.n_cases, gibbs.n_missing) == (2, 1)
    assert gibbs.estimate == pytest.approx((dice(3) + dice(2)) / 2, abs=1e-6)
    assert gibbs.change == pytest.approx((dice(3) + dice(2)) / 2 - 1, abs=1e-6)
    clean = rows["frozen", "tissue Dice", "gibbs", 0.0]
    assert (clean.n_cases, clean.n_missing) == (3, 0)
    assert rows["linear", "tissue Dice", "gibbs", 0.4].n_missing == 0


def test_predictions_of_the_best_checkpoint_are_marked(folders, tmp_path):
    references, conditions = folders
    for condition in ("clean", "gibbs-0.4", "gamma-0.5"):
        write_prediction_source(conditions / condition / "frozen", "checkpoint_best.pth")
    assert run(references, conditions, tmp_path / "out") == 1
    for condition in ("clean", "gibbs-0.4"):
        write_prediction_source(conditions / condition / "linear_r10", "checkpoint_best.pth")
    assert run(references, conditions, tmp_path / "out", "--checkpoint", "best") == 0
    assert all(row.warnings.startswith("BEST") for row in rows_of(tmp_path / "out").values())


def test_what_does_not_fit_is_refused(folders, tmp_path, capsys):
    references, conditions = folders
    out = tmp_path / "out"
    assert segment_eval.main(["--conditions", str(conditions), "--out", str(out)]) == 1
    assert "--conditions DIR goes with --references" in capsys.readouterr().err
    (conditions / "clean" / "frozen" / "a.nii.gz").unlink()
    assert run(references, conditions, out) == 1
    assert "1 of 3 cases have no prediction, e.g. a.nii.gz" in capsys.readouterr().err
    write(conditions / "clean" / "frozen" / "a.nii.gz", 4)
    for case in CASES:
        (conditions / "gamma-0.5" / "frozen" / f"{case}.nii.gz").unlink()
    write(conditions / "gamma-0.5" / "frozen" / "z.nii.gz", 4)
    assert run(references, conditions, out) == 1
    assert "3 of 3 cases have no prediction" in capsys.readouterr().err
    (conditions / "blurred").mkdir()
    assert run(references, conditions, out) == 1
    assert "expected folders called clean or like gamma-0.5" in capsys.readouterr().err
    (conditions / "blurred").rename(tmp_path / "blurred")
    (tmp_path / "alone" / "gamma-0.5" / "frozen").mkdir(parents=True)
    for case in CASES:
        write(tmp_path / "alone" / "gamma-0.5" / "frozen" / f"{case}.nii.gz", 4)
    (tmp_path / "alone" / "gamma-0.5" / "frozen" / "dataset.json").write_text(json.dumps({"labels": REGIONS}))
    assert run(references, tmp_path / "alone", out) == 1
    assert "model frozen has predictions under gamma-0.5; expected some on clean scans" in capsys.readouterr().err
    assert not (out / "robustness.tsv").exists()
