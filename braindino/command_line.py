"""How every program of the front door ends when it cannot go on: with a line, and a code that scripts can read."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_PARTIAL = 3
"""Finished, with some scans, cases or rows left out; a table says which and why."""
EXIT_DIFFERENT = 4
EXIT_INTERRUPTED = 130
"""What shells give to a program that Ctrl-C ended: 128 and the number of SIGINT."""
GOES_ON = "what is finished is kept, the same command goes on"

Arguments = ParamSpec("Arguments")
Main = Callable[Arguments, int]


def command_line(
    verb: str, *, errors: tuple[type[Exception], ...] = (), interrupted: str = ""
) -> Callable[[Main[Arguments]], Main[Arguments]]:
    """A ``main`` that tells what was expected to go wrong in a line on standard error, without a traceback.

    ValueError, OSError and ``errors`` end it with EXIT_ERROR, Ctrl-C with EXIT_INTERRUPTED. Any other exception is a
    mistake of ours and keeps its traceback.

    Args:
        verb: the program's name, after ``braindino``.
        errors: further exceptions that a user can do something about.
        interrupted: what Ctrl-C leaves, and how to go on.
    """

    expected: tuple[type[Exception], ...] = (ValueError, OSError, *errors)

    def decorate(main: Main[Arguments]) -> Main[Arguments]:
        @functools.wraps(main)
        def guarded(*args: Arguments.args, **keywords: Arguments.kwargs) -> int:
            try:
                return main(*args, **keywords)
            except expected as error:
                print(f"braindino {verb}: {error}", file=sys.stderr)
                return EXIT_ERROR
            except KeyboardInterrupt:
                end = f"interrupted; {interrupted}" if interrupted else "interrupted"
                print(f"braindino {verb}: {end}", file=sys.stderr)
                return EXIT_INTERRUPTED

        return guarded

    return decorate
