"""The debug recipe from end to end on a tiny store."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from braindino import load_encoder
from braindino.manifest import Scan
from braindino.metrics_log import read_metrics
from braindino.pretrain.checkpoint import checkpoint_folders, load_newest_checkpoint
from braindino.pretrain.train import main
from braindino.slice_store import SliceStore, SliceStoreWriter

TIMING = ("slices_per_second", "eta_seconds")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Five subjects with 8 slices each: a bright disc whose place and width tell subject and height, and noise."""
    writer = SliceStoreWriter(tmp_path_factory.mktemp("pretrain") / "store")
    rows, columns = np.mgrid[:256, :256]
    rng = np.random.default_rng(0)
    for number in range(5):
        discs = [
            2.0 * ((rows - 90 - 6 * k) ** 2 + (columns - 80 - 20 * number) ** 2 < (30 + 5 * k) ** 2) for k in range(8)
        ]
        scan = Scan(path=f"/data/{number}.nii.gz", cohort="site", subject=f"s{number}", sequence="T1")
        writer.add(scan, np.stack(discs) + 0.1 * rng.standard_normal((8, 256, 256)), range(8))
    writer.publish()
    return writer.store_dir


def arguments(store: Path, run: Path, *more: str) -> list[str]:
    return ["debug", "--store", str(store), "--out", str(run), "--device", "cpu", *more]


def rows_of(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory) -> Path:
    """An uninterrupted run of the recipe: 12 iterations."""
    run = tmp_path_factory.mktemp("pretrain") / "straight"
    finish(start(arguments(store, run)))
    return run


def start(arguments: list[str]) -> subprocess.Popen:
    """A run in a process of its own: float sums, and so its numbers, depend on how many threads share them."""
    return subprocess.Popen(
        [sys.executable, "-m", "braindino.pretrain.train", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    """What it printed."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


def test_a_run_leaves_its_files_and_finite_falling_losses(straight: Path) -> None:
    rows = rows_of(straight)
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    assert all(np.isfinite(value) for row in rows for value in row.values() if not isinstance(value, list))
    assert rows[0]["loss"] == pytest.approx(rows[0]["expected_initial_loss"], rel=0.02)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {path.name for path in straight.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "encoder",
        "metrics.jsonl",
        "progress.png",
        "run.json",
    }
    assert [path.name for path in checkpoint_folders(straight)] == ["iteration=000012", "iteration=000008"]


def test_an_initial_loss_that_is_not_an_untrained_networks_is_noticed(store: Path, tmp_path: Path, capsys) -> None:
    options = ("--iterations", "1", "--loss.student-temperature")
    assert main([*arguments(store, tmp_path / "sharp", *options, "0.01")]) == 0
    assert "NOTICE: the initial loss is " in capsys.readouterr().out
    assert main([*arguments(store, tmp_path / "as-usual", *options, "0.1")]) == 0
    assert "NOTICE" not in capsys.readouterr().out


def test_the_encoder_file_is_the_teacher_of_the_newest_checkpoint(straight: Path, store: Path) -> None:
    checkpoint = load_newest_checkpoint(straight)
    assert checkpoint is not None
    encoder = load_encoder(straight / "encoder")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, checkpoint.state["teacher"][f"encoder.{name}"]), name
    description = json.loads((straight / "encoder" / "encoder.json").read_text())
    assert SliceStore(store).fingerprint in json.dumps(description)
    assert "teacher after 12 iterations" in json.dumps(description)


@pytest.mark.fault
def test_killed_and_resumed_with_other_workers_equals_running_straight(
    straight: Path, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    process = start(arguments(store, run, "--num-workers", "1"))
    wait_for(lambda: len(checkpoint_folders(run)) >= 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    checkpoint = load_newest_checkpoint(run)
    assert checkpoint is not None and checkpoint.iteration < 12
    finish(start(arguments(store, run, "--num-workers", "2")))
    assert rows_of(run) == rows_of(straight)
    assert load_encoder(run / "encoder").sha256 == load_encoder(straight / "encoder").sha256


@pytest.mark.fault
def test_sigterm_finishes_the_step_saves_and_exits_cleanly(straight: Path, store: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    process = start(arguments(store, run, "--checkpoint-every", "1000"))
    wait_for(lambda: len(read_metrics(run / "metrics.jsonl")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    checkpoint = load_newest_checkpoint(run)
    assert checkpoint is not None and checkpoint.iteration < 12
    assert f"stopped by SIGTERM after iteration {checkpoint.iteration}; the same command resumes" in output
    assert rows_of(run) == rows_of(straight)[: checkpoint.iteration]


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_a_finished_run_is_left_as_it_is(straight: Path, store: Path, tmp_path: Path, capsys) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    assert main(arguments(store, run)) == 0
    assert "is finished: all 12 iterations are done" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_run_with_other_settings_is_refused_naming_them(straight: Path, store: Path, capsys) -> None:
    assert main(arguments(store, straight, "--seed", "5", "--optimizer.base-lr", "0.5")) == 1
    error = capsys.readouterr().err
    assert "holds a run with other settings (seed: 0 -> 5; optimizer.base_lr: 0.001 -> 0.5)" in error


def test_excluded_subjects_are_recorded_and_change_what_is_seen(
    straight: Path, store: Path, tmp_path: Path, capsys
) -> None:
    listed = tmp_path / "test_subjects.txt"
    listed.write_text("site/s1\nsite/s3\n")
    flags = ("--exclude-subjects", str(listed), "--iterations", "2")
    assert main(arguments(store, tmp_path / "run", *flags)) == 0
    assert "24 of 5 scans" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["excluded_subjects"]["subjects"] == ["site/s1", "site/s3"]
    assert len(record["excluded_subjects"]["sha256"]) == 64
    assert rows_of(tmp_path / "run")[0]["loss"] != rows_of(straight)[0]["loss"]
    listed.write_text("site/s1\n")
    assert main(arguments(store, tmp_path / "run", *flags)) == 1
    assert "excluded subjects: 2 -> 1" in capsys.readouterr().err


def test_a_second_stage_starts_from_the_teacher_of_the_first(
    straight: Path, store: Path, tmp_path: Path, capsys
) -> None:
    first = load_newest_checkpoint(straight)
    assert first is not None
    flags = ("--init-from", str(straight), "--iterations", "1", "--optimizer.teacher-momentum", "1.0")
    assert main(arguments(store, tmp_path / "second", *flags)) == 0
    second = load_newest_checkpoint(tmp_path / "second")
    assert second is not None
    assert all(torch.equal(first.state["teacher"][name], tensor) for name, tensor in second.state["teacher"].items())
    assert main(arguments(store, tmp_path / "third", *flags, "--model.num-prototypes", "32")) == 1
    error = capsys.readouterr().err
    assert "2 parameters do not fit, first dino_head.last_layer.weight: found (128, 32), expected (32, 32)" in error


def test_several_crop_pairs_alternate_between_iterations(store: Path, tmp_path: Path) -> None:
    flags = "--crops.global-sizes 64 96 --crops.local-sizes 32 40 --crops.pair-ratios 0.5 0.5 --crops.canvas-size 1024"
    assert main(arguments(store, tmp_path / "run", *flags.split(), "--iterations", "6")) == 0
    sizes = {tuple(row["crop_sizes"]) for row in rows_of(tmp_path / "run")}
    assert sizes == {(64, 32), (96, 32)}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_iteration_and_scans(
    store: Path, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    assert main(arguments(store, run, "--optimizer.base-lr", "1e30", "--iterations", "8")) == 1
    error = capsys.readouterr().err
    assert "from iteration 2 on loss or gradient is not finite, more than 3 times in a row" in error
    assert "all its slices are finite; its scans: /data/" in error
    assert all(np.isfinite(row["loss"]) for row in rows_of(run))


def test_a_second_process_on_the_same_run_is_turned_away(store: Path, straight: Path, capsys) -> None:
    (straight / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    try:
        assert main(arguments(store, straight)) == 1
    finally:
        (straight / ".lock").unlink()
    assert "process 1 on elsewhere is working here" in capsys.readouterr().err


def test_a_missing_store_is_one_clear_line(tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path / "nothing", tmp_path / "run")) == 1
    assert "no slice store here (no store.json); make one with `braindino prepare`" in capsys.readouterr().err
