"""DICOM files that cannot be read: a quarantined row each from the first run on, until they are mended."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from braindino.manifest import Scan, read_scans
from braindino.preprocessing import preparation
from braindino.preprocessing.prepare import main
from braindino.slice_store import SliceStore

# Large enough to be a head, and of many grey values.
VOXELS = np.random.default_rng(3).integers(100, 4000, (32, 32, 40), dtype=np.uint16)
STUDY = "manifest-1/IvyGAP/W1/study"


def prepare(folder: Path, *options: str) -> int:
    return main([str(folder / "in"), "--out", str(folder / "out"), "--cohort", "ivygap", "--jobs", "0", *options])


def rows(folder: Path) -> dict[str, Scan]:
    """Name of the input -> its row."""
    return {Path(scan.source or scan.path).name: scan for scan in read_scans(folder / "out" / "scans.tsv")}


@pytest.fixture
def converted(monkeypatch) -> list[str]:
    """Names of the series whose conversion was begun."""
    names: list[str] = []
    convert = preparation.convert

    def converting(conversion, source, path):
        names.append(source.name)
        return convert(conversion, source, path)

    monkeypatch.setattr(preparation, "convert", converting)
    return names


@pytest.fixture
def tree(tmp_path, series) -> Path:
    """A good series, a folder of which no file can be read, and a folder of two series and a stray file."""

    def write(folder: str, name: str, description: str, number: int) -> None:
        # A head of 16 cm.
        series(
            tmp_path / "in" / STUDY / folder,
            voxels=np.roll(VOXELS, number),
            name=name,
            PatientID="W1",
            SeriesDescription=description,
            SeriesNumber=number,
            PixelSpacing=[5.0, 5.0],
            ImagePositionPatient=lambda index: [-80.0, -80.0, -80.0 + 4 * index],
        )

    write("good", "1-{number:03d}.dcm", "AX T2", 1)
    write("mended", "1-{number:03d}.dcm", "AX FLAIR", 2)
    shutil.move(tmp_path / "in" / STUDY / "mended", tmp_path / "kept")
    (tmp_path / "in" / STUDY / "mended").mkdir()
    (tmp_path / "in" / STUDY / "mended" / "1-001.dcm").write_bytes(b"half a header")
    write("shared", "a{number:03d}.dcm", "SAG T1", 3)
    write("shared", "b{number:03d}.dcm", "COR FLAIR", 4)
    shutil.move(tmp_path / "in" / STUDY / "shared" / "a001.dcm", tmp_path / "a001.dcm")
    (tmp_path / "in" / STUDY / "shared" / "a001.dcm").write_bytes(b"")
    return tmp_path


def test_they_are_quarantined_at_once_and_prepared_when_they_are_mended(tree, converted, capsys):
    shared, mended = (tree / "in" / STUDY / name for name in ("shared", "mended"))
    assert prepare(tree, "--dry-run", "--probe", "0") == 0
    printed = capsys.readouterr().out
    assert "5 files: 3 scans, 0 left, 2 that cannot be used" in printed and "3 to do" in printed
    assert "  quarantined unreadable_dicom: 2\n" in printed
    assert f"    {mended}: 1 files that belong to no series, the first 1-001.dcm" in printed

    assert prepare(tree) == 3
    first = rows(tree)
    assert {name: (row.status, row.subject, row.sequence) for name, row in first.items()} == {
        "good": ("done", "W1", "T2"),
        "mended": ("quarantined", "", "unknown"),
        "a001.dcm": ("quarantined", "", "unknown"),
        "a002.dcm": ("done", "W1", "T1"),
        "b001.dcm": ("done", "W1", "FLAIR"),
    }
    assert first["mended"].reason.startswith(
        "unreadable_dicom: 1 files that belong to no series, the first 1-001.dcm: "
    )
    assert first["a001.dcm"].reason.endswith("; copy them again")
    assert sorted(converted) == ["a002.dcm", "b001.dcm", "good"], "what cannot be read is not tried"
    assert "quarantined unreadable_dicom: 2" in capsys.readouterr().out

    converted.clear()
    assert prepare(tree) == 3
    assert rows(tree) == first and not converted
    assert "5 files" in (printed := capsys.readouterr().out) and "0 worked on in this run" in printed

    # One that changes and is as bad as before is looked at again.
    (mended / "1-001.dcm").write_bytes(b"another half of a header")
    assert prepare(tree) == 3
    assert not converted and "1 worked on in this run" in capsys.readouterr().out

    shutil.rmtree(mended)
    shutil.copytree(tree / "kept", mended)
    shutil.copy(tree / "a001.dcm", shared / "a001.dcm")
    assert prepare(tree) == 0
    # The series of the mended file now goes by it, and there is no row of its own for it any more.
    assert {name: (row.status, row.sequence) for name, row in rows(tree).items()} == {
        "good": ("done", "T2"),
        "mended": ("done", "FLAIR"),
        "a001.dcm": ("done", "T1"),
        "b001.dcm": ("done", "FLAIR"),
    }
    assert sorted(converted) == ["a001.dcm", "mended"]


def test_the_first_file_of_a_series_in_a_shared_folder_breaks_and_is_mended(tree):
    shutil.rmtree(tree / "in" / STUDY / "mended")
    file = tree / "in" / STUDY / "shared" / "a001.dcm"
    outcomes = []
    for content in ((tree / "a001.dcm").read_bytes(), b"junk", (tree / "a001.dcm").read_bytes()):
        file.write_bytes(content)
        code = prepare(tree)
        stored = sorted(Path(scan.source).name for scan in SliceStore(tree / "out" / "store").scans)
        outcomes.append((code, {name: row.status for name, row in rows(tree).items()}, stored))
    whole = {"good": "done", "a001.dcm": "done", "b001.dcm": "done"}
    assert outcomes == [
        (0, whole, sorted(whole)),
        (3, {**whole, "a001.dcm": "quarantined", "a002.dcm": "done"}, ["a002.dcm", "b001.dcm", "good"]),
        (0, whole, sorted(whole)),
    ]


def test_a_series_that_becomes_unreadable_does_not_leave_its_slices_behind(tree):
    for path in (tree / "in" / STUDY / "mended", tree / "in" / STUDY / "shared"):
        shutil.rmtree(path)
    assert prepare(tree) == 0
    for path in (tree / "in" / STUDY / "good").iterdir():
        path.write_bytes(b"overwritten")
    assert prepare(tree) == 3
    assert {name: (row.status, row.num_slices) for name, row in rows(tree).items()} == {"good": ("quarantined", 0)}
    assert SliceStore(tree / "out" / "store").scans == []
