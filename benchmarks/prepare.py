"""Scans from file to slices on disk, one core, no stripping: `braindino prepare` beside the plain and the MONAI way.

OMP_NUM_THREADS=1 python benchmarks/prepare.py SCAN.nii.gz...        (MONAI: pip install "braindino[benchmarks]")

All three read the file, turn it to RAS+, crop, resize, clip, normalise, choose 128 slices and write them as float16.
Ours does all of `prepare`: it also hashes bytes, voxels and looks, measures the scan, compresses the slices, syncs
them to the disk and writes the case. The others write one uncompressed .npy file and sync nothing.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy.ndimage
import torch

from braindino.manifest import Scan
from braindino.preprocessing.discovery import Candidate
from braindino.preprocessing.preparation import ScanPreparer, Settings
from braindino.slice_store import SliceStoreWriter
from braindino.slices import axial_slices, gaussian_indices, scan_generator
from braindino.transforms import standardize
from braindino.volume import Volume, load_volume

ROUNDS = 3


def plain(path: Path) -> np.ndarray:
    """The paper's steps as one would first write them: (256, 256, 256) float32."""
    data = nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32)
    occupied = np.argwhere(data != 0)
    (x0, y0, z0), (x1, y1, z1) = occupied.min(0), occupied.max(0) + 1
    data = data[x0:x1, y0:y1, z0:z1]
    data = scipy.ndimage.zoom(data, 256 / np.array(data.shape), order=1, grid_mode=True, mode="nearest")
    foreground = data != 0
    data = np.clip(data, *np.percentile(data, [0.5, 99.5]))
    return np.where(foreground, (data - data[foreground].mean()) / data[foreground].std(), 0).astype(np.float32)


def monai_way() -> Callable[[Path], np.ndarray] | None:
    """The same steps as MONAI's transforms; None where it is not installed."""
    try:
        from monai import transforms as mt
    except ImportError:
        return None
    steps = mt.Compose(
        [
            mt.LoadImage(image_only=True, ensure_channel_first=True),
            mt.Orientation(axcodes="RAS"),
            mt.CropForeground(select_fn=lambda image: image != 0, allow_smaller=True),
            mt.Resize((256, 256, 256), mode="trilinear"),
        ]
    )
    clip = mt.ClipIntensityPercentiles(lower=0.5, upper=99.5)
    normalise = mt.NormalizeIntensity(nonzero=True)

    def cube(path: Path) -> np.ndarray:
        image = steps(path)
        # Clipping lifts background where the 0.5 percentile is above 0; it is to stay background.
        clipped = torch.where(image != 0, clip(image), torch.zeros((), dtype=image.dtype))
        return np.asarray(normalise(clipped)[0])

    return cube


def ours(path: Path) -> np.ndarray:
    return standardize(load_volume(path)).data


def write_plainly(cube: np.ndarray, path: Path) -> None:
    """128 slices of a cube as one .npy file."""
    indices = gaussian_indices(rng=scan_generator(0, path.stem))
    np.save(path, axial_slices(Volume(cube, np.eye(4)), indices).astype(np.float16))


def best(function: Callable[[], object]) -> float:
    """Seconds of the fastest of some rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    paths = [Path(name).resolve() for name in sys.argv[1:]]
    others = {"plain": plain, **({"MONAI": cube} if (cube := monai_way()) is not None else {})}
    totals = dict.fromkeys(("prepare", "standardize", *others, *(f"{name} cube" for name in others)), 0.0)
    print(
        f"{'scan':<28} {'prepare':>8} {'ours':>8} "
        + " ".join(f"{name:>8} {'cube':>8} {'differ':>8}" for name in others)
    )
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths):
            scan = Scan(str(path), "benchmark", f"s{number}")
            preparer = ScanPreparer(Path(folder), Settings())
            reference = ours(path)
            case = preparer(Candidate(scan=scan))
            assert case.scan.status == "done", case.scan.reason
            row = {
                "prepare": best(lambda: preparer(Candidate(scan=scan))),  # noqa: B023
                "standardize": best(lambda: ours(path)),  # noqa: B023
            }
            shown = f"{path.name[-28:]:<28} {row['prepare']:8.3f} {row['standardize']:8.3f}"
            for name, cube in others.items():
                differ = float(np.abs(cube(path) - reference).max())
                out = Path(folder, f"{number}.npy")
                row[name] = best(lambda: write_plainly(cube(path), out))  # noqa: B023
                row[f"{name} cube"] = best(lambda: cube(path))  # noqa: B023
                shown += f" {row[name]:8.3f} {row[f'{name} cube']:8.3f} {differ:8.1e}"
            print(shown, flush=True)
            for name, seconds in row.items():
                totals[name] += seconds
        stored = SliceStoreWriter(Path(folder) / "store").publish()
        print(f"{len(paths)} scans, {len(stored)} slices in the store")
    for name in others:
        print(f"{name} / ours: to slices on disk {totals[name] / totals['prepare']:.2f}, to the cube alone "
              f"{totals[f'{name} cube'] / totals['standardize']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
