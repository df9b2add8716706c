"""SIGTERM and SIGINT as a request to stop after the current step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_TOGETHER = 2.0


class StopRequest:
    """Which signal asked to stop; empty until one did."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block the first SIGTERM or SIGINT is only noted; a second SIGINT interrupts at once.

    Ctrl-C reaches the processes of torchrun twice, from the terminal and from torchrun: what comes within
    SECONDS_TOGETHER of the first is the same request.
    """
    request = StopRequest()
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not request:
            first = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first > SECONDS_TOGETHER:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
