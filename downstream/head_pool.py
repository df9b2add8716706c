"""Many heads in several processes, with progress.

A step of a head is some twenty short operations, and after each of them the threads of one process wait for each other
in Python; processes do not (``benchmarks/RESULTS.md``). They are forked off a process that has imported what they need,
and nothing else, so that this takes two seconds once and not in each. A few heads are trained where they are asked for.
"""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from braindino.child_process import end_with_parent
from braindino.downstream.heads import Head, Training, check_heads, check_queries, of_each_head, train_heads
from braindino.progress import track

STEPS_WORTH_A_PROCESS = 5_000
HEADS_AT_A_TIME = 4

# Of a worker process: what all its heads have in common.
_shared: dict[str, Any] = {}


def train_many_heads(
    features: np.ndarray,
    targets: np.ndarray,
    *,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    num_outputs: int,
    head: Head,
    training: Training,
    queries: Sequence[np.ndarray] = (),
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """As ``train_heads``, the same numbers bit by bit: on a CPU by as many processes as torch has threads, where there
    is work enough for each.

    The processes import the script that calls this, which hence needs ``if __name__ == "__main__":``.

    Raises:
        ValueError: as ``train_heads``.
        ChildProcessError: a process died.
    """
    shared: dict[str, Any] = {"features": features, "num_outputs": num_outputs, "head": head, "training": training}
    asked = shared | {"queries": queries}
    processes = min(torch.get_num_threads(), len(seeds) * training.steps // STEPS_WORTH_A_PROCESS)
    if torch.device(device).type != "cpu" or head.kind == "logistic" or processes < 2:
        return train_heads(targets=targets, subsets=subsets, seeds=seeds, device=device, **asked)
    # Here, where the numbers of the heads are those of the caller.
    check_heads(targets=targets, subsets=subsets, seeds=seeds, **shared)
    check_queries([features, *queries])
    own = of_each_head(targets, len(seeds), training)
    blocks = [slice(start, start + HEADS_AT_A_TIME) for start in range(0, len(seeds), HEADS_AT_A_TIME)]
    num_rows = len(features) + sum(map(len, queries))
    outputs = np.empty((len(seeds), num_rows, num_outputs), dtype=np.float32)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=(asked,)) as pool:
        done = pool.map(_train, *([parts[block] for block in blocks] for parts in (own, subsets, seeds)))
        try:
            for block, part in zip(blocks, track(done, total=len(blocks), desc="heads, by fours"), strict=True):
                outputs[block] = part
        except BrokenProcessPool as error:
            size = sum(block.nbytes for block in (features, *queries))
            raise ChildProcessError(
                f"a process that trained heads died, most likely for want of memory: each of {processes} holds the "
                f"features, {size / 2**20:.0f} MiB; set OMP_NUM_THREADS=1 for one"
            ) from error
    return outputs


def _start(shared: dict[str, Any]) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    _shared.update(shared)


def _train(targets: Sequence[np.ndarray], subsets: Sequence[np.ndarray], seeds: Sequence[int]) -> np.ndarray:
    return train_heads(targets=np.stack(targets), subsets=subsets, seeds=seeds, **_shared)
