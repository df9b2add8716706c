"""One scan: from its file to a brain mask, 128 slices in the store, and a case that says so (paper sec. 4.1.2)."""

import errno
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braindino.atomic import replace_file
from braindino.file_digest import file_digest
from braindino.fingerprint import appearance_hash, content_hash
from braindino.manifest import Scan, mask_path
from braindino.preprocessing.cases import (
    Case,
    InputState,
    input_files,
    input_path,
    input_state,
    key_of,
    picture_path,
    quarantined_mask_path,
    read_case,
    remove_case,
    write_case,
)
from braindino.preprocessing.conversion import conversion_version, convert
from braindino.preprocessing.discovery import Candidate
from braindino.preprocessing.quality_gate import MaskFindings, examine_mask, gate_picture
from braindino.preprocessing.skull_strip import TOOLS, SkullStripper, largest_component, looks_stripped
from braindino.scan_quality import ScanQuality
from braindino.slice_store import FORMAT_VERSION, SliceStoreWriter
from braindino.slices import NUM_SLICES, SLICE_ORIENTATION, axial_slices, gaussian_indices, scan_generator
from braindino.transforms import standardize
from braindino.volume import (
    Volume,
    VolumeError,
    check_field_of_view,
    load_mask,
    load_volume,
    obliqueness,
    save_mask_like,
)

# Raised whenever the same file and settings give another brain mask (STRIP), another judgement of it (GATE) or other
# slices (SLICES) than before.
STRIP_VERSION = 2
GATE_VERSION = 1
SLICES_VERSION = 2
# Real scans have hundreds of grey levels, the coarsest one met 89; label maps a handful.
MAX_LABELS = 32
STORE_CONTRACT = {
    "intensity": "clipped to the 0.5-99.5 percentile, z-score over non-zero voxels, background 0",
    "orientation": SLICE_ORIENTATION,
    "slice_axis": "axial",
    "sampling": f"{NUM_SLICES} of 256, gaussian about the middle, blank ones left out",
}
# What a write says when the disk, not the scan, is at fault: the run stops instead of blaming one scan after another.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENODEV, errno.ESTALE})

# Every 7th voxel is enough for percentiles; a prime number meets all rows and columns.
QUALITY_STEP = 7

_SAMPLE_STEP = 101
_STRIPPERS: dict[tuple[str, str, bool], SkullStripper] = {}
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the outcome of a scan depends on, besides its bytes.

    Attributes:
        seed: of the choice of slices.
        skull_strip: ``hd-bet``, ``hd-bet-offline`` or ``none``.
        skull_strip_version: version of that tool's package and of its weights.
        mirroring: whether the tool averages over mirrored copies of a scan.
        accepted: scan_ids whose masks were looked at and found good, whatever the quality gate says.
    """

    seed: int = 0
    skull_strip: str = "none"
    skull_strip_version: str = ""
    mirroring: bool = False
    accepted: frozenset[str] = frozenset()

    def keys(self, candidate: Candidate) -> dict[str, str]:
        """Stage -> key, see :mod:`braindino.preprocessing.cases`."""
        conversion, convert_key = candidate.conversion, ""
        if conversion is not None:
            convert_key = key_of(conversion_version(), conversion.kind, conversion.files, conversion.parameters)
        return {
            "convert": convert_key,
            "strip": key_of(STRIP_VERSION, self.skull_strip, self.skull_strip_version, self.mirroring),
            "slices": key_of(
                SLICES_VERSION, FORMAT_VERSION, GATE_VERSION, self.seed, candidate.scan.scan_id in self.accepted
            ),
        }


class ScanPreparer:
    """Prepares scans into one folder; picklable. Each process loads the skull-strip model once, when it is wanted."""

    def __init__(self, out_dir: Path, settings: Settings, *, device: str = "cpu", num_threads: int = 0):
        """
        Args:
            out_dir: the prepared folder.
            settings: what to do.
            device: where the skull-strip model runs: ``cpu``, ``cuda`` or ``cuda:1``.
            num_threads: threads of that model; 0 leaves torch's choice.
        """
        self.out_dir = out_dir
        self.settings = settings
        self.device = device
        self.num_threads = num_threads

    def __call__(self, candidate: Candidate) -> Case:
        """Prepare one scan and return its case, which is on disk by then.

        A scan that cannot be used comes back as a quarantined case; so does one of which that is known already.

        Raises:
            OSError: the output folder cannot be written, the disk is full, or the folder of the scan is gone.
        """
        start = time.perf_counter()
        scan, keys = candidate.scan, self.settings.keys(candidate)
        old = read_case(self.out_dir, scan.scan_id)
        # Nothing of an earlier outcome may survive into this one, nor count as finished if this one is cut short.
        remove_case(self.out_dir, Case(scan), keep_mask=True)
        known = _Known()
        try:
            files = _files(candidate)
            known.state, known.file_hash = input_state(files), file_digest(*files)
            if old is not None and (old.file_hash, old.keys["convert"]) != (known.file_hash, keys["convert"]):
                old = None
            if scan.status == "quarantined":
                code, _, words = scan.reason.partition(": ")
                raise VolumeError(code, words)
            known.conversion_notes = self._convert(candidate, old)
            known.volume = load_volume(scan.path)
            scan = replace(scan, content_hash=content_hash(known.volume))
            same_strip = old is not None and old.keys["strip"] == keys["strip"]
            result = self._process(scan, known, old.quality if old is not None and same_strip else None)
        except VolumeError as error:
            scan = self._quarantine(scan, error, known.volume)
        except Exception as error:  # a fault of one scan must leave the others alone; it is told in full, tried again
            if isinstance(error, OSError) and (error.errno in DISK_ERRORS or _is_below(error.filename, self.out_dir)):
                raise
            _check_source_is_there(scan)
            traceback.print_exc(file=sys.stderr)
            scan = replace(scan, status="quarantined", reason=f"failed: {type(error).__name__}: {error}", num_slices=0)
        else:
            scan = replace(
                scan,
                status="done",
                reason="; ".join([*known.conversion_notes, *result.notes]),
                num_slices=len(result.slices),
                appearance_hash=result.appearance,
            )
            SliceStoreWriter(self.out_dir / "store").add(scan, result.slices, result.indices)
        scan = replace(scan, seconds=round(time.perf_counter() - start, 3))
        case = Case(
            scan,
            state=known.state,
            file_hash=known.file_hash,
            keys=keys,
            conversion_notes=known.conversion_notes,
            quality=known.quality,
        )
        write_case(self.out_dir, case)
        return case

    def warm_up(self) -> None:
        """Load the skull-strip model now, if one will be wanted."""
        if self.settings.skull_strip != "none":
            self._stripper()

    def _convert(self, candidate: Candidate, old: Case | None) -> tuple[str, ...]:
        """Make the NIfTI file of an input that is none, unless ``old`` says that it was made already; notes."""
        if candidate.conversion is None:
            return ()
        path = Path(candidate.scan.path)
        if old is not None and path.exists():
            return old.conversion_notes
        return convert(candidate.conversion, Path(candidate.scan.source), path)

    def _process(self, scan: Scan, known: "_Known", old: ScanQuality | None) -> "_Prepared":
        volume = known.volume
        assert volume is not None
        known.quality = _measure(scan, volume)
        check_is_image(volume)
        check_field_of_view(volume)
        notes = list(volume.notes)
        if self.settings.skull_strip == "none" or looks_stripped(volume):
            mask_path(self.out_dir, scan).unlink(missing_ok=True)
            quarantined_mask_path(self.out_dir, scan).unlink(missing_ok=True)
            if self.settings.skull_strip != "none":
                notes.append("already_stripped")
                known.quality = replace(known.quality, stripped_by="already")
        else:
            mask, findings = self._mask(scan, volume, old)
            known.quality = replace(known.quality, stripped_by=self.settings.skull_strip, **asdict(findings))
            notes += self._pass_gate(scan, mask, findings)
            volume = Volume(np.where(mask, volume.data, np.float32(0)), volume.affine, volume.notes)
        cube = standardize(volume)
        indices = gaussian_indices(rng=scan_generator(self.settings.seed, scan.scan_id))
        slices = axial_slices(cube, indices)
        kept = slices.any(axis=(1, 2))
        if not kept.all():
            notes.append(f"blank_slices={np.count_nonzero(~kept)}")
        return _Prepared(slices[kept], indices[kept], appearance_hash(cube.data), notes)

    def _mask(self, scan: Scan, volume: Volume, old: ScanQuality | None) -> tuple[np.ndarray, MaskFindings]:
        """The brain, and what the gate finds about it: from an earlier run with the same settings, or from the model.

        ``old`` is what that run measured. What only the model's own output shows, the islands that are cut off
        before a mask is kept, is taken from there.
        """
        if old is not None and old.components is not None and old.largest_component is not None:
            for path in (mask_path(self.out_dir, scan), quarantined_mask_path(self.out_dir, scan)):
                mask = _earlier_mask(path, volume)
                if mask is not None:
                    findings = replace(
                        examine_mask(mask, volume),
                        components=old.components,
                        largest_component=old.largest_component,
                    )
                    return mask, findings
        # Threads of one process (a Dask worker may have several) share the model and its memory.
        with _ONE_AT_A_TIME:
            raw = self._stripper().strip(volume)
        return largest_component(raw), examine_mask(raw, volume)

    def _pass_gate(self, scan: Scan, mask: np.ndarray, findings: MaskFindings) -> list[str]:
        """Put the mask where it belongs; notes.

        Raises:
            VolumeError: code ``suspicious_mask``; the mask is kept beside its picture, for a second look.
        """
        faults = findings.faults()
        accepted = scan.scan_id in self.settings.accepted
        good, bad = mask_path(self.out_dir, scan), quarantined_mask_path(self.out_dir, scan)
        stopped = bool(faults) and not accepted
        save_mask_like(mask, scan.path, bad if stopped else good)
        (good if stopped else bad).unlink(missing_ok=True)
        if stopped:
            raise VolumeError("suspicious_mask", "; ".join(faults))
        return ["mask_accepted_by_hand"] if faults else []

    def _quarantine(self, scan: Scan, error: VolumeError, volume: Volume | None) -> Scan:
        if error.code != "suspicious_mask":
            mask_path(self.out_dir, scan).unlink(missing_ok=True)
            quarantined_mask_path(self.out_dir, scan).unlink(missing_ok=True)
        if volume is not None:
            mask = np.zeros(volume.shape, dtype=bool)
            if error.code == "suspicious_mask":
                mask = load_mask(quarantined_mask_path(self.out_dir, scan))
            _save_picture(gate_picture(volume, mask), picture_path(self.out_dir, scan))
        message = error.message.removeprefix(f"{scan.path}: ").removeprefix(f"{input_path(scan)}: ")
        return replace(scan, status="quarantined", reason=f"{error.code}: {message}", num_slices=0)

    def _stripper(self) -> SkullStripper:
        settings = self.settings
        key = (settings.skull_strip, self.device, settings.mirroring)
        if key not in _STRIPPERS:
            import torch

            if self.num_threads:
                torch.set_num_threads(self.num_threads)
            _STRIPPERS[key] = TOOLS[settings.skull_strip].build(self.device, settings.mirroring)
        return _STRIPPERS[key]


def check_is_image(volume: Volume) -> None:
    """Refuse a volume with so few distinct values that it must be a mask or a label map.

    Raises:
        VolumeError: code ``label_map``.
    """
    # A sparse sample with many values settles it for nearly every scan; sorting all voxels takes seconds.
    if len(np.unique(volume.data.ravel(order="K")[::_SAMPLE_STEP])) > MAX_LABELS:
        return
    values = np.unique(volume.data)
    if len(values) <= MAX_LABELS:
        raise VolumeError(
            "label_map",
            f"holds {len(values)} distinct values, like a mask or a label map; expected an image (over {MAX_LABELS})",
        )


@dataclass
class _Known:
    """What is known of a scan, as far as its preparation has got."""

    state: InputState | None = None
    file_hash: str = ""
    conversion_notes: tuple[str, ...] = ()
    volume: Volume | None = None
    quality: ScanQuality | None = None


class _Prepared(NamedTuple):
    """Slices (n, 256, 256), their indices (n,), the brain's appearance hash, and notes."""

    slices: np.ndarray
    indices: np.ndarray
    appearance: str
    notes: list[str]


def _files(candidate: Candidate) -> list[Path]:
    """The input's files; whatever keeps them from being read is a fault of the scan, unless its folder is gone."""
    try:
        files = input_files(candidate.scan, candidate.conversion)
        for path in files:
            with path.open("rb"):
                pass
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        _check_source_is_there(candidate.scan)
        raise VolumeError("unreadable", f"{input_path(candidate.scan)}: {error.strerror or error}") from error
    return files


def _check_source_is_there(scan: Scan) -> None:
    """
    Raises:
        FileNotFoundError: the folder that held the scan is gone, as when its disk was unmounted.
    """
    folder = Path(input_path(scan)).parent
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, "the folder of the scans is gone; is its disk mounted?", str(folder))


def _is_below(name: object, folder: Path) -> bool:
    """Whether the file that an error names lies in ``folder``."""
    return isinstance(name, str) and folder.absolute() in Path(name).absolute().parents


def _measure(scan: Scan, volume: Volume) -> ScanQuality:
    sample = volume.data.ravel(order="K")[::QUALITY_STEP]  # as it lies in memory: no copy
    values = sample[sample != 0]
    p01, median, p99 = np.percentile(values, (1, 50, 99)) if values.size else (0.0, 0.0, 0.0)
    return ScanQuality(
        scan_id=scan.scan_id,
        shape="x".join(str(extent) for extent in volume.shape),
        spacing="x".join(f"{extent:.3f}" for extent in volume.spacing),
        obliqueness=round(obliqueness(volume.affine), 2),
        p01=float(p01),
        median=float(median),
        p99=float(p99),
        foreground=round(float(values.size / sample.size), 4),
    )


def _earlier_mask(path: Path, volume: Volume) -> np.ndarray | None:
    """The mask an earlier run left at ``path``; None where there is none that can be used."""
    try:
        mask = load_mask(path)
    except (FileNotFoundError, VolumeError):  # damaged: it is made again
        return None
    return mask if mask.shape == volume.shape else None


def _save_picture(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    with replace_file(path) as temporary:
        Image.fromarray(picture).save(temporary)
