"""A simulated cohort for the `demo` recipe, made and prepared through the command line."""

import subprocess
import sys
from pathlib import Path

NUM_SUBJECTS = 12


def make_demo_store(folder: Path) -> Path:
    """Simulate a cohort in folder/cohort and prepare it in folder/prepared unless that is done; the slice store's path.

    Raises:
        ValueError: a command failed; names it and its exit code.
    """
    cohort, prepared = folder / "cohort", folder / "prepared"
    store = prepared / "store"
    if not (store / "store.json").exists():
        print(f"no --store given: simulating {NUM_SUBJECTS} subjects in {cohort} and preparing them", flush=True)
        _run("simulate", "--out", str(cohort), "--subjects", str(NUM_SUBJECTS), "--seed", "0")
        _run("prepare", str(cohort), "--out", str(prepared), "--skull-strip", "none", "--jobs", "2")
    return store


def _run(*arguments: str) -> None:
    command = [sys.executable, "-m", "braindino.cli", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise ValueError(f"`braindino {' '.join(arguments)}` ended with exit code {code}; its message is above")
