"""All measurements of pretraining that need a GPU, in less than 10 minutes on an H100; one table, also in a file.

    python benchmarks/gpu.py --out gpu.md [--dinov3 CHECKOUT --dinov3-python PATH] [--lightly-python PATH]
    python benchmarks/gpu.py --out tiny.md --device cpu --tiny      whether the script itself runs

Parts, each a process with a time limit of its own; one that fails or takes too long is a row that says so, its output
is kept beside the table, and the others go on:

    tests          pytest -m gpu
    step           ViT-B, 256 slices, drop path 0.2, the paper's first stage: eager and compiled
    beside others  plain at a batch that it fits with, ours at the same; DINOv3 and lightly-train where they are given
    stage 2        the five crop pairs, 56 slices, with activation checkpointing
    loader         slices/s from a store, without a GPU

Targets (H100): at least 700 images/s and less than 60 GB at 256 slices, 1.5 times the official step; the loader 700/s
on 4 cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
STAGE2_PAIRS = ((512, 112), (768, 112), (768, 160), (768, 224), (768, 336))


class Part(NamedTuple):
    """One process and what its table row is called."""

    name: str
    command: list[str]
    limit: float
    """Seconds."""
    measures_step: bool = True
    """Whether it is pretrain_step.py, which writes its figures to a file."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the table; OUT.log holds what the parts print")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a step of seconds on a CPU instead of the paper's")
    parser.add_argument("--lightly-python", type=Path)
    parser.add_argument("--dinov3", type=Path)
    parser.add_argument("--dinov3-python", type=Path, default=Path(sys.executable))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --tiny tries the script")
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        "",
        "| part | side | s a step | images/s | peak, GB | |",
        "|---|---|---|---|---|---|",
    ]
    failed = 0
    with tempfile.TemporaryDirectory() as folder, options.out.with_suffix(".log").open("w") as log:
        for part in parts(options):
            figures = Path(folder) / "figures.json"
            figures.unlink(missing_ok=True)
            rows, ok = run(part, figures, log)
            lines += rows
            print(*rows, sep="\n", flush=True)
            failed += not ok
    options.out.write_text("\n".join(lines) + "\n")
    print(f"{options.out}: {failed} part(s) failed" if failed else f"{options.out}: all parts ran")
    return int(failed > 0)


def parts(options: argparse.Namespace) -> list[Part]:
    tiny = options.tiny
    size = ["--model", "vit_small" if tiny else "vit_base", "--prototypes", "512" if tiny else "65536"]
    timing = ["--device", options.device, "--warmup", "1" if tiny else "3", "--steps", "1" if tiny else "10"]
    step = [sys.executable, str(HERE / "pretrain_step.py"), *size, *timing]
    full, fitting, stage2 = ("2", "2", "2") if tiny else ("256", "64", "56")
    slow = 1 if options.device == "cuda" else 6
    others = [
        *(["--lightly-python", str(options.lightly_python)] if options.lightly_python else []),
        *(["--dinov3", str(options.dinov3), "--dinov3-python", str(options.dinov3_python)] if options.dinov3 else []),
    ]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests")]
    loader = [sys.executable, str(HERE / "loader.py"), "--workers", "4"]
    found = [
        Part("gpu tests", tests, 90 * slow, measures_step=False),
        Part(f"step, batch {full}", [*step, "--batch", full, "--sides", "ours"], 45 * slow),
        Part(f"step compiled, batch {full}", [*step, "--batch", full, "--sides", "ours", "--compile"], 100 * slow),
        Part(f"beside others, batch {fitting}", [*step, "--batch", fitting, *others], 120 * slow),
    ]
    for pair in STAGE2_PAIRS[: 1 if tiny else None]:
        crops = ["--crops", *map(str, pair), "--checkpointing"]
        name = f"stage 2, {pair[0]} / {pair[1]} px, batch {stage2}"
        found.append(Part(name, [*step, "--batch", stage2, "--sides", "ours", *crops], 35 * slow))
    few = ["--slices", "256", "--batch", "32", "--batches", "4"] if tiny else []
    return [*found, Part("loader, 4 workers", [*loader, *few], 40 * slow, measures_step=False)]


def run(part: Part, figures: Path, log) -> tuple[list[str], bool]:
    """Rows of the table, and whether the part ran."""
    command = [*part.command, *(["--json", str(figures)] if part.measures_step else [])]
    log.write(f"\n$ {' '.join(command)}\n")
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=part.limit,
            env=environment,
            check=False,
        )
        output, code = done.stdout, done.returncode
        problem = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        problem = f"more than {part.limit:g} s"
    log.write(output)
    log.flush()
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if part.measures_step and not problem:
        sides = json.loads(figures.read_text())
        wanted = [line.split(":")[0] for line in output.splitlines() if line.endswith(": could not run")]
        rows = [
            f"| {part.name} | {side} | {values['seconds']:.3f} | {values['rate']:.1f} | {values['peak_gb']:.1f} | |"
            for side, values in sides.items()
        ]
        rows += [f"| {part.name} | {side} | | | | could not run, see the log |" for side in wanted]
        return rows, not wanted
    return [f"| {part.name} | | | | | {problem or last.strip()} |"], not problem


if __name__ == "__main__":
    raise SystemExit(main())
