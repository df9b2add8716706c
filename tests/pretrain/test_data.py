"""Which slices an iteration sees, and the reading of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from braindino.manifest import Scan
from braindino.pretrain.data import (
    BatchReader,
    SliceSampler,
    build_loader,
    crop_pair_of_each_iteration,
    read_exclusion,
    usable_slices,
)
from braindino.pretrain.recipes import STAGE2
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


def reader_of(store: SliceStore, *, batch_size: int = 5, usable: np.ndarray | None = None) -> BatchReader:
    return BatchReader(
        store,
        SliceSampler(store.scan_index, batch_size=batch_size, seed=3, usable=usable),
        grids=[(4, 4)],
        pairs=np.zeros(40, dtype=int),
        mask_probability=0.5,
        mask_ratios=(0.1, 0.5),
    )


def test_every_slice_is_seen_once_per_epoch_also_across_batches(store: SliceStore) -> None:
    sampler = SliceSampler(store.scan_index, batch_size=5, seed=0)
    drawn = np.concatenate([sampler.indices_of(i) for i in range(48)])  # 240 draws: five epochs of 48
    for epoch in range(5):
        assert sorted(drawn[48 * epoch : 48 * (epoch + 1)]) == list(range(48))
    assert not np.array_equal(drawn[:48], drawn[48:96])


def test_the_batch_of_an_iteration_does_not_depend_on_those_before(store: SliceStore) -> None:
    walked, fresh = (SliceSampler(store.scan_index, batch_size=5, seed=0) for _ in range(2))
    batches = [walked.indices_of(i) for i in range(30)]
    assert np.array_equal(fresh.indices_of(29), batches[29]) and np.array_equal(fresh.indices_of(4), batches[4])
    other_seed = SliceSampler(store.scan_index, batch_size=5, seed=1)
    assert not np.array_equal(other_seed.indices_of(4), batches[4])


def test_slices_of_one_scan_are_spread_over_batches() -> None:
    scan_index = np.repeat(np.arange(50), 128)
    sampler = SliceSampler(scan_index, batch_size=64, seed=0)
    most = max(np.bincount(scan_index[sampler.indices_of(i)]).max() for i in range(100))
    # 64 of 6,400 slices are 1.28 per scan; even places allow ceil(1.28) + 1, plain shuffling gives 7 and more.
    assert most <= 3


def test_fewer_slices_than_a_batch_are_refused(store: SliceStore) -> None:
    with pytest.raises(ValueError, match="batch of 64 slices cannot be drawn from 48 usable slices"):
        SliceSampler(store.scan_index, batch_size=64, seed=0)


def test_a_batch_holds_the_slices_of_its_indices_and_its_masks(store: SliceStore) -> None:
    reader = reader_of(store)
    batch = reader[7]
    assert batch.slices.shape == (5, 256, 256) and batch.slices.dtype == torch.float16
    assert batch.slices[:, 100, 30].tolist() == reader.sampler.indices_of(7).tolist()
    assert batch.masks.shape == (10, 16) and batch.masks.any(dim=1).sum() == 5
    assert [row.subject for row in reader.scans_of(7)] == [
        store.scan_of(int(index)).subject for index in reader.sampler.indices_of(7)
    ]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_deliver_what_the_main_process_would_read(store: SliceStore, num_workers: int) -> None:
    reader = reader_of(store)
    loader = build_loader(reader, range(3, 9), num_workers=num_workers, pin_memory=False)
    for iteration, batch in zip(range(3, 9), loader, strict=True):
        assert torch.equal(batch.slices, reader[iteration].slices)
        assert torch.equal(batch.masks, reader[iteration].masks)


def test_excluded_subjects_are_never_drawn(store: SliceStore, tmp_path: Path) -> None:
    listed = tmp_path / "held_out.txt"
    listed.write_text("# held out\nsite/b\n\nsite/d\nsite/not-here\n")
    exclusion = read_exclusion(listed, store.scans)
    assert exclusion.subjects == {"site/b", "site/d", "site/not-here"}
    reader = reader_of(store, usable=usable_slices(store, exclusion.subjects))
    subjects = {row.subject for iteration in range(20) for row in reader.scans_of(iteration)}
    assert subjects == {"a", "c"}


def test_an_exclusion_list_that_excludes_nobody_is_refused(store: SliceStore, tmp_path: Path) -> None:
    listed = tmp_path / "held_out.txt"
    listed.write_text("sites/b\n")
    with pytest.raises(ValueError, match=r"none of its 1 subjects is in the store \(first: 'sites/b'"):
        read_exclusion(listed, store.scans)
    listed.write_text("b\n")
    with pytest.raises(ValueError, match="found 'b'; expected cohort/subject"):
        read_exclusion(listed, store.scans)


def test_crop_pairs_are_drawn_with_their_ratios() -> None:
    pairs = crop_pair_of_each_iteration(10_000, STAGE2.crops.pair_ratios, seed=0)
    assert np.bincount(pairs, minlength=5) / 10_000 == pytest.approx((0.3, 0.3, 0.3, 0.05, 0.05), abs=0.015)
    assert np.array_equal(pairs, crop_pair_of_each_iteration(10_000, STAGE2.crops.pair_ratios, seed=0))
