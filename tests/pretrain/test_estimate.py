"""What a run will cost: measured steps, and the arithmetic from them."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from braindino.manifest import Scan
from braindino.pretrain.config import ModelConfig
from braindino.pretrain.data import Batch
from braindino.pretrain.distillation import build_student
from braindino.pretrain.estimate import Estimate, Measurement, Stopwatch, count_parameters, duration, power_limit
from braindino.pretrain.train import main
from braindino.slice_store import SliceStoreWriter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate") / "store"
    writer, rng = SliceStoreWriter(folder), np.random.default_rng(0)
    for n in range(3):
        writer.add(Scan(f"/data/{n}.nii.gz", "site", f"s{n}", sequence="T1"), rng.random((8, 256, 256)), range(8))
    writer.publish()
    return folder


def an_estimate(*measured: tuple, num_workers: int = 4, watts: float | None = None) -> Estimate:
    return Estimate(
        recipe="stage1",
        iterations=1000,
        global_batch=1024,
        num_processes=4,
        device="cuda",
        lr_rule="dinov3",
        peak_lr=4e-4,
        encoder_parameters=85_641_984,
        head_parameters=23_073_024,
        measured=measured,
        num_workers=num_workers,
        watts=watts,
    )


def measured(compute: float, load: float, *, share: float = 1.0, gib: float = 1.0) -> tuple:
    return (256, 112), share, Measurement(torch.device("cuda"), 256, compute, load, int(gib * 2**30))


def test_a_stopwatch_tells_computing_from_reading() -> None:
    def slow_loader():
        for _ in range(20):
            time.sleep(0.02)
            yield Batch(torch.zeros(3, 2, 2), torch.zeros(6, 1, dtype=torch.bool))

    stopwatch = Stopwatch(3, read_ahead=2)
    trained_on = 0
    for _ in stopwatch.watch(slow_loader(), CPU):
        time.sleep(0.5 if trained_on < 2 else 0.05)  # the first two steps warm up
        trained_on += 1
    assert trained_on == 5
    result = stopwatch.measurement
    assert result is not None and result.batch_size == 3
    assert result.compute_seconds == pytest.approx(0.05, abs=0.03)
    assert result.load_seconds == pytest.approx(0.02, abs=0.012)
    assert 2**25 < result.peak_bytes < 2**36


def test_a_run_too_short_to_be_measured_is_refused() -> None:
    loader = [Batch(torch.zeros(3, 2, 2), torch.zeros(6, 1, dtype=torch.bool))] * 2
    with pytest.raises(ValueError, match="--dry-run: the run has 2 iterations; 3 are needed"):
        list(Stopwatch(3, read_ahead=0).watch(loader, CPU))


def test_time_rates_and_energy_by_hand() -> None:
    # Half a second a step, faster reading: 1,000 steps are 500 s on each of 4 devices.
    result = an_estimate(measured(0.5, 0.1), watts=700.0)
    assert result.seconds == pytest.approx(500) and result.images_per_second == pytest.approx(2048)
    assert result.model_rate == pytest.approx(2048) and result.loader_rate == pytest.approx(10_240)
    assert result.limit() == "the model decides the speed"
    assert "energy: 0.556 device-hours, 0.389 kWh at the limit of 700 W each" in result.lines()
    assert "whole run: 8.33 min, without checkpoints and probes" in result.lines()
    assert result.lines()[1] == "peak learning rate: 0.0004 (rule dinov3, global batch 1024)"
    assert "student 131.79 M (encoder 85.64 M, two heads of 23.07 M)" in result.lines()[2]


def test_a_slow_loader_decides_the_speed_and_without_workers_adds_to_it() -> None:
    slow = an_estimate(measured(0.5, 0.8))
    assert slow.seconds == pytest.approx(800) and slow.limit().startswith("the loader decides the speed")
    alone = an_estimate(measured(0.5, 0.8), num_workers=0)
    assert alone.seconds == pytest.approx(1300) and alone.limit().startswith("reading takes a part of every step")
    assert an_estimate(measured(0.5, 0.45)).limit().startswith("the loader only just keeps up")
    assert an_estimate(measured(0.5, 0.45)).lines()[-1].startswith("energy: 0.556 device-hours (no power limit")


def test_pairs_of_crop_sizes_count_with_their_probabilities_and_memory_is_that_of_the_largest() -> None:
    result = an_estimate(measured(1.0, 0.1, share=0.75, gib=10), measured(3.0, 0.1, share=0.25, gib=40))
    assert result.seconds == pytest.approx(1500)
    assert result.peak_bytes == 40 * 2**30
    # Each pair is limited by what is slower for it.
    assert an_estimate(measured(1, 2, share=0.5), measured(3, 2, share=0.5)).seconds == pytest.approx(2500)


def test_parameters_are_those_of_the_network_that_is_built() -> None:
    tiny = dict(num_storage_tokens=4, layer_scale_init=1.0, drop_path=0.0, num_prototypes=48)
    tiny |= dict(head_hidden_dim=32, head_bottleneck_dim=16)
    student = build_student("vit_tiny", **tiny, seed=0)
    encoder, head = count_parameters(ModelConfig(architecture="vit_tiny", **tiny))
    assert encoder == sum(parameter.numel() for parameter in student.encoder.parameters())
    assert head == sum(parameter.numel() for parameter in student.ibot_head.parameters())
    assert count_parameters(ModelConfig()) == (85_641_984, 23_073_024)


@pytest.mark.parametrize(("seconds", "text"), [(41, "41 s"), (720, "12 min"), (12_600, "3.5 h"), (354_240, "4.1 days")])
def test_durations_are_told_in_a_fitting_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_cpu_has_no_power_limit() -> None:
    assert power_limit(CPU) is None


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_dry_run_measures_every_pair_and_leaves_nothing_behind(store: Path, tmp_path: Path, capsys, workers) -> None:
    flags = ["debug", "--store", str(store), "--device", "cpu", "--num-workers", workers, "--dry-run-steps", "2"]
    flags += ["--crops.global-sizes", "64", "48", "96", "--crops.local-sizes", "32", "32", "40"]
    flags += ["--crops.pair-ratios", "0.75", "0.25", "0", "--out", str(tmp_path / "runs" / "run"), "--dry-run"]
    assert main(flags) == 0
    assert not list(tmp_path.rglob("*run*/*")) and not list(tmp_path.rglob(".*"))
    told = capsys.readouterr().out
    assert "crops 64/32 px (75% of the steps)" in told and "crops 48/32 px (25% of the steps)" in told
    assert "crops 96" not in told
    assert "peak learning rate: 0.001 (rule none, global batch 4)" in told
    assert "model alone" in told and "whole run:" in told and "GiB" in told and "device-hours" in told
    assert "saved" not in told


def test_a_dry_run_leaves_a_run_as_it_is_and_removes_the_rest_of_a_killed_one(store: Path, tmp_path: Path) -> None:
    flags = ["debug", "--store", str(store), "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*flags, "--iterations", "1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    left = tmp_path / ".run.dry-run-0"
    left.mkdir(parents=True)
    (left / "config.yaml").write_text("seed: 99\n")
    (left / "run.json").write_text("{}")
    # Of other settings than the run's: a dry run asks what they would cost.
    assert main([*flags, "--dry-run", "--dry-run-steps", "1", "--batch-size", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_dry_run_of_a_run_that_is_too_short_says_so(store: Path, tmp_path: Path, capsys) -> None:
    flags = ["debug", "--store", str(store), "--device", "cpu", "--out", str(tmp_path / "run"), "--iterations", "2"]
    assert main([*flags, "--dry-run"]) == 1
    assert "--dry-run: the run has 2 iterations; 3 are needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
