import json

import numpy as np
import pytest

from braindino.feature_table import FeatureTable, FeatureTableWriter
from braindino.manifest import Scan

SOURCE = {"encoder_name": "tiny", "encoder_sha256": "a" * 64, "preparation": {"slices": "4 equally spaced"}}


def scan(number):
    return Scan(path=f"/data/s{number}.nii.gz", cohort="c", subject=f"s{number}", sequence="T1")


def test_features_are_the_mean_over_slices_in_the_order_of_the_scans(tmp_path):
    cls = {1: np.array([[1.0, 2.0], [3.0, 6.0]], np.float32), 2: np.array([[0.0, 0.0], [1e-5, 4.0]], np.float32)}
    with FeatureTableWriter(tmp_path, **SOURCE) as writer:
        writer.add(scan(1), cls[1])
        writer.add(scan(2), cls[2])
    table = FeatureTable(tmp_path)
    assert table.scans == [scan(1), scan(2)]
    np.testing.assert_array_equal(table.features, np.array([[2.0, 4.0], [5e-6, 2.0]], np.float32))
    np.testing.assert_array_equal(table.slices(scan(2)), cls[2])
    assert table.meta.encoder_name == "tiny"
    assert table.meta.preparation == {"slices": "4 equally spaced"}


def test_a_table_of_another_encoder_or_preparation_is_refused(tmp_path):
    FeatureTableWriter(tmp_path, **SOURCE).close()
    with pytest.raises(ValueError, match=r"holds features of encoder 'tiny' \(weights aaaaaaaaaaaa\), asked for 'big'"):
        FeatureTableWriter(tmp_path, **{**SOURCE, "encoder_name": "big", "encoder_sha256": "b" * 64})
    with pytest.raises(ValueError, match=r"holds features prepared as .*4 equally.*asked for .*8 equally"):
        FeatureTableWriter(tmp_path, **{**SOURCE, "preparation": {"slices": "8 equally spaced"}})


def test_a_finished_file_that_a_killed_run_did_not_list_is_kept_and_listed(tmp_path):
    killed = FeatureTableWriter(tmp_path, **SOURCE)
    killed.add(scan(1), np.ones((2, 3), np.float32))
    assert not (tmp_path / "scans.tsv").exists()
    with FeatureTableWriter(tmp_path, **SOURCE) as writer:
        assert writer.keep(scan(1))
        assert not writer.keep(scan(2))
    assert FeatureTable(tmp_path).scans == [scan(1)]


def test_features_older_than_their_scan_are_neither_kept_nor_listed(tmp_path):
    with FeatureTableWriter(tmp_path, **SOURCE) as writer:
        writer.add(scan(1), np.ones((2, 3), np.float32))
        writer.add(scan(2), np.ones((2, 3), np.float32))
        changed = (tmp_path / "cls" / f"{scan(1).scan_id}.npy").stat().st_mtime + 1
        assert not writer.keep(scan(1), newer_than=changed)
    assert FeatureTable(tmp_path).scans == [scan(2)]


def test_features_that_are_not_finite_are_refused_and_leave_nothing(tmp_path):
    writer = FeatureTableWriter(tmp_path, **SOURCE)
    with pytest.raises(ValueError, match=r"features of /data/s1.nii.gz: 1 values are not finite"):
        writer.add(scan(1), np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(ValueError, match=r"found shape \(3,\); expected \(num_slices, D\)"):
        writer.add(scan(1), np.ones(3, np.float32))
    assert not writer.keep(scan(1))


def test_a_folder_that_is_no_table_or_of_another_version_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no features.json here; expected a folder made by extract"):
        FeatureTable(tmp_path)
    FeatureTableWriter(tmp_path, **SOURCE).close()
    path = tmp_path / "features.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ValueError, match="version 99; expected 'braindino feature table' version 1"):
        FeatureTable(tmp_path)


def test_a_damaged_file_is_named_with_what_to_do(tmp_path):
    with FeatureTableWriter(tmp_path, **SOURCE) as writer:
        writer.add(scan(1), np.ones((2, 3), np.float32))
    path = tmp_path / "cls" / f"{scan(1).scan_id}.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=rf"{scan(1).scan_id}.npy: damaged features .* delete the file and run extract"
    ):
        FeatureTable(tmp_path).slices(scan(1))
    path.unlink()
    with pytest.raises(ValueError, match=r"no features of /data/s1.nii.gz in this table"):
        FeatureTable(tmp_path).slices(scan(1))
