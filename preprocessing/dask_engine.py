"""The same tasks on an existing Dask cluster. The only module that imports Dask, and only when a scheduler is given.

The workers of the cluster must see the same files under the same paths, and have this package installed in the same
version. They write into the prepared folder themselves, as local processes do, so the outcome is the same to the byte.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from braindino.preprocessing.worker_pool import WorkerDied

Task = TypeVar("Task")
Result = TypeVar("Result")

CONNECT_SECONDS = 30
# Enough for every worker to have its next task at hand; all at once would fill the scheduler's memory.
TASKS_AHEAD_PER_THREAD = 3


def run_on_dask(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, scheduler: str
) -> Iterator[tuple[Task, Result | WorkerDied]]:
    """Yield each task with its result, in the order of completion, as :func:`worker_pool.run_tasks` does.

    A task during which workers died is tried as often as the cluster's ``allowed-failures`` says, then given up.

    Args:
        function: called with one task; picklable.
        tasks: picklable.
        scheduler: ``tcp://host:port``, or the path of a scheduler file.

    Raises:
        ValueError: Dask is not installed, nobody answers at the address, or the workers have another version.
        Exception: whatever ``function`` raised first; the tasks that are left are dropped.
    """
    try:
        import distributed
    except ImportError as error:
        raise ValueError('--scheduler needs Dask: pip install "braindino[cluster]"') from error
    is_address = "://" in scheduler
    try:
        client = distributed.Client(
            address=scheduler if is_address else None,
            scheduler_file=None if is_address else scheduler,
            timeout=CONNECT_SECONDS,
            set_as_default=False,
        )
    except (OSError, TimeoutError, ValueError) as error:
        raise ValueError(
            f"--scheduler {scheduler}: no Dask scheduler answers ({error}); expected the address of a running one, "
            "such as tcp://host:8786, or its scheduler file"
        ) from error
    with client:
        _check_workers(client, scheduler)
        shared = client.scatter(function, broadcast=True, hash=False)
        waiting = iter(tasks)
        running: dict[object, Task] = {}

        def submit_next() -> object | None:
            task = next(waiting, None)
            if task is None:
                return None
            future = client.submit(_call, shared, task, pure=False)
            running[future] = task
            return future

        ahead = TASKS_AHEAD_PER_THREAD * max(1, sum(client.nthreads().values()))
        first = [future for _ in range(ahead) if (future := submit_next()) is not None]
        queue = distributed.as_completed(first, loop=client.loop)
        try:
            for future in queue:
                task = running.pop(future)
                following = submit_next()
                if following is not None:
                    queue.add(following)
                try:
                    yield task, future.result()
                except distributed.KilledWorker:
                    yield task, WorkerDied(None)
        finally:
            client.cancel(list(running))


def _call(function: Callable[[Task], Result], task: Task) -> Result:
    return function(task)


def _check_workers(client: "distributed.Client", scheduler: str) -> None:  # type: ignore[name-defined]  # noqa: F821
    """
    Raises:
        ValueError: there is no worker, or one that cannot run this version of the code.
    """
    from braindino import __version__

    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise ValueError(f"--scheduler {scheduler}: no worker came within {CONNECT_SECONDS} s; start some") from error
    found = client.run(_version, on_error="return")
    wrong = {worker: str(version) for worker, version in found.items() if version != __version__}
    if wrong:
        worker, version = next(iter(wrong.items()))
        raise ValueError(
            f"--scheduler {scheduler}: {len(wrong)} of {len(found)} workers cannot take part, such as {worker}: found "
            f"braindino {version}; expected {__version__}, installed in the environment of the workers"
        )


def _version() -> str:
    from braindino import __version__

    return __version__
