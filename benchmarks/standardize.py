"""One scan from file to standard cube: ours beside plain nibabel + scipy.ndimage.zoom + NumPy, ratio last.

OMP_NUM_THREADS=1 python benchmarks/standardize.py SCAN.nii.gz
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy.ndimage

from braindino.transforms import standardize
from braindino.volume import load_volume

ROUNDS = 5


def plain(path: Path) -> np.ndarray:
    """The paper's steps as one would first write them."""
    data = nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32)
    occupied = np.argwhere(data != 0)
    (x0, y0, z0), (x1, y1, z1) = occupied.min(0), occupied.max(0) + 1
    data = data[x0:x1, y0:y1, z0:z1]
    data = scipy.ndimage.zoom(data, 256 / np.array(data.shape), order=1, grid_mode=True, mode="nearest")
    foreground = data != 0
    data = np.clip(data, *np.percentile(data, [0.5, 99.5]))
    return np.where(foreground, (data - data[foreground].mean()) / data[foreground].std(), 0)


def ours(path: Path) -> np.ndarray:
    return standardize(load_volume(path)).data


def best(function: Callable[[Path], np.ndarray], path: Path) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function(path)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    path = Path(sys.argv[1])
    difference = np.abs(ours(path) - plain(path)).max()
    a, b = best(ours, path), best(plain, path)
    print(f"ours {a:.3f} s, plain {b:.3f} s, largest difference {difference:.1e}, ratio {b / a:.2f}")


if __name__ == "__main__":
    main()
