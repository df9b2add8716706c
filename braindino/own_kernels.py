"""Whether the project's own GPU kernels run on a device.

They are written in Triton, which PyTorch's CUDA builds bring along. Each has a plain formulation beside it, which
serves CPUs, other devices and float64; ``explain`` says which of the two it is, and why.
"""

import functools

import torch


def own_kernels(x: torch.Tensor) -> bool:
    """Whether kernels are used for ``x``; the compiler gets the plain formulation, to see into it."""
    return x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling() and not why_not(x.device)


@functools.cache
def why_not(device: torch.device) -> str:
    """Empty when a kernel ran on ``device`` and was right, else the reason in one line."""
    if device.type != "cuda":
        return f"{device.type} is no CUDA device"
    try:
        from braindino.token_kernels import normalize_rows

        with torch.no_grad():
            rows = torch.tensor([[1.0, 3.0, 1.0, 3.0]], device=device)
            found = normalize_rows(rows, None, eps=0.0, dtype=torch.float32)[0]
        if found.tolist() != [[-1.0, 1.0, -1.0, 1.0]]:
            return "a kernel ran, but its result was wrong"
    # Drivers, compilers and Triton fail in ways of their own; the reason is told, not swallowed.
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {first_line[:160]}"
    return ""


def explain(device: torch.device) -> str:
    """One line for people."""
    reason = why_not(device)
    return f"own kernels on {device}: {f'no ({reason})' if reason else 'yes'}"
