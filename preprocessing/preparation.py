"""One scan: from its file to a brain mask, 128 slices in the store, and a case that says so (paper sec. 4.1.2)."""

import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braindino.manifest import Scan, mask_path
from braindino.preprocessing.cases import Case, content_hash, remove_case, settings_hash, write_case
from braindino.preprocessing.skull_strip import (
    TOOLS,
    SkullStripper,
    check_brain_mask,
    largest_component,
    looks_stripped,
)
from braindino.slice_store import SliceStoreWriter
from braindino.slices import NUM_SLICES, SLICE_ORIENTATION, axial_slices, gaussian_indices, scan_generator
from braindino.transforms import standardize
from braindino.volume import Volume, VolumeError, load_volume, save_mask_like

# Raised whenever the same file and settings give other slices than before.
CODE_VERSION = 1
# Real scans have hundreds of grey levels, the coarsest one met 89; label maps a handful.
MAX_LABELS = 32
STORE_CONTRACT = {
    "intensity": "clipped to the 0.5-99.5 percentile, z-score over non-zero voxels, background 0",
    "orientation": SLICE_ORIENTATION,
    "slice_axis": "axial",
    "sampling": f"{NUM_SLICES} of 256, gaussian about the middle, blank ones left out",
}

_SAMPLE_STEP = 101


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the outcome of a scan depends on, besides its bytes.

    Attributes:
        seed: of the choice of slices.
        skull_strip: ``hd-bet``, ``hd-bet-offline`` or ``none``.
        skull_strip_version: version of that tool's package.
    """

    seed: int
    skull_strip: str
    skull_strip_version: str

    @property
    def fingerprint(self) -> str:
        """16 digits that change with any setting and with :data:`CODE_VERSION`."""
        return settings_hash([("code", CODE_VERSION), *asdict(self).items()])


class ScanPreparer:
    """Prepares scans into one folder; picklable, and loads the skull-strip model at its first use in each process."""

    def __init__(self, out_dir: Path, settings: Settings, *, device: str = "cpu", num_threads: int = 0):
        """
        Args:
            out_dir: the prepared folder.
            settings: what to do.
            device: where the skull-strip model runs, ``cpu`` or ``cuda``.
            num_threads: threads of that model; 0 leaves torch's choice.
        """
        self.out_dir = out_dir
        self.settings = settings
        self.device = device
        self.num_threads = num_threads

    def __call__(self, scan: Scan) -> Case:
        """Prepare one scan and return its case, which is on disk by then.

        A scan that cannot be used comes back as a quarantined case.

        Raises:
            OSError: the output folder cannot be written.
        """
        start = time.perf_counter()
        # Nothing of an earlier outcome may survive into this one, nor count as finished if this one is cut short.
        remove_case(self.out_dir, Case(scan))
        content, brain_ml = "", None
        try:
            content = _content(scan)
            result = self._process(scan, load_volume(scan.path))
        except VolumeError as error:
            message = error.message.removeprefix(f"{scan.path}: ")
            scan = replace(scan, status="quarantined", reason=f"{error.code}: {message}", num_slices=0)
        except (
            Exception
        ) as error:  # any fault of one scan must leave the others alone; it is told in full, and tried again
            traceback.print_exc(file=sys.stderr)
            scan = replace(scan, status="quarantined", reason=f"failed: {type(error).__name__}: {error}", num_slices=0)
        else:
            scan = replace(scan, status="done", reason="; ".join(result.notes), num_slices=len(result.slices))
            brain_ml = result.brain_ml
            if result.mask is not None:
                save_mask_like(result.mask, scan.path, mask_path(self.out_dir, scan))
            SliceStoreWriter(self.out_dir / "store").add(scan, result.slices, result.indices)
        scan = replace(scan, seconds=round(time.perf_counter() - start, 3))
        case = Case(scan, content=content, settings=self.settings.fingerprint, brain_ml=brain_ml)
        write_case(self.out_dir, case)
        return case

    def _process(self, scan: Scan, volume: Volume) -> "_Prepared":
        check_is_image(volume)
        notes = list(volume.notes)
        mask = brain_ml = None
        if self.settings.skull_strip != "none":
            if looks_stripped(volume):
                notes.append("already_stripped")
            else:
                mask = largest_component(self._stripper.strip(volume))
                brain_ml = round(check_brain_mask(mask, volume), 1)
                volume = Volume(np.where(mask, volume.data, np.float32(0)), volume.affine, volume.notes)
        indices = gaussian_indices(rng=scan_generator(self.settings.seed, scan.scan_id))
        slices = axial_slices(standardize(volume), indices)
        kept = slices.any(axis=(1, 2))
        if not kept.all():
            notes.append(f"blank_slices={np.count_nonzero(~kept)}")
        return _Prepared(slices[kept], indices[kept], mask, brain_ml, notes)

    @cached_property
    def _stripper(self) -> SkullStripper:
        import torch

        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        return TOOLS[self.settings.skull_strip].build(self.device)


def check_is_image(volume: Volume) -> None:
    """Refuse a volume with so few distinct values that it must be a mask or a label map.

    Raises:
        VolumeError: code ``label_map``.
    """
    # A sparse sample with many values settles it for nearly every scan; sorting all voxels takes seconds.
    if len(np.unique(volume.data.ravel()[::_SAMPLE_STEP])) > MAX_LABELS:
        return
    values = np.unique(volume.data)
    if len(values) <= MAX_LABELS:
        raise VolumeError(
            "label_map",
            f"holds {len(values)} distinct values, like a mask or a label map; expected an image (over {MAX_LABELS})",
        )


class _Prepared(NamedTuple):
    """Slices (n, 256, 256), their indices (n,), the brain mask and its ml if one was made, and notes."""

    slices: np.ndarray
    indices: np.ndarray
    mask: np.ndarray | None
    brain_ml: float | None
    notes: list[str]


def _content(scan: Scan) -> str:
    """The hash of a file's bytes; whatever keeps them from being read is a fault of the scan."""
    try:
        return content_hash(Path(scan.path))
    except OSError as error:
        raise VolumeError("unreadable", f"{scan.path}: {error.strerror or error}") from error
