"""Encoder inputs of the scans of a task's cases, for fine-tuning: prepared at first use and kept in memory while there
is room, so that an optimiser step does not wait for a scan to be read, cropped and resized."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from braindino.downstream.loading import load_ahead
from braindino.encoders.contract import VolumeEncoder
from braindino.file_digest import file_digest
from braindino.manifest import Scan, load_brain, mask_path, read_scans
from braindino.progress import track

BYTES_PER_GB = 1 << 30


class ScanInputs:
    """What the encoder is given of each scan; ``stream`` gives it in the order asked for.

    Whether a volume is kept or prepared again decides nothing but time.

    Attributes:
        scans: that can be asked for.
    """

    def __init__(
        self,
        encoder: VolumeEncoder,
        prepared_dir: Path,
        scans: Sequence[Scan],
        *,
        rows: slice = slice(None),
        dtype: torch.dtype = torch.float32,
        memory: float,
        jobs: int = 1,
    ) -> None:
        """
        Args:
            encoder: its ``prepare`` makes the inputs.
            prepared_dir: folder made by `braindino prepare`.
            scans: those that will be asked for.
            rows: slices of a volume that are needed, for an encoder of slices.
            dtype: what inputs are rounded to.
            memory: GB to keep inputs in.
            jobs: threads that load and prepare.

        Raises:
            ValueError: the folder lacks a scan.
        """
        self._encoder, self._prepared_dir = encoder, prepared_dir
        self._rows, self._dtype, self._jobs = rows, dtype, jobs
        self.scans = _find(prepared_dir, scans)
        self._kept: dict[str, Tensor] = {}
        self._room = int(memory * BYTES_PER_GB)

    @property
    def num_kept(self) -> int:
        """Volumes in memory."""
        return len(self._kept)

    def stream(self, scans: Sequence[Scan]) -> Iterator[tuple[Scan, Tensor]]:
        """Yield each scan with its input, ``Prepared.data`` on the CPU; those to come are prepared ahead.

        Raises:
            ValueError: a scan or its mask can no longer be used.
        """
        if all(scan.scan_id in self._kept for scan in scans):
            yield from ((scan, self._kept[scan.scan_id]) for scan in scans)
            return
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                for scan, data in load_ahead(pool, self._load, scans, depth=self._jobs):
                    yield self._taken(scan, data)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def digest(self) -> str:
        """SHA-256 over the ids and the digests of all files that the inputs are made of."""
        lines = []
        for scan in track(self.scans.values(), total=len(self.scans), desc="digests of scans"):
            mask = mask_path(self._prepared_dir, scan)
            paths = (Path(scan.path), mask) if mask.exists() else (Path(scan.path),)
            lines.append(f"{scan.scan_id} {file_digest(*paths)}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _load(self, scan: Scan) -> Tensor:
        kept = self._kept.get(scan.scan_id)
        if kept is not None:
            return kept
        found = self.scans[scan.scan_id]
        try:
            prepared = self._encoder.prepare(load_brain(self._prepared_dir, found), sequence=found.sequence)
        except (ValueError, OSError) as error:
            raise ValueError(f"{found.path}: {error}. It had features once; put the file back as it was") from error
        # A copy: a view would keep all slices of the volume in memory.
        return prepared.data[self._rows].to(self._dtype, copy=True)

    def _taken(self, scan: Scan, future: "Future[Tensor]") -> tuple[Scan, Tensor]:
        data = future.result()
        size = data.numel() * data.element_size()
        if scan.scan_id not in self._kept and size <= self._room:
            self._kept[scan.scan_id] = data
            self._room -= size
        return scan, data


def _find(prepared_dir: Path, scans: Sequence[Scan]) -> dict[str, Scan]:
    path = prepared_dir / "scans.tsv"
    if not path.is_file():
        raise ValueError(f"{prepared_dir}: no scans.tsv; expected the folder that `braindino prepare` made")
    done = {scan.scan_id: scan for scan in read_scans(path) if scan.status == "done"}
    missing = [scan for scan in scans if scan.scan_id not in done]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of the {len(scans)} scans of the cases are not there with status done, such as "
            f"{missing[0].sequence} of {missing[0].subject_key} ({missing[0].path}); give with --prepared the folder "
            "that the features were extracted from, or prepare these scans"
        )
    return {scan.scan_id: done[scan.scan_id] for scan in scans}
