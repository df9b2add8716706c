"""Several processes, and several micro-batches: the same run as one process with the whole batch. On gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from braindino.manifest import Scan
from braindino.metrics_log import read_metrics
from braindino.pretrain.checkpoint import checkpoint_folders, load_newest_checkpoint
from braindino.pretrain.distributed import Division
from braindino.pretrain.train import main
from braindino.slice_store import SliceStoreWriter

ITERATIONS = 8
# The model is cut down in its heads alone: what is compared is every part of the real step.
SETTINGS = ("--device", "cpu", "--iterations", str(ITERATIONS), "--checkpoint-every", "2")
# KoLeo and drop path go by micro-batch; without them a micro-batch may be of any size.
BY_SLICE = ("--loss.koleo-weight", "0", "--model.drop-path", "0")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Three subjects with 8 slices each."""
    writer = SliceStoreWriter(tmp_path_factory.mktemp("distributed") / "store")
    rows, columns = np.mgrid[:256, :256]
    rng = np.random.default_rng(0)
    for number in range(3):
        discs = [
            2.0 * ((rows - 90 - 6 * k) ** 2 + (columns - 80 - 20 * number) ** 2 < (30 + 5 * k) ** 2) for k in range(8)
        ]
        scan = Scan(path=f"/data/{number}.nii.gz", cohort="site", subject=f"s{number}", sequence="T1")
        writer.add(scan, np.stack(discs) + 0.1 * rng.standard_normal((8, 256, 256)), range(8))
    writer.publish()
    return writer.store_dir


def start(store: Path, run: Path, *more: str, processes: int) -> subprocess.Popen:
    """The debug recipe in processes of their own, one thread each."""
    launcher = TORCHRUN if processes == 2 else ()
    return subprocess.Popen(
        [
            *(sys.executable, *launcher, "-m", "braindino.pretrain.train", "debug"),
            *("--store", str(store), "--out", str(run), *SETTINGS, *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )


def finish(process: subprocess.Popen) -> str:
    """What it printed."""
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def two(store: Path, tmp_path_factory) -> Path:
    """An uninterrupted run of two processes (DDP) with 2 slices each."""
    run = tmp_path_factory.mktemp("distributed") / "two"
    output = finish(start(store, run, "--batch-size", "2", processes=2))
    assert "4 slices (2 processes x 2) on cpu, ddp" in output
    assert "global batch 4)" in output
    assert output.count("initial loss") == 1
    return run


def assert_same_run(run: Path, reference: Path, *, but_for: tuple[str, ...] = ()) -> None:
    """Equal losses, gradient norms and weights at the end, but for the order in which floats are summed."""
    rows, expected = read_metrics(run / "metrics.jsonl"), read_metrics(reference / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    for row, wanted in zip(rows, expected, strict=True):
        for name in ("loss", "dino", "dino_global", "dino_local", "ibot", "koleo", "grad_norm_encoder"):
            assert name in but_for or row[name] == pytest.approx(wanted[name], rel=1e-5), (row["iteration"], name)
    ours, theirs = load_newest_checkpoint(run), load_newest_checkpoint(reference)
    assert ours is not None and theirs is not None and ours.iteration == theirs.iteration == ITERATIONS
    for network in ("student", "teacher"):
        assert ours.state[network].keys() == theirs.state[network].keys()
        for name, tensor in ours.state[network].items():
            # By norm: AdamW makes whole steps of gradients that are zero but for rounding, in single weights.
            wanted_tensor = theirs.state[network][name]
            assert (tensor - wanted_tensor).norm() <= 2e-5 * (wanted_tensor.norm() + 1), name


def test_two_processes_equal_one_at_the_same_global_batch(store: Path, tmp_path: Path) -> None:
    finish(start(store, tmp_path / "one", "--batch-size", "4", *BY_SLICE, processes=1))
    finish(start(store, tmp_path / "two", "--batch-size", "2", *BY_SLICE, processes=2))
    assert_same_run(tmp_path / "two", tmp_path / "one", but_for=("koleo",))


def test_two_micro_batches_equal_two_processes_with_koleo_and_drop_path(store: Path, two: Path, tmp_path: Path) -> None:
    finish(start(store, tmp_path / "run", "--batch-size", "2", "--accumulate", "2", processes=1))
    assert_same_run(tmp_path / "run", two)


def test_sharded_processes_equal_copies_and_leave_the_same_files(store: Path, two: Path, tmp_path: Path) -> None:
    output = finish(start(store, tmp_path / "run", "--batch-size", "2", "--parallel", "fsdp", processes=2))
    assert "(2 processes x 2) on cpu, fsdp" in output
    assert_same_run(tmp_path / "run", two)
    ours, theirs = load_newest_checkpoint(tmp_path / "run"), load_newest_checkpoint(two)
    assert ours is not None and theirs is not None
    first, second = ours.state["optimizer"], theirs.state["optimizer"]
    assert first["param_groups"] == second["param_groups"] and first["state"].keys() == second["state"].keys()
    for number, moments in second["state"].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(first["state"][number][name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.fault
@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_killed_with_two_processes_and_resumed_equals_running_straight(
    store: Path, two: Path, tmp_path: Path, parallel: str
) -> None:
    run = tmp_path / "run"
    kill_after_a_checkpoint(store, run)
    finish(start(store, run, "--batch-size", "2", "--parallel", parallel, "--num-workers", "1", processes=2))
    assert_same_run(run, two)
    if parallel == "ddp":
        ours, theirs = load_newest_checkpoint(run), load_newest_checkpoint(two)
        assert ours is not None and theirs is not None
        for name, tensor in theirs.state["student"].items():
            assert torch.equal(ours.state["student"][name], tensor), name
        losses, expected = ([row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (run, two))
        assert losses == expected


@pytest.mark.fault
def test_killed_with_two_processes_and_resumed_with_one(store: Path, two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_after_a_checkpoint(store, run)
    refused = start(store, run, "--batch-size", "2", processes=1)
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert "global batch (processes x accumulate x batch_size): 4 -> 2" in output
    output = finish(start(store, run, "--batch-size", "2", "--accumulate", "2", processes=1))
    assert "it was made with 4 slices (2 processes x 2): the same micro-batches, so the same numbers" in output
    assert_same_run(run, two)


def kill_after_a_checkpoint(store: Path, run: Path) -> None:
    """Start two processes and kill -9 them, and torchrun, when there is a checkpoint."""
    process = start(store, run, "--batch-size", "2", processes=2)
    wait_for(lambda: len(checkpoint_folders(run)) >= 1, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in (process.pid, *map(int, children)):
        os.kill(number, signal.SIGKILL)
    process.communicate()
    checkpoint = load_newest_checkpoint(run)
    assert checkpoint is not None and checkpoint.iteration < ITERATIONS
    assert checkpoint.state["division"] == {"processes": 2, "accumulate": 1, "batch_size": 2}


@pytest.mark.fault
def test_sigterm_to_torchrun_is_agreed_on_and_saved_once(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(store, run, "--batch-size", "2", "--checkpoint-every", "1000", "--iterations", "1000", processes=2)
    wait_for(lambda: len(read_metrics(run / "metrics.jsonl")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    checkpoint = load_newest_checkpoint(run)
    assert checkpoint is not None and 2 <= checkpoint.iteration < 1000
    assert output.count(f"stopped by SIGTERM after iteration {checkpoint.iteration}; the same command resumes") == 1
    assert len(read_metrics(run / "metrics.jsonl")) == checkpoint.iteration
    assert not (run / ".lock").exists()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_an_error_of_all_processes_is_told_once(store: Path, two: Path) -> None:
    process = start(store, two, "--batch-size", "2", "--seed", "5", processes=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("holds a run with other settings (seed: 0 -> 5)") == 1
    assert "Traceback" not in output.split("torch/distributed")[0]


REDUCTIONS = """
import sys, torch, torch.distributed as dist
from braindino.pretrain.distributed import all_reduce_logsumexp, join_processes, main_process_first, MainProcessError
generator = torch.Generator().manual_seed(0)
x = 300 * torch.randn(5, 7, generator=generator)
x[:, 3] = -torch.inf
with join_processes("cpu") as processes:
    for first in (2, 0):
        mine = x[:first] if processes.rank == 0 else x[first:]
        torch.testing.assert_close(all_reduce_logsumexp(mine, 0, keepdim=True), x.logsumexp(0, keepdim=True))
    nothing = all_reduce_logsumexp(x[:0], 0)
    assert (nothing == -torch.inf).all(), nothing
    x[0, 0] = torch.nan
    broken = all_reduce_logsumexp(x[:2] if processes.rank == 0 else x[2:], 0)
    assert broken.isnan().tolist() == [True] + 6 * [False], broken
    try:
        with main_process_first(processes):
            raise ValueError("from the main process")
    except ValueError:
        assert processes.is_main
    except MainProcessError:
        assert not processes.is_main
    print("passed")
"""


def test_log_sum_exp_over_processes_is_exact_with_huge_empty_and_broken_parts(tmp_path: Path) -> None:
    script = tmp_path / "reductions.py"
    script.write_text(REDUCTIONS)
    output = subprocess.run(
        [sys.executable, *TORCHRUN, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert output.returncode == 0, output.stderr
    assert output.stdout.count("passed") == 2


def test_parts_of_the_global_batch_are_contiguous_and_complete() -> None:
    division = Division(processes=3, accumulate=2, batch_size=4)
    places = [place for rank in range(3) for part in division.parts(rank) for place in range(24)[part]]
    assert places == list(range(division.global_batch)) == list(range(24))
    assert str(division) == "24 slices (3 processes x 2 micro-batches x 4)"
    assert "KoLeo" in division.difference(Division(3, 1, 8))


def test_fsdp_without_torchrun_and_half_an_environment_are_refused(
    store: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    arguments = ["debug", "--store", str(store), "--out", str(tmp_path / "run"), *SETTINGS]
    assert main([*arguments, "--parallel", "fsdp"]) == 1
    assert "--parallel fsdp shards over the processes of torchrun; start with torchrun" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "but not MASTER_ADDR, MASTER_PORT, RANK; start with torchrun" in error


def test_the_record_of_a_run_holds_its_global_batch(two: Path) -> None:
    assert json.loads((two / "run.json").read_text())["global_batch"] == 4
