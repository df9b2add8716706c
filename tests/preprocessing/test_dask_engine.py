"""The same tasks on a Dask cluster: another way, the same results."""

import os
from collections.abc import Iterator

import pytest

from braindino.preprocessing.dask_engine import run_on_dask
from braindino.preprocessing.worker_pool import WorkerDied

dask = pytest.importorskip("dask", reason="Dask comes with the extra [cluster]")
distributed = pytest.importorskip("distributed", reason="Dask comes with the extra [cluster]")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Address of a cluster of two worker processes on this machine, without its dashboard."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
    ):
        yield cluster.scheduler_address


def test_tasks_run_on_the_cluster_and_all_are_answered(scheduler):
    results = dict(run_on_dask(eval, [f"{number} * {number}" for number in range(20)], scheduler=scheduler))
    assert results == {f"{number} * {number}": number * number for number in range(20)}
    pids = {
        pid
        for _, pid in run_on_dask(eval, [f"__import__('os').getpid() + {k} * 0" for k in range(8)], scheduler=scheduler)
    }
    assert os.getpid() not in pids


def test_an_error_of_the_function_reaches_the_caller_and_a_task_that_kills_its_worker_is_named(scheduler):
    with pytest.raises(ZeroDivisionError):
        list(run_on_dask(eval, ["1 / 0"], scheduler=scheduler))
    killer = "__import__('os').kill(__import__('os').getpid(), 9)"
    results = dict(run_on_dask(eval, ["1 + 1", killer], scheduler=scheduler))
    assert results == {"1 + 1": 2, killer: WorkerDied(None)}
    assert "every worker of the cluster that took it died" in str(results[killer])


def test_nobody_at_the_address_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("braindino.preprocessing.dask_engine.CONNECT_SECONDS", 1)
    with pytest.raises(ValueError, match=r"--scheduler tcp://127\.0\.0\.1:9: no Dask scheduler answers"):
        list(run_on_dask(len, ["a"], scheduler="tcp://127.0.0.1:9"))
