"""Which code made a result."""

import shutil
import subprocess
from pathlib import Path

import pytest

from braindino import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_this_code_with_a_mark_for_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "package" / "provenance.py"
    file.parent.mkdir()
    file.write_text("one")
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.code_commit() == ""  # no repository
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "of another project")
    assert provenance.code_commit() == ""  # somebody else's repository, as around a virtual environment
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "ours")
    git(tmp_path, "tag", "v1")
    assert provenance.code_commit() == git(tmp_path, "rev-parse", "HEAD")
    file.write_text("two")
    assert provenance.code_commit() == git(tmp_path, "rev-parse", "HEAD") + "-dirty"
