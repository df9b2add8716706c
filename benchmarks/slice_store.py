"""Random slice reads and size: our store beside WebDataset's tar, Zarr v3 (sharded), HDF5 and .npy files; ratios last.

    pip install webdataset zarr h5py hdf5plugin
    OMP_NUM_THREADS=1 python benchmarks/slice_store.py --store prepared/store

The slices are those of the store given, or of scans simulated here. Every format holds the same float16 slices and
reads them one by one in the same random order: one process, one thread, warm. Rounds of all formats take turns and
medians are compared, since a shared machine is faster in one second than in the next. Only lossless forms compete. A
format takes part with several settings, from its usual one to what suits these slices best; the ratio is to the fastest
that is no larger than the store. What is not installed is left out and named.
"""

import argparse
import importlib
import io
import os
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braindino.manifest import Scan
from braindino.slice_store import SliceStore, SliceStoreWriter
from braindino.slices import axial_slices, uniform_indices
from braindino.transforms import standardize
from braindino.volume import load_volume

READS_PER_ROUND = 300
ROUNDS = 15
SLICES_PER_SCAN = 128
SEQUENTIAL = "webdataset, npy.gz, in order"


class Contestant(NamedTuple):
    """One format with one setting.

    Attributes:
        name: both.
        read: gives slice i as (256, 256) float16.
        share: its size, of the raw size.
        checks: whether reading notices a changed byte.
    """

    name: str
    read: Callable[[int], np.ndarray]
    share: float
    checks: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="published store whose slices are used; simulated ones by default")
    parser.add_argument("--scans", type=int, default=16, help="scans to use")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        half, what = _slices_of(arguments.store, arguments.scans) if arguments.store else _simulated(folder)
        print(f"{len(half)} slices of 256 x 256, float16, {what}\n")
        compare(half, folder)


def compare(half: np.ndarray, folder: Path) -> None:
    """Print the table: half is (n, 256, 256) float16."""
    store = _write_store(half, folder / "store")
    share = sum(store.scan_path(row).stat().st_size for row in range(store.num_scans)) / half.nbytes
    place = np.empty(half.shape[1:], dtype=np.float16)
    ours = Contestant("store", lambda index: store.read_float16(index, out=place), share, checks=True)
    alike = [
        Contestant("store, each in a new array", store.read_float16, share, checks=True),
        Contestant("store, as float32, each in a new array", store.__getitem__, share, checks=True),
    ]
    contestants = [ours, *alike, *_others(half, folder)]
    sample = np.random.default_rng(1).integers(0, len(half), 32).tolist()
    for contestant in contestants:
        for index in sample:
            np.testing.assert_array_equal(np.asarray(contestant.read(index), dtype=np.float16), half[index])
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(ROUNDS + 1):  # the first warms up
        order = np.random.default_rng(number).integers(0, len(half), READS_PER_ROUND).tolist()
        # Every one comes first and last in some round: who follows whom matters to the processor's caches.
        shift = number % len(contestants)
        for contestant in contestants[shift:] + contestants[:shift]:
            start = time.perf_counter()
            for index in order:
                contestant.read(index)
            if number:
                seconds[contestant.name].append((time.perf_counter() - start) / READS_PER_ROUND)
    rates = {name: 1 / statistics.median(times) for name, times in seconds.items()}
    in_order = _rate_in_order(folder / "gz.tar")
    print(f"{'':50s}{'slices/s':>9s}  {'of raw size':>11s}  {'checked':>7s}  {'store/it':>8s}")
    for each in contestants:
        ratio = "" if each is ours else f"{_ratio(seconds, ours, each):.2f}"
        checked = "yes" if each.checks else "no"
        print(f"{each.name:50s}{rates[each.name]:9.0f}  {each.share:11.3f}  {checked:>7s}  {ratio:>8s}")
    if in_order is not None:
        print(f"{SEQUENTIAL:50s}{in_order:9.0f}  (its own reader, from the first to the last: not random)")
    rivals = [each for each in contestants[1 + len(alike) :] if each.share <= share]
    for what, those in (
        ("no larger", rivals),
        ("no larger and also checks what it reads", [each for each in rivals if each.checks]),
        ("no larger, of what each format brings along", [each for each in rivals if "plugin" not in each.name]),
    ):
        if those:
            best = max(those, key=lambda each: rates[each.name])
            print(f"fastest other that is {what}: {best.name}; ratio store / it: {_ratio(seconds, ours, best):.2f}")


def _ratio(seconds: dict[str, list[float]], ours: Contestant, other: Contestant) -> float:
    """Slices per second of the store, of those of another: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(seconds[ours.name], seconds[other.name], strict=True))


def _slices_of(store_dir: Path, num_scans: int) -> tuple[np.ndarray, str]:
    store = SliceStore(store_dir)
    rows = np.unique(np.linspace(0, store.num_scans - 1, num_scans).astype(int))
    indices = np.flatnonzero(np.isin(store.scan_index, rows))
    cohorts = ", ".join(sorted({store.scans[row].cohort for row in rows}))
    return np.stack([store.read_float16(int(index)) for index in indices]), f"of {len(rows)} scans ({cohorts})"


def _simulated(folder: Path) -> tuple[np.ndarray, str]:
    from braindino.simulation.simulate import simulate_cohort

    simulate_cohort(folder / "cohort", num_subjects=2, seed=0, jobs=1)
    paths = sorted(path for path in (folder / "cohort").rglob("anat/*.nii.gz"))[:8]
    cubes = (standardize(load_volume(path)) for path in paths)
    slices = [axial_slices(cube, uniform_indices(SLICES_PER_SCAN)).astype(np.float16) for cube in cubes]
    return np.concatenate(slices), f"of {len(paths)} simulated scans"


def _write_store(half: np.ndarray, folder: Path) -> SliceStore:
    writer = SliceStoreWriter(folder)
    for first in range(0, len(half), SLICES_PER_SCAN):
        part = half[first : first + SLICES_PER_SCAN]
        # Names in order, so that slice i of the store is slice i here.
        scan = Scan(path=f"/{first:09d}.nii.gz", cohort="benchmark", subject=f"{first:09d}", sequence="T1")
        writer.add(scan, part, range(len(part)))
    return writer.publish()


def _others(half: np.ndarray, folder: Path) -> Iterator[Contestant]:
    for name, build in (("h5py", _hdf5), ("zarr", _zarr), ("webdataset", _webdataset)):
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"left out: {error}")
            continue
        yield from build(half, folder)
    plain = folder / "npy"
    plain.mkdir()
    for index, part in enumerate(half):
        np.save(plain / f"{index}.npy", part)
    yield Contestant(".npy files (the limit)", lambda index: np.load(plain / f"{index}.npy"), 1.0)


def _hdf5(half: np.ndarray, folder: Path) -> Iterator[Contestant]:
    import h5py

    settings: dict[str, dict] = {
        "HDF5, lzf + shuffle": {"compression": "lzf", "shuffle": True},
        "HDF5, gzip 4 + shuffle": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
        "HDF5, gzip 1 + shuffle": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
    }
    try:
        import hdf5plugin
    except ImportError as error:
        print(f"left out: HDF5 with Blosc ({error})")
    else:
        for cname, level in (("zstd", 1), ("lz4hc", 9)):
            name, options = f"HDF5 + hdf5plugin, Blosc {cname} {level}", hdf5plugin.Blosc(cname, level, shuffle=1)
            settings[name] = dict(options)
            settings[f"{name}, fletcher32"] = {**options, "fletcher32": True}
    for number, (name, options) in enumerate(settings.items()):
        path = folder / f"{number}.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("slices", data=half, chunks=(1, *half.shape[1:]), **options)
        # A cache of one chunk: none of these reads comes back to the last slice.
        dataset = h5py.File(path, "r", rdcc_nbytes=0)["slices"]
        out = np.empty(half.shape[1:], dtype=np.float16)

        def read(index: int, dataset: "h5py.Dataset" = dataset, out: np.ndarray = out) -> np.ndarray:
            # The quickest way that h5py has: no array made, no selection object kept.
            dataset.read_direct(out, np.s_[index])
            return out

        yield Contestant(name, read, path.stat().st_size / half.nbytes, checks="fletcher32" in name or "gzip" in name)


def _zarr(half: np.ndarray, folder: Path) -> Iterator[Contestant]:
    import zarr
    from zarr.codecs import BloscCodec

    zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})
    for cname, level in (("zstd", 1), ("lz4hc", 9)):
        path = folder / f"{cname}.zarr"
        array = zarr.create_array(
            path,
            shape=half.shape,
            dtype="float16",
            chunks=(1, *half.shape[1:]),
            shards=(min(SLICES_PER_SCAN, len(half)), *half.shape[1:]),
            compressors=[BloscCodec(cname=cname, clevel=level, shuffle="shuffle", typesize=2)],
        )
        array[:] = half
        opened = zarr.open_array(path, mode="r")
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        yield Contestant(
            f"Zarr v3, shards of {SLICES_PER_SCAN}, Blosc {cname} {level}",
            lambda index, opened=opened: opened[index],
            size / half.nbytes,
        )


def _webdataset(half: np.ndarray, folder: Path) -> Iterator[Contestant]:
    """A tar has no index of its own: one of offsets is made, and members are read by it."""
    forms: dict[str, tuple[Callable[[np.ndarray], bytes], Callable[[bytes], np.ndarray]]] = {
        "gz": (
            lambda part: zlib.compress(_npy(part), 4, wbits=31),
            lambda raw: np.load(io.BytesIO(zlib.decompress(raw, wbits=31))),
        ),
        "npz": (_npz, lambda raw: np.load(io.BytesIO(raw))["slice"]),
    }
    for suffix, (encode, decode) in forms.items():
        path = folder / f"{suffix}.tar"
        with tarfile.open(path, "w") as archive:
            for index, part in enumerate(half):
                content = encode(part)
                info = tarfile.TarInfo(f"{index:09d}.{'npy.gz' if suffix == 'gz' else suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        with tarfile.open(path) as archive:
            places = [(member.offset_data, member.size) for member in archive.getmembers()]
        descriptor = os.open(path, os.O_RDONLY)

        def read(
            index: int,
            descriptor: int = descriptor,
            places: list[tuple[int, int]] = places,
            decode: Callable[[bytes], np.ndarray] = decode,
        ) -> np.ndarray:
            offset, size = places[index]
            return decode(os.pread(descriptor, size, offset))

        name = {"gz": "WebDataset tar + offsets, npy.gz", "npz": "WebDataset tar + offsets, npz"}[suffix]
        yield Contestant(name, read, path.stat().st_size / half.nbytes, checks=True)


def _rate_in_order(path: Path) -> float | None:
    """Slices per second of WebDataset's own reader."""
    if not path.exists():
        return None
    import webdataset

    def decode(sample: dict) -> np.ndarray:
        return np.load(io.BytesIO(zlib.decompress(sample["npy.gz"], wbits=31)))

    rates = []
    for _ in range(3):
        start = time.perf_counter()
        count = sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False).map(decode))
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def _npy(part: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, part)
    return buffer.getvalue()


def _npz(part: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, slice=part)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
