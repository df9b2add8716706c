"""The processes of one run: one alone, or as many as torchrun has started, on one node or on several.

A process alone has no process group at all, and every function here then does nothing, or what its plain torch
counterpart does: the loop is written once.

Of the global batch of an iteration, G = processes x accumulate x batch_size slices, process r takes the r-th
contiguous part, and its m-th micro-batch is the m-th contiguous part of that. Slices, masks and crops are drawn for the
global batch, so that none of them depends on how the batch is divided.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# While the main process saves or probes the others wait for it in a collective, which must not give up on it.
TIMEOUT = timedelta(minutes=60)
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Processes(NamedTuple):
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints, and writes the files of the run."""
        return self.rank == 0


class Division(NamedTuple):
    """How the global batch of an iteration is divided."""

    processes: int
    accumulate: int
    """Micro-batches per process."""
    batch_size: int
    """Slices per micro-batch."""

    @property
    def global_batch(self) -> int:
        """Slices per iteration."""
        return self.processes * self.accumulate * self.batch_size

    def parts(self, rank: int) -> list[slice]:
        """Where the micro-batches of a process lie in the global batch."""
        first = rank * self.accumulate
        return [
            slice(number * self.batch_size, (number + 1) * self.batch_size)
            for number in range(first, first + self.accumulate)
        ]

    def __str__(self) -> str:
        factors = [f"{self.processes} processes"] if self.processes > 1 else []
        factors += [f"{self.accumulate} micro-batches"] if self.accumulate > 1 else []
        if not factors:
            return f"{self.batch_size} slices"
        return f"{self.global_batch} slices ({' x '.join(factors)} x {self.batch_size})"

    def difference(self, before: "Division") -> str:
        """What becomes of the numbers of a run that goes on with this division of the same global batch."""
        if before.batch_size == self.batch_size:
            return "the same micro-batches, so the same numbers but for rounding"
        return "the same slices, crops and masks; drop path and KoLeo, drawn and taken per micro-batch, differ"


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the process group that torchrun describes in the environment, and leave it at the end.

    nccl on CUDA, where each process has the GPU of its number on the node; gloo on the CPU. Started without torchrun,
    the process is alone and there is no group.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: no such device; or only a part of torchrun's variables is set; says which.
    """
    present = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    launched = "LOCAL_RANK" in present and "WORLD_SIZE" in present
    if launched and len(present) < len(TORCHRUN_VARIABLES):
        missing = sorted(set(TORCHRUN_VARIABLES) - set(present))
        raise ValueError(f"the environment has {', '.join(present)} but not {', '.join(missing)}; start with torchrun")
    local_rank = int(os.environ["LOCAL_RANK"]) if launched else 0
    chosen = _choose_device(device, local_rank)
    if not launched:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


def share_of(processes: Processes, total: int) -> slice:
    """The contiguous part of `total` things, a multiple of the number of processes, that falls to this process."""
    assert total % processes.size == 0
    each = total // processes.size
    return slice(processes.rank * each, (processes.rank + 1) * each)


def say(processes: Processes, text: str) -> None:
    """Print, in the main process alone."""
    if processes.is_main:
        print(text, flush=True)


@contextmanager
def main_process_first(processes: Processes) -> Iterator[None]:
    """The block runs in the main process first and then in the others, who see the files that it has written.

    Raises:
        MainProcessError: in the others, when the main process failed, so that its error is told once.
    """
    if processes.size == 1:
        yield
        return
    done = torch.zeros((), device=processes.device)
    if not processes.is_main:
        dist.broadcast(done, src=0)
        if not done:
            raise MainProcessError
        yield
        return
    try:
        yield
        done.fill_(1)
    finally:
        dist.broadcast(done, src=0)


class MainProcessError(Exception):
    """The main process has met an error, and tells it."""


def all_reduce(values: Tensor, operation: str = "sum") -> Tensor:
    """Sum, mean ("mean"), largest ("max") or smallest ("min") over all processes, in place; returns its argument."""
    if dist.is_initialized():
        kinds = {
            "sum": dist.ReduceOp.SUM,
            "mean": dist.ReduceOp.SUM,
            "max": dist.ReduceOp.MAX,
            "min": dist.ReduceOp.MIN,
        }
        dist.all_reduce(values, kinds[operation])
        if operation == "mean":
            values /= dist.get_world_size()
    return values


def all_reduce_logsumexp(x: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """log sum exp over a dimension and over all processes, as if the tensors were joined along it.

    The dimension may be of another length in each process, or empty (log 0 = -inf).
    """
    return all_reduce_logaddexp(torch.logsumexp(x, dim=dim, keepdim=keepdim))


def all_reduce_logaddexp(local: Tensor) -> Tensor:
    """log of the sum over all processes of exp(local), elementwise.

    The largest of all is taken out before exp, so that nothing overflows whatever the numbers.
    """
    if not dist.is_initialized():
        return local
    largest = all_reduce(local.clone(), "max")
    # Where no process has anything the sum is log 0 whatever is taken out; -inf - -inf would be NaN.
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    return all_reduce(torch.exp(local - shift)).log() + shift


def agree(values: Iterable[float], device: torch.device, operation: str = "max") -> list[float]:
    """A few numbers of the host, reduced over all processes. Waits for all of them."""
    return all_reduce(torch.tensor(list(values), dtype=torch.float64, device=device), operation).tolist()


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available to torch here; use --device cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this node has no GPU: torch sees {torch.cuda.device_count()}; start as many "
            "processes per node (torchrun --nproc-per-node) as there are GPUs"
        )
    return torch.device("cuda", local_rank)
