"""Steps that are not finite: skipped without a trace in the weights, counted, named, and the end of the run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from braindino.manifest import Scan
from braindino.metrics_log import read_metrics
from braindino.pretrain.checkpoint import checkpoint_folders, load_newest_checkpoint
from braindino.pretrain.guards import StepGuard
from braindino.pretrain.optimizer import build_adamw, step_unless, update_teacher
from braindino.pretrain.train import main
from braindino.slice_store import SliceStore, SliceStoreWriter

ONE, NAN = torch.tensor(1.0), torch.tensor(torch.nan)


def test_the_guard_counts_and_latches_until_it_is_looked_at() -> None:
    guard = StepGuard(1, torch.device("cpu"))
    skips = [
        guard.check(iteration, loss, torch.ones(3)).item() for iteration, loss in enumerate([ONE, NAN, ONE, NAN, ONE])
    ]
    assert skips == [0, 1, 0, 1, 0]
    found = guard.look()
    assert found.skipped == [1, 3] and found.total == 2 and not found.last_is_bad and found.stop_at is None
    # Two in a row are one too many: what follows is skipped although it is good, up to the look.
    skips = [guard.check(5 + number, loss, torch.ones(3)).item() for number, loss in enumerate([ONE, NAN, NAN, ONE])]
    assert skips == [0, 1, 1, 1]
    assert guard.look().stop_at == 6
    # What is saved then is the state before the row.
    assert guard.state_dict() == {"total": 2, "in_a_row": 0}


def test_a_gradient_norm_that_is_not_finite_counts_and_zero_allowed_stops_at_the_first() -> None:
    guard = StepGuard(0, torch.device("cpu"))
    assert guard.check(7, ONE, torch.tensor([1.0, torch.inf])).item() == 1
    assert guard.look().stop_at == 7


def test_a_row_goes_on_over_an_interruption() -> None:
    guard = StepGuard(2, torch.device("cpu"))
    for iteration in (3, 4):
        guard.check(iteration, NAN, torch.ones(1))
    assert guard.look().stop_at is None
    resumed = StepGuard(2, torch.device("cpu"))
    resumed.load_state_dict(guard.state_dict())
    resumed.check(5, NAN, torch.ones(1))
    assert resumed.look().stop_at == 3


def test_a_skipped_step_leaves_weights_moments_and_teacher_bit_equal() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    names = ["weight", "bias"]
    groups = [{"params": list(student.parameters()), "names": names, "lr": 0.1}]
    optimizer = build_adamw(groups, betas=(0.9, 0.999))
    for group in optimizer.param_groups:
        group["lr"] = 0.1

    def step(gradient: float, skip: float) -> list[torch.Tensor]:
        for parameter in student.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        step_unless(optimizer, torch.tensor(skip))
        update_teacher(teacher, student, momentum=0.9, skip=torch.tensor(skip))
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        return [tensor.detach().clone() for tensor in [*student.parameters(), *teacher.parameters(), *moments]]

    first = step(0.5, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(first, step(torch.nan, 1.0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, step(0.5, 0.0), strict=True) if a.ndim)


def test_the_moving_average_is_the_same_with_the_flag_down() -> None:
    torch.manual_seed(0)
    student, plain, flagged = nn.Linear(40, 30), nn.Linear(40, 30), nn.Linear(40, 30)
    flagged.load_state_dict(plain.state_dict())
    update_teacher(plain, student, momentum=0.994)
    update_teacher(flagged, student, momentum=0.994, skip=torch.zeros(()))
    torch.testing.assert_close(flagged.weight, plain.weight, rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Six scans of 4 slices."""
    writer = SliceStoreWriter(tmp_path_factory.mktemp("guards") / "store")
    rng = np.random.default_rng(0)
    for number in range(6):
        scan = Scan(path=f"/data/{number}.nii.gz", cohort="site", subject=f"s{number}", sequence="T1")
        writer.add(scan, rng.standard_normal((4, 256, 256)).cumsum(axis=2) / 8, range(4))
    writer.publish()
    return writer.store_dir


def arguments(store: Path, run: Path, *more: str) -> list[str]:
    flags = ["--iterations", "6", "--checkpoint-every", "100", "--log-every", "3", "--device", "cpu", *more]
    return ["debug", "--store", str(store), "--out", str(run), *flags]


@pytest.fixture
def broken(store: Path, monkeypatch) -> set[int]:
    """Store indices of slices that read as NaN: add to it."""
    indices: set[int] = set()
    read = SliceStore.read_float16

    def read_broken(self: SliceStore, index: int, out: np.ndarray | None = None) -> np.ndarray:
        values = read(self, index, out=out) if out is not None else read(self, index)
        if index in indices:
            values[100:110, 100:110] = np.nan
        return values

    monkeypatch.setattr(SliceStore, "read_float16", read_broken)
    return indices


@pytest.mark.fault
def test_a_slice_of_nan_costs_its_step_and_is_named_by_its_scan(
    store: Path, broken: set[int], tmp_path: Path, capsys
) -> None:
    broken.add(0)  # one of the 24 slices: an epoch is 6 iterations of 4
    assert main(arguments(store, tmp_path / "run")) == 0
    output = capsys.readouterr().out
    assert output.count("skipped: loss or gradient is not finite; scans with values not finite: /data/0.nii.gz") == 1
    assert "/data/0.nii.gz, " not in output
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows and rows[-1]["skipped_steps"] <= 1
    assert all(np.isfinite(row["loss"]) for row in rows)
    checkpoint = load_newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.state["guard"]["total"] == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint.state["student"].values())


@pytest.mark.fault
def test_too_many_in_a_row_stop_the_run_with_the_last_good_state_saved(
    store: Path, broken: set[int], tmp_path: Path, capsys
) -> None:
    good = tmp_path / "good"
    assert main(arguments(store, good, "--iterations", "6", "--checkpoint-every", "2")) == 0
    (good / "checkpoints" / "iteration=000006").rename(tmp_path / "aside")
    reference = load_newest_checkpoint(good)
    assert reference is not None and reference.iteration == 4
    capsys.readouterr()

    from braindino.pretrain.sampling import SliceSampler

    sampler = SliceSampler(SliceStore(store).scan_index, batch_size=4, seed=0)
    broken.update(int(sampler.indices_of(iteration)[0]) for iteration in (4, 5))
    run = tmp_path / "run"
    assert main(arguments(store, run, "--max-bad-steps", "1")) == 1
    error = capsys.readouterr().err
    assert "from iteration 5 on loss or gradient is not finite, more than 1 times in a row" in error
    assert str(checkpoint_folders(run)[0]) in error
    kept = load_newest_checkpoint(run)
    assert kept is not None and kept.iteration == 4
    for name, tensor in reference.state["student"].items():
        assert torch.equal(kept.state["student"][name], tensor), name
    # Once the data are whole again the run goes on as if nothing had been.
    broken.clear()
    assert main(arguments(store, run, "--max-bad-steps", "1")) == 0
    resumed = load_newest_checkpoint(run)
    (tmp_path / "aside").rename(good / "checkpoints" / "iteration=000006")
    straight = load_newest_checkpoint(good)
    assert resumed is not None and straight is not None and resumed.iteration == straight.iteration == 6
    assert all(torch.equal(resumed.state["student"][name], value) for name, value in straight.state["student"].items())
    assert json.loads(json.dumps(resumed.state["guard"])) == {"total": 0, "in_a_row": 0}
