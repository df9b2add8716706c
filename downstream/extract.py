"""``python downstream/extract.py --prepared DIR --encoder ENCODER --out FEATURES``: frozen features, once, for every
task."""

import os
import sys
import time
from collections.abc import Sequence

import torch
import tyro

from braindino.command_line import EXIT_DONE, EXIT_PARTIAL, GOES_ON, command_line
from braindino.devices import choose_devices
from braindino.downstream.config import ExtractConfig
from braindino.downstream.extraction import (
    Work,
    choose_precision,
    encode_on,
    encode_scans,
    last_change,
    table_meta,
)
from braindino.encoders.catalogue import load_volume_encoder
from braindino.encoders.options import parse_options
from braindino.feature_table import FeatureTableWriter, remove_leftovers
from braindino.leakage import EXPOSURE_FILE, exposure_of_encoder, write_exposure
from braindino.lock import lock_folder
from braindino.manifest import read_scans, write_scans
from braindino.parts import part_of
from braindino.progress import track

MAX_JOBS = 16


@command_line("extract", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every done scan has features, 3 when some could not be used, 1 on an error."""
    try:
        return _run(tyro.cli(ExtractConfig, args=argv, prog="braindino extract"))
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{error}; try a smaller --batch-size") from error


def _run(config: ExtractConfig) -> int:
    scans = [scan for scan in read_scans(config.prepared / "scans.tsv") if scan.status == "done"]
    if not scans:
        raise ValueError(f"{config.prepared / 'scans.tsv'}: no scan with status done; look at the reasons given there")
    part = f"part-{config.part}-of-{config.of}" if config.part is not None else ""
    if part:
        scans = [scan for scan in scans if part_of(scan.scan_id, config.of or 1) == config.part]
    devices = choose_devices(config.device)
    options = parse_options(config.options)
    # With several GPUs each process loads its own; here only the identity is wanted.
    encoder = load_volume_encoder(config.encoder, device=devices[0] if len(devices) == 1 else "cpu", **options)
    if encoder.network is None:
        devices = ["cpu"]
    on_gpu = devices[0] != "cpu"
    meta = table_meta(encoder, precision=choose_precision(config.precision, encoder, on_gpu=on_gpu))
    work = Work(
        encoder=config.encoder,
        options=options,
        prepared_dir=config.prepared,
        table_dir=config.out,
        meta=meta,
        batch_size=config.batch_size,
        jobs=config.jobs or (_jobs_per_gpu(len(devices)) if on_gpu else 1),
    )
    size = f", {meta.num_slices} slices" if meta.num_slices else ""
    print(f"extract: {len(scans)} scans, encoder {meta.identity.name}{size}, {meta.precision} on {', '.join(devices)}")
    quarantined = []
    start = time.monotonic()
    with lock_folder(config.out, part=part):
        if not part:
            remove_leftovers(config.out)
        table = FeatureTableWriter(config.out, meta)
        # What the encoder has seen travels with its features, so that evaluate can tell who must not be tested on.
        exposure = exposure_of_encoder(config.encoder)
        if exposure is not None:
            write_exposure(config.out / EXPOSURE_FILE, exposure)
        missing = [scan for scan in scans if not table.keep(scan, newer_than=last_change(config.prepared, scan))]
        finished = encode_scans(encoder, missing, work) if len(devices) == 1 else encode_on(devices, missing, work)
        try:
            for scan in track(finished, total=len(missing), desc="extract"):
                if scan.status == "quarantined":
                    quarantined.append(scan)
                elif not part:
                    table.record(scan)
        finally:
            # Parts write beside one another; the run after them finds their files and lists them.
            if not part:
                table.close()
        if not part:
            write_scans(config.out / "quarantined.tsv", quarantined)
    seconds = time.monotonic() - start
    num_done = len(missing) - len(quarantined)
    rate = f", {num_done / seconds:.2f} volumes/s" if num_done else ""
    print(
        f"extract: {num_done} done in {seconds:.1f} s{rate}; {len(scans) - len(missing)} were there already; "
        f"{len(quarantined)} quarantined; {config.out}"
    )
    if part:
        print(f"part {config.part} of {config.of}; when all are done, run once more without --part and --of")
    for scan in quarantined:
        print(f"quarantined: {scan.path}: {scan.reason}", file=sys.stderr)
    return EXIT_PARTIAL if quarantined else EXIT_DONE


def _jobs_per_gpu(num_gpus: int) -> int:
    return max(1, min(MAX_JOBS, (os.cpu_count() or 1) // num_gpus))


if __name__ == "__main__":
    raise SystemExit(main())
