"""Montages: pages show what is there, and are drawn only when that changes."""

import numpy as np
import pytest
from PIL import Image

from braindino.manifest import Scan
from braindino.preprocessing import montage
from braindino.preprocessing.montage import draw_montages
from braindino.slice_store import SliceStoreWriter


@pytest.fixture
def store(tmp_path):
    writer = SliceStoreWriter(tmp_path / "store")
    slices = np.zeros((4, 256, 256), dtype=np.float32)
    slices[:, 64:192, 64:192] = np.array([0.5, 1.0, 2.0, 3.0])[:, None, None]
    writer.add(Scan("/d/t1.nii", "A/1", "p1", sequence="T1"), slices, range(4))
    return writer.publish()


def test_a_page_shows_three_slices_of_a_scan_and_the_reason_of_a_quarantined_one(store, tmp_path):
    bad = Scan("/d/t2.nii", "A/1", "p2", sequence="T2", status="quarantined", reason="constant: every voxel is 0")
    left = Scan("/d/m.nii", "A/1", "p3", status="skipped", reason="label: mask")
    (page,) = draw_montages(tmp_path / "montages", store, [store.scans[0], bad, left])
    assert page.name == "A_1_001.png"
    pixels = np.asarray(Image.open(page).convert("RGB")).astype(int)
    greys = set(pixels[(np.ptp(pixels, axis=2) == 0)][:, 0].tolist())
    for value in (1.0, 2.0, 3.0):  # slices 1, 2 and 3 of 4, grey from -2.5 to 3 standard deviations
        assert min(abs(grey - 255 * (value + 2.5) / 5.5) for grey in greys) <= 2
    assert (np.ptp(pixels, axis=2) > 50).any(), "the reason is written in colour"


def test_a_page_is_drawn_again_only_when_it_changes(store, tmp_path):
    folder = tmp_path / "montages"
    (page,) = draw_montages(folder, store, store.scans)
    first = page.stat().st_mtime_ns
    draw_montages(folder, store, store.scans)
    assert page.stat().st_mtime_ns == first
    bad = Scan("/d/t2.nii", "A/1", "p2", status="quarantined", reason="constant")
    draw_montages(folder, store, [*store.scans, bad])
    assert page.stat().st_mtime_ns > first


def test_a_cohort_gets_as_many_pages_as_it_needs_and_old_ones_go(store, tmp_path, monkeypatch):
    monkeypatch.setattr(montage, "SCANS_PER_PAGE", 2)
    rows = [Scan(f"/d/{i}.nii", "B", f"p{i}", status="quarantined", reason="x") for i in range(3)]
    pages = draw_montages(tmp_path / "montages", store, [*store.scans, *rows])
    assert [page.name for page in pages] == ["A_1_001.png", "B_001.png", "B_002.png"]
    draw_montages(tmp_path / "montages", store, rows[:1])
    assert [page.name for page in (tmp_path / "montages").iterdir()] == ["B_001.png"]
