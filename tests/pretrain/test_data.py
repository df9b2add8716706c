"""Reading the slices of an iteration, here or in other processes."""

import multiprocessing

import numpy as np
import pytest
import torch

from braindino.manifest import Scan
from braindino.pretrain.data import BatchReader, build_loader
from braindino.pretrain.data import reading as reading_from
from braindino.pretrain.sampling import SliceSampler
from braindino.slice_store import SliceStore, SliceStoreWriter


def scan(subject: str, sequence: str = "T1") -> Scan:
    return Scan(path=f"/data/{subject}_{sequence}.nii.gz", cohort="site", subject=subject, sequence=sequence)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SliceStore:
    """Four subjects, two scans each, six slices each; every slice holds its own number."""
    writer = SliceStoreWriter(tmp_path_factory.mktemp("data") / "store")
    number = 0
    for subject in ("a", "b", "c", "d"):
        for sequence in ("T1", "T2"):
            values = np.arange(number, number + 6, dtype=np.float32)
            writer.add(scan(subject, sequence), np.broadcast_to(values[:, None, None], (6, 256, 256)), range(6))
            number += 6
    return writer.publish()


def reader_of(store: SliceStore, *, batch_size: int = 5) -> BatchReader:
    return BatchReader(
        store,
        SliceSampler(store.scan_index, batch_size=batch_size, seed=3),
        grids=[(4, 4)],
        pairs=np.zeros(40, dtype=int),
        mask_probability=0.5,
        mask_ratios=(0.1, 0.5),
    )


def test_a_batch_holds_the_slices_of_its_indices_and_its_masks(store: SliceStore) -> None:
    reader = reader_of(store)
    batch = reader[7]
    assert batch.slices.shape == (5, 256, 256) and batch.slices.dtype == torch.float16
    assert batch.slices[:, 100, 30].tolist() == reader.sampler.indices_of(7).tolist()
    assert batch.masks.shape == (10, 16) and batch.masks.any(dim=1).sum() == 5
    assert [row.subject for row in reader.scans_of(7)] == [
        store.scan_of(int(index)).subject for index in reader.sampler.indices_of(7)
    ]


def test_slices_are_unpacked_into_the_batch_and_never_copied(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[np.ndarray] = []
    read = SliceStore.read_float16

    def reading(self: SliceStore, index: int, out: np.ndarray | None = None) -> np.ndarray:
        assert out is not None
        places.append(out)
        return read(self, index, out)

    monkeypatch.setattr(SliceStore, "read_float16", reading)
    slices = reader_of(store)[0].slices.numpy()
    assert len(places) == len(slices)
    assert all(np.shares_memory(place, row) for place, row in zip(places, slices, strict=True))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_deliver_what_the_main_process_would_read(store: SliceStore, num_workers: int) -> None:
    reader = reader_of(store)
    loader = build_loader(reader, range(3, 9), num_workers=num_workers, pin_memory=False)
    for iteration, batch in zip(range(3, 9), loader, strict=True):
        assert torch.equal(batch.slices, reader[iteration].slices)
        assert torch.equal(batch.masks, reader[iteration].masks)


def test_readers_that_ignore_signals_are_gone_once_reading_ends_before_its_end(store: SliceStore) -> None:
    """Else Python would wait for them when it exits."""
    loader = build_loader(reader_of(store), range(100), num_workers=2, pin_memory=False)
    with reading_from(loader) as batches:
        first = next(batches)
        readers = set(multiprocessing.active_children())
        assert len(readers) >= 2
    assert first.slices.shape[0] and batches is not None
    assert not readers & set(multiprocessing.active_children())
    with reading_from(build_loader(reader_of(store), range(3), num_workers=0, pin_memory=False)) as batches:
        assert len(list(batches)) == 3
