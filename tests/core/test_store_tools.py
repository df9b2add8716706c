"""`braindino verify`, `merge` and `subset`: damage is found wherever it is, stores are put together and taken apart."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from braindino.manifest import Scan
from braindino.slice_store import SliceStore, SliceStoreWriter, scan_files
from braindino.splits import write_subjects
from braindino.store_merge import main as merge
from braindino.store_subset import main as subset
from braindino.store_verify import main as verify
from braindino.store_verify import verify_store

CONTRACT = {"intensity": "z-score", "slice_axis": "axial"}


def scan(number: int, cohort: str = "ixi", sequence: str = "T1") -> Scan:
    return Scan(path=f"/data/{number}_{sequence}.nii.gz", cohort=cohort, subject=f"sub-{number}", sequence=sequence)


SCANS = [scan(1), scan(1, sequence="T2"), scan(2), scan(3, cohort="brats", sequence="FLAIR"), scan(4, cohort="brats")]


def smooth(row: Scan) -> np.ndarray:
    rng = np.random.default_rng(int(row.scan_id, 16))
    return np.repeat(np.repeat(rng.normal(size=(2, 32, 32)), 8, axis=1), 8, axis=2).astype(np.float32)


def filled(folder: Path, scans: list[Scan], contract: dict = CONTRACT) -> SliceStore:
    writer = SliceStoreWriter(folder, contract=contract)
    for row in scans:
        writer.add(row, smooth(row), [100, 130])
    return writer.publish()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sound_store_is_said_to_be_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "prepared" / "store", SCANS)
    assert verify([str(tmp_path / "prepared")]) == 0  # the folder that `braindino prepare` made will do
    assert (
        "5 scans, 10 slices (index, sizes and headers; --deep reads the slices, too): sound" in capsys.readouterr().out
    )
    assert verify([str(tmp_path / "prepared" / "store"), "--deep", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sound"] and result["deep"] and result["problems"] == [] and result["notes"] == []
    assert (result["num_scans"], result["num_slices"]) == (5, 10)


@pytest.mark.fault
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", SCANS[:2])
    files = sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert len(files) == 1 + 3 + 2
    header = {store.scan_path(row).name: int(store.records_of_scan(row)[0, 2]) for row in range(2)}
    rng = np.random.default_rng(0)
    for path in files:
        content = path.read_bytes()
        size = header.get(path.name, len(content))
        # Every byte of store.json and of the headers' first fields; elsewhere the ends and places drawn at random.
        places = set(range(len(content))) if path.name == "store.json" else {*range(24), size - 1, len(content) - 1}
        if path.name != "store.json":
            places.update(rng.integers(0, len(content), 25).tolist())
        for place in sorted(places):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            deep = path.name in header and place >= size
            problems = verify_store(tmp_path / "store", deep=deep).problems
            assert problems, f"{path.name}, byte {place} of {len(content)}"
            relative = str(path.relative_to(tmp_path / "store"))
            assert problems[0].file == relative and str(path) in problems[0].message
            if path.name in header:
                assert problems[0].scan == next(row.path for row in SCANS if row.scan_id == path.name)
                assert len(problems) == 1
            if deep:
                assert verify_store(tmp_path / "store", deep=False).problems == []
        path.write_bytes(content)
    assert verify_store(tmp_path / "store", deep=True).problems == []


def test_missing_and_shortened_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(tmp_path / "store", SCANS)
    rows = {store.scans[row].path: store.scan_path(row) for row in range(5)}
    rows["/data/2_T1.nii.gz"].unlink()
    rows["/data/3_FLAIR.nii.gz"].write_bytes(rows["/data/3_FLAIR.nii.gz"].read_bytes()[:-1])
    assert verify([str(tmp_path / "store")]) == 1
    printed = capsys.readouterr().out
    assert f"{rows['/data/2_T1.nii.gz']}: missing; prepare that scan again (/data/2_T1.nii.gz)" in printed
    assert "3_FLAIR" in printed and "expected" in printed and "2 problem(s)" in printed
    with pytest.raises(ValueError, match=r"missing .*/data/2_T1.nii.gz.*; prepare that scan again"):
        store[int(np.flatnonzero([row.path == "/data/2_T1.nii.gz" for row in store.scans])[0]) * 2]


def test_a_file_changed_since_the_publish_and_one_added_are_told_apart(tmp_path: Path) -> None:
    filled(tmp_path / "store", SCANS[:3])
    writer = SliceStoreWriter(tmp_path / "store")
    writer.add(SCANS[0], smooth(SCANS[4]), [100, 130])
    writer.add(SCANS[3], smooth(SCANS[3]), [100, 130])
    result = verify_store(tmp_path / "store", deep=True)
    assert [problem.scan for problem in result.problems] == ["/data/1_T1.nii.gz"]
    assert "not the file that was indexed" in result.problems[0].message
    assert len(result.notes) == 1 and SCANS[3].scan_id in result.notes[0]


def test_several_processes_find_what_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = filled(tmp_path / "store", SCANS)
    for row in (0, 4):
        content = bytearray(store.scan_path(row).read_bytes())
        content[-1] ^= 0x80
        store.scan_path(row).write_bytes(content)
    monkeypatch.setattr("braindino.store_verify.SCANS_PER_BATCH", 2)
    assert verify([str(tmp_path / "store"), "--deep", "--json", "--jobs", "2"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [problem["scan"] for problem in result["problems"]] == [store.scans[row].path for row in (0, 4)]
    assert [problem["file"] for problem in result["problems"]] == [
        str(store.scan_path(row).relative_to(tmp_path / "store")) for row in (0, 4)
    ]
    (tmp_path / "store" / "store.json").write_text("{}")
    alone, together = (verify_store(tmp_path / "store", deep=True, jobs=jobs).problems for jobs in (1, 2))
    assert alone == together and {problem.file for problem in alone} >= {"store.json", result["problems"][0]["file"]}


def test_what_is_no_store_cannot_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([str(tmp_path)]) == 1
    assert "no slice store here (no store.json)" in capsys.readouterr().err


def test_merged_stores_are_the_store_of_all_their_scans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "all", SCANS)
    filled(tmp_path / "a", [SCANS[4], SCANS[0], SCANS[1]])
    filled(tmp_path / "prepared" / "store", [SCANS[1], SCANS[2], SCANS[3]])
    command = [str(tmp_path / name) for name in ("out", "a", "prepared")]
    assert merge(command) == 0
    assert "5 scans, 10 slices of 2 store(s), 1 held by more than one" in capsys.readouterr().out
    assert tree(tmp_path / "out") == tree(tmp_path / "all")
    linked = SliceStoreWriter(tmp_path / "out").scan_file(SCANS[0].scan_id)
    assert linked.samefile(SliceStoreWriter(tmp_path / "a").scan_file(SCANS[0].scan_id))
    assert verify([str(tmp_path / "out"), "--deep"]) == 0
    times = {path: path.stat().st_ctime_ns for path, _ in scan_files(tmp_path / "out")}
    assert merge(command) == 0
    assert times == {path: path.stat().st_ctime_ns for path, _ in scan_files(tmp_path / "out")}
    assert tree(tmp_path / "out") == tree(tmp_path / "all")


def test_where_links_are_impossible_scans_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "all", SCANS)
    filled(tmp_path / "a", SCANS[:2])
    filled(tmp_path / "b", SCANS[2:])

    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    assert merge([str(tmp_path / name) for name in ("one", "a", "b")]) == 0
    monkeypatch.setattr(os, "copy_file_range", refused)
    assert merge([str(tmp_path / name) for name in ("two", "a", "b")]) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "all")
    source = SliceStoreWriter(tmp_path / "a").scan_file(SCANS[0].scan_id)
    assert not SliceStoreWriter(tmp_path / "one").scan_file(SCANS[0].scan_id).samefile(source)


@pytest.mark.fault
def test_a_killed_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "all", SCANS)
    filled(tmp_path / "a", SCANS[:2])
    filled(tmp_path / "b", SCANS[2:])
    command = [str(tmp_path / name) for name in ("out", "a", "b")]
    link, calls = os.link, iter(range(3))

    def mortal(source: Path, target: Path) -> None:
        link(source, target)
        if next(calls, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", mortal)
    assert merge(command) == 130
    monkeypatch.undo()
    assert not (tmp_path / "out" / "store.json").exists()
    assert any(path.name.startswith(".tmp-") for path in (tmp_path / "out").rglob("*"))
    assert merge(command) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "all")


def test_stores_made_in_different_ways_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "a", SCANS[:2])
    filled(tmp_path / "b", SCANS[2:], {"intensity": "min-max", "slice_axis": "axial"})
    assert merge([str(tmp_path / name) for name in ("out", "a", "b")]) == 1
    error = capsys.readouterr().err
    assert f'intensity: "z-score" in {tmp_path / "a"}, "min-max" in {tmp_path / "b"}' in error
    assert "slice_axis" not in error and not (tmp_path / "out").exists()


def test_a_scan_that_differs_between_stores_is_named_with_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path / "a", SCANS[:3])
    writer = SliceStoreWriter(tmp_path / "b", contract=CONTRACT)
    writer.add(SCANS[0], smooth(SCANS[1]), [100, 130])
    moved = Scan(path="/elsewhere/2_T1.nii.gz", cohort="ixi", subject="sub-2", sequence="T1")
    writer.add(moved, smooth(SCANS[2]), [100, 130])
    writer.publish()
    assert merge([str(tmp_path / name) for name in ("out", "a", "b")]) == 1
    error = capsys.readouterr().err
    a, b = tmp_path / "a", tmp_path / "b"
    assert f"/data/1_T1.nii.gz in {a}, /data/1_T1.nii.gz in {b}: different slices" in error
    assert f"/data/2_T1.nii.gz in {a}, /elsewhere/2_T1.nii.gz in {b}: same slices, but different path" in error
    assert "2 scan(s) differ" in error and not (tmp_path / "out").exists()


def test_a_folder_with_other_scans_is_not_merged_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "a", SCANS[:2])
    filled(tmp_path / "out", SCANS[2:])
    before = tree(tmp_path / "out")
    assert merge([str(tmp_path / name) for name in ("out", "a")]) == 1
    assert "holds 3 scan(s) that the result does not have" in capsys.readouterr().err
    assert merge([str(tmp_path / name) for name in ("a", "a", "out")]) == 1
    assert "is one of the stores to read" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before


def test_a_damaged_or_unpublished_scan_is_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(tmp_path / "a", SCANS[:2])
    content = bytearray(store.scan_path(0).read_bytes())
    store.scan_path(0).write_bytes(content[:50] + bytes([content[50] ^ 4]) + content[51:])
    command = [str(tmp_path / name) for name in ("out", "a")]
    assert merge(command) == 1
    assert "damaged header" in capsys.readouterr().err
    SliceStoreWriter(tmp_path / "a").add(store.scans[0], smooth(SCANS[3]), [100, 130])
    assert merge(command) == 1
    assert "not the file that its store has indexed; publish that store again" in capsys.readouterr().err
    assert not (tmp_path / "out" / "store.json").exists()


@pytest.mark.parametrize(
    ("conditions", "rows"),
    [
        (["--cohort", "ixi"], [0, 1, 2]),
        (["--cohort", "ixi", "--sequence", "T1"], [0, 2]),
        (["--sequence", "T2", "FLAIR"], [1, 3]),
        (["--subject", "ixi/sub-1", "brats/sub-4"], [0, 1, 4]),
        (["--subjects", "LIST"], [0, 1, 3]),
        (["--subjects", "LIST", "--subject", "ixi/sub-2", "--cohort", "ixi"], [0, 1, 2]),
        (["--exclude-subjects", "LIST"], [2, 4]),
    ],
)
def test_a_subset_is_the_store_of_its_scans(tmp_path: Path, conditions: list[str], rows: list[int]) -> None:
    filled(tmp_path / "prepared" / "store", SCANS)
    write_subjects(tmp_path / "LIST", ["ixi/sub-1", "brats/sub-3", "other/sub-9"], comment="a list")
    arguments = [str(tmp_path / "LIST") if text == "LIST" else text for text in conditions]
    for _ in range(2):
        assert subset([str(tmp_path / "prepared"), str(tmp_path / "out"), *arguments]) == 0
        filled(tmp_path / "expected", [SCANS[row] for row in rows])
        assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert verify([str(tmp_path / "out"), "--deep"]) == 0


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["--cohort", "IXI"], "--cohort: found ['IXI'], which the store does not have; it has brats, ixi"),
        (["--sequence", "T1c"], "--sequence: found ['T1c']"),
        (["--subject", "sub-1"], "--subject: found ['sub-1']"),
        (["--exclude-subjects", "LIST"], "none of its 1 subjects is in the store (first: 'other/sub-9'"),
        (["--cohort", "ixi", "--sequence", "FLAIR"], "no scan of 5 meets all conditions; nothing was written"),
    ],
)
def test_conditions_that_choose_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], conditions: list[str], message: str
) -> None:
    filled(tmp_path / "store", SCANS)
    write_subjects(tmp_path / "LIST", ["other/sub-9"])
    arguments = [str(tmp_path / "LIST") if text == "LIST" else text for text in conditions]
    assert subset([str(tmp_path / "store"), str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (subset, ["in", "out"], "no condition given"),
        (merge, ["out"], "none given"),
        (verify, ["in", "--jobs", "0"], "jobs"),
    ],
)
def test_a_command_that_cannot_be_meant_is_a_usage_error(
    program: Callable[[list[str]], int], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program(arguments)
    assert message in capsys.readouterr().err
