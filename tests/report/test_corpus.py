"""`braindino stats`: counts by hand, and a figure that shows them."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from braindino.manifest import Scan
from braindino.report.corpus import COLOURS, HATCHES, corpus_figure, count_corpus, main
from braindino.slice_store import SliceStoreWriter

ROWS = [
    ("ixi", "1", "T1", 128),
    ("ixi", "1", "T2", 128),
    ("ixi", "2", "T1", 100),
    ("brats", "1", "T1c", 128),
    ("brats", "1", "FLAIR", 128),
    ("brats", "1", "unknown", 2),
    ("adni", "7", "T1", 258),
]


def scans() -> tuple[list[Scan], list[int]]:
    made = [Scan(f"/{c}{s}{q}.nii", cohort=c, subject=s, sequence=q) for c, s, q, _ in ROWS]
    return made, [row[3] for row in ROWS]


def test_counts_are_those_made_by_hand() -> None:
    assert [tuple(row) for row in count_corpus(*scans())] == [
        ("ixi", "T1", 2, 2, 228),
        ("ixi", "T2", 1, 1, 128),
        ("ixi", "total", 2, 3, 356),
        ("adni", "T1", 1, 1, 258),
        ("adni", "total", 1, 1, 258),
        ("brats", "T1c", 1, 1, 128),
        ("brats", "FLAIR", 1, 1, 128),
        ("brats", "unknown", 1, 1, 2),
        ("brats", "total", 1, 3, 258),
        ("total", "T1", 3, 3, 486),
        ("total", "T1c", 1, 1, 128),
        ("total", "T2", 1, 1, 128),
        ("total", "FLAIR", 1, 1, 128),
        ("total", "unknown", 1, 1, 2),
        ("total", "total", 4, 7, 872),
    ]


def test_bars_are_as_long_as_the_counts() -> None:
    left, right = corpus_figure(count_corpus(*scans())).axes
    ends = {round(patch.get_y() + patch.get_height() / 2): 0.0 for patch in left.patches}
    for patch in left.patches:
        ends[round(patch.get_y() + patch.get_height() / 2)] += patch.get_width()
    assert [label.get_text() for label in left.get_yticklabels()] == ["ixi", "adni", "brats"]
    assert ends == {0: 356, 1: 258, 2: 258}
    assert [patch.get_width() for patch in right.patches] == [486, 128, 128, 128, 2]
    assert "3 scans, 2 subjects" in {text.get_text() for text in left.texts}


def test_sequences_are_told_apart_without_colour() -> None:
    assert len(set(HATCHES.values())) == len(HATCHES) == len(COLOURS)
    luminance = {name: np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) for name, colour in COLOURS.items()}
    assert max(luminance.values()) < 0.75, "the white hatching needs a ground"


def test_table_and_figure_are_written_and_are_the_same_every_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = SliceStoreWriter(tmp_path / "prepared" / "store")
    for row in scans()[0]:
        writer.add(row, np.zeros((2, 256, 256), dtype=np.float32), [100, 101])
    writer.publish()
    for name in ("one", "two"):
        assert main([str(tmp_path / "prepared"), "--out", str(tmp_path / name)]) == 0
    assert "ixi     T1               2      2       4" in capsys.readouterr().out
    assert (tmp_path / "one" / "corpus.tsv").read_text().splitlines()[:2] == [
        "cohort\tsequence\tsubjects\tscans\tslices",
        "brats\tT1c\t1\t1\t2",
    ]
    for name in ("corpus.tsv", "corpus.svg", "corpus.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    ElementTree.parse(tmp_path / "one" / "corpus.svg")
    assert (tmp_path / "one" / "corpus.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_empty_store_has_no_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SliceStoreWriter(tmp_path / "store").publish()
    assert main([str(tmp_path / "store"), "--out", str(tmp_path / "out")]) == 1
    assert "holds no scans" in capsys.readouterr().err and not (tmp_path / "out").exists()
