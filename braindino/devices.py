"""Which device a program of one process computes on."""

import torch


def choose_device(name: str) -> torch.device:
    """The device of ``--device``; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: PyTorch does not know it, or finds none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"--device {name}: {first}; expected auto, cpu, or a GPU that PyTorch finds (see `braindino doctor`)"
        ) from error
    return device
