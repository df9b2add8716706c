"""What may be looked at: the scans that were given, each under a key that is no path."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braindino.fingerprint import content_hash
from braindino.manifest import Scan, load_brain, mask_path, read_scans
from braindino.slices import axial_slices
from braindino.transforms import CUBE_SHAPE, crop_to_foreground, resize
from braindino.viewer.bounded_cache import BoundedCache
from braindino.volume import Volume, encode_nifti, load_labels, load_volume

GIVEN = "given"
"""The key of the scan that was named on the command line."""
MAX_SCAN_BYTES = 1 << 30
MAX_THUMBNAIL_BYTES = 1 << 25
THUMBNAIL_PIXELS = 96
# As for the images of one case elsewhere: half a voxel of 1 mm would be a wrong mask already.
AFFINE_TOLERANCE_MM = 1e-2
# A scan with its skull has signal nearly everywhere; around a brain alone most of the field of view is exactly 0.
MIN_BACKGROUND_SHARE = 0.2


@dataclass(frozen=True)
class Source:
    """The files of one scan.

    Attributes:
        key: by which the page asks for it.
        scan: its row.
        prepared_dir: the folder that holds its brain mask, where it was prepared.
        mask: its brain mask, where one was given by hand.
        segmentation: a label map to lay over it.
    """

    key: str
    scan: Scan
    prepared_dir: Path | None = None
    mask: Path | None = None
    segmentation: Path | None = None


class Segmentation(NamedTuple):
    """A label map laid over a scan.

    Attributes:
        labels: (X, Y, Z) int16 on the grid of the scan.
        millilitres: of each label but 0, measured on the map's own grid.
    """

    labels: np.ndarray
    millilitres: dict[int, float]


@dataclass(frozen=True, eq=False)
class OpenScan:
    """A scan in memory.

    Attributes:
        source: its files.
        volume: as it was measured, RAS+.
        brain: the same with everything outside the brain 0: what encoders are shown.
        mask: (X, Y, Z) bool on the grid of ``volume``; None where the scan came without one.
        segmentation: None where there is none.
    """

    source: Source
    volume: Volume
    brain: Volume
    mask: np.ndarray | None
    segmentation: Segmentation | None

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        arrays = [self.volume.data, self.mask, self.segmentation.labels if self.segmentation else None]
        if self.brain is not self.volume:
            arrays.append(self.brain.data)
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def warning(self) -> str:
        """What a user should know before believing a map; empty where there is nothing."""
        if self.mask is None and (self.volume.data == 0).mean() < MIN_BACKGROUND_SHARE:
            return (
                "This scan has no brain mask and no empty background: the encoder sees the skull too, which it was not "
                "trained on. Give --mask, or prepare the scan."
            )
        return ""

    def window(self) -> tuple[float, float]:
        """Intensities to show as black and as white: the 1st (at most 0) and the 99.5th percentile of the brain."""
        tissue = self.brain.data[self.brain.data != 0]
        low, high = np.percentile(tissue, (1, 99.5)) if tissue.size else (0.0, 1.0)
        return float(min(low, 0.0)), float(max(high, low + 1e-6))


class ScanShelf:
    """The scans by their keys; opened when they are asked for, and kept while there is room."""

    def __init__(self, sources: Iterable[Source], *, max_bytes: int = MAX_SCAN_BYTES) -> None:
        self.sources: Mapping[str, Source] = {source.key: source for source in sources}
        self._open: BoundedCache[OpenScan] = BoundedCache(max_bytes, lambda opened: opened.num_bytes)
        self._thumbnails: BoundedCache[np.ndarray] = BoundedCache(MAX_THUMBNAIL_BYTES, lambda pixels: pixels.nbytes)

    def open(self, key: str) -> OpenScan:
        """The scan of ``key``.

        Raises:
            KeyError: there is no such scan.
            ValueError: a file cannot be used, or the files do not fit one another.
            OSError: a file is gone.
        """
        source = self.sources[key]
        return self._open.get(key, lambda: open_scan(source))

    def thumbnail(self, key: str, index: int) -> np.ndarray:
        """(height, width) uint8: the axial slice ``index`` of the standard cube, in its true proportions.

        Raises:
            As ``open``.
        """
        source = self.sources[key]
        return self._thumbnails.get((key, index), lambda: draw_slice(_load_brain(source), index))


def given_source(path: Path, *, mask: Path | None, segmentation: Path | None, known: Iterable[Source] = ()) -> Source:
    """The scan of the command line. What is known of the same scan, by its path or, where that differs, by its voxels,
    is known of this one: its subject, who is no neighbour of himself, and the mask of a prepared folder.

    Raises:
        VolumeError: the file cannot be used.
        OSError: there is no such file.
    """
    sources = list(known)
    found = next((each for each in sources if Path(each.scan.path).resolve() == path.resolve()), None)
    if found is None and any(each.scan.content_hash for each in sources):
        voxels = content_hash(load_volume(path))
        found = next((each for each in sources if each.scan.content_hash == voxels), None)
    if found is None:
        name = path.name.removesuffix(".gz").removesuffix(".nii")
        return Source(GIVEN, Scan(path=str(path), cohort="", subject=name), None, mask, segmentation)
    return Source(GIVEN, replace(found.scan, path=str(path)), None, mask or _mask_file(found), segmentation)


def prepared_sources(prepared_dir: Path) -> list[Source]:
    """The scans of a prepared folder that were done.

    Raises:
        ValueError: the folder holds none, or is no prepared folder.
    """
    table = prepared_dir / "scans.tsv"
    if not table.is_file():
        raise ValueError(f"{prepared_dir}: no scans.tsv here; expected a folder made by `braindino prepare`")
    sources = [Source(scan.scan_id, scan, prepared_dir) for scan in read_scans(table) if scan.status == "done"]
    if not sources:
        raise ValueError(f"{table}: no scan with status done; look at the reasons given there")
    return sources


def open_scan(source: Source) -> OpenScan:
    """Read the files of a scan and check that they belong together.

    Raises:
        ValueError: a file cannot be used (``VolumeError``), or the mask is not on the scan's grid.
        OSError: a file is gone.
    """
    volume = load_volume(source.scan.path)
    mask = None
    path = _mask_file(source)
    if path is not None:
        labels, affine = load_labels(path)
        if labels.shape != volume.shape or np.abs(affine - volume.affine).max() > AFFINE_TOLERANCE_MM:
            raise ValueError(
                f"{path}: grid {labels.shape} with corner at {np.round(affine[:3, 3], 2).tolist()} mm differs from "
                f"{source.scan.path}'s {volume.shape} at {np.round(volume.affine[:3, 3], 2).tolist()} mm (RAS+); "
                "give the mask of this scan, or resample it"
            )
        mask = labels > 0
        if not mask.any():
            raise ValueError(f"{path}: the mask is empty; expected voxels above 0 where the brain is")
    segmentation = _read_segmentation(source.segmentation, volume) if source.segmentation else None
    brain = volume
    if mask is not None:
        brain = Volume(np.where(mask, volume.data, np.float32(0)), volume.affine, volume.notes)
    return OpenScan(source, volume, brain, mask, segmentation)


def scan_nifti(opened: OpenScan) -> bytes:
    """The scan for the page: int16 where that says the same, else float32."""
    data = opened.volume.data
    low, high = data.min(), data.max()
    limits = np.iinfo(np.int16)
    whole = limits.min <= low and high <= limits.max and np.array_equal(data, data.astype(np.int16))
    return encode_nifti(data, opened.volume.affine, dtype=np.int16 if whole else np.float32)


def mask_bytes(opened: OpenScan) -> bytes:
    """The brain mask for the page: uint8, 0 and 1, x fastest."""
    assert opened.mask is not None, "asked for only where there is one"
    return opened.mask.astype(np.uint8).tobytes(order="F")


def segmentation_bytes(opened: OpenScan) -> bytes:
    """The label map for the page: little-endian int16 on the scan's grid, x fastest."""
    assert opened.segmentation is not None, "asked for only where there is one"
    return opened.segmentation.labels.astype("<i2").tobytes(order="F")


def draw_slice(brain: Volume, index: int) -> np.ndarray:
    """(height, width) uint8: slice ``index`` of the standard cube (``braindino.transforms``), the 1st to the 99th
    percentile of its tissue from dark to white; row 0 anterior, column 0 patient right.

    The same slice as that of ``standardize``, without making the other 255.
    """
    box = crop_to_foreground(brain)
    depth = box.shape[2]
    position = np.clip((index + 0.5) * depth / CUBE_SHAPE[2] - 0.5, 0, depth - 1)
    lower = int(min(position, max(depth - 2, 0)))
    upper, weight = min(lower + 1, depth - 1), np.float32(position - lower)
    plane = box.data[:, :, lower] * (1 - weight) + box.data[:, :, upper] * weight
    width, height = (extent * spacing for extent, spacing in zip(box.shape[:2], box.spacing[:2], strict=True))
    scale = THUMBNAIL_PIXELS / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale)), 1
    image = axial_slices(resize(Volume(plane[:, :, None], box.affine), size), [0])[0]
    tissue = image != 0
    if not tissue.any():
        return np.zeros(image.shape, dtype=np.uint8)
    low, high = np.percentile(image[tissue], (1, 99))
    grey = 20 + 235 * np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.asarray(grey * tissue, dtype=np.uint8)


def _read_segmentation(path: Path, volume: Volume) -> Segmentation:
    """The label map at ``path``, on the grid of ``volume`` by nearest neighbour; 0 where it does not reach."""
    labels, affine = load_labels(path)
    values, counts = np.unique(labels, return_counts=True)
    voxel = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    millilitres = {int(value): count * voxel for value, count in zip(values, counts.tolist(), strict=True) if value}
    if labels.shape == volume.shape and np.abs(affine - volume.affine).max() <= AFFINE_TOLERANCE_MM:
        return Segmentation(labels, millilitres)
    matrix = np.linalg.inv(affine) @ volume.affine
    x, y = np.meshgrid(np.arange(volume.shape[0]), np.arange(volume.shape[1]), indexing="ij")
    placed = np.zeros(volume.shape, dtype=np.int16)
    for z in range(volume.shape[2]):
        voxels = np.stack([x, y, np.full_like(x, z)], axis=-1) @ matrix[:3, :3].T + matrix[:3, 3]
        found = np.floor(voxels + 0.5).astype(np.intp)
        inside = ((found >= 0) & (found < labels.shape)).all(axis=-1)
        placed[:, :, z][inside] = labels[tuple(found[inside].T)]
    if labels.any() and not placed.any():
        raise ValueError(f"{path}: none of its labels lies within the scan; expected a label map of this scan")
    return Segmentation(placed, millilitres)


def _mask_file(source: Source) -> Path | None:
    if source.mask is not None or source.prepared_dir is None:
        return source.mask
    path = mask_path(source.prepared_dir, source.scan)
    return path if path.exists() else None


def _load_brain(source: Source) -> Volume:
    if source.prepared_dir is not None and source.mask is None:
        return load_brain(source.prepared_dir, source.scan)
    return open_scan(source).brain
