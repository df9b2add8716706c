"""A project folder that has something of everything, for the tests that open its report in a browser."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from braindino.manifest import Scan, write_scans
from braindino.report.page import main
from braindino.representation_tables import CkaRow, SpreadRow, write_cka, write_spread
from braindino.robustness_table import RobustnessRow, write_robustness
from braindino.segmentation_scores import RegionSummary, SegmentationScores, write_scores
from braindino.task_summary import COLUMNS, write_task_summary
from braindino.task_tables import (
    CalibrationRow,
    ComparisonRow,
    ReliabilityRow,
    StratumRow,
    SurvivalRow,
    SurvivalStep,
    write_rows,
)
from braindino.vision_transformer import vit_tiny
from braindino.volume import save_array
from braindino.weights import save_encoder

ENCODERS = ("ours", "a-very-long-name-of-an-encoder-that-somebody-gave", "<b>bold<-b>")
SUBJECTS = 12


@pytest.fixture(scope="session")
def full_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cohort, scans, a run, segmentation with images, tasks of every kind, robustness, CKA; reported on."""
    root = tmp_path_factory.mktemp("full") / "a project & more"
    scans = _write_cohort(root)
    _write_run(root / "pretrain")
    _write_segmentation(root / "nnunet")
    _write_classes(root / "eval" / "adni", scans)
    _write_neighbours(root / "eval" / "knn_adni", scans)
    _write_survival(root / "eval" / "os_cox", scans)
    write_robustness(_robustness(), root / "robustness" / "adni" / "robustness.tsv")
    write_cka(root / "representation" / "cka.tsv", _cka())
    write_spread(root / "representation" / "spread.tsv", _spread())
    (root / "held-out.txt").write_text("c/sub-01\nc/sub-02\n")
    (root / "commands.log").write_text("braindino prepare scans --out prepared\n")
    assert main([str(root)]) == 0
    return root


def _write_cohort(root: Path) -> list[Scan]:
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, 32),) * 3, indexing="ij")
    brain = x**2 + y**2 + z**2 < 0.9
    rows = ["participant_id\tage\tsex\tsite"]
    scans = []
    for number in range(SUBJECTS):
        subject = f"sub-{number:02d}"
        rows.append(f"{subject}\t{30 + 4 * number}\tF\tsite-{number % 2}")
        path = root / "cohort" / subject / "ses-1" / "anat" / f"{subject}_ses-1_T1w.nii.gz"
        if number == 0:
            data = np.where(brain, 300 + 200 * x + rng.normal(0, 9, brain.shape), 0)
            save_array(data, np.diag([5.0, 5, 5, 1]), path, dtype=np.int16)
        scans.append(Scan(str(path), "c", subject, "ses-1", "T1", num_slices=128))
    bad = Scan(
        "/nowhere/bad_T1w.nii.gz", "c", "sub-99", "ses-1", "T1", status="quarantined", reason="no_contrast: flat"
    )
    write_scans(root / "prepared" / "scans.tsv", [*scans, bad])
    (root / "cohort" / "participants.tsv").write_text("\n".join(rows) + "\n")
    return scans


def _write_run(run: Path) -> None:
    rows = [{"iteration": i, "loss": 8.5 - i / 8, "dino": 4.0, "lr": 1e-3} for i in range(1, 13)]
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text("iterations: 12\nmodel: {architecture: vit_tiny, num_prototypes: 4096}\n")
    imsave(run / "maps.png", np.full((40, 300, 3), 0.5))
    save_encoder(vit_tiny(layer_scale_init=1e-5), run / "encoder", data_fingerprint="f00d")


def _write_segmentation(folder: Path) -> None:
    predictions = folder / "ours" / "predictions"
    raw = folder / "raw" / "Dataset001_T"
    cases = {"sub-00_ses-1": (0.8, 0.4), "sub-01_ses-1": (0.5, 0.2)}
    for case in cases:
        image = np.arange(1, 12 * 12 * 4 + 1, dtype=np.float32).reshape(12, 12, 4)
        labels = np.zeros((12, 12, 4), np.uint8)
        labels[3:8, 4:9, 2] = 1
        labels[4:6, 5:7, 2] = 2
        save_array(image, np.eye(4), raw / "imagesTs" / f"{case}_0000.nii.gz", dtype=np.float32)
        save_array(labels, np.eye(4), raw / "labelsTs" / f"{case}.nii.gz", dtype=np.uint8)
        save_array(np.roll(labels, 1, axis=0), np.eye(4), predictions / f"{case}.nii.gz", dtype=np.uint8)
    labels_of = {"background": 0, "whole tumour": [1, 2], "core": [2]}
    (predictions / "dataset.json").write_text(json.dumps({"labels": labels_of}))
    summary = {"whole tumour": RegionSummary(0.65, 0.21, 2, 0.1), "core": RegionSummary(0.3, 0.14, 2, 0.05)}
    of_case = {case: dict(zip(summary, values, strict=True)) for case, values in cases.items()}
    write_scores(SegmentationScores(of_case, summary), folder / "ours")


def _summary(folder: Path, rows: list[dict[str, str]], scans: list[Scan]) -> None:
    shared = dict.fromkeys(COLUMNS, "n/a") | {
        "variant": "",
        "metric": "auc",
        "baseline": "0.500",
        "baseline_low": "0.500",
        "baseline_high": "0.500",
        "baseline_name": "chance",
        "train_subjects": "40",
        "test_subjects": str(SUBJECTS),
        "seeds": "1",
        "splits": "1",
        "data": "",
        "interval": "bootstrap",
        "pretraining_overlap": "none",
        "warnings": "",
    }
    folder.mkdir(parents=True)
    write_task_summary(folder / "summary.tsv", [shared | row for row in rows])
    lines = [f"{scan.scan_id}\t{scan.subject_key}\t{scan.scan_id}\tx" for scan in scans]
    (folder / "cases.tsv").write_text("\n".join(["case\tsubject\tscans\ttarget", *lines]) + "\n")
    (folder / "run.json").write_text(json.dumps({"provenance": {"command": ["braindino", "evaluate", folder.name]}}))


def _write_predictions(folder: Path, encoder: str, rows: list[dict[str, object]]) -> None:
    path = folder / encoder / "predictions.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _trials(scans: list[Scan], ratio: str, variant: str = "") -> list[dict[str, object]]:
    return [
        {"split": 0, "seed": 0, "ratio": ratio, "variant": variant, "case": scan.scan_id, "subject": scan.subject_key}
        for scan in scans
    ]


def _write_classes(folder: Path, scans: list[Scan]) -> None:
    rows = [
        {
            "encoder": name,
            "ratio": ratio,
            "estimate": f"{value:.3f}",
            "low": f"{value - 0.1:.3f}",
            "high": f"{value + 0.1:.3f}",
        }
        for ratio, shift in (("0.1", -0.15), ("0.4", -0.05), ("1", 0.0))
        for name, value in zip(ENCODERS, (0.85 + shift, 0.8 + shift, 0.7 + shift), strict=True)
    ]
    _summary(folder, rows, scans)
    names = ENCODERS
    for name in names:
        trials = [
            trial
            | {
                "target": ("CN", "AD")[place % 2],
                "predicted": "CN",
                "probability_CN": share,
                "probability_AD": 1 - share,
            }
            for ratio in ("0.1", "0.4", "1")
            for place, trial in enumerate(_trials(scans, ratio))
            for share in [(place + 1) / (SUBJECTS + 1)]
        ]
        _write_predictions(folder, name, trials)
    tests = [
        ComparisonRow(
            ratio=ratio,
            variant="",
            stratum=stratum,
            first=names[0],
            second=name,
            what="auc",
            difference=0.05,
            low=0.0,
            high=0.1,
            p=0.01,
            p_holm=0.02,
            n=SUBJECTS,
            method="paired bootstrap",
        )
        for ratio in (0.1, 0.4, 1.0)
        for stratum in ("", "55-64", "85+")
        for name in names[1:]
    ]
    write_rows(folder / "comparisons.tsv", ComparisonRow, tests)
    strata = [
        StratumRow(
            encoder=name,
            ratio=1.0,
            variant="",
            stratum=stratum,
            metric="auc",
            estimate=0.7,
            low=0.6,
            high=0.8,
            subjects=6,
            method="bootstrap",
        )
        for name in names
        for stratum in ("55-64", "85+")
    ]
    write_rows(folder / "strata.tsv", StratumRow, strata)
    lines = [
        CalibrationRow(
            encoder=name,
            what="logit",
            intercept=0.1,
            intercept_low=0.0,
            intercept_high=0.2,
            slope=0.8,
            slope_low=0.5,
            slope_high=1.1,
            subjects=SUBJECTS,
            method="bootstrap",
        )
        for name in names
    ]
    write_rows(folder / "calibration.tsv", CalibrationRow, lines)
    bins = [
        ReliabilityRow(
            encoder=name,
            positive="AD",
            low=low,
            high=low + 0.5,
            n=6,
            mean_predicted=low + 0.25,
            observed_share=low + 0.2,
        )
        for name in names
        for low in (0.0, 0.5)
    ]
    write_rows(folder / "reliability.tsv", ReliabilityRow, bins)


def _write_neighbours(folder: Path, scans: list[Scan]) -> None:
    rows = [
        {
            "encoder": ENCODERS[0],
            "ratio": "1",
            "variant": f"k={k}",
            "metric": "accuracy",
            "estimate": "0.600",
            "low": "0.500",
            "high": "0.700",
        }
        for k in (1, 3, 50)
    ]
    _summary(folder, rows, scans)
    trials = [
        trial | {"target": "CN", "predicted": "CN" if place % 2 else "AD"}
        for k in (1, 3, 50)
        for place, trial in enumerate(_trials(scans, "1", f"k={k}"))
    ]
    _write_predictions(folder, ENCODERS[0], trials)


def _write_survival(folder: Path, scans: list[Scan]) -> None:
    row = {"encoder": ENCODERS[0], "ratio": "1", "metric": "c_index", "estimate": "0.6", "low": "0.5", "high": "0.7"}
    _summary(folder, [row], scans)
    trials = [
        trial | {"time": 100 * (place + 1), "event": place % 2, "predicted": -place, "above_cut": 5.5 - place}
        for place, trial in enumerate(_trials(scans, "1"))
    ]
    _write_predictions(folder, ENCODERS[0], trials)
    groups, steps = [], []
    for group, times in (("high risk", (100.0, 200.0, 300.0)), ("low risk", (700.0, 900.0, 1200.0))):
        groups.append(
            SurvivalRow(
                encoder=ENCODERS[0],
                ratio=1.0,
                group=group,
                cases=3,
                events=3,
                median=times[1],
                median_low=times[0],
                median_high=times[2],
                chi_squared=5.0,
                p=0.025,
                method="log-rank",
            )
        )
        steps += [
            SurvivalStep(
                encoder=ENCODERS[0],
                ratio=1.0,
                group=group,
                time=time,
                at_risk=3 - place,
                events=1,
                left=0,
                survival=(2 - place) / 3,
                low=0.0,
                high=1.0,
            )
            for place, time in enumerate(times)
        ]
    write_rows(folder / "survival.tsv", SurvivalRow, groups)
    write_rows(folder / "survival_curves.tsv", SurvivalStep, steps)


def _robustness() -> list[RobustnessRow]:
    return [
        RobustnessRow(
            task="adni",
            encoder=name,
            metric="auc",
            better="higher",
            perturbation=kind,
            severity=severity,
            clean=severity == 0,
            n_subjects=12,
            n_cases=12,
            estimate=0.9 - severity,
            low=0.8 - severity,
            high=0.95 - severity,
        )
        for name in ENCODERS
        for kind in ("gibbs", "bias_field")
        for severity in (0.0, 0.2)
    ]


def _cka() -> list[CkaRow]:
    return [
        CkaRow(
            group="c",
            unit="scan",
            depth=depth,
            encoder_a=ENCODERS[0],
            encoder_b=ENCODERS[1],
            n=12,
            subjects=12,
            dim_a=4,
            dim_b=4,
            cka=value,
            low=value - 0.1,
            high=value + 0.1,
            debiased=value,
            debiased_low=0.0,
            debiased_high=1.0,
            method="jackknife",
        )
        for depth, value in (("early", 0.5), ("mid", 0.6), ("late", 0.7))
    ]


def _spread() -> list[SpreadRow]:
    return [
        SpreadRow(
            group="all",
            encoder=ENCODERS[0],
            depth="global",
            n=12,
            subjects=12,
            dim=192,
            effective_rank=7.5,
            participation_ratio=3.25,
            mean_cosine=0.91,
            first_share=0.4,
            between_within=2.0,
        )
    ]
