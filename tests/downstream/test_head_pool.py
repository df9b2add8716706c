"""Heads trained by several processes are those that one process trains."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from braindino.downstream import head_pool
from braindino.downstream.heads import Head, Training, train_heads

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((40, 24)).astype(np.float32)
CLASSES = np.arange(40) % 2
SUBSETS = [RNG.permutation(40)[:20] for _ in range(10)]
SETTINGS = {"num_outputs": 2, "head": Head(hidden_width=16, dropout=0.1), "training": Training(steps=20)}


@pytest.fixture
def two_processes(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(head_pool, "STEPS_WORTH_A_PROCESS", 50)
    yield
    torch.set_num_threads(before)


def test_heads_of_two_processes_are_bit_equal_to_those_of_one(two_processes, monkeypatch):
    alone = train_heads(FEATURES, CLASSES, subsets=SUBSETS, seeds=list(range(10)), **SETTINGS)
    monkeypatch.setattr(head_pool, "train_heads", None)  # what this process must not call
    pooled = head_pool.train_many_heads(FEATURES, CLASSES, subsets=SUBSETS, seeds=list(range(10)), **SETTINGS)
    assert pooled.dtype == np.float32 and np.array_equal(pooled, alone)


def test_every_head_keeps_its_own_targets_in_the_pool(two_processes):
    own = np.stack([np.roll(np.sort(CLASSES), shift) for shift in range(10)])
    alone = train_heads(FEATURES, own, subsets=SUBSETS, seeds=list(range(10)), **SETTINGS)
    pooled = head_pool.train_many_heads(FEATURES, own, subsets=SUBSETS, seeds=list(range(10)), **SETTINGS)
    assert np.array_equal(pooled, alone)


def test_few_heads_are_trained_here(monkeypatch):
    monkeypatch.setattr(head_pool, "ProcessPoolExecutor", None)
    few = head_pool.train_many_heads(FEATURES, CLASSES, subsets=SUBSETS[:2], seeds=[0, 1], **SETTINGS)
    assert few.shape == (2, 40, 2)


def test_a_head_without_two_classes_is_named_by_the_callers_number(two_processes):
    subsets = [*SUBSETS[:7], np.arange(0, 40, 2), *SUBSETS[8:]]
    with pytest.raises(ValueError, match=r"head 7 \(seed 107\): all 20 training cases are of class 0"):
        head_pool.train_many_heads(FEATURES, CLASSES, subsets=subsets, seeds=list(range(100, 110)), **SETTINGS)


def train_long(pipe):
    """Of a process that is to be killed: tells who works for it once they do."""
    torch.set_num_threads(2)
    threading.Thread(target=lambda: pipe.send(wait_for_workers()), daemon=True).start()
    head_pool.train_many_heads(
        FEATURES,
        CLASSES,
        subsets=SUBSETS * 400,
        seeds=list(range(4000)),
        **{**SETTINGS, "training": Training(steps=100)},
    )


def wait_for_workers():
    me = os.getpid()
    while len(workers := [pid for child in children_of(me) for pid in children_of(child)]) < 2:
        time.sleep(0.05)
    return workers


def children_of(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for task in tasks for word in task.read_text().split()]


def is_alive(pid):
    """A zombie that nobody waits for is not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.fault
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux which processes there are")
def test_the_processes_of_a_killed_run_end_with_it():
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    run = context.Process(target=train_long, args=(there,))
    run.start()
    assert here.poll(60), "no process was started"
    workers = here.recv()
    assert all(map(is_alive, workers))
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    deadline = time.monotonic() + 60
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, f"{workers} go on without the run that started them"
        time.sleep(0.05)
