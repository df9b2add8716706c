"""Rows in TensorBoard's own files, read back by it, and in a stand-in for Weights & Biases."""

import sys
import types
from pathlib import Path

import pytest

from braindino.pretrain import trackers
from braindino.pretrain.trackers import Trackers

ROW = {"iteration": 7, "loss": 2.5, "skipped_steps": 0, "crop_sizes": [96, 48], "alarms": ["few_points"]}


def test_tensorboard_reads_back_the_numbers_of_a_row(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Trackers(tmp_path, tensorboard=None, wandb_project=None, config={}, start=0) as shown:
        shown.log(ROW)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "skipped_steps"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 2.5)]


def test_tensorboard_can_be_switched_off(tmp_path: Path) -> None:
    with Trackers(tmp_path, tensorboard=False, wandb_project=None, config={}, start=0) as shown:
        shown.log(ROW)
    assert list(tmp_path.iterdir()) == []


class StandIn(types.ModuleType):
    """What the tracker calls of wandb, written down."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple] = []

    def init(self, **options) -> "StandIn":
        self.calls.append(("init", options))
        return self

    def log(self, numbers, step) -> None:
        self.calls.append(("log", numbers, step))

    def finish(self, exit_code) -> None:
        self.calls.append(("finish", exit_code))


def test_wandb_gets_rows_settings_and_an_id_that_a_resumed_run_keeps(tmp_path: Path, monkeypatch) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name == "wandb")
    for _ in range(2):
        with Trackers(tmp_path, tensorboard=None, wandb_project="mri", config={"seed": 3}, start=6) as shown:
            shown.log(ROW)
    first, second = (call[1] for call in wandb.calls if call[0] == "init")
    assert first == second and first["project"] == "mri" and first["config"] == {"seed": 3}
    assert first["resume"] == "allow" and len(first["id"]) == 16
    assert wandb.calls[1:3] == [("log", {"loss": 2.5, "skipped_steps": 0}, 7), ("finish", 0)]


def test_what_is_asked_for_and_not_installed_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for options in ({"tensorboard": True, "wandb_project": None}, {"tensorboard": False, "wandb_project": "mri"}):
        with pytest.raises(ValueError, match=r"is not installed; pip install (tensorboard|wandb)"):
            Trackers(tmp_path, config={}, start=0, **options)
