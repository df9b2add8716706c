"""How programs end: a line and a code for what users can mend, a traceback for what they cannot."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from braindino.command_line import EXIT_ERROR, EXIT_INTERRUPTED, command_line


def ending(error: BaseException | None, **options) -> Callable[[Sequence[str] | None], int]:
    @command_line("try", **options)
    def main(argv: Sequence[str] | None = None) -> int:
        """What it does."""
        if error is not None:
            raise error
        return 3

    return main


def test_a_program_that_ends_by_itself_gives_its_own_code_and_keeps_its_name() -> None:
    main = ending(None)
    assert main([]) == 3 and main(argv=[]) == 3
    assert main.__name__ == "main" and main.__doc__ == "What it does."


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("scan.nii: found 2 axes; expected 3"), "braindino try: scan.nii: found 2 axes; expected 3\n"),
        (FileNotFoundError(2, "No such file", "x"), "braindino try: [Errno 2] No such file: 'x'\n"),
        (FloatingPointError("loss is NaN"), "braindino try: loss is NaN\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_code_1(error, line, capsys) -> None:
    assert ending(error, errors=(FloatingPointError,))([]) == EXIT_ERROR
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [KeyError("name"), FloatingPointError("not expected here"), SystemExit(2)])
def test_our_own_mistakes_keep_their_traceback_and_usage_its_code(error) -> None:
    with pytest.raises(type(error)):
        ending(error)([])


def test_ctrl_c_says_how_to_go_on(capsys) -> None:
    assert ending(KeyboardInterrupt(), interrupted="run it again")([]) == EXIT_INTERRUPTED
    assert ending(KeyboardInterrupt())([]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "braindino try: interrupted; run it again\nbraindino try: interrupted\n"


def test_ctrl_c_ends_a_program_that_is_at_work_without_a_traceback(tmp_path: Path, hears_ctrl_c) -> None:
    out = tmp_path / "cohort"
    command = [sys.executable, "-m", "braindino.cli", "simulate", "--out", str(out), "--subjects", "24"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while not list(out.rglob("*.nii.gz")) and running.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == EXIT_INTERRUPTED, errors
    assert "Traceback" not in errors and "braindino simulate: interrupted; what is finished is kept" in errors
