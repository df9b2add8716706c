"""Which devices a program computes on, as ``--device`` says."""

import torch


def choose_device(name: str) -> torch.device:
    """The one device of a program that works in one process; ``auto`` is a GPU where there is one.

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


def choose_devices(name: str) -> list[str]:
    """The devices of a program with a process for each: ``cpu`` or one GPU by name, or with ``auto`` and ``cuda`` all
    GPUs; ``auto`` is the CPU where there are none.

    Raises:
        ValueError: a GPU was asked for that PyTorch does not see, or something else.
    """
    if name not in ("auto", "cpu", "cuda") and not (name.startswith("cuda:") and name[5:].isdigit()):
        raise ValueError(f"--device: found {name!r}; expected auto, cpu, cuda, or one GPU such as cuda:1")
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count() if name != "cpu" else 0)]
    if name == "cpu" or (name == "auto" and not gpus):
        return ["cpu"]
    chosen = [gpu for gpu in gpus if name in ("auto", "cuda", gpu)]
    if not chosen:
        seen = f"only {', '.join(gpus)}" if gpus else "no GPU"
        raise ValueError(f"--device {name}: PyTorch finds {seen} here; use --device cpu, or see `braindino doctor`")
    return chosen
