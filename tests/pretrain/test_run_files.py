"""Files of a run: checkpoints, metrics, the picture of progress."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch

from braindino.metrics_log import append_metrics, drop_metrics_after, read_metrics
from braindino.pretrain.checkpoint import checkpoint_folders, load_newest_checkpoint, save_checkpoint
from braindino.pretrain.progress import draw_progress


def save(run: Path, iteration: int) -> Path:
    return save_checkpoint(
        run, iteration=iteration, config={"seed": 0}, state={"student": {"w": torch.ones(3) * iteration}}
    )


def test_the_two_newest_checkpoints_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for iteration in (5, 10, 1_000_000):
        save(tmp_path, iteration)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["iteration=1000000", "iteration=000010"]
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None and newest.iteration == 1_000_000 and newest.config == {"seed": 0}
    assert newest.state["student"]["w"].tolist() == [1e6] * 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no description", "no state"])
@pytest.mark.fault
def test_a_damaged_checkpoint_is_passed_over_with_a_notice(tmp_path: Path, capsys, damage: str) -> None:
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    state, description = folder / "state.pt", folder / "checkpoint.json"
    content = bytearray(state.read_bytes())
    if damage == "truncated":
        state.write_bytes(content[:-20])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "no description":
        description.write_text("{")
    else:
        state.unlink()
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None and newest.iteration == 5
    notice = capsys.readouterr().out
    assert notice.startswith("checkpoint passed over: ") and str(folder) in notice
    save(tmp_path, 10)
    again = load_newest_checkpoint(tmp_path)
    assert again is not None and again.iteration == 10


@pytest.mark.fault
def test_damaged_later_checkpoints_do_not_push_out_sound_ones(tmp_path: Path) -> None:
    for iteration in (5, 10):
        save(tmp_path, iteration)
    (tmp_path / "checkpoints" / "iteration=000010" / "state.pt").write_bytes(b"")
    save(tmp_path, 8)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["iteration=000008", "iteration=000005"]


@pytest.mark.fault
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    (save(tmp_path, 5) / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of its 1 checkpoints can be read .*remove them to start from the beg"):
        load_newest_checkpoint(tmp_path)


@pytest.mark.fault
def test_a_checkpoint_that_was_being_written_is_not_seen(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    folder.rename(folder.with_name(f".{folder.name}"))
    assert load_newest_checkpoint(tmp_path) is None


def test_metrics_after_the_resumed_iteration_and_unfinished_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for iteration in range(1, 6):
        append_metrics(path, {"iteration": iteration, "loss": 1.0 / iteration})
    with path.open("a") as handle:
        handle.write('{"iteration": 6, "lo')
    drop_metrics_after(path, 3)
    append_metrics(path, {"iteration": 4, "loss": 0.5})
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert read_metrics(path)[-1] == {"iteration": 4, "loss": 0.5}


def test_a_broken_line_in_the_middle_of_metrics_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\nnonsense\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        read_metrics(path)


def test_progress_is_drawn_from_metrics(tmp_path: Path) -> None:
    names = "dino_global dino_local ibot loss teacher_entropy prototype_entropy feature_std feature_rank lr koleo"
    names += " grad_norm_encoder grad_norm_dino_head grad_norm_ibot_head neighbour_distance slices_per_second"
    rows = [
        {"iteration": i, "expected_initial_loss": 9.0, **dict.fromkeys(names.split(), 1.0 / i)} for i in range(1, 5)
    ]
    draw_progress(rows, tmp_path / "progress.png", num_prototypes=64, title="a run")
    plain = matplotlib.image.imread(tmp_path / "progress.png")
    for name in ("knn_sequence", "mae_age"):
        rows[-1] |= {f"probe_{name}{part}": 0.5 for part in ("", "_intensity", "_floor")}
    rows[-1] |= {"probe_neighbour_distance": 0.1, **{f"dino_cohort/c{i}": float(i) for i in range(20)}}
    draw_progress(rows, tmp_path / "progress.png", num_prototypes=64, title="a run with probes and cohorts")
    # Seven panels in four columns, then eleven in six.
    assert matplotlib.image.imread(tmp_path / "progress.png").shape[1] == plain.shape[1] * 6 // 4
