"""Files that appear whole, folders with one owner, progress in a log."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from braindino import progress
from braindino.atomic import replace_file, write_json, write_text
from braindino.lock import lock_folder
from braindino.progress import track
from braindino.provenance import versions


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="half way"), replace_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        raise RuntimeError("half way")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_written_file_has_ordinary_permissions_and_keeps_its_suffix(tmp_path: Path) -> None:
    with replace_file(tmp_path / "deep" / "b.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz") and temporary.parent == tmp_path / "deep"
        temporary.write_bytes(b"x")
    (tmp_path / "plain").touch()
    assert (tmp_path / "deep" / "b.nii.gz").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", {"b": 1, "a": [2]})
    assert list(json.loads((tmp_path / "c.json").read_text())) == ["b", "a"]


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        owner = rf"process {os.getpid()} on {socket.gethostname()} is working here"
        with pytest.raises(ValueError, match=owner), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (tmp_path / ".lock").write_text(json.dumps({"pid": int(gone.stdout), "host": socket.gethostname()}))
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    (tmp_path / ".lock").write_text(json.dumps({"pid": int(gone.stdout), "host": "another-host"}))
    with pytest.raises(ValueError, match="another-host"), lock_folder(tmp_path):
        pass


def test_a_lock_that_its_owner_never_wrote_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braindino.lock.SECONDS_TO_WRITE", 0.01)
    (tmp_path / ".lock").touch()
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_progress_in_a_log_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(track(range(4), desc="scans")) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["scans: 2/4 done, 20 s, about 20 s left", "scans: 4/4 done, 40 s, about 0 s left"]


def test_versions_name_what_made_a_result() -> None:
    found = versions()
    assert {"python", "torch", "numpy", "nnunetv2"} <= set(found)
