"""What a run is pretrained on, written beside its encoder: the scans left after exclusions, and those seen before."""

from pathlib import Path

import numpy as np

from braindino.leakage import EXPOSURE_FILE, Exposure, exposure_of_encoder, write_exposure
from braindino.slice_store import SliceStore


def record_exposure(
    encoder_dir: Path, store: SliceStore, usable: np.ndarray, *, init_from: Path | None, resumed: bool
) -> None:
    """Write ``pretrained_on.tsv`` into the encoder's folder.

    A scan counts as seen from the first iteration on: which slices a stopped run has reached is not asked. A resumed
    run keeps its table; the run it started from may be gone by then.

    Args:
        encoder_dir: where the encoder will be saved.
        store: that the run reads.
        usable: indices of the slices that it draws from.
        init_from: run or encoder that it starts from; what that one has seen, this one has. Where nobody wrote that
            down, as for public weights, the table says that it is unknown.
        resumed: whether there is a checkpoint to go on from.
    """
    path = encoder_dir / EXPOSURE_FILE
    if resumed and path.exists():
        return
    scans = [store.scans[row] for row in np.unique(store.scan_index[usable])]
    unknown: list[str] = []
    if init_from is not None:
        before = exposure_of_encoder(init_from)
        if before is None:
            unknown.append(f"the run starts from {init_from.name}, which has no {EXPOSURE_FILE}")
        else:
            scans += before.scans
            unknown += before.unknown
    write_exposure(path, Exposure(tuple(scans), tuple(unknown)))
