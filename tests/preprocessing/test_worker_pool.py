"""Workers: all tasks are answered, and a process that dies costs its own task alone."""

import pytest

from braindino.preprocessing.worker_pool import WorkerDied, run_tasks

# The built-in eval is a function that every process can import.
KILLED = "__import__('os').kill(__import__('os').getpid(), 9)"
LEFT = "__import__('os')._exit(7)"


@pytest.mark.fault
def test_a_worker_that_dies_loses_its_task_only():
    tasks = ["1 + 1", KILLED, "2 + 2", LEFT, "3 + 3"]
    results = dict(run_tasks([eval, eval], tasks))
    assert results == {"1 + 1": 2, KILLED: WorkerDied(-9), "2 + 2": 4, LEFT: WorkerDied(7), "3 + 3": 6}
    assert str(results[KILLED]) == ("its process was killed, as the system does when memory runs out; try fewer --jobs")
    assert str(results[LEFT]) == "its process ended with code 7"


def test_every_process_has_its_own_function():
    assert sorted(result for _, result in run_tasks([len, len], ["a", "bb", "ccc"])) == [1, 2, 3]
    # One task, so the second function, which could not do it, is not even started.
    assert list(run_tasks([len, int], ["six"])) == [("six", 3)]


def test_an_error_of_the_function_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(run_tasks([eval], ["1 / 0", "1"]))


def test_no_tasks_start_no_process():
    assert list(run_tasks([eval] * 4, [])) == []
