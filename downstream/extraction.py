"""From prepared scans to a feature table: load -> standardise -> slices -> encoder -> CLS, for each scan."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from braindino.encoders import intensity
from braindino.feature_table import FeatureTableWriter
from braindino.manifest import Scan, load_brain, mask_path
from braindino.slices import axial_slices, uniform_indices
from braindino.transforms import standardize
from braindino.volume import VolumeError
from braindino.weights import load_encoder


class SliceEncoder(NamedTuple):
    """Anything that turns slices (B, 1, H, W) into features (B, D), with its identity."""

    name: str
    sha256: str
    encode: Callable[[Tensor], Tensor]


class Extraction(NamedTuple):
    """What became of the scans."""

    num_kept: int
    num_done: int
    quarantined: list[Scan]
    seconds: float


def load_slice_encoder(path_or_name: str, *, device: torch.device) -> SliceEncoder:
    """Return the encoder's CLS tokens after the final norm as a function of slices, or the intensity floor.

    Raises:
        ValueError, FileNotFoundError: what ``load_encoder`` says of the weights.
    """
    if path_or_name == intensity.NAME:
        return SliceEncoder(intensity.NAME, intensity.SHA256, intensity.encode_intensity)
    encoder = load_encoder(path_or_name, device=device)
    return SliceEncoder(encoder.name, encoder.sha256, lambda slices: encoder(slices).cls)


def load_slices(prepared_dir: Path, scan: Scan, *, num_slices: int) -> np.ndarray:
    """Return the (num_slices, 256, 256) float32 equally spaced axial slices of a prepared scan (paper sec. 4.3).

    Raises:
        VolumeError: the scan can no longer be used.
    """
    return axial_slices(standardize(load_brain(prepared_dir, scan)), uniform_indices(num_slices))


def encode_slices(encoder: SliceEncoder, slices: np.ndarray, *, batch_size: int, device: torch.device) -> np.ndarray:
    """Return the features of slices (n, H, W) as (n, D) float32.

    bfloat16 autocast is used on CUDA only: on a CPU it is slower than float32 where the processor lacks the
    instructions.
    """
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for batch in torch.from_numpy(slices)[:, None].split(batch_size):
            parts.append(encoder.encode(batch.to(device)).float().cpu())
    return torch.cat(parts).numpy()


def extract_features(
    scans: Sequence[Scan],
    *,
    prepared_dir: Path,
    encoder: SliceEncoder,
    writer: FeatureTableWriter,
    num_slices: int,
    batch_size: int,
    jobs: int,
    device: torch.device,
    track: Callable[[Iterable[Scan]], Iterable[Scan]],
) -> Extraction:
    """Add the features of ``scans`` to a table; those that are there already, and not older than their scan, are
    kept.

    The next ``jobs`` volumes are loaded by threads while the encoder works on this one. A scan that cannot be
    loaded or encoded ends as a quarantined row with its reason, and the rest go on.

    Args:
        scans: done scans of a prepared folder.
        prepared_dir: that folder.
        encoder: what makes the features.
        writer: of the table.
        num_slices: equally spaced slices per volume.
        batch_size: slices per pass.
        jobs: loading threads.
        device: of the encoder.
        track: wraps the scans that are to be worked on, for progress.
    """
    start = time.monotonic()
    missing = [scan for scan in scans if not writer.keep(scan, newer_than=_last_change(prepared_dir, scan))]
    quarantined = []
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        loading = _ahead(pool, lambda scan: load_slices(prepared_dir, scan, num_slices=num_slices), missing, depth=jobs)
        for scan, slices in zip(track(missing), loading, strict=True):
            try:
                loaded = slices.result()
            except (ValueError, OSError) as error:
                quarantined.append(_quarantine(scan, error))
                continue
            cls = encode_slices(encoder, loaded, batch_size=batch_size, device=device)
            try:
                writer.add(scan, cls)
            except ValueError as error:
                quarantined.append(_quarantine(scan, error))
    return Extraction(
        num_kept=len(scans) - len(missing),
        num_done=len(missing) - len(quarantined),
        quarantined=quarantined,
        seconds=time.monotonic() - start,
    )


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[Scan], np.ndarray], scans: Sequence[Scan], *, depth: int
) -> Iterator[Future]:
    """Yield the futures of ``load`` in order, always with ``depth`` more under way: memory stays bounded."""
    waiting: deque[Future] = deque()
    for scan in scans:
        waiting.append(pool.submit(load, scan))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def _quarantine(scan: Scan, error: Exception) -> Scan:
    code = error.code if isinstance(error, VolumeError) else type(error).__name__
    return replace(scan, status="quarantined", reason=f"{code}: {error}")


def _last_change(prepared_dir: Path, scan: Scan) -> float:
    """Modification time of the scan or its mask, seconds since 1970; 0 where the file is gone (loading will say so)."""
    paths = (Path(scan.path), mask_path(prepared_dir, scan))
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
