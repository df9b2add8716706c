"""``python downstream/extract.py --prepared DIR --encoder FILE --out FEATURES``: frozen features, once, for every
task."""

import sys
from collections.abc import Sequence
from functools import partial

import torch
import tyro

from braindino.downstream.config import ExtractConfig
from braindino.downstream.extraction import extract_features, load_slice_encoder
from braindino.feature_table import FeatureTableWriter
from braindino.leakage import EXPOSURE_FILE, exposure_of_encoder, write_exposure
from braindino.lock import lock_folder
from braindino.manifest import read_scans, write_scans
from braindino.progress import track
from braindino.slices import SLICE_ORIENTATION
from braindino.transforms import CUBE_SHAPE


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every done scan has features, 3 when some could not be used, 1 on an error."""
    config = tyro.cli(ExtractConfig, args=argv)
    try:
        return _run(config)
    except (ValueError, OSError) as error:
        print(f"braindino extract: {error}", file=sys.stderr)
        return 1


def _run(config: ExtractConfig) -> int:
    scans = [scan for scan in read_scans(config.prepared / "scans.tsv") if scan.status == "done"]
    if not scans:
        raise ValueError(f"{config.prepared / 'scans.tsv'}: no scan with status done; look at the reasons given there")
    device = torch.device(_device_name(config.device))
    encoder = load_slice_encoder(config.encoder, device=device)
    preparation = {
        "slices": f"{config.num_slices} equally spaced",
        "orientation": SLICE_ORIENTATION,
        "cube": list(CUBE_SHAPE),
        "intensity": "clip 0.5-99.5 percentile, z-score over non-zero voxels, background 0",
        "precision": "bfloat16" if device.type == "cuda" else "float32",
    }
    print(f"extract: {len(scans)} scans, encoder {encoder.name}, {config.num_slices} slices, {device}")
    with (
        lock_folder(config.out),
        FeatureTableWriter(
            config.out, encoder_name=encoder.name, encoder_sha256=encoder.sha256, preparation=preparation
        ) as writer,
    ):
        # What the encoder has seen travels with its features, so that evaluate can tell who must not be tested on.
        exposure = exposure_of_encoder(config.encoder)
        if exposure is not None:
            write_exposure(config.out / EXPOSURE_FILE, exposure)
        outcome = extract_features(
            scans,
            prepared_dir=config.prepared,
            encoder=encoder,
            writer=writer,
            num_slices=config.num_slices,
            batch_size=config.batch_size,
            jobs=config.jobs,
            device=device,
            track=partial(track, desc="extract"),
        )
        write_scans(config.out / "quarantined.tsv", outcome.quarantined)
    rate = f", {outcome.num_done / outcome.seconds:.2f} volumes/s" if outcome.num_done else ""
    print(
        f"extract: {outcome.num_done} done in {outcome.seconds:.1f} s{rate}; {outcome.num_kept} were there already; "
        f"{len(outcome.quarantined)} quarantined; {config.out}"
    )
    for scan in outcome.quarantined:
        print(f"quarantined: {scan.path}: {scan.reason}", file=sys.stderr)
    return 3 if outcome.quarantined else 0


def _device_name(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


if __name__ == "__main__":
    raise SystemExit(main())
