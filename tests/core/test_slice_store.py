"""The slice store: what goes in comes out, damage is named, readers may fork."""

import functools
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from braindino.manifest import Scan
from braindino.slice_store import SliceStore, SliceStoreWriter, StoreError, read_scan_file


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


@pytest.mark.fault
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


@pytest.mark.fault
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


@pytest.mark.fault
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


def test_every_finite_float16_becomes_the_same_float32(tmp_path: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = np.where(np.isfinite(bits), bits, np.float16(0)).reshape(1, 256, 256)
    writer = SliceStoreWriter(tmp_path / "store")
    writer.add(scan(0), every, [7])
    np.testing.assert_array_equal(writer.publish()[0], every[0].astype(np.float32))


def test_a_slice_is_read_into_its_place_in_a_batch(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    batch = np.zeros((3, 256, 256), dtype=np.float16)
    for place, index in enumerate((7, 2, 4)):
        assert store.read_float16(index, out=batch[place]) is not None
    np.testing.assert_array_equal(batch, np.stack([store.read_float16(index) for index in (7, 2, 4)]))
    for bad in (batch[0].astype(np.float32), batch[0, :128], batch[0].T):
        with pytest.raises(ValueError, match=r"out: found .*expected contiguous float16 \(256, 256\)"):
            store.read_float16(0, out=bad)


def test_opening_reads_neither_rows_nor_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "store")
    monkeypatch.setattr("braindino.slice_store.read_scans", lambda path: pytest.fail(f"{path} was read"))
    store = SliceStore(tmp_path / "store")
    assert len(store) == 9 and store.num_scans == 3
    store[4]
    monkeypatch.undo()
    assert [row.subject for row in store.scans] == ["sub-0", "sub-1", "sub-2"]


def test_names_with_odd_white_space_are_read_back(tmp_path: Path) -> None:
    odd = Scan(path="/data/a  b.nii.gz", cohort="my  cohort", subject="sub\t1", sequence="T1")
    writer = SliceStoreWriter(tmp_path / "store")
    writer.add(odd, slices(5), [1, 2, 3])
    store = writer.publish()
    np.testing.assert_array_equal(store.read_float16(1), slices(5)[1].astype(np.float16))
    assert store.scans[0].cohort == "my cohort" and store.scan_ids == [odd.scan_id]


def test_scans_without_slices_take_no_place(tmp_path: Path) -> None:
    writer = SliceStoreWriter(tmp_path / "store")
    for number, count in enumerate((0, 2, 0, 0, 1, 0)):
        writer.add(scan(number), slices(number, count), range(count))
    store = writer.publish()
    assert [store.scan_of(index).subject for index in range(3)] == ["sub-1", "sub-1", "sub-4"]
    assert store.slices_per_scan.tolist() == [0, 2, 0, 0, 1, 0] and store.verify() == []
    np.testing.assert_array_equal(store.read_float16(-1), slices(4, 1)[0].astype(np.float16))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the notes that a publish leaves for the next."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".notes"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Killed(BaseException):
    """Not an Exception, as a signal is none."""


@pytest.mark.fault
def test_a_publish_killed_at_any_step_leaves_the_old_index_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "old", (0, 2))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    SliceStoreWriter(tmp_path / "new").add(scan(1), slices(1), [10, 20, 30])
    shutil.copytree(tmp_path / "new", tmp_path / "before")
    contract = {"intensity": "z-score"}
    after = SliceStoreWriter(tmp_path / "new", contract=contract).publish()
    lengths, step = [], 0
    while True:
        step += 1
        shutil.copytree(tmp_path / "before", tmp_path / "killed")
        left = iter(range(step))

        def mortal(name: str, left: Iterator[int] = left) -> None:
            original = getattr(Path, name)

            def call(self: Path, *arguments: object, **keywords: object) -> object:
                if next(left, None) is None:
                    raise Killed
                return original(self, *arguments, **keywords)

            monkeypatch.setattr(Path, name, call)

        for name in ("replace", "unlink", "mkdir", "read_bytes", "chmod"):
            mortal(name)
        try:
            SliceStoreWriter(tmp_path / "killed", contract=contract).publish()
            finished = True
        except Killed:
            finished = False
        monkeypatch.undo()
        lengths.append(len(SliceStore(tmp_path / "killed")))
        assert SliceStore(tmp_path / "killed").verify() == []
        SliceStoreWriter(tmp_path / "killed", contract=contract).publish()
        assert tree(tmp_path / "killed") == tree(tmp_path / "new")
        shutil.rmtree(tmp_path / "killed")
        if finished:
            break
    assert len(after) == 9 and lengths == sorted(lengths) and set(lengths) == {6, 9}
    assert lengths.count(6) > 10 and lengths.count(9) > 1


def test_publishing_again_reads_the_headers_of_changed_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braindino.slice_store.NOTES_FROM_SCANS", 1)
    monkeypatch.setattr("braindino.slice_store._NANOSECONDS_OF_DOUBT", -(10**12))
    filled(tmp_path / "store", (0, 1, 2))
    read: list[str] = []

    def counted(path: Path, **keywords: str) -> object:
        read.append(path.name)
        return read_scan_file(path, **keywords)

    monkeypatch.setattr("braindino.slice_store.read_scan_file", counted)
    filled(tmp_path / "store", (3,))
    assert read == [scan(3).scan_id]
    changed = SliceStoreWriter(tmp_path / "store").scan_file(scan(1).scan_id)
    SliceStoreWriter(tmp_path / "store").add(scan(1), slices(11), [10, 20, 30])
    read.clear()
    again = filled(tmp_path / "store", ())
    assert read == [changed.name]
    np.testing.assert_array_equal(again.read_float16(3), slices(11)[0].astype(np.float16))
    filled(tmp_path / "fresh", (0, 2, 3))
    SliceStoreWriter(tmp_path / "fresh").add(scan(1), slices(11), [10, 20, 30])
    filled(tmp_path / "fresh", ())
    assert tree(tmp_path / "store") == tree(tmp_path / "fresh")
    content = bytearray(changed.read_bytes())
    content[30] ^= 1
    changed.write_bytes(content)
    with pytest.raises(StoreError, match=f"{changed.name}: damaged header"):
        filled(tmp_path / "store", ())


def test_a_damaged_index_is_never_built_upon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braindino.slice_store.NOTES_FROM_SCANS", 1)
    monkeypatch.setattr("braindino.slice_store._NANOSECONDS_OF_DOUBT", -(10**12))
    store = filled(tmp_path / "store")
    sound = tree(tmp_path / "store")
    path = tmp_path / "store" / "index" / f"{store.index_name}.slices.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)
    filled(tmp_path / "store", ())
    assert tree(tmp_path / "store") == sound


def _read_while_publishing(opened: SliceStore, folder: Path, ready: Event, stop: Event) -> None:
    """Read through a store opened before and ones opened now until told to stop; wrong values raise."""
    while not (ready.is_set() and stop.is_set()):
        fresh = SliceStore(folder)
        assert len(fresh) in (6, 9) and fresh.num_scans * 3 == len(fresh)
        for store in (opened, fresh):
            for index in range(6):
                assert float(store[index].sum(dtype=np.float64)) == _sum_of(*divmod(index, 3))
        ready.set()


@functools.cache
def _sum_of(number: int, position: int) -> float:
    return float(slices(number)[position].astype(np.float16).astype(np.float64).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_publishing_disturbs_no_reader(tmp_path: Path, method: str) -> None:
    folder = tmp_path / "store"
    store = filled(folder, (0, 1))
    writer = SliceStoreWriter(folder, contract={"intensity": "z-score"})
    context = multiprocessing.get_context(method)
    stop, ready = context.Event(), [context.Event() for _ in range(2)]
    readers = [context.Process(target=_read_while_publishing, args=(store, folder, event, stop)) for event in ready]
    for reader in readers:
        reader.start()
    # A copy of a store opens its own index, which must still be the published one.
    assert all(event.wait(60) for event in ready)
    for publish in range(12):
        if publish % 2:
            writer.discard(scan(2).scan_id)
        else:
            writer.add(scan(2), slices(2), [10, 20, 30])
        writer.publish()
    stop.set()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0]


def test_a_store_stays_with_its_index(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    pickled = pickle.dumps(store)
    writer = SliceStoreWriter(tmp_path / "store", contract={"intensity": "z-score"})
    writer.discard(scan(0).scan_id)
    assert len(writer.publish()) == 6
    np.testing.assert_array_equal(store.read_float16(3), slices(1)[0].astype(np.float16))
    for use in (lambda: store[0], lambda: pickle.loads(pickled), lambda: store.scans):
        with pytest.raises(StoreError, match="published anew since it was opened; open it again"):
            use()


def test_threads_share_a_store_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braindino.slice_store.MAX_OPEN_FILES", 1)
    store = filled(tmp_path / "store", (0, 1, 2, 3))
    order = np.random.default_rng(0).integers(0, 12, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda index: float(store[index].sum(dtype=np.float64)), order))
    assert sums == [_sum_of(*divmod(index, 3)) for index in order]


def test_an_index_that_is_gone_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braindino.slice_store.SECONDS_TO_OPEN", 0.1)
    store = filled(tmp_path / "store")
    (tmp_path / "store" / "index" / f"{store.index_name}.scans.npy").unlink()
    with pytest.raises(StoreError, match=r"scans.npy: missing, but store.json names it; publish again"):
        SliceStore(tmp_path / "store")


def test_a_file_under_another_scans_name_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    writer = SliceStoreWriter(tmp_path / "store")
    shutil.copy(writer.scan_file(scan(0).scan_id), writer.scan_file(scan(1).scan_id))
    with pytest.raises(StoreError, match=f"holds scan {scan(0).scan_id} .*expected {scan(1).scan_id}"):
        writer.publish()
