"""The leakage audit measured: the search among 50,000 scans, the time of a fingerprint, and how far apart the
appearance hashes of one scan and of different subjects are.

    python benchmarks/audit.py                       the search, and both hashes on a cube of noise
    python benchmarks/audit.py --data ../shared/data  and the distances on real brains
"""

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from braindino.fingerprint import APPEARANCE_BITS, MAX_APPEARANCE_DISTANCE, appearance_hash, content_hash, hamming
from braindino.leakage import Crosswalk, Exposure, find_overlaps
from braindino.manifest import Scan
from braindino.transforms import standardize
from braindino.volume import Volume, load_volume

NUM_SEEN, NUM_TESTED, NUM_COPIES = 50_000, 2_000, 100
FLIPPED_BITS = 60


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with oasis-t1, tcga-fg-6692 and brats")
    data = parser.parse_args().data
    measure_search()
    measure_hashes()
    if data is not None:
        measure_distances(data)


def measure_search() -> None:
    """All kinds of overlap between 2,000 scans and 50,000, of which 100 are near-duplicates."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (NUM_SEEN, APPEARANCE_BITS), dtype=np.uint8)
    asked = rng.integers(0, 2, (NUM_TESTED, APPEARANCE_BITS), dtype=np.uint8)
    asked[:NUM_COPIES] = bits[:: NUM_SEEN // NUM_COPIES]
    asked[:NUM_COPIES, :FLIPPED_BITS] ^= 1
    seen = [_scan("seen", n, row) for n, row in enumerate(bits)]
    tested = [_scan("tested", n, row) for n, row in enumerate(asked)]
    start = time.perf_counter()
    found = find_overlaps(Exposure(tuple(seen)), tested, Crosswalk())
    seconds = time.perf_counter() - start
    assert [(each.kind, each.distance) for each in found] == [("looks_the_same", FLIPPED_BITS)] * NUM_COPIES
    print(f"{NUM_TESTED} scans against {NUM_SEEN}: {seconds:.1f} s, all {len(found)} near-duplicates found, no other")


def measure_hashes() -> None:
    """Best of seven, one core."""
    rng = np.random.default_rng(0)
    volume = Volume(np.asfortranarray(rng.random((240, 240, 155), dtype=np.float32)), np.eye(4))
    cube = rng.standard_normal((256, 256, 256), dtype=np.float32)
    print(f"content_hash of 240x240x155: {_best(lambda: content_hash(volume)) * 1e3:.0f} ms")
    print(f"appearance_hash: {_best(lambda: appearance_hash(cube)) * 1e3:.0f} ms")


def measure_distances(data: Path) -> None:
    """Distances between variants of one scan, and between subjects of one sequence."""
    paths = {
        "T1": [
            *sorted(data.glob("oasis-t1/*_SS.nii.gz")), data / "tcga-fg-6692/bet_t1.nii.gz",
            data / "brats/BraTS-GLI-00001-000-t1n.nii.gz", data / "misc/subpixar009_T1w.nii.gz",
        ],
        **{
            name: [data / f"tcga-fg-6692/bet_{ours}.nii.gz", data / f"brats/BraTS-GLI-00001-000-{theirs}.nii.gz"]
            for name, ours, theirs in (("T1c", "t1c", "t1c"), ("T2", "t2", "t2w"), ("FLAIR", "fla", "t2f"))
        },
    }  # fmt: skip
    same: dict[str, list[int]] = defaultdict(list)
    different: list[int] = []
    for files in paths.values():
        hashes = {}
        for path in files:
            volume = load_volume(path)
            hashes[path] = appearance_hash(standardize(volume).data)
            for name, variant in _variants(volume):
                same[name].append(hamming(hashes[path], appearance_hash(standardize(variant).data)))
        different += [hamming(a, b) for a, b in itertools.combinations(hashes.values(), 2)]
    print("\nthe same scan after            median  largest   (bits of 512)")
    for name, distances in same.items():
        print(f"  {name:<28} {np.median(distances):>6.0f} {max(distances):>8}")
    below, margin = np.mean(different) - MAX_APPEARANCE_DISTANCE, min(different) - MAX_APPEARANCE_DISTANCE
    print(
        f"different subjects, one sequence: {len(different)} pairs, smallest {min(different)}, mean "
        f"{np.mean(different):.0f}, deviation {np.std(different):.1f}\nlimit {MAX_APPEARANCE_DISTANCE}: "
        f"{below / np.std(different):.1f} deviations below the mean, {margin} bits below the nearest pair"
    )


def _variants(volume: Volume) -> Iterator[tuple[str, Volume]]:
    """What happens to a scan on its way from one release to another."""
    rng = np.random.default_rng(0)
    data, affine = volume.data, volume.affine
    inside = ndimage.binary_fill_holes(data != 0)
    assert inside is not None
    scaled = np.clip(data, 0, None) / np.percentile(np.abs(data[inside]), 99)
    box = ndimage.find_objects(inside.astype(np.int8))[0]
    tighter = tuple(slice(part.start + 2, part.stop - 2) for part in box)
    higher = (*box[:2], slice(box[2].start + 4, box[2].stop))
    slope = 1 + 0.1 * np.linspace(-1, 1, volume.shape[0])[:, None, None]
    for mm in (1.2, 2.0):
        yield f"resampling to {mm} mm", _resampled(volume, mm)
    for steps in (1, 2):
        yield (
            f"mask {steps} voxel tighter",
            _of(np.where(ndimage.binary_erosion(inside, iterations=steps), data, 0), affine),
        )
    yield "crop by 2 voxels all round", _of(data[tighter], affine)
    yield "4 voxels of brainstem lost", _of(data[higher], affine)
    yield "gamma 0.7", _of(scaled**0.7 * inside, affine)
    yield "gamma 1.4", _of(scaled**1.4 * inside, affine)
    yield (
        "noise of 5 %",
        _of(np.where(inside, data + rng.normal(0, 0.05, data.shape) * np.percentile(data, 99), 0), affine),
    )
    yield "10 % bias from left to right", _of(data * slope, affine)
    yield "smoothing", _of(ndimage.gaussian_filter(data, 0.8) * inside, affine)
    yield "100 grey levels", _of(np.rint(scaled * 100), affine)
    turned = [
        ndimage.rotate(part, 3, axes=(0, 1), order=1, reshape=False) for part in (data, inside.astype(np.float32))
    ]
    yield "rotation by 3 degrees (beyond)", _of(turned[0] * (turned[1] > 0.5), affine)


def _resampled(volume: Volume, mm: float) -> Volume:
    zoom = [spacing / mm for spacing in volume.spacing]
    mask = ndimage.zoom((volume.data != 0).astype(np.float32), zoom, order=1, grid_mode=True, mode="nearest") > 0.5
    data = ndimage.zoom(volume.data, zoom, order=1, grid_mode=True, mode="nearest")
    return _of(data * mask, np.diag([mm, mm, mm, 1.0]))


def _of(data: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(np.asarray(data, dtype=np.float32), affine)


def _scan(cohort: str, number: int, bits: np.ndarray) -> Scan:
    looks = np.packbits(bits).tobytes().hex()
    return Scan("", cohort, f"{number}", content_hash=f"{cohort} {number}", appearance_hash=looks)


def _best(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
