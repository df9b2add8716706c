"""All measurements that need a GPU, in less than 15 minutes on an H100; one table, also in a file.

    python benchmarks/gpu.py --out gpu.md [--dinov3 CHECKOUT --dinov3-python PATH] [--lightly-python PATH]
    python benchmarks/gpu.py --out gpu.md --parts segmentation downstream     some groups of parts
    python benchmarks/gpu.py --out gpu.md --only "gpu tests" loader           parts whose names hold one of these words
    python benchmarks/gpu.py --out tiny.md --device cpu --tiny                whether the script itself runs

Parts, each a process with a time limit of its own; one that fails or takes too long is a row that says so, its output
is kept beside the table, and the others go on:

pretrain

    gpu tests      pytest -m gpu, the files that hold such tests
    step           ViT-B, 256 slices, drop path 0.2, the paper's first stage: eager and compiled
    beside others  plain at a batch that it fits with, ours at the same; DINOv3 and lightly-train where they are given
    stage 2        the five crop pairs, 56 slices, with activation checkpointing
    loader         slices/s from a store, without a GPU

segmentation

    training step  ViT-B, 49 slices: frozen, fusion fixed, fine-tuning, and nnU-Net's own network
    prediction     a BraTS-sized case by nnUNetv2_predict and by ours, without and with mirroring
    compiled step  nnU-Net's own network as nnU-Net trains it; our trainers do not compile

downstream

    extraction     braindino extract beside the bare ViT-B, 128 slices a volume

Targets (H100): at least 700 images/s and less than 60 GB at 256 slices, 1.5 times the official step; the loader 700/s
on 4 cores. A frozen training step at most 0.8 of fine-tuning, with the fusion fixed 0.6; prediction 3 times as fast as
stock with equal labels; extraction at most 1.1 of the bare encoder.
"""

import argparse
import json
import os
import signal
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
    writes_figures: bool = True
    """Whether it takes ``--json FILE`` and writes there what its sides took; else its last line stands for it."""
    unit: str = "a step"
    """What the seconds are of."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the table; OUT.log holds what the parts print")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a step of seconds on a CPU instead of the paper's")
    parser.add_argument("--parts", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="parts of these whose names hold one of the words")
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
        "| part | side | seconds | images/s | peak, GB | |",
        "|---|---|---|---|---|---|",
    ]
    failed = 0
    with tempfile.TemporaryDirectory() as folder, options.out.with_suffix(".log").open("w") as log:
        for part in (part for group in options.parts for part in GROUPS[group](options)):
            if options.only and not any(word in part.name for word in options.only):
                continue
            figures = Path(folder) / "figures.json"
            figures.unlink(missing_ok=True)
            rows, ok = run(part, figures, log)
            lines += rows
            print(*rows, sep="\n", flush=True)
            failed += not ok
    options.out.write_text("\n".join(lines) + "\n")
    print(f"{options.out}: {failed} part(s) failed" if failed else f"{options.out}: all parts ran")
    return int(failed > 0)


def pretrain_parts(options: argparse.Namespace) -> list[Part]:
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
    files = (path for path in sorted((HERE.parent / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text())
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, files)]
    loader = [sys.executable, str(HERE / "loader.py"), "--workers", "4"]
    found = [
        Part("gpu tests", tests, 90 * slow, writes_figures=False),
        Part(f"step, batch {full}", [*step, "--batch", full, "--sides", "ours"], 45 * slow),
        Part(f"step compiled, batch {full}", [*step, "--batch", full, "--sides", "ours", "--compile"], 100 * slow),
        Part(f"beside others, batch {fitting}", [*step, "--batch", fitting, *others], 120 * slow),
    ]
    for pair in STAGE2_PAIRS[: 1 if tiny else None]:
        crops = ["--crops", *map(str, pair), "--checkpointing"]
        name = f"stage 2, {pair[0]} / {pair[1]} px, batch {stage2}"
        found.append(Part(name, [*step, "--batch", stage2, "--sides", "ours", *crops], 35 * slow))
    few = ["--slices", "256", "--batch", "32", "--batches", "4"] if tiny else []
    return [*found, Part("loader, 4 workers", [*loader, *few], 40 * slow, writes_figures=False)]


def segmentation_parts(options: argparse.Namespace) -> list[Part]:
    tiny, slow = options.tiny, 1 if options.device == "cuda" else 6
    model, batch = ("vit_small", "1") if tiny else ("vit_base", "49")
    step = [sys.executable, str(HERE / "segmentation_step.py"), "--model", model, "--batch", batch, "--rounds", "1"]
    step += ["--steps", "1" if tiny else "10", "--sides"]
    predict = [sys.executable, str(HERE / "segmentation_predict.py"), "--model", "vit_tiny" if tiny else model]
    predict += ["--rounds", "1", "--network", "--device", options.device]
    return [
        Part(f"training step, batch {batch}", [*step, "frozen", "fixed", "finetune", "stock"], 100 * slow),
        Part("prediction", predict, 90 * slow, unit="a case"),
        Part("prediction mirrored", [*predict, "--mirroring"], 100 * slow, unit="a case"),
        Part("compiled step, nnU-Net's own", [*step, "stock", "--compile"], 90 * slow),
    ]


def downstream_parts(options: argparse.Namespace) -> list[Part]:
    extract = [sys.executable, str(HERE / "extraction.py"), "--encoder", "untrained:vit_base", "--jobs", "14"]
    extract += ["--volumes", "48", "--num-slices", "128", "--rounds", "2", "--sizes", "100"]
    if options.tiny:
        extract = [sys.executable, str(HERE / "extraction.py"), "--quick", "--rounds", "1"]
    extract += ["--device", "cuda:0" if options.device == "cuda" else "cpu"]
    return [Part("extraction", extract, 90 if options.device == "cuda" else 600, unit="a volume")]


GROUPS = {"pretrain": pretrain_parts, "segmentation": segmentation_parts, "downstream": downstream_parts}


def run(part: Part, figures: Path, log) -> tuple[list[str], bool]:
    """Rows of the table, and whether the part ran."""
    command = [*part.command, *(["--json", str(figures)] if part.writes_figures else [])]
    log.write(f"\n$ {' '.join(command)}\n")
    # The folder of the call holds the sources of braindino, not the package with all its rooms.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONSAFEPATH": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # so that what it has started ends with it
    )
    problem = ""
    try:
        output, _ = process.communicate(timeout=part.limit)
        problem = f"exit code {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        problem = f"more than {part.limit:g} s"
    log.write(f"{output}\n({time.perf_counter() - start:.0f} s)\n")
    log.flush()
    last = output.strip().splitlines()[-1].strip() if output.strip() else ""
    if not figures.exists():
        # One that ran says its figures in its last line.
        return [f"| {part.name} | | | | | {problem or last} |"], not problem
    rows = [
        f"| {part.name} | {side} | {values['seconds']:.3f} {part.unit} | {number(values, 'rate')} | "
        f"{number(values, 'peak_gb')} | {values.get('note', '')} |"
        for side, values in json.loads(figures.read_text()).items()
    ]
    wanted = [line.split(":")[0] for line in output.splitlines() if line.endswith(": could not run")]
    rows += [f"| {part.name} | {side} | | | | could not run, see the log |" for side in wanted]
    if problem and not wanted:
        rows.append(f"| {part.name} | | | | | {problem} |")
    return rows, not (wanted or problem)


def number(values: dict, key: str) -> str:
    return f"{values[key]:.1f}" if key in values else ""


if __name__ == "__main__":
    raise SystemExit(main())
