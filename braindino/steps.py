"""Chains of commands: each printed, run, and kept in a log that says how a folder was made."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from braindino.atomic import write_text

# Threads that wait for each other sleep instead of spinning. On a free machine nothing changes; beside one other busy
# process a training step took 2.3 s with this and 17 s without (two cores, benchmarks/RESULTS.md).
THREADING = {"OMP_WAIT_POLICY": "PASSIVE"}


class Step(NamedTuple):
    """One command, and the environment variables it needs beyond the user's own."""

    title: str
    command: list[str]
    environment: dict[str, str]
    allowed: tuple[int, ...] = (0,)
    """Exit codes with which the chain goes on."""

    def __str__(self) -> str:
        """As one would type it; a program of this environment by its name alone."""
        words = [Path(self.command[0]).name, *self.command[1:]]
        return " ".join(
            [*(f"{key}={shlex.quote(value)}" for key, value in self.environment.items()), shlex.join(words)]
        )


def program(
    title: str,
    name: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    allowed: tuple[int, ...] = (0,),
) -> Step:
    """A console script of the very environment that Python runs in, whatever PATH says."""
    script = Path(sys.executable).with_name(name)
    return Step(title, [str(script), *map(str, arguments)], dict(environment or {}), allowed)


def verb(title: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Step:
    """A ``braindino`` verb; quarantined scans (exit code 3) do not stop the chain."""
    return program(title, "braindino", *arguments, environment=environment, allowed=(0, 3))


def run_steps(steps: Iterable[Step], *, log_path: Path, headline: str) -> float:
    """Run the steps in order and write them to ``log_path``; returns the seconds taken.

    Raises:
        ValueError: a step failed; names it. What was finished stays, and a second run goes on as its programs do.
    """
    start = time.monotonic()
    log = [f"# {headline}"]
    for number, step in enumerate(steps, start=1):
        began = time.monotonic()
        print(f"\n[{began - start:4.0f} s] {number}. {step.title}\n    {step}", flush=True)
        environment = {**THREADING, **os.environ, **step.environment}
        code = subprocess.run(step.command, env=environment, check=False).returncode
        if code not in step.allowed:
            raise ValueError(
                f"step {number} ({step.title}) ended with code {code}; its messages are above. Run again to go on"
            )
        log += [f"# {number}. {step.title}, {time.monotonic() - began:.0f} s", str(step)]
        write_text(log_path, "\n".join(log) + "\n")
    return time.monotonic() - start
