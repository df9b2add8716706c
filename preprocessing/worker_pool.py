"""Processes that work through a list of tasks, and go on when one of them dies.

``concurrent.futures`` gives up all tasks when one process is killed (out of memory, say) and cannot tell which task
it was on. Here every process has a pipe of its own, so the task of a dead one is known, it alone is lost, and a new
process takes over.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, Generic, NamedTuple, TypeVar, cast

from braindino.allocation import keep_freed_memory
from braindino.child_process import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDied(NamedTuple):
    """Stands for the result of a task whose process died."""

    exit_code: int | None
    """Of the process; None where that is not known, as on a cluster."""

    def __str__(self) -> str:
        if self.exit_code is None:
            return "every worker of the cluster that took it died, as when memory runs out"
        if self.exit_code == -signal.SIGKILL:
            return "its process was killed, as the system does when memory runs out; try fewer --jobs"
        return f"its process ended with code {self.exit_code}"


class _Worker(Generic[Task]):
    """A process, this side of its pipe, and the task it is on."""

    def __init__(self, function: Callable[[Task], Any]):
        self.function = function
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, far_end), daemon=True)
        self.process.start()
        # With the far end closed here, the death of the process reads as the end of the pipe.
        far_end.close()
        self.ready = False
        self.task: Task | None = None

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def run_tasks(
    functions: Sequence[Callable[[Task], Result]], tasks: Sequence[Task]
) -> Iterator[tuple[Task, Result | WorkerDied]]:
    """Yield each task with its result, in the order of completion.

    Args:
        functions: one for each process, called with one task at a time; picklable. They do the same work, each with
            what is its own (a GPU, say). State that a function keeps lives as long as its process.
        tasks: picklable.

    Raises:
        Exception: whatever a function raised first; the tasks that are left are dropped.
        RuntimeError: a process died before it could take a task.
    """
    waiting = deque(tasks)
    workers = [_Worker[Task](function) for function in functions[: len(waiting)]]
    try:
        while workers:
            for pipe in connection.wait([worker.pipe for worker in workers]):
                worker = next(worker for worker in workers if worker.pipe is pipe)
                try:
                    message = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    workers.remove(worker)
                    yield from _bury(worker)
                    if waiting:
                        workers.append(_Worker(worker.function))
                    continue
                if isinstance(message, _Failure):
                    raise message.error
                # The first message only says that the process is up. The next task goes out before the caller gets
                # the result, so that nobody waits.
                answered, finished = worker.ready, worker.task
                worker.ready = True
                if waiting:
                    worker.task = waiting.popleft()
                    worker.pipe.send(worker.task)
                else:
                    workers.remove(worker)
                    worker.stop()
                if answered:
                    yield cast(Task, finished), message
    finally:
        for worker in workers:
            worker.stop()


class _Failure(NamedTuple):
    error: Exception


def _bury(worker: _Worker[Task]) -> Iterator[tuple[Task, WorkerDied]]:
    worker.process.join()
    died = WorkerDied(worker.process.exitcode or 0)
    worker.stop()
    if not worker.ready:
        raise RuntimeError(
            f"a worker could not start: {died}; see its message above, or try --jobs 0 to work without processes"
        )
    yield cast(Task, worker.task), died


def _serve(function: Callable[[Any], Any], pipe: connection.Connection) -> None:
    """Life of a worker: say that it is ready, then answer tasks until the pipe ends."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    keep_freed_memory()
    pipe.send(None)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(task)
        except Exception as error:  # raised again in the parent
            answer = _Failure(error)
        pipe.send(answer)
