import dataclasses
import json
import time

import numpy as np
import pytest
import torch

from braindino.encoders.contract import Features, Identity, Layers, SliceFeatures
from braindino.feature_table import FeatureTable, FeatureTableMeta, FeatureTableWriter, save_features
from braindino.manifest import Scan, write_scans

IDENTITY = Identity("tiny", "a" * 64, {"num_slices": 4}, {"feature": "class token", "layers": (0, 1, 2)})
SLICES = FeatureTableMeta(IDENTITY, "float32", 2, 4)
VOLUMES = FeatureTableMeta(IDENTITY, "float32", 3, None)


def scan(number):
    return Scan(path=f"/data/s{number}.nii.gz", cohort="c", subject=f"s{number}", sequence="T1")


def slice_features(number, *, num_slices=4, dim=2):
    """CLS tokens number + 0, 1, 2... and ten times the slice; patch means the negative of these; layers by depth."""
    cls = torch.stack([torch.arange(num_slices) + number, 10 * torch.arange(num_slices)], dim=1).float()[:, :dim]
    layers = Layers(torch.tensor([1.0, number]), torch.tensor([2.0, number]), torch.tensor([3.0, number]))
    return Features(cls.mean(dim=0), layers, None, SliceFeatures(cls, -cls))


def volume_features(number):
    layers = Layers(torch.full((5,), 1.0), torch.full((4,), 2.0), torch.full((3,), float(number)))
    return Features(torch.tensor([number, 0.5, -1.0]), layers, None, None)


def write(folder, meta, features_of):
    with FeatureTableWriter(folder, meta) as writer:
        for number, features in features_of.items():
            writer.add(scan(number), features)
    return FeatureTable(folder)


def scan_file(folder, number):
    return folder / "scans" / f"{scan(number).scan_id}.safetensors"


def test_pools_are_means_over_slices_in_the_order_asked_for(tmp_path):
    table = write(tmp_path, SLICES, {1: slice_features(1), 5: slice_features(5)})
    assert table.scans == [scan(1), scan(5)] and len(table) == 2
    assert table.identity.key == IDENTITY.key and table.dim == 2 and table.has_slices
    expected = np.array([[6.5, 15.0], [2.5, 15.0]], np.float32)
    for pool in ("global", "cls"):
        pooled = table.pooled([scan(5), scan(1)], pool=pool)
        assert pooled.dtype == np.float32
        np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(table.pooled([scan(5), scan(1)], pool="patches"), -expected)


@pytest.mark.parametrize(
    ("slice_range", "kept"),
    # Four slices lie at 1/8, 3/8, 5/8 and 7/8.
    [
        ((0.0, 1.0), [0, 1, 2, 3]),
        ((0.0, 0.5), [0, 1]),
        ((0.5, 1.0), [2, 3]),
        ((0.375, 0.625), [1, 2]),
        ((0.376, 0.624), []),
        ((0.8, 0.9), [3]),
    ],
)
def test_a_range_keeps_the_slices_whose_middle_lies_in_it(tmp_path, slice_range, kept):
    table = write(tmp_path, SLICES, {1: slice_features(1)})
    if not kept:
        with pytest.raises(ValueError, match=r"no middle of 4 slices lies in \(0.376, 0.624\); give a wider range"):
            table.pooled([scan(1)], pool="cls", slice_range=slice_range)
        return
    slices = table.slices([scan(1)], pool="patches", slice_range=slice_range)
    np.testing.assert_array_equal(slices, [[[-1.0 - row, -10.0 * row] for row in kept]])
    pooled = table.pooled([scan(1)], pool="cls", slice_range=slice_range)
    np.testing.assert_array_equal(pooled, [[1 + np.mean(kept), 10 * np.mean(kept)]])


def test_layers_are_read_by_depth_and_may_differ_in_width(tmp_path):
    table = write(tmp_path, VOLUMES, {1: volume_features(1), 2: volume_features(2)})
    assert table.layer([scan(2), scan(1)], "early").shape == (2, 5)
    np.testing.assert_array_equal(table.layer([scan(2), scan(1)], "late"), [[2, 2, 2], [1, 1, 1]])
    np.testing.assert_array_equal(table.layer([scan(2)], "mid"), [[2, 2, 2, 2]])
    with pytest.raises(ValueError, match="depth: found 'deep'; expected one of early, mid, late"):
        table.layer([scan(1)], "deep")


def test_an_encoder_of_volumes_says_which_pools_it_has(tmp_path):
    table = write(tmp_path, VOLUMES, {1: volume_features(1)})
    assert not table.has_slices
    np.testing.assert_array_equal(table.pooled([scan(1)]), [[1, 0.5, -1]])
    message = "no pool 'cls' of slices; encoder tiny has the pools only global"
    with pytest.raises(ValueError, match=message):
        table.pooled([scan(1)], pool="cls")
    with pytest.raises(ValueError, match="no pool 'patches' of slices"):
        table.slices([scan(1)], pool="patches")


def test_what_cannot_be_asked_for_is_said(tmp_path):
    table = write(tmp_path, SLICES, {1: slice_features(1)})
    with pytest.raises(ValueError, match=r"pool 'global' is of the whole volume, found slice_range \(0.2, 0.8\)"):
        table.pooled([scan(1)], slice_range=(0.2, 0.8))
    with pytest.raises(ValueError, match=r"no pool 'storage' of slices; .* global, cls and patches"):
        table.pooled([scan(1)], pool="storage")
    for wrong in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.9, 0.1)):
        with pytest.raises(ValueError, match="expected two rising numbers from 0"):
            table.slices([scan(1)], slice_range=wrong)
    with pytest.raises(ValueError, match="features of no scan were asked for"):
        table.pooled([])
    with pytest.raises(ValueError, match=r"no features of /data/s9.nii.gz in this table; run extract again"):
        table.pooled([scan(9)])


def test_the_global_feature_is_read_without_the_slices(tmp_path):
    """The file's bytes of the slices are spoilt: whoever reads them meets the checksum."""
    table = write(tmp_path, SLICES, {1: slice_features(1)})
    path = scan_file(tmp_path, 1)
    content = bytearray(path.read_bytes())
    spoilt = content.index(slice_features(1).slices.cls.numpy().tobytes())
    content[spoilt] ^= 1
    path.write_bytes(content)
    np.testing.assert_array_equal(table.pooled([scan(1)]), [[2.5, 15.0]])
    with pytest.raises(ValueError, match=r"damaged features of /data/s1.nii.gz \(the checksum of 'cls' does not fit\)"):
        table.pooled([scan(1)], pool="cls")


def test_a_thousand_scans_of_the_papers_size_are_read_quickly(tmp_path):
    """Fifty stand for them; a thousand may take 2 s (global) and 20 s (slices) on a slow disk."""
    meta = FeatureTableMeta(IDENTITY, "float32", 768, 128)
    cls = torch.randn(128, 768)
    features = Features(cls.mean(dim=0), Layers(cls[0], cls[1], cls[2]), None, SliceFeatures(cls, cls))
    table = write(tmp_path, meta, dict.fromkeys(range(50), features))
    start = time.perf_counter()
    table.pooled(table.scans)
    middle = time.perf_counter()
    table.pooled(table.scans, pool="cls", slice_range=(0.25, 0.75))
    end = time.perf_counter()
    assert middle - start < 2 * 50 / 1000
    assert end - middle < 20 * 50 / 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": {"sha256": "b" * 64, "name": "big"}}, r"encoder 'tiny' \(weights a{12}\), asked for 'big'"),
        ({"identity": {"preparation": {"num_slices": 8}}}, r"holds features prepared as .*4.* asked for .*8"),
        ({"identity": {"reading": {"feature": "mean"}}}, r"holds features read as .*class token.* asked for .*mean"),
        ({"precision": "bfloat16"}, "holds features computed in float32, asked for bfloat16"),
    ],
)
def test_another_encoder_preparation_reading_or_precision_is_refused(tmp_path, change, message):
    FeatureTableWriter(tmp_path, SLICES).close()
    FeatureTableWriter(tmp_path, SLICES).close()  # the same may go on
    identity = dataclasses.replace(IDENTITY, **change.get("identity", {}))
    other = dataclasses.replace(SLICES, identity=identity, precision=change.get("precision", "float32"))
    assert other.key != SLICES.key
    with pytest.raises(ValueError, match=message):
        FeatureTableWriter(tmp_path, other)


def test_a_file_that_came_from_another_table_is_refused(tmp_path):
    """Same shapes, another precision."""
    other = write(tmp_path / "other", dataclasses.replace(SLICES, precision="bfloat16"), {1: slice_features(1)})
    table = write(tmp_path / "table", SLICES, {1: slice_features(1)})
    scan_file(tmp_path / "table", 1).write_bytes(scan_file(other.table_dir, 1).read_bytes())
    with pytest.raises(ValueError, match="made by another encoder, preparation or precision than this table"):
        table.pooled([scan(1)])


def test_features_without_the_file_that_says_whose_they_are_are_refused(tmp_path):
    write(tmp_path, SLICES, {1: slice_features(1)})
    (tmp_path / "features.json").unlink()
    with pytest.raises(ValueError, match=r"holds features but no features.json that says whose they are"):
        FeatureTableWriter(tmp_path, SLICES)


def test_a_finished_file_that_a_killed_run_did_not_list_is_kept_and_listed(tmp_path):
    killed = FeatureTableWriter(tmp_path, SLICES)
    save_features(tmp_path, SLICES, scan(1), slice_features(1))
    assert not (tmp_path / "scans.tsv").exists()
    with pytest.raises(ValueError, match=r"no scans.tsv, .* run extract again, without --part"):
        FeatureTable(tmp_path)
    with FeatureTableWriter(tmp_path, killed.meta) as writer:
        assert writer.keep(scan(1))
        assert not writer.keep(scan(2))
    assert FeatureTable(tmp_path).scans == [scan(1)]


def test_features_older_than_their_scan_are_deleted_and_not_listed(tmp_path):
    with FeatureTableWriter(tmp_path, SLICES) as writer:
        writer.add(scan(1), slice_features(1))
        writer.add(scan(2), slice_features(2))
        assert not writer.keep(scan(1), newer_than=scan_file(tmp_path, 1).stat().st_mtime + 1)
    assert FeatureTable(tmp_path).scans == [scan(2)]
    assert not scan_file(tmp_path, 1).exists()


def test_features_that_are_not_finite_or_of_another_shape_are_refused_and_leave_nothing(tmp_path):
    writer = FeatureTableWriter(tmp_path, SLICES)
    broken = slice_features(1)
    broken.slices.cls[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"features of /data/s1.nii.gz: values are not finite: cls 1\. Look at"):
        writer.add(scan(1), broken)
    for wrong in (slice_features(1, num_slices=5), slice_features(1, dim=1), volume_features(1)):
        with pytest.raises(ValueError, match=r"found shapes .*; expected .*'cls': \(4, 2\)"):
            writer.add(scan(1), wrong)
    assert not writer.keep(scan(1))
    assert not list(tmp_path.glob("scans/*"))


def test_a_folder_that_is_no_table_or_of_another_version_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no features.json here; expected a folder made by extract"):
        FeatureTable(tmp_path)
    FeatureTableWriter(tmp_path, SLICES).close()
    path = tmp_path / "features.json"
    content = json.loads(path.read_text())
    for version in (1, 99):
        path.write_text(json.dumps({**content, "version": version}))
        with pytest.raises(ValueError, match=rf"version {version}; expected .* version 2; extract again"):
            FeatureTable(tmp_path)
        with pytest.raises(ValueError, match=rf"version {version}; expected .* version 2; extract again"):
            FeatureTableWriter(tmp_path, SLICES)
    path.write_text(json.dumps({**content, "precision": "bfloat16"}))
    with pytest.raises(ValueError, match=r"features.json: its key is not that of .*: it was edited; extract again"):
        FeatureTable(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"features.json: damaged"):
        FeatureTable(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-4], lambda data: data[:20], lambda data: b"", lambda d: d + d])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, damage):
    table = write(tmp_path, SLICES, {1: slice_features(1)})
    path = scan_file(tmp_path, 1)
    path.write_bytes(damage(path.read_bytes()))
    for read in (table.pooled, table.slices, lambda scans: table.layer(scans, "mid")):
        with pytest.raises(ValueError, match=rf"{path.name}: damaged features of /data/s1.* delete the file and run"):
            read([scan(1)])


def test_equal_features_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, SLICES, {1: slice_features(1)})
    assert scan_file(tmp_path / "a", 1).read_bytes() == scan_file(tmp_path / "b", 1).read_bytes()


def test_a_table_without_scans_opens_and_is_empty(tmp_path):
    FeatureTableWriter(tmp_path, SLICES).close()
    write_scans(tmp_path / "scans.tsv", [])
    assert len(FeatureTable(tmp_path)) == 0
