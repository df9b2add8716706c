"""The mean loss of each cohort."""

from pathlib import Path

import numpy as np
import pytest
import torch

from braindino.manifest import Scan
from braindino.metrics_log import read_metrics
from braindino.pretrain.cohort_loss import CohortLoss
from braindino.pretrain.train import main
from braindino.slice_store import SliceStoreWriter

CPU = torch.device("cpu")


def scans_of(*cohorts: str) -> list[Scan]:
    return [Scan(f"/data/{i}_T1.nii.gz", cohort, f"s{i}", sequence="T1") for i, cohort in enumerate(cohorts)]


def test_means_are_those_of_the_slices_of_each_cohort_since_the_last_look() -> None:
    loss = CohortLoss(scans_of("a", "b", "a", "c"), np.array([0, 0, 1, 2, 3]), CPU)
    loss.add(np.array([0, 2]), torch.tensor([1.0, 10.0]))
    loss.add(np.array([3, 1]), torch.tensor([2.0, float("nan")]))
    assert loss.look() == {"dino_cohort/a": 1.5, "dino_cohort/b": 10.0}
    loss.add(np.array([4]), torch.tensor([7.0]))
    assert loss.look() == {"dino_cohort/c": 7.0}
    assert loss.look() == {}


def test_one_cohort_has_no_entry_of_its_own() -> None:
    loss = CohortLoss(scans_of("a", "a"), np.array([0, 1]), CPU)
    loss.add(np.array([0]), torch.tensor([1.0]))
    assert loss.look() == {}


def test_the_rows_of_a_run_hold_it_and_it_averages_to_the_loss(tmp_path: Path) -> None:
    writer, rng = SliceStoreWriter(tmp_path / "store"), np.random.default_rng(0)
    for scan in scans_of("a", "b"):
        writer.add(scan, rng.standard_normal((4, 256, 256)), range(4))
    writer.publish()
    command = ["debug", "--store", str(tmp_path / "store"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--batch-size", "8", "--iterations", "2"]) == 0
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        # Every slice is in a batch of eight, four of each cohort.
        assert (row["dino_cohort/a"] + row["dino_cohort/b"]) / 2 == pytest.approx(row["dino"], rel=1e-5)
