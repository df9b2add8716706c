"""Nearest slices against a float64 loop and hand-worked cases."""

from pathlib import Path

import numpy as np
import pytest
import torch

from braindino.encoders.contract import Features, Identity, Layers, SliceFeatures
from braindino.feature_table import FeatureTable, FeatureTableMeta, FeatureTableWriter
from braindino.manifest import Scan
from braindino.slice_neighbours import SliceIndex


def make_scans(*, subjects: int, scans_each: int = 2, cohorts: int = 3) -> list[Scan]:
    return [
        Scan(f"/data/{subject}-{number}.nii.gz", f"cohort{subject % cohorts}", f"s{subject}", f"ses-{number}", "T1")
        for subject in range(subjects)
        for number in range(scans_each)
    ]


def by_loop(scans, features, query, *, count, but_subject=None, one_per_subject=True, but_cohort=None):
    """(scan, place, similarity), one slice after the other, in float64."""
    query = query.astype(np.float64)
    found = []
    for number, scan in enumerate(scans):
        if scan.subject_key == but_subject or scan.cohort == but_cohort:
            continue
        for place, row in enumerate(features[number].astype(np.float64)):
            cosine = float((row * query).sum() / np.sqrt((row**2).sum() * (query**2).sum()))
            found.append((-cosine, number, place))
    chosen, seen = [], set()
    for cosine, number, place in sorted(found):
        if one_per_subject and scans[number].subject_key in seen:
            continue
        seen.add(scans[number].subject_key)
        chosen.append((scans[number].scan_id, place, -cosine))
    return chosen[:count]


@pytest.mark.parametrize("one_per_subject", [True, False])
@pytest.mark.parametrize("but", [{}, {"but_subject": "cohort1/s4"}, {"but_cohort": "cohort2"}])
def test_neighbours_are_those_of_a_loop(one_per_subject, but):
    rng = np.random.default_rng(0)
    scans = make_scans(subjects=12)
    features = rng.standard_normal((len(scans), 5, 16)).astype(np.float32) + 1
    index = SliceIndex(scans, features)
    for query in (features[9, 2], rng.standard_normal(16).astype(np.float32)):
        found = index.nearest(query, count=7, one_per_subject=one_per_subject, **but)
        expected = by_loop(scans, features, query, count=7, one_per_subject=one_per_subject, **but)
        assert [(each.scan.scan_id, each.place) for each in found] == [each[:2] for each in expected]
        np.testing.assert_allclose([each.similarity for each in found], [each[2] for each in expected], atol=1e-12)


def test_order_is_that_of_float64_where_float32_cannot_tell():
    """All slices within 1e-8 of one another in cosine, as those of an encoder that has hardly been trained."""
    rng = np.random.default_rng(1)
    scans = make_scans(subjects=30)
    features = (rng.standard_normal(64) + 1e-4 * rng.standard_normal((len(scans), 3, 64))).astype(np.float32)
    query = features[7, 1]
    found = SliceIndex(scans, features).nearest(query, count=10)
    expected = by_loop(scans, features, query, count=10)
    assert found[-1].similarity > 1 - 1e-6
    assert [(each.scan.scan_id, each.place) for each in found] == [each[:2] for each in expected]


def test_equal_slices_come_in_the_order_of_scans_and_from_below():
    scans = make_scans(subjects=3, scans_each=1)
    features = np.zeros((3, 4, 5), dtype=np.float32)
    features[:, 1:] = (1, 2, 3, 4, 5)
    features[1, 2] *= 3  # longer, and as similar
    found = SliceIndex(scans, features).nearest(features[0, 1], count=20, one_per_subject=False)
    places = [(scans.index(each.scan), each.place) for each in found]
    assert places == [(s, p) for s in range(3) for p in (1, 2, 3)] + [(s, 0) for s in range(3)]
    assert [each.similarity for each in found] == pytest.approx([1.0] * 9 + [0.0] * 3, abs=1e-12)


def test_fewer_are_given_where_there_are_no_more():
    scans = make_scans(subjects=4)
    index = SliceIndex(scans, np.random.default_rng(0).random((8, 2, 3)).astype(np.float32))
    assert len(index.nearest(np.ones(3), count=10)) == 4
    assert len(index.nearest(np.ones(3), count=20, one_per_subject=False)) == 16
    assert index.nearest(np.ones(3), count=10, but_subject=scans[0].subject_key, but_cohort="cohort1")[0].scan in scans
    alone = SliceIndex(scans[:2], np.ones((2, 2, 3), dtype=np.float32))
    assert alone.nearest(np.ones(3), count=3, but_cohort="cohort0") == []


def test_the_slices_of_a_table_are_asked_by_pool(tmp_path: Path):
    scans = make_scans(subjects=3, scans_each=1)
    meta = FeatureTableMeta(Identity("e", "1" * 64, {}, {}), "float32", 4, 2)
    rng = np.random.default_rng(2)
    cls, patches = (rng.random((3, 2, 4)).astype(np.float32) for _ in range(2))
    mean = torch.zeros(4)
    with FeatureTableWriter(tmp_path, meta) as writer:
        for scan, *parts in zip(scans, cls, patches, strict=True):
            kept = SliceFeatures(*map(torch.from_numpy, parts))
            writer.add(scan, Features(mean, Layers(mean, mean, mean), None, kept))
    table = FeatureTable(tmp_path)
    order = [scans.index(next(s for s in scans if s.scan_id == each.scan_id)) for each in table.scans]
    for pool, values in (("cls", cls), ("patches", patches)):
        index = SliceIndex.from_table(table, pool=pool)
        np.testing.assert_array_equal(index.feature(table.scans[1], 1), values[order[1], 1])
        first = index.nearest(values[order[2], 0], count=1)[0]
        assert (first.scan.scan_id, first.place) == (table.scans[2].scan_id, 0)
    some = SliceIndex.from_table(table, table.scans[:1])
    assert {each.scan.scan_id for each in some.nearest(cls[2, 0], count=9)} == {table.scans[0].scan_id}
    with pytest.raises(ValueError, match=r"no slice 2 of .*; it holds 3 scans with slices 0 to 1"):
        SliceIndex.from_table(table).feature(scans[0], 2)


def test_an_encoder_of_volumes_has_no_slices(tmp_path: Path):
    meta = FeatureTableMeta(Identity("of-volumes", "1" * 64, {}, {}), "float32", 4, None)
    mean = torch.zeros(4)
    with FeatureTableWriter(tmp_path, meta) as writer:
        writer.add(Scan("/data/a.nii.gz", "c", "s"), Features(mean, Layers(mean, mean, mean), None, None))
    with pytest.raises(ValueError, match=r"encoder of-volumes reads whole volumes, so this table has no slices"):
        SliceIndex.from_table(FeatureTable(tmp_path))


def test_a_feature_of_another_encoder_is_refused():
    index = SliceIndex(make_scans(subjects=1), np.ones((2, 2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=r"feature of shape \(4,\) .*expected 3 finite numbers that are not all 0"):
        index.nearest(np.ones(4), count=1)
    for bad in (np.zeros(3), np.array([1, np.nan, 1])):
        with pytest.raises(ValueError, match=r"expected 3 finite numbers that are not all 0"):
            index.nearest(bad, count=1)
    with pytest.raises(ValueError, match="0 neighbours were asked for"):
        index.nearest(np.ones(3), count=0)
    with pytest.raises(ValueError, match=r"features of shape \(3, 2, 3\) for 2 scans"):
        SliceIndex(make_scans(subjects=1), np.ones((3, 2, 3), dtype=np.float32))
