"""What every process that works for another one does."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_parent() -> None:
    """From now on, leave at once when the process that asked for this one is gone: a killed run must not go on, writing
    beside its successor or waiting for tasks that nobody sends."""
    threading.Thread(target=_wait_and_leave, daemon=True).start()


def _wait_and_leave() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
