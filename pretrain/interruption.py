"""SIGTERM and SIGINT as a request to stop after the current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Which signal asked to stop; empty until one did."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block the first SIGTERM or SIGINT is only noted; a second SIGINT interrupts at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
