"""Dice worked out by hand, and what happens where it is not defined."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from braindino.segmentation_scores import SegmentationScores, read_scores
from braindino.volume import save_array
from nnunet_braindino import cli, evaluate

SHAPE = (6, 5, 4)
REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": [3]}


def write_labels(path: Path, voxels: dict[tuple[int, int, int], int], *, shape: tuple[int, int, int] = SHAPE) -> None:
    labels = np.zeros(shape, dtype=np.uint8)
    for voxel, value in voxels.items():
        labels[voxel] = value
    save_array(labels, np.eye(4), path, dtype=np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    predictions, references = tmp_path / "predictions", tmp_path / "labelsTs"
    # Case a: whole 2*2/(3+2) = 0.8, core 2*1/(2+1) = 2/3, enhancing 1/(0+1) -> 0.
    write_labels(references / "a.nii.gz", {(1, 1, 1): 2, (2, 1, 1): 1})
    write_labels(predictions / "a.nii.gz", {(1, 1, 1): 3, (2, 1, 1): 1, (4, 4, 3): 2})
    # Case b: perfect, without an enhancing part in either.
    for folder in (predictions, references):
        write_labels(folder / "b.nii.gz", {(0, 0, 0): 1, (1, 0, 0): 2})
    (predictions / "dataset.json").write_text(json.dumps({"labels": REGIONS}))
    return predictions, references


def test_dice_equals_the_hand_worked_values(folders: tuple[Path, Path]):
    scores = evaluate.score_folder(*folders)
    assert scores.cases["a"] == pytest.approx({"whole tumor": 0.8, "tumor core": 2 / 3, "enhancing tumor": 0.0})
    assert scores.cases["b"] == pytest.approx(
        {"whole tumor": 1.0, "tumor core": 1.0, "enhancing tumor": math.nan}, nan_ok=True
    )
    whole = scores.summary["whole tumor"]
    assert whole.mean == pytest.approx(0.9)
    assert whole.sd == pytest.approx(0.2 / math.sqrt(2))
    assert whole.num_cases == 2
    enhancing = scores.summary["enhancing tumor"]
    assert (enhancing.mean, enhancing.num_cases) == (0.0, 1)
    assert math.isnan(enhancing.sd)


def test_score_writes_tables_and_an_overlay(folders: tuple[Path, Path], tmp_path: Path, capsys):
    predictions, references = folders
    image = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    for case in ("a", "b"):
        save_array(image, np.eye(4), tmp_path / "imagesTs" / f"{case}_0000.nii.gz", dtype=np.float32)
    assert cli.main(["score", str(predictions), str(references)]) == 0
    out = predictions / "scores"
    written = json.loads((out / "scores.json").read_text())
    assert written["regions"]["whole tumor"] == {
        "mean": 0.9,
        "sd": pytest.approx(0.141421, abs=1e-6),
        "cases": 2,
        # The image has 119 non-zero voxels: 2*2/(119+2) in case a; in case b one labelled voxel is the zero one.
        "floor": pytest.approx((4 / 121 + 2 / 121) / 2),
    }
    assert written["regions"]["enhancing tumor"] == {"mean": 0.0, "sd": None, "cases": 1, "floor": None}
    assert written["cases"]["b"]["enhancing tumor"] is None
    assert "not counted" in written["undefined"]
    assert (out / "scores.tsv").read_text().splitlines() == [
        "case\twhole tumor\ttumor core\tenhancing tumor",
        "a\t0.8000\t0.6667\t0.0000",
        "b\t1.0000\t1.0000\tn/a",
    ]
    again = read_scores(out / "scores.json")
    assert again.cases["a"] == pytest.approx({"whole tumor": 0.8, "tumor core": 2 / 3, "enhancing tumor": 0.0})
    assert again.summary["whole tumor"].num_cases == 2 and math.isnan(again.summary["enhancing tumor"].floor)
    assert (out / "overlay.png").read_bytes().startswith(b"\x89PNG")
    assert "whole tumor" in capsys.readouterr().out


def test_overlay_cases_range_from_worst_to_best():
    cases = {f"c{i}": {"r": i / 10} for i in range(9)} | {"empty": {"r": math.nan}}
    scores = SegmentationScores(cases, {"r": evaluate.summarize(row["r"] for row in cases.values())})
    assert evaluate.overlay_cases(scores, num=3) == ["c0", "c4", "empty"]


def test_a_missing_prediction_and_another_grid_are_errors(folders: tuple[Path, Path], capsys):
    predictions, references = folders
    write_labels(references / "c.nii.gz", {(0, 0, 0): 1})
    assert cli.main(["score", str(predictions), str(references)]) == 1
    assert "1 of 3 cases have no prediction, e.g. c.nii.gz" in capsys.readouterr().err
    write_labels(predictions / "c.nii.gz", {(0, 0, 0): 1}, shape=(6, 5, 5))
    assert cli.main(["score", str(predictions), str(references)]) == 1
    assert "c.nii.gz: grid (6, 5, 5) differs" in capsys.readouterr().err
