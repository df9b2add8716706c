"""Checkpoints of a run: RUN/checkpoints/iteration=000100/, with everything that resuming needs.

A folder holds state.pt (weights of student and teacher, optimiser) and checkpoint.json (iteration, settings, SHA-256 of
state.pt). It is written under another name and renamed, so that a folder of the right name is complete.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from braindino.atomic import replace_file, sync, write_json
from braindino.file_digest import file_digest

FORMAT_VERSION = 2
KEPT = 2
PREFIX = "iteration="


class Checkpoint(NamedTuple):
    """A checkpoint read back."""

    path: Path
    iteration: int
    """Iterations done."""
    config: dict[str, Any]
    sha256: str
    state: dict[str, Any]
    """`student`, `teacher` and `optimizer` state dictionaries, whole and on the CPU however they were trained; `guard`
    (counts of skipped steps) and `division` (of the batch over processes, see `distributed.Division`)."""


def save_checkpoint(run_dir: Path, *, iteration: int, config: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write a checkpoint and remove all but this and the one before; the path of its folder."""
    folder = checkpoint_folder(run_dir, iteration)
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with replace_file(partial / "state.pt") as temporary:
        torch.save(state, temporary)
    write_json(
        partial / "checkpoint.json",
        {
            "format": "braindino pretraining checkpoint",
            "version": FORMAT_VERSION,
            "iteration": iteration,
            "state_sha256": file_digest(partial / "state.pt"),
            "config": config,
        },
    )
    if folder.exists():  # a corrupt one that was skipped on resuming
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.parent)
    # Later ones were passed over on resuming; left there, they would count among the newest two.
    kept = [path for path in checkpoint_folders(run_dir) if _iteration_of(path) <= iteration][:KEPT]
    for path in folder.parent.glob(f"*{PREFIX}*"):
        if path not in kept:
            shutil.rmtree(path)
    return folder


def checkpoint_folder(run_dir: Path, iteration: int) -> Path:
    """Where the checkpoint after so many iterations lies."""
    return run_dir / "checkpoints" / f"{PREFIX}{iteration:06d}"


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, newest first."""
    found = [path for path in (run_dir / "checkpoints").glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=_iteration_of, reverse=True)


def load_newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is sound, None if there is none at all; damaged ones are named on standard output.

    Raises:
        ValueError: there are checkpoints, but not one of them can be read. A run that has come far must not start anew
            over that unasked.
    """
    folders = checkpoint_folders(run_dir)
    for folder in folders:
        try:
            return load_checkpoint(folder)
        except (ValueError, OSError) as error:
            print(f"checkpoint passed over: {error}", flush=True)
    if folders:
        raise ValueError(
            f"{folders[0].parent}: none of its {len(folders)} checkpoints can be read (see above); restore one, or "
            "remove them to start from the beginning"
        )
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        ValueError: it is damaged or of another format version; names the file.
    """
    description = folder / "checkpoint.json"
    try:
        meta = json.loads(description.read_text(encoding="utf-8"))
        version, sha256 = meta["version"], meta["state_sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{description}: damaged ({error})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{description}: format version {version}; this program reads version {FORMAT_VERSION}")
    found = file_digest(folder / "state.pt")
    if found != sha256:
        raise ValueError(f"{folder / 'state.pt'}: damaged (SHA-256 {found[:12]}..., expected {sha256[:12]}...)")
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return Checkpoint(folder, meta["iteration"], meta["config"], sha256, state)


def _iteration_of(folder: Path) -> int:
    return int(folder.name[len(PREFIX) :])
