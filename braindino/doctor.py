"""``braindino doctor``: what this machine has and what the programs would use. Reads only; asks no network."""

import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from braindino.command_line import EXIT_DONE, EXIT_USAGE, command_line
from braindino.provenance import versions

GIB = 1024**3


class Finding(NamedTuple):
    """One line of the report: ``ok`` is None where nothing can be wrong."""

    topic: str
    text: str
    ok: bool | None = None


@command_line("doctor")
def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; exit code 0, since a missing option is no error, 2 on arguments it does not know."""
    if argv:
        print("usage: braindino doctor    (it takes no arguments)")
        return EXIT_DONE if list(argv) in (["-h"], ["--help"]) else EXIT_USAGE
    for finding in examine():
        mark = {True: "ok ", False: "-- ", None: "   "}[finding.ok]
        first, *rest = finding.text.splitlines() or [""]
        print(f"{mark}{finding.topic:<14} {first}")
        for line in rest:
            print(f"{'':17} {line}")
    return EXIT_DONE


def examine() -> list[Finding]:
    """Everything worth knowing before a first run, from the machine up to the optional models."""
    return [*_machine(), *_torch(), *_skull_strip(), *_nnunet()]


def _machine() -> list[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    disk = shutil.disk_usage(Path.cwd())
    found = versions()
    packages = ", ".join(f"{name} {found[name]}" for name in found if name not in ("python", "platform"))
    return [
        Finding("machine", f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {disk.free / GIB:.0f} GiB free here"),
        Finding("python", f"{found['python']} on {found['platform']}"),
        Finding("packages", packages),
    ]


def _torch() -> list[Finding]:
    import torch

    from braindino import own_kernels
    from braindino.attention import explain

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    device = "cuda" if devices else "cpu"
    text = (
        ", ".join(devices) if devices else f"no CUDA device: everything runs on {torch.get_num_threads()} CPU threads"
    )
    return [
        Finding("device", text, bool(devices)),
        Finding("kernels", own_kernels.explain(torch.device(device))),
        Finding("attention", explain(device)),
    ]


def _skull_strip() -> list[Finding]:
    # Rooms are asked by name: the core does not import them, and a broken one must not hide the others.
    tools = importlib.import_module("braindino.preprocessing.skull_strip").TOOLS
    return [_checked(f"{name}", tool.check) for name, tool in tools.items()]


def _nnunet() -> list[Finding]:
    """The plugin's own lines: trainer, folders, and the encoder that a training would use."""
    lines, found = importlib.import_module("nnunet_braindino.cli").diagnose()
    return [Finding("nnU-Net", "\n".join(lines), found)]


def _checked(topic: str, check: Callable[[], str]) -> Finding:
    """The version that the check returns, or the words of the error it raised."""
    try:
        return Finding(topic, f"ready, version {check()}", True)
    except (ValueError, OSError, ImportError) as error:
        return Finding(topic, str(error), False)
