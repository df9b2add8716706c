"""What the machine does to a run of ``prepare``: no memory, no network, a disk that takes nothing."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from braindino.manifest import read_scans
from braindino.preprocessing.prepare import main
from braindino.slice_store import SliceStore

pytestmark = pytest.mark.fault

COMMAND = [sys.executable, "-m", "braindino.preprocessing.prepare"]
#: A worker with a scan of ordinary size takes less than 1 GB of address space (one thread), a cube of 700 voxels more.
MEMORY_BYTES = 2 << 30


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [*map(str, arguments)], env=environment, capture_output=True, text=True, check=False, timeout=300, **options
    )


def test_a_scan_too_large_for_the_memory_is_a_row_and_the_others_go_on(make_phantom, tmp_path):
    source, out = tmp_path / "cohort", tmp_path / "prepared"
    for number in range(3):
        make_phantom(seed=number).save(source / f"P{number}_t1.nii.gz")
    header = nib.Nifti1Image(np.zeros((1, 1, 1), dtype=np.uint8), np.eye(4) * 0.3).header
    header.set_data_shape((700, 700, 700))
    header.set_data_offset(352)
    with (source / "P9_t1.nii").open("wb") as file:
        header.write_to(file)
        file.truncate(352 + 700**3)  # a sparse file: the voxels take no room on the disk

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    done = run(*COMMAND, source, "--out", out, "--jobs", 1, preexec_fn=limit_memory)
    assert done.returncode == 3, done.stderr
    rows = {Path(row.path).name: row for row in read_scans(out / "scans.tsv")}
    assert rows["P9_t1.nii"].reason.startswith(("failed: MemoryError", "failed: _ArrayMemoryError"))
    assert [rows[f"P{number}_t1.nii.gz"].status for number in range(3)] == ["done"] * 3
    assert SliceStore(out / "store").num_scans == 3
    # It lay in the machine, not in the scan: with more memory, or without the giant, the next run tries again.
    assert "1 worked on" in run(*COMMAND, source, "--out", out, "--jobs", 1, preexec_fn=limit_memory).stdout


def test_prepare_needs_no_network(phantom, tmp_path):
    unshare = shutil.which("unshare")
    if unshare is None or run(unshare, "-n", "true").returncode:
        pytest.skip("taking the network away needs root and unshare")
    phantom.save(tmp_path / "cohort" / "P1_t1.nii.gz")
    done = run(unshare, "-n", *COMMAND, tmp_path / "cohort", "--out", tmp_path / "prepared", "--jobs", 1)
    assert done.returncode == 0, done.stderr
    fetched = run(unshare, "-n", sys.executable, "-m", "braindino.preprocessing.hd_bet_weights",
                  "--weights-dir", tmp_path / "weights")  # fmt: skip
    assert fetched.returncode == 1
    assert "does not say what release_v1.5.0.zip must be" in fetched.stderr and "try again" in fetched.stderr


@pytest.fixture
def read_only_disk(tmp_path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if run("mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", mount).returncode:
        pytest.skip("mounting a read-only disk needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_an_output_that_cannot_be_written_is_named_before_any_work(phantom, read_only_disk, tmp_path, capsys):
    phantom.save(tmp_path / "cohort" / "P1_t1.nii.gz")
    out = read_only_disk / "prepared"
    assert main([str(tmp_path / "cohort"), "--out", str(out), "--jobs", "0"]) == 1
    error = capsys.readouterr().err
    assert "Read-only file system" in error and str(out) in error
