"""The slice store: what goes in comes out, damage is named, readers may fork."""

import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from braindino.manifest import Scan
from braindino.slice_store import SliceStore, SliceStoreWriter, StoreError


def scan(number: int, sequence: str = "T1") -> Scan:
    return Scan(path=f"/data/sub-{number}_{sequence}.nii.gz", cohort="toy", subject=f"sub-{number}", sequence=sequence)


def slices(number: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(count, 256, 256)).astype(np.float32)


def filled(folder: Path, numbers: tuple[int, ...] = (0, 1, 2)) -> SliceStore:
    writer = SliceStoreWriter(folder, contract={"intensity": "z-score"})
    for number in numbers:
        writer.add(scan(number), slices(number), [10, 20, 30])
    return writer.publish()


def test_slices_come_back_as_they_went_in(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    assert len(store) == 9
    for index in range(9):
        number, position = divmod(index, 3)
        expected = slices(number)[position].astype(np.float16)
        assert store[index].dtype == np.float32 and store[index].shape == (256, 256)
        np.testing.assert_array_equal(store.read_float16(index), expected)
        np.testing.assert_array_equal(store[index], expected.astype(np.float32))
        assert store.scan_of(index).subject == f"sub-{number}"
        assert store.position_of(index) == (10, 20, 30)[position]
    np.testing.assert_array_equal(store.scan_index, np.repeat([0, 1, 2], 3))
    assert [row.num_slices for row in store.scans] == [3, 3, 3]
    assert store.contract == {"intensity": "z-score"}
    assert store.verify() == []
    with pytest.raises(IndexError, match="slice 9 of a store with 9"):
        store[9]


def test_the_bytes_do_not_depend_on_the_order_of_work(tmp_path: Path) -> None:
    forward, backward = filled(tmp_path / "a", (0, 1, 2)), filled(tmp_path / "b", (2, 0, 1))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert forward.fingerprint == backward.fingerprint


def test_a_flipped_byte_is_named_and_never_used(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    path = tmp_path / "store" / "slices" / scan(1).scan_id[:2] / scan(1).scan_id
    content = bytearray(path.read_bytes())
    content[-40] ^= 0x01
    path.write_bytes(content)
    store = SliceStore(tmp_path / "store")
    with pytest.raises(StoreError, match=r"slice 5 .*position 30 of /data/sub-1_T1.nii.gz.* damaged"):
        store[5]
    assert len(store.verify()) == 1
    store[4], store[6]


def test_a_truncated_scan_file_stops_publishing_and_is_named(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    path = tmp_path / "store" / "slices" / scan(2).scan_id[:2] / scan(2).scan_id
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StoreError, match=rf"{scan(2).scan_id}: found \d+ bytes, expected"):
        SliceStoreWriter(tmp_path / "store").publish()


def test_the_index_can_be_rebuilt_from_the_scan_files(tmp_path: Path) -> None:
    before = filled(tmp_path / "store")
    (tmp_path / "store" / "store.json").unlink()
    shutil.rmtree(tmp_path / "store" / "index")
    after = SliceStoreWriter(tmp_path / "store").publish()
    assert after.fingerprint == before.fingerprint
    np.testing.assert_array_equal(after[7], before[7])


def test_adding_a_scan_again_replaces_it_and_discarding_removes_it(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    writer = SliceStoreWriter(tmp_path / "store")
    writer.add(scan(1), slices(99, 2), [0, 1])
    assert writer.has(scan(1).scan_id)
    store = writer.publish()
    assert len(store) == 8
    np.testing.assert_array_equal(store.read_float16(3), slices(99, 2)[0].astype(np.float16))
    writer.discard(scan(1).scan_id)
    assert len(writer.publish()) == 6


def _read_everything(store: SliceStore) -> float:
    return float(sum(store[i].sum(dtype=np.float64) for i in range(len(store))))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes_read_the_same_store(tmp_path: Path, method: str) -> None:
    store = filled(tmp_path / "store")
    expected = _read_everything(store)  # opens files that a forked child inherits
    with multiprocessing.get_context(method).Pool(2) as pool:
        # A reader that waits for threads which a fork did not copy would never answer.
        assert pool.map_async(_read_everything, [store] * 4).get(timeout=60) == [expected] * 4


def test_a_store_pickles_without_its_open_files(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    store[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))[0], store[0])


def test_more_scans_than_open_files_are_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braindino.slice_store.MAX_OPEN_FILES", 2)
    store = filled(tmp_path / "store", (0, 1, 2, 3))
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for index in (0, 3, 6, 9, 0, 11):
        store[index]
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) - before <= 2


def test_what_is_no_store_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no slice store here"):
        SliceStore(tmp_path)
    filled(tmp_path / "store")
    text = (tmp_path / "store" / "store.json").read_text()
    (tmp_path / "store" / "store.json").write_text(text.replace('"version": 2', '"version": 9'))
    with pytest.raises(StoreError, match="format version 9; this program reads version 2"):
        SliceStore(tmp_path / "store")


def test_slices_of_the_wrong_shape_or_range_are_refused(tmp_path: Path) -> None:
    writer = SliceStoreWriter(tmp_path / "store")
    with pytest.raises(ValueError, match=r"found shape \(3, 256, 256\); expected \(2, 256, 256\)"):
        writer.add(scan(0), slices(0), [1, 2])
    with pytest.raises(ValueError, match="expected z-scores"), np.errstate(over="ignore"):
        writer.add(scan(0), slices(0) * 1e6, [1, 2, 3])
    assert not writer.has(scan(0).scan_id)


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    filled(tmp_path / "store", (0,))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "store", copy)
    monkeypatch.setattr("braindino.atomic.os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        SliceStoreWriter(copy).add(scan(1), slices(1), [1, 2, 3])
    monkeypatch.undo()
    assert [p.name for p in copy.rglob(".tmp*")] == []
    assert len(SliceStore(copy)) == 3
