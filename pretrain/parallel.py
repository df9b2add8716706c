"""Student and teacher over the processes of a run: alone, copied to each (DDP), or sharded over all (FSDP2).

Both wrappers hook themselves onto a module's forward, so that the two halves of an iteration, the teacher's targets and
the student's objective, are modules here. Gradients are averaged over processes: with equal shares of the batch the
mean over the global batch.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from braindino.pretrain.distillation import Network, Objective, Targets, distillation_objective, teacher_targets
from braindino.pretrain.distributed import Processes
from braindino.pretrain.views import Views

Mode = Literal["alone", "ddp", "fsdp"]

# From this width on (ViT-L) the state of student, teacher and optimiser is worth sharding.
FSDP_WIDTH = 1024


class TargetsModule(nn.Module):
    """`teacher_targets` of a teacher."""

    def __init__(self, teacher: Network) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, micro_batches: Sequence[Views], **settings: Any) -> list[Targets]:
        return teacher_targets(self.teacher, micro_batches, **settings)


class ObjectiveModule(nn.Module):
    """`distillation_objective` of a student."""

    def __init__(self, student: Network) -> None:
        super().__init__()
        self.student = student

    def forward(self, views: Views, targets: Targets, **settings: Any) -> Objective:
        return distillation_objective(self.student, views, targets, **settings)


class Distillation:
    """The two halves of an iteration, over the processes of the run.

    `student` and `teacher` are the networks as they were given; under FSDP their parameters have become shards
    (DTensor). The optimiser is built afterwards.
    """

    def __init__(self, student: Network, teacher: Network, *, mode: Mode, processes: Processes) -> None:
        self.student = student
        self.teacher = teacher
        self.mode = mode
        self._targets: nn.Module = TargetsModule(teacher)
        self._objective: nn.Module = ObjectiveModule(student)
        if mode == "ddp":
            # The only buffers are constants. Newer versions of torch call the argument by another name, and say so.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
                self._objective = DistributedDataParallel(
                    self._objective, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        elif mode == "fsdp":
            mesh = init_device_mesh(processes.device.type, (processes.size,))
            for module, network in ((self._targets, teacher), (self._objective, student)):
                for block in network.encoder.blocks[:-1]:
                    fully_shard(block, mesh=mesh)
                # The last block (of which `forward_read` computes a part, so that its forward, and with it the hook,
                # is not called), tokens, patch embedding, last norm and heads: gathered once per iteration. The
                # student's objective reads the teacher's prototypes, which stay whole until `backward` is through.
                fully_shard(module, mesh=mesh, reshard_after_forward=False)

    def targets(self, micro_batches: Sequence[Views], **settings: Any) -> list[Targets]:
        """The teacher's targets of all micro-batches of this process."""
        return self._targets(micro_batches, **settings)

    def objective(self, views: Views, targets: Targets, **settings: Any) -> Objective:
        """The student's objective of one micro-batch."""
        return self._objective(views, targets, **settings)

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Around objective and backward of a micro-batch: gradients are exchanged with the last one only."""
        if self.mode == "ddp" and not last:
            assert isinstance(self._objective, DistributedDataParallel)
            with self._objective.no_sync():
                yield
            return
        if self.mode == "fsdp":
            assert isinstance(self._objective, FSDPModule)
            self._objective.set_requires_gradient_sync(last)
        yield
        if self.mode == "fsdp" and last:
            assert isinstance(self._targets, FSDPModule)
            self._targets.reshard()


def choose_mode(parallel: str, processes: Processes, *, embed_dim: int) -> Mode:
    """How a run is divided over its processes; `parallel` is the setting of that name.

    Raises:
        ValueError: fsdp is asked of a process that torchrun has not started.
    """
    if not dist.is_initialized():
        if parallel == "fsdp":
            raise ValueError("--parallel fsdp shards over the processes of torchrun; start with torchrun, or leave it")
        return "alone"
    if parallel == "auto":
        return "fsdp" if processes.size > 1 and embed_dim >= FSDP_WIDTH else "ddp"
    return "fsdp" if parallel == "fsdp" else "ddp"


def whole_state(state: Any, *, keep: bool) -> Any:
    """A state dictionary on the CPU with every sharded tensor put together again, one after the other.

    All processes call it together; only those that `keep` get the tensors, the others None in their place.
    """
    if isinstance(state, dict):
        return {key: whole_state(value, keep=keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(value, keep=keep) for value in state)
    if not isinstance(state, Tensor):
        return state
    whole = state.full_tensor() if isinstance(state, DTensor) else state
    return whole.detach().to("cpu", copy=True) if keep else None


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dictionary of whole tensors, sharding each as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def placed(number: int, tensor: Any) -> Any:
        parameter = parameters[number]
        if isinstance(parameter, DTensor) and isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
            tensor = tensor.to(parameter.device)
            return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return tensor

    moments = {
        number: {name: placed(number, tensor) for name, tensor in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
