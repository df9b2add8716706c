"""Extraction beside the bare encoder, and what a volume costs in tables of 10, 100 and 1,000.

    python benchmarks/extraction.py [--encoder untrained:vit_tiny] [--quick]      two minutes on a CPU, or half of one
    python benchmarks/extraction.py --encoder untrained:vit_base --device cuda:0 --jobs 16 --volumes 64 --num-slices 128

First table: `braindino extract` on simulated volumes, which are loaded, prepared, encoded and written, and the encoder
alone on the same slices, which are in memory already. The weights are loaded before. Both sides are measured in turn,
rounds times; the ratio is of the medians. The preparation of a volume on one thread is given beside them: where it
takes longer than the encoder (on a GPU), or shares its cores with it (on a CPU), it counts.

Second table: volumes of noise, 8 slices of 32 x 32, in place of load and preparation; all else is real: the encoder,
files synced to the disk, tables, a second run that finds everything there, and reading. So what is seen is the cost
of a volume besides its images.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from braindino.downstream import extract, extraction
from braindino.encoders.catalogue import load_volume_encoder
from braindino.encoders.contract import Prepared, VolumeEncoder
from braindino.encoders.slice_transformer import SliceTransformer
from braindino.feature_table import FeatureTable
from braindino.manifest import Scan, load_brain, read_scans, write_scans
from braindino.volume import save_array

SIZES = (10, 100, 1000)
SMALL = {"num_slices": 8, "image_size": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="untrained:vit_tiny", help="one of slices: a path, or untrained:NAME")
    parser.add_argument("--device", default="cpu", help="cpu or one GPU, such as cuda:0")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--volumes", type=int, default=4, help="of the first table")
    parser.add_argument("--num-slices", type=int, default=64, help="a volume; the paper has 128")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=1, help="loading threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="volumes of the second table's rows")
    parser.add_argument("--json", type=Path, help="write the first table there, too")
    parser.add_argument("--quick", action="store_true", help="4 volumes, 16 slices; tables of up to 100")
    options = parser.parse_args()
    if options.quick:
        options.volumes, options.num_slices, options.sizes = 4, 16, SIZES[:2]
    with tempfile.TemporaryDirectory() as folder:
        beside_the_encoder(Path(folder), options)
        if options.sizes:
            by_size(Path(folder), options, sizes=options.sizes)


def beside_the_encoder(folder: Path, options: argparse.Namespace) -> None:
    prepared = write_cohort(folder, options.volumes)
    encoder = load_volume_encoder(options.encoder, device=options.device, num_slices=options.num_slices)
    if not isinstance(encoder, SliceTransformer):
        sys.exit(f"{options.encoder}: expected a vision transformer of slices, whose bare pass is known here")
    on_gpu = encoder.device.type == "cuda"
    precision = extraction.choose_precision(options.precision, encoder, on_gpu=on_gpu)
    start = time.perf_counter()
    inputs = [encoder.prepare(load_brain(prepared, scan)) for scan in read_scans(prepared / "scans.tsv")]
    preparing = (time.perf_counter() - start) / options.volumes
    slices = torch.cat([each.data for each in inputs]).to(encoder.device)

    def bare() -> None:
        autocast = torch.autocast(encoder.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with torch.inference_mode(), autocast:
            for batch in slices.split(options.batch_size):
                encoder.network(batch)
            if on_gpu:
                torch.cuda.synchronize(encoder.device)

    words = ["--prepared", prepared, "--encoder", options.encoder, "--options", f"num_slices={options.num_slices}"]
    words += ["--batch-size", options.batch_size, "--jobs", options.jobs, "--device", encoder.device]
    words += ["--precision", precision]
    sides: dict[str, list[float]] = {"bare": [], "extract": []}
    bare()
    for number in range(options.rounds):
        sides["bare"].append(seconds_of(bare))
        command = [*words, "--out", folder / f"round-{number}"]
        sides["extract"].append(seconds_of(lambda: run(encoder, command)))  # noqa: B023
    bare_side, whole = (statistics.median(sides[name]) / options.volumes for name in ("bare", "extract"))
    name = torch.cuda.get_device_name(encoder.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; {encoder.identity.name}, {precision}, {options.num_slices} slices, passes of {options.batch_size}")
    print(f"{options.volumes} volumes, {options.rounds} rounds; seconds a volume")
    print(f"{'bare encoder':>14} {'extract':>9} {'ratio':>7} {'preparation alone':>19}")
    print(f"{bare_side:14.3f} {whole:9.3f} {whole / bare_side:7.2f} {preparing:19.3f}", flush=True)
    if options.json is not None:
        rows = {
            "bare encoder": {"seconds": bare_side, "rate": options.num_slices / bare_side},
            "braindino extract": {
                "seconds": whole,
                "rate": options.num_slices / whole,
                "note": f"{whole / bare_side:.2f} of the bare encoder; preparation alone {preparing:.3f} s",
            },
        }
        options.json.write_text(json.dumps(rows))


def by_size(folder: Path, options: argparse.Namespace, *, sizes: Sequence[int]) -> None:
    print(f"\n{'ms a volume':>14} {'first run':>10} {'second run':>11} {'read global':>12} {'read slices':>12}")
    load, small = extraction._load, [f"{name}={value}" for name, value in SMALL.items()]
    extraction._load = load_noise
    encoder = load_volume_encoder("untrained:vit_tiny", device=options.device, **SMALL)
    try:
        for size in sizes:
            prepared, out = folder / f"prepared-{size}", folder / f"features-{size}"
            scans = [Scan(f"/noise/{size}/s{number:05d}.nii.gz", "noise", f"s{number}") for number in range(size)]
            write_scans(prepared / "scans.tsv", scans)
            words = ["--prepared", prepared, "--encoder", "untrained:vit_tiny", "--out", out]
            words += ["--options", *small, "--device", options.device]
            first, second = (seconds_of(lambda: run(encoder, words)) for _ in range(2))  # noqa: B023
            table = FeatureTable(out)
            assert len(table) == size
            global_ = seconds_of(lambda: table.pooled(table.scans))  # noqa: B023
            slices = seconds_of(lambda: table.slices(table.scans))  # noqa: B023
            row = [1e3 * seconds / size for seconds in (first, second, global_, slices)]
            print(f"{size:>6,} volumes {row[0]:10.2f} {row[1]:11.2f} {row[2]:12.3f} {row[3]:12.3f}", flush=True)
    finally:
        extraction._load = load


def write_cohort(folder: Path, number: int) -> Path:
    """A prepared folder of "brains" of noise, 1 mm, 150 x 180 x 140 voxels in a field of view of 192 x 224 x 176."""
    prepared = folder / "prepared"
    index = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (192, 224, 176)), indexing="ij"), axis=-1)
    inside = np.linalg.norm(index / 0.8, axis=-1) < 1

    def write(one: int) -> Scan:
        data = np.where(inside, np.random.default_rng(one).integers(100, 900, inside.shape), 0)
        path = folder / f"s{one}.nii.gz"
        save_array(data, np.eye(4), path, dtype=np.int16)
        return Scan(str(path), "noise", f"s{one}", sequence="T1")

    with ThreadPoolExecutor() as pool:
        write_scans(prepared / "scans.tsv", list(pool.map(write, range(number))))
    return prepared


def load_noise(scan, work, encoder):
    """For ``extraction._load``."""
    rng = np.random.default_rng(int(scan.scan_id, 16))
    data = rng.standard_normal((SMALL["num_slices"], 1, SMALL["image_size"], SMALL["image_size"]), dtype=np.float32)
    return Prepared(torch.from_numpy(data), scan.sequence, np.eye(4), np.eye(4))


def run(encoder: VolumeEncoder, words: Sequence[object]) -> None:
    """`braindino extract` with an encoder that is loaded already."""
    load = extract.load_volume_encoder
    extract.load_volume_encoder = lambda *_, **__: encoder
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = extract.main([str(word) for word in words])
        assert code == 0, code
    finally:
        extract.load_volume_encoder = load


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
