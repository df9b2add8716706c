"""The whole room: every input accounted for, nothing done twice, the same bytes however it ran."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from braindino.lock import lock_folder
from braindino.manifest import Scan, load_brain, mask_path, read_scans
from braindino.preprocessing import preparation
from braindino.preprocessing import prepare as prepare_module
from braindino.preprocessing.cases import picture_path, quarantined_mask_path
from braindino.preprocessing.preparation import ScanPreparer
from braindino.preprocessing.prepare import main
from braindino.preprocessing.skull_strip import TOOLS, Tool
from braindino.preprocessing.worker_pool import WorkerDied
from braindino.scan_quality import read_quality
from braindino.slice_store import SliceStore
from braindino.transforms import standardize
from braindino.volume import Volume, load_volume, save_array

SCRIPT = Path(prepare_module.__file__)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def times_of(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_by_name(out: Path) -> dict[str, Scan]:
    return {Path(row.path).name: row for row in read_scans(out / "scans.tsv")}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Four stripped scans of two subjects."""
    source = tmp_path_factory.mktemp("data") / "cohort"
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (28, 32, 26)], indexing="ij")
    for number, name in enumerate(("P1-t1n", "P1-t2f", "P2-t1n", "P2-t2w")):
        rng = np.random.default_rng(number)
        data = np.where(x**2 + y**2 + z**2 < 0.8, 500 + 90 * x + 60 * y + 200 * rng.random(x.shape), 0)
        source.mkdir(exist_ok=True)
        save_array(data, np.diag([5.0, 5.0, 5.0, 1.0]), source / f"{name}.nii.gz", dtype=np.int16)
    return source


@pytest.fixture(scope="module")
def undisturbed(cohort, tmp_path_factory) -> Path:
    """What one run without disturbance makes of the cohort, with two processes."""
    out = tmp_path_factory.mktemp("out") / "prepared"
    assert main([str(cohort), "--out", str(out), "--jobs", "2"]) == 0
    return out


def test_prepared_scans_are_the_standard_slices_in_the_store(cohort, undisturbed):
    store = SliceStore(undisturbed / "store")
    rows = rows_by_name(undisturbed)
    assert [(row.subject, row.sequence, row.status, row.num_slices) for row in rows.values()] == [
        ("P1", "FLAIR", "done", 128),
        ("P1", "T1", "done", 128),
        ("P2", "T1", "done", 128),
        ("P2", "T2", "done", 128),
    ]
    assert len(store) == 512
    assert {row.cohort for row in rows.values()} == {"cohort"}
    assert all(Path(row.path).is_absolute() and row.seconds > 0 for row in rows.values())
    cube = standardize(load_volume(cohort / "P1-t1n.nii.gz")).data
    first = [scan.scan_id for scan in store.scans].index(rows["P1-t1n.nii.gz"].scan_id) * 128
    for index in (first, first + 64, first + 127):
        # Row 0 anterior, column 0 the patient's right.
        expected = cube[::-1, ::-1, store.position_of(index)].T
        np.testing.assert_allclose(store[index], expected, atol=2e-3)
    assert (undisturbed / "montages/cohort_001.png").exists()


@pytest.mark.fault
def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_bytes(cohort, undisturbed, tmp_path):
    out = tmp_path / "prepared"
    command = [sys.executable, str(SCRIPT), str(cohort), "--out", str(out), "--jobs", "1"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("cases/*/*.json")):
        assert run.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(1)  # its worker notices and ends
    finished = [path.stem for path in out.glob("cases/*/*.json")]
    assert 0 < len(finished) < 4
    assert (out / ".lock").exists(), "killed, it could not let go"
    before = {name: seconds for name, seconds in times_of(out).items() if Path(name).stem in finished}

    assert main([str(cohort), "--out", str(out), "--jobs", "0"]) == 0
    after = times_of(out)
    assert {name: after[name] for name in before} == before
    assert files_of(out / "store") == files_of(undisturbed / "store")
    assert not (out / ".lock").exists()


def test_a_second_run_does_nothing_and_a_changed_file_or_setting_does_only_what_it_touches(
    cohort, undisturbed, tmp_path, capsys
):
    source, out = tmp_path / "cohort", tmp_path / "prepared"
    shutil.copytree(cohort, source)
    for name in ("P2-t1n.nii.gz", "P2-t2w.nii.gz"):
        (source / name).unlink()
    assert main([str(source), "--out", str(out), "--jobs", "0"]) == 0
    before = times_of(out / "store/slices")
    capsys.readouterr()
    assert main([str(source), "--out", str(out), "--jobs", "0"]) == 0
    assert "2 done" in (printed := capsys.readouterr().out) and "0 worked on" in printed
    assert times_of(out / "store/slices") == before

    shutil.copy(cohort / "P2-t1n.nii.gz", source / "P1-t1n.nii.gz")
    assert main([str(source), "--out", str(out), "--jobs", "0"]) == 0
    assert "1 worked on" in capsys.readouterr().out
    rows = rows_by_name(out)
    after = times_of(out / "store/slices")
    changed = {Path(name).name for name in before if after[name] != before[name]}
    assert changed == {rows["P1-t1n.nii.gz"].scan_id}

    positions = [SliceStore(out / "store").position_of(index) for index in range(128)]
    assert main([str(source), "--out", str(out), "--jobs", "0", "--seed", "1"]) == 0
    assert "2 worked on" in capsys.readouterr().out
    assert positions != [SliceStore(out / "store").position_of(index) for index in range(128)]


@pytest.mark.fault
def test_bad_inputs_end_as_rows_with_their_own_codes_beside_the_good_ones(phantom, make_phantom, tmp_path, capsys):
    source, out = tmp_path / "raw", tmp_path / "prepared"
    good = phantom.save(source / "good_t1.nii.gz")
    data, affine = phantom.stripped, phantom.affine
    (source / "truncated_t1.nii.gz").write_bytes(good.read_bytes()[:-5000])
    save_array(np.stack([data] * 3, axis=3), affine, source / "series_t1.nii.gz", dtype=np.int16)
    holes = data.copy()
    holes[10:20] = np.nan
    save_array(holes, affine, source / "nans_t1.nii.gz", dtype=np.float32)
    holes = data.copy()
    holes[20, 24, 18] = np.inf
    save_array(holes[..., None], affine, source / "mended_t1.nii.gz", dtype=np.float32)
    save_array(0 * data, affine, source / "zeros_t1.nii.gz", dtype=np.int16)
    save_array(data[:, :, 18], affine, source / "flat_t1.nii.gz", dtype=np.int16)
    save_array(phantom.brain, affine, source / "secret_t1.nii.gz", dtype=np.uint8)
    save_array(phantom.brain, affine, source / "good_mask.nii.gz", dtype=np.uint8)
    (source / "text_t1.nii.gz").write_text("subject,age\n1,54\n")
    (source / "gone_t1.nii.gz").symlink_to(source / "nowhere.nii.gz")

    assert main([str(source), "--out", str(out), "--jobs", "1"]) == 3
    rows = rows_by_name(out)
    assert {name: (row.status, row.reason.partition(":")[0]) for name, row in rows.items()} == {
        "good_t1.nii.gz": ("done", ""),
        "mended_t1.nii.gz": ("done", "singleton_squeezed; nonfinite_replaced=1"),
        "good_mask.nii.gz": ("skipped", "label"),
        "truncated_t1.nii.gz": ("quarantined", "truncated"),
        "series_t1.nii.gz": ("quarantined", "four_dimensional"),
        "nans_t1.nii.gz": ("quarantined", "non_finite"),
        "zeros_t1.nii.gz": ("quarantined", "constant"),
        "flat_t1.nii.gz": ("quarantined", "two_dimensional"),
        "secret_t1.nii.gz": ("quarantined", "label_map"),
        "text_t1.nii.gz": ("quarantined", "not_nifti"),
        "gone_t1.nii.gz": ("quarantined", "unreadable"),
    }
    assert len(rows) == len(list(source.iterdir()))
    assert rows["zeros_t1.nii.gz"].reason == "constant: every voxel is 0; expected an image"
    assert {scan.subject for scan in SliceStore(out / "store").scans} == {"good", "mended"}
    printed = capsys.readouterr().out
    assert "11 files" in printed and "quarantined label_map: 1" in printed and "skipped label: 1" in printed

    # The same again costs nothing; a file that was replaced by a good one is done, and the rest still counts.
    make_phantom(seed=1).save(source / "text_t1.nii.gz")
    assert main([str(source), "--out", str(out), "--jobs", "0"]) == 3
    assert rows_by_name(out)["text_t1.nii.gz"].status == "done"
    # Two now: the link to nowhere has no bytes by which to know it again.
    assert "2 worked on" in capsys.readouterr().out


class FakeStripper:
    """Takes the phantom's brain by its grey values."""

    calls = 0
    half = False

    def strip(self, volume: Volume) -> np.ndarray:
        type(self).calls += 1
        brain = (volume.data > 100) & (volume.data < 700)
        if self.half:
            brain[:20] = False
        return brain


@pytest.fixture
def fake_tool(monkeypatch):
    monkeypatch.setattr(FakeStripper, "calls", 0)
    monkeypatch.setattr(preparation, "_STRIPPERS", {})
    monkeypatch.setitem(TOOLS, "hd-bet", Tool(lambda: "1.0", lambda device, mirroring: FakeStripper()))


def test_masks_lie_on_the_own_grid_of_an_oblique_file_and_stripped_scans_are_left_alone(phantom, tmp_path, fake_tool):
    source, out = tmp_path / "c", tmp_path / "prepared"
    phantom.save(source / "P2_t1.nii.gz", stripped=True)
    # Stored from left, posterior, superior axes in the order z, x, y, and turned by 10 degrees about the vertical.
    turn = np.deg2rad(10)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1.0]])
    world = np.eye(4)
    world[:3, :3] = rotation @ (4.0 * np.eye(3))
    ras = nib.Nifti1Image(phantom.head.astype(np.int16), world)
    turned = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("SLP"))
    native = ras.as_reoriented(turned)
    nib.save(native, source / "P1_t1.nii.gz")

    assert main([str(source), "--out", str(out), "--skull-strip", "hd-bet", "--jobs", "0"]) == 0
    rows = rows_by_name(out)
    assert rows["P2_t1.nii.gz"].reason == "already_stripped"
    assert not mask_path(out, rows["P2_t1.nii.gz"]).exists()
    assert FakeStripper.calls == 1

    row = rows["P1_t1.nii.gz"]
    assert row.reason == "oblique=10.0deg"
    mask = nib.load(mask_path(out, row))
    np.testing.assert_allclose(mask.affine, native.affine, atol=1e-5)
    values = np.asarray(native.dataobj)
    inside = np.asarray(mask.dataobj).astype(bool)
    assert inside.shape == (36, 40, 48)
    np.testing.assert_array_equal(inside, (values > 100) & (values < 700))
    brain = load_brain(out, row)
    assert brain.data.max() < 700
    np.testing.assert_array_equal(brain.data != 0, phantom.brain)
    (quality,) = [found for found in read_quality(out / "quality.tsv") if found.scan_id == row.scan_id]
    assert quality.brain_ml == pytest.approx(np.count_nonzero(phantom.brain) * 0.064, abs=0.05)
    assert (quality.stripped_by, quality.spacing, quality.shape) == ("hd-bet", "4.000x4.000x4.000", "40x48x36")
    assert quality.obliqueness == pytest.approx(10, abs=0.1)

    # Without stripping the mask must go, or readers would go on applying it.
    assert main([str(source), "--out", str(out), "--jobs", "0"]) == 0
    assert not mask_path(out, row).exists()
    assert load_brain(out, row).data.max() == 800


@pytest.mark.parametrize("wrong", [np.zeros_like, np.ones_like])
def test_a_wrong_brain_mask_is_quarantined_and_nothing_of_it_stays(phantom, tmp_path, fake_tool, monkeypatch, wrong):
    monkeypatch.setattr(FakeStripper, "strip", lambda self, volume: wrong(volume.data, dtype=bool))
    phantom.save(tmp_path / "c/P1_t1.nii.gz", stripped=False)
    out = tmp_path / "prepared"
    assert main([str(tmp_path / "c"), "--out", str(out), "--skull-strip", "hd-bet", "--jobs", "0"]) == 3
    (row,) = read_scans(out / "scans.tsv")
    assert (row.status, row.reason.partition(":")[0], row.num_slices) == ("quarantined", "suspicious_mask", 0)
    assert not list((out / "masks").glob("*"))
    with Image.open(picture_path(out, row)) as picture:
        assert picture.width > 100, "its picture is there to look at"
    assert len(SliceStore(out / "store")) == 0


@pytest.mark.fault
def test_faults_of_the_machine_are_quarantined_told_and_tried_again(
    make_phantom, tmp_path, fake_tool, monkeypatch, capsys
):
    source, out = tmp_path / "c", tmp_path / "prepared"
    make_phantom().save(source / "P1_t1.nii.gz", stripped=False)
    make_phantom(seed=1).save(source / "P2_t1.nii.gz", stripped=True)
    command = [str(source), "--out", str(out), "--skull-strip", "hd-bet", "--jobs", "0"]

    def fail(self, volume):
        raise RuntimeError("out of memory on the device")

    with monkeypatch.context() as patch:
        patch.setattr(FakeStripper, "strip", fail)
        assert main(command) == 3
    rows = rows_by_name(out)
    assert rows["P1_t1.nii.gz"].reason == "failed: RuntimeError: out of memory on the device"
    assert rows["P2_t1.nii.gz"].status == "done"
    assert "Traceback" in capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "run_tasks", lambda functions, tasks: [(tasks[0], WorkerDied(-9))])
        assert main([*command[:-1], "1"]) == 3
    assert rows_by_name(out)["P1_t1.nii.gz"].reason.startswith("worker_died: its process was killed")

    assert main(command) == 0
    assert "1 worked on" in capsys.readouterr().out
    assert {row.status for row in read_scans(out / "scans.tsv")} == {"done"}


def test_other_sources_add_to_a_folder_and_a_renamed_cohort_leaves_one_row_per_file(phantom, make_phantom, tmp_path):
    one, two = phantom.save(tmp_path / "one/P1_t1.nii.gz"), make_phantom(seed=1).save(tmp_path / "two/P1_t1.nii.gz")
    out = tmp_path / "prepared"
    assert main([str(one.parent), "--out", str(out), "--jobs", "0"]) == 0
    assert main([str(two.parent), "--out", str(out), "--jobs", "0"]) == 0
    assert [(row.cohort, row.path) for row in read_scans(out / "scans.tsv")] == [("one", str(one)), ("two", str(two))]
    assert main([str(two), "--out", str(out), "--jobs", "0", "--cohort-name", "TWO", "--sequence", "T2"]) == 0
    rows = read_scans(out / "scans.tsv")
    assert [(row.cohort, row.sequence) for row in rows] == [("TWO", "T1"), ("one", "T1")]
    assert [scan.scan_id for scan in SliceStore(out / "store").scans] == [row.scan_id for row in rows]
    assert len(list((out / "cases").glob("*/*.json"))) == 2


def test_a_namesake_of_a_scan_prepared_earlier_is_refused_unless_it_moved(phantom, tmp_path, capsys):
    first = phantom.save(tmp_path / "a/raw/P1_t1.nii.gz")
    second = phantom.save(tmp_path / "b/raw/P1_t1.nii.gz")
    out = tmp_path / "prepared"
    assert main([str(first.parent), "--out", str(out), "--jobs", "0"]) == 0
    assert main([str(second.parent), "--out", str(out), "--jobs", "0"]) == 1
    assert "would both be cohort 'raw', subject 'P1'" in capsys.readouterr().err
    first.unlink()
    assert main([str(second.parent), "--out", str(out), "--jobs", "0"]) == 0
    assert [row.path for row in read_scans(out / "scans.tsv")] == [str(second)]


def test_slices_without_a_row_are_not_published(cohort, undisturbed, tmp_path, phantom):
    out = tmp_path / "prepared"
    phantom.save(tmp_path / "c/P9_t1.nii.gz")
    shutil.copytree(undisturbed / "store", out / "store")  # as if killed between slices and case, four times
    assert main([str(tmp_path / "c"), "--out", str(out), "--jobs", "0"]) == 0
    assert [scan.subject for scan in SliceStore(out / "store").scans] == ["P9"]


@pytest.mark.fault
def test_a_folder_at_work_refuses_a_second_run_and_the_lock_of_a_dead_one_is_taken(cohort, tmp_path, capsys):
    out = tmp_path / "prepared"
    out.mkdir()
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    (out / ".lock").write_text(json.dumps(owner))
    one = str(cohort / "P1-t1n.nii.gz")
    assert main([one, "--out", str(out), "--jobs", "0"]) == 1
    assert f"process {owner['pid']} on {owner['host']} is working here" in capsys.readouterr().err
    assert not (out / "scans.tsv").exists()

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (out / ".lock").write_text(json.dumps({**owner, "pid": gone.pid}))
    assert main([one, "--out", str(out), "--jobs", "0"]) == 0


def test_a_dry_run_counts_and_writes_nothing(cohort, tmp_path, capsys):
    out = tmp_path / "prepared"
    assert main([str(cohort), "--out", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4 files: 4 scans, 0 left" in printed
    assert "take  cohort T1: 2 scans of 2 subjects" in printed
    assert "0 are done already, 4 to do" in printed
    assert not out.exists()


def test_wrong_arguments_are_one_clear_message(cohort, tmp_path, capsys):
    out = ["--out", str(tmp_path / "prepared")]
    assert main([str(tmp_path / "nowhere"), *out]) == 1
    assert capsys.readouterr().err.startswith(f"braindino prepare: {tmp_path}/nowhere: no such file or folder")
    for wrong, message in (
        ([str(cohort), "--subject-pattern", "("], "unterminated"),
        ([str(cohort), "--subject-pattern", "x"], "(?P<subject>"),
        ([str(cohort), "--jobs", "-1"], "expected 0 or more"),
        ([str(cohort), "--skull-strip", "fsl"], "hd-bet"),
        ([], "none given"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*wrong, *out])
        assert caught.value.code == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


@pytest.mark.fault
def test_a_full_disk_stops_the_run_and_keeps_what_is_finished(cohort, tmp_path, monkeypatch, capsys):
    out = tmp_path / "prepared"
    command = [str(cohort), "--out", str(out), "--jobs", "0"]
    assert main([command[0] + "/P1-t1n.nii.gz", *command[1:], "--cohort-name", "cohort"]) == 0

    def full(self, scan, slices, indices):
        raise OSError(28, "No space left on device", str(out / "store"))

    with monkeypatch.context() as patch:
        patch.setattr("braindino.slice_store.SliceStoreWriter.add", full)
        assert main(command) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [row.subject for row in read_scans(out / "scans.tsv")] == ["P1"]
    assert len(SliceStore(out / "store")) == 128


def test_a_changed_setting_does_again_only_the_stages_it_touches(make_phantom, tmp_path, fake_tool, monkeypatch):
    source, out = tmp_path / "c", tmp_path / "prepared"
    make_phantom().save(source / "P1_t1.nii.gz", stripped=False)
    command = [str(source), "--out", str(out), "--jobs", "0", "--skull-strip", "hd-bet"]
    assert main(command) == 0
    assert FakeStripper.calls == 1
    (row,) = read_scans(out / "scans.tsv")
    mask_time = mask_path(out, row).read_bytes()
    positions = [SliceStore(out / "store").position_of(index) for index in range(128)]

    assert main([*command, "--seed", "1"]) == 0, "other slices, the same mask"
    assert FakeStripper.calls == 1
    assert mask_path(out, row).read_bytes() == mask_time
    assert [SliceStore(out / "store").position_of(index) for index in range(128)] != positions

    assert main([*command, "--seed", "1", "--mirroring"]) == 0, "another mask"
    assert FakeStripper.calls == 2
    monkeypatch.setitem(TOOLS, "hd-bet", Tool(lambda: "1.1", lambda device, mirroring: FakeStripper()))
    preparation._STRIPPERS.clear()
    assert main([*command, "--seed", "1", "--mirroring"]) == 0, "other weights"
    assert FakeStripper.calls == 3
    assert main([*command, "--seed", "1", "--mirroring"]) == 0
    assert FakeStripper.calls == 3


def test_a_touched_file_is_read_but_not_prepared_again_and_recheck_finds_a_change_that_kept_size_and_time(
    cohort, tmp_path, capsys
):
    source, out = tmp_path / "c", tmp_path / "prepared"
    source.mkdir()
    path = source / "P1-t1n.nii"
    volume = load_volume(cohort / "P1-t1n.nii.gz")
    save_array(volume.data, volume.affine, path, dtype=np.int16)
    command = [str(source), "--out", str(out), "--jobs", "0"]
    assert main(command) == 0
    os.utime(path, ns=(1, 1))
    assert main(command) == 0
    assert "0 worked on" in capsys.readouterr().out

    raw = bytearray(path.read_bytes())
    raw[-20_000] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(1, 1))
    assert main(command) == 0
    assert "0 worked on" in capsys.readouterr().out
    assert main([*command, "--recheck"]) == 0
    assert "1 worked on" in capsys.readouterr().out


def test_a_mask_stopped_by_the_gate_passes_once_a_person_accepts_it_without_being_made_again(
    make_phantom, tmp_path, fake_tool, monkeypatch
):
    monkeypatch.setattr(FakeStripper, "half", True)
    source, out, accepted = tmp_path / "c", tmp_path / "prepared", tmp_path / "accepted.txt"
    make_phantom().save(source / "P1_t1.nii.gz", stripped=False)
    command = [str(source), "--out", str(out), "--jobs", "0", "--skull-strip", "hd-bet"]
    assert main(command) == 3
    (row,) = read_scans(out / "scans.tsv")
    assert row.reason.startswith("suspicious_mask: ")
    assert quarantined_mask_path(out, row).exists() and not mask_path(out, row).exists()
    assert main(command) == 3 and FakeStripper.calls == 1

    accepted.write_text(f"# looked at on Monday\n{row.scan_id}  # half a brain is what this patient has\n")
    assert main([*command, "--accept", str(accepted)]) == 0
    (row,) = read_scans(out / "scans.tsv")
    assert (row.status, row.reason, FakeStripper.calls) == ("done", "mask_accepted_by_hand", 1)
    assert mask_path(out, row).exists() and not quarantined_mask_path(out, row).exists()
    assert not picture_path(out, row).exists()


@pytest.mark.fault
def test_the_same_voxels_under_another_name_are_one_scan_whatever_came_first(make_phantom, tmp_path):
    source, out = tmp_path / "c", tmp_path / "prepared"
    phantom = make_phantom()
    path = phantom.save(source / "P2_t1.nii.gz")
    make_phantom(seed=1).save(source / "P3_t1.nii.gz")
    command = [str(source), "--out", str(out), "--jobs", "0"]
    assert main(command) == 0
    # The same scan of "another" subject: other axes, another type, not compressed.
    turned = nib.load(path).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("PSL"))
    )
    save_array(np.asarray(turned.dataobj), turned.affine, source / "P1_t1.nii", dtype=np.float32)
    assert main(command) == 3
    rows = rows_by_name(out)
    assert rows["P1_t1.nii"].status == rows["P3_t1.nii.gz"].status == "done"
    assert rows["P2_t1.nii.gz"].reason == f"duplicate: the same voxels as {source / 'P1_t1.nii'}"
    assert rows["P2_t1.nii.gz"].num_slices == 0
    assert {scan.subject for scan in SliceStore(out / "store").scans} == {"P1", "P3"}
    before = times_of(out / "cases")
    assert main(command) == 3
    assert times_of(out / "cases") == before, "nothing is left to do"

    # When the one that was kept turns out to be something else, the other one is needed after all.
    save_array(make_phantom(seed=2).stripped, phantom.affine, source / "P1_t1.nii", dtype=np.float32)
    assert main(command) == 0
    assert {scan.subject for scan in SliceStore(out / "store").scans} == {"P1", "P2", "P3"}


def test_parts_of_an_array_job_together_make_the_same_bytes(cohort, undisturbed, tmp_path, capsys):
    out = tmp_path / "prepared"
    command = [str(cohort), "--out", str(out), "--jobs", "0"]
    worked_on = 0
    for part in ("1", "2", "3"):
        assert main([*command, "--part", part, "--of", "3"]) == 0
        printed = capsys.readouterr().out
        worked_on += int(printed.split(" worked on")[0].rsplit(" ", 1)[1])
        assert f"part {part} of 3" in printed
    assert worked_on == 4
    assert not (out / "scans.tsv").exists(), "parts leave tables and index to the last run"
    assert main(command) == 0
    assert "0 worked on" in capsys.readouterr().out
    assert files_of(out / "store") == files_of(undisturbed / "store")


def test_a_dask_cluster_makes_the_same_bytes(cohort, undisturbed, tmp_path):
    dask = pytest.importorskip("dask", reason="Dask comes with the extra [cluster]")
    distributed = pytest.importorskip("distributed")
    out = tmp_path / "prepared"
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
    ):
        assert main([str(cohort), "--out", str(out), "--scheduler", cluster.scheduler_address]) == 0
    assert files_of(out / "store") == files_of(undisturbed / "store")
    assert [row.status for row in read_scans(out / "scans.tsv")] == ["done"] * 4


def test_a_part_and_a_whole_run_do_not_work_in_one_folder(cohort, tmp_path, capsys):
    out = tmp_path / "prepared"
    command = [str(cohort), "--out", str(out), "--jobs", "0"]
    with lock_folder(out, part="part-2-of-3"):
        assert main(command) == 1
        assert f"process {os.getpid()}" in capsys.readouterr().err
        assert main([*command, "--part", "2", "--of", "3"]) == 1
        assert main([*command, "--part", "1", "--of", "3"]) == 0
    with lock_folder(out):
        assert main([*command, "--part", "1", "--of", "3"]) == 1


def test_the_estimate_of_a_dry_run_is_within_a_fifth_of_what_happens(make_phantom, tmp_path, capsys):
    source, out = tmp_path / "c", tmp_path / "prepared"
    for seed in range(8):
        make_phantom(seed).save(source / f"P{seed}_t1.nii.gz")
    command = [str(source), "--out", str(out), "--jobs", "0"]
    assert main([*command, "--dry-run", "--probe", "3"]) == 0
    printed = capsys.readouterr().out
    slices, gigabytes = (
        float(re.search(pattern, printed)[1].replace(",", "")) for pattern in (r"([\d,]+) slices", r"([\d.e-]+) GB")
    )
    assert not out.exists()
    assert main(command) == 0
    stored = sum(path.stat().st_size for path in (out / "store/slices").rglob("*") if path.is_file())
    assert slices == pytest.approx(len(SliceStore(out / "store")), rel=0.2)
    assert gigabytes == pytest.approx(stored / 1e9, rel=0.2)


@pytest.mark.fault
def test_a_source_folder_that_vanishes_stops_the_run_instead_of_quarantining_everything(
    cohort, tmp_path, monkeypatch, capsys
):
    source, out = tmp_path / "c", tmp_path / "prepared"
    shutil.copytree(cohort, source)
    original = ScanPreparer.__call__

    def unmounted_after_the_first(self, candidate):
        case = original(self, candidate)
        if source.exists():
            source.rename(tmp_path / "elsewhere")
        return case

    with monkeypatch.context() as patch:
        patch.setattr(ScanPreparer, "__call__", unmounted_after_the_first)
        assert main([str(source), "--out", str(out), "--jobs", "0"]) == 1
    assert f"is its disk mounted?: '{source}'" in capsys.readouterr().err
    assert [row.status for row in read_scans(out / "scans.tsv")] == ["done"]
    (tmp_path / "elsewhere").rename(source)
    assert main([str(source), "--out", str(out), "--jobs", "0"]) == 0
    assert "3 worked on" in capsys.readouterr().out


@pytest.fixture
def small_disk(undisturbed, tmp_path) -> Iterator[Path]:
    """A real file system with room for two or three scans of the cohort."""
    size = 3 * max(path.stat().st_size for path in (undisturbed / "store/slices").rglob("*") if path.is_file())
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.fault
def test_a_really_full_disk_stops_the_run_keeps_what_is_finished_and_goes_on_with_more_room(
    cohort, undisturbed, small_disk, tmp_path, capsys
):
    out = small_disk / "prepared"
    command = [str(cohort), "--out", str(out), "--jobs", "1"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and str(out) in error
    finished = [path.stem for path in out.glob("cases/*/*.json")]
    assert 0 < len(finished) < 4
    before = times_of(out / "store/slices")
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert main(command) == 0
    after = times_of(out / "store/slices")
    assert {name: after[name] for name in before if Path(name).name in finished} == {
        name: time for name, time in before.items() if Path(name).name in finished
    }
    assert files_of(out / "store") == files_of(undisturbed / "store")
