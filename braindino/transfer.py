"""Copies to a device that the host does not wait for."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``. From ordinary memory CUDA copies only when all work before it is done, with the host
    waiting; so it goes through pinned memory, which torch keeps for as long as the copy needs it."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
