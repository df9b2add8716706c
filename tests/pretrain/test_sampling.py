"""Which slices an iteration sees: order, weights, exclusions, crop sizes."""

import math
from pathlib import Path

import numpy as np
import pytest

from braindino.leakage import Crosswalk, Exposure, find_overlaps
from braindino.manifest import Scan
from braindino.pretrain.config import SamplingConfig, overlay
from braindino.pretrain.exclusion import read_exclusion
from braindino.pretrain.randomness import numpy_generator
from braindino.pretrain.recipes import DEBUG, STAGE2
from braindino.pretrain.sampling import (
    SliceSampler,
    crop_pair_of_each_iteration,
    expected_shares,
    scan_weights,
    share_lines,
)
from braindino.pretrain.train import parse_arguments

FORTY_EIGHT = np.repeat(np.arange(8), 6)


def scan(subject: str, *, cohort: str = "site", sequence: str = "T1", **hashes: str) -> Scan:
    return Scan(f"/data/{cohort}_{subject}_{sequence}.nii.gz", cohort, subject, sequence=sequence, **hashes)


def unweighted_order(scan_index: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The order of runs from before there were weights: it must never change, or old runs resume differently."""
    rng = numpy_generator(seed, epoch, "slices")
    shuffled = rng.permutation(len(scan_index))
    by_scan = shuffled[np.argsort(scan_index[shuffled], kind="stable")]
    _, first, counts = np.unique(scan_index[by_scan], return_index=True, return_counts=True)
    number = np.arange(len(by_scan)) - np.repeat(first, counts)
    place = (number + rng.random(len(by_scan))) / np.repeat(counts, counts)
    return by_scan[np.argsort(place, kind="stable")]


def test_every_slice_is_seen_once_per_epoch_also_across_batches() -> None:
    sampler = SliceSampler(FORTY_EIGHT, batch_size=5, seed=0)
    drawn = np.concatenate([sampler.indices_of(i) for i in range(48)])  # 240 draws: five epochs of 48
    for epoch in range(5):
        assert sorted(drawn[48 * epoch : 48 * (epoch + 1)]) == list(range(48))
    assert not np.array_equal(drawn[:48], drawn[48:96])


def test_the_batch_of_an_iteration_does_not_depend_on_those_before() -> None:
    walked, fresh = (SliceSampler(FORTY_EIGHT, batch_size=5, seed=0) for _ in range(2))
    batches = [walked.indices_of(i) for i in range(30)]
    assert np.array_equal(fresh.indices_of(29), batches[29]) and np.array_equal(fresh.indices_of(4), batches[4])
    other_seed = SliceSampler(FORTY_EIGHT, batch_size=5, seed=1)
    assert not np.array_equal(other_seed.indices_of(4), batches[4])


def test_slices_of_one_scan_are_spread_over_batches() -> None:
    scan_index = np.repeat(np.arange(50), 128)
    sampler = SliceSampler(scan_index, batch_size=64, seed=0)
    most = max(np.bincount(scan_index[sampler.indices_of(i)]).max() for i in range(100))
    # 64 of 6,400 slices are 1.28 per scan; even places allow ceil(1.28) + 1, plain shuffling gives 7 and more.
    assert most <= 3


def test_fewer_slices_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="batch of 64 slices cannot be drawn from 48 usable slices"):
        SliceSampler(FORTY_EIGHT, batch_size=64, seed=0)


@pytest.mark.parametrize("weights", [None, np.ones(300), np.full(300, 0.3)])
def test_equal_weights_give_the_order_of_runs_without_weights(weights: np.ndarray | None) -> None:
    scan_index = np.repeat(np.arange(300), np.random.default_rng(0).integers(1, 140, 300))
    sampler = SliceSampler(scan_index, batch_size=32, seed=5, scan_weights=weights)
    for epoch in (0, 3):
        assert np.array_equal(sampler.epoch_order(epoch), unweighted_order(scan_index, seed=5, epoch=epoch))


def test_equal_weights_with_exclusions_give_the_order_of_the_slices_that_are_left() -> None:
    weights = np.array([1.0, 0, 1, 1, 0, 1, 1, 1])
    sampler = SliceSampler(FORTY_EIGHT, batch_size=4, seed=5, scan_weights=weights)
    left = np.flatnonzero(weights[FORTY_EIGHT])
    assert np.array_equal(sampler.indices, left)
    assert np.array_equal(sampler.epoch_order(2), left[unweighted_order(FORTY_EIGHT[left], seed=5, epoch=2)])


def test_the_share_of_a_group_is_its_weight_times_its_size() -> None:
    # 100 scans of weight 1, 50 of weight 3, 10 of weight 0.2, 5 of weight 0; 20 slices each.
    weights = np.repeat([1.0, 3.0, 0.2, 0.0], [100, 50, 10, 5])
    scan_index = np.repeat(np.arange(165), 20)
    sampler = SliceSampler(scan_index, batch_size=64, seed=1, scan_weights=weights)
    assert len(sampler.indices) == 3200
    drawn = np.concatenate([sampler.epoch_order(epoch) for epoch in range(10)])
    groups = np.repeat([0, 1, 2, 3], [100, 50, 10, 5])[scan_index[drawn]]
    expected = np.array([100, 150, 2, 0]) / 252
    # Systematic: not only in expectation, but to a draw or two per epoch.
    assert np.bincount(groups, minlength=4) / len(drawn) == pytest.approx(expected, abs=2 / 3200)


def test_weighted_draws_are_even_over_slices_and_leave_none_out() -> None:
    weights = np.random.default_rng(0).choice([0.0, 0.07, 0.5, 1.0, 2.3], size=80)
    scan_index = np.repeat(np.arange(80), 16)
    sampler = SliceSampler(scan_index, batch_size=16, seed=2, scan_weights=weights)
    expected = (weights / weights[weights > 0].mean())[scan_index]
    counts = np.array([np.bincount(sampler.epoch_order(e), minlength=1280) for e in range(60)])
    assert (counts.sum(axis=1) == len(sampler.indices)).all()
    assert ((counts >= np.floor(expected)) & (counts <= np.ceil(expected))).all()
    assert (counts[:, expected == 0] == 0).all()
    for index in np.flatnonzero(expected > 0):
        window = math.ceil(2 / expected[index]) + 1
        seen = np.convolve(counts[:, index], np.ones(window), mode="valid")
        assert seen.min() >= 1, f"slice {index}, expected {expected[index]:.3f} times an epoch"


def test_weighted_slices_of_one_scan_and_copies_of_one_slice_are_spread_over_batches() -> None:
    weights = np.where(np.arange(50) < 10, 4.0, 0.5)
    scan_index = np.repeat(np.arange(50), 128)
    sampler = SliceSampler(scan_index, batch_size=64, seed=0, scan_weights=weights)
    # Scans of weight 4 make 2/3 of the draws: 64 * 2/3 / 10 = 4.3 of each in a batch; plain shuffling gives 13.
    for iteration in range(100):
        indices = sampler.indices_of(iteration)
        assert np.bincount(scan_index[indices]).max() <= 6
        assert len(set(indices)) == 64


def test_weighted_batches_do_not_depend_on_those_before() -> None:
    weights = np.arange(8.0)
    walked, fresh = (SliceSampler(FORTY_EIGHT, batch_size=5, seed=0, scan_weights=weights) for _ in range(2))
    batches = [walked.indices_of(i) for i in range(40)]
    assert np.array_equal(fresh.indices_of(39), batches[39]) and np.array_equal(fresh.indices_of(4), batches[4])


def test_weights_multiply_and_excluded_subjects_weigh_nothing() -> None:
    scans = [scan("1"), scan("1", sequence="FLAIR"), scan("1", cohort="other"), scan("2", cohort="other")]
    weights = scan_weights(scans, by_cohort={"other": 3.0}, by_sequence={"FLAIR": 0.5}, excluded=frozenset({"other/2"}))
    assert weights.tolist() == [1.0, 0.5, 3.0, 0.0]
    shares = expected_shares(scans, np.repeat(np.arange(4), [10, 10, 5, 5]), weights)
    assert shares == {
        ("other", "T1"): (10, pytest.approx(0.5)),
        ("site", "FLAIR"): (10, pytest.approx(1 / 6)),
        ("site", "T1"): (10, pytest.approx(1 / 3)),
    }
    assert share_lines(shares, draws=100)[0] == "  other T1: 10 slices, 50.0% of the draws, each 5 times in the run"


def test_weights_of_names_that_the_store_lacks_are_refused_naming_what_it_has() -> None:
    scans = [scan("1"), scan("1", cohort="other", sequence="T2")]
    with pytest.raises(ValueError, match=r"sampling.cohort_weights: no cohort 'ixi' in the store; it has 'other', 's"):
        scan_weights(scans, by_cohort={"ixi": 2.0}, by_sequence={})
    with pytest.raises(ValueError, match=r"sampling.sequence_weights: no sequence 'flair' in .* it has 'T1', 'T2'"):
        scan_weights(scans, by_cohort={}, by_sequence={"flair": 2.0})


@pytest.mark.parametrize("item", ["ixi", "ixi=", "ixi=two", "ixi=-1", "ixi=nan", "ixi=inf", "=2"])
def test_a_weight_that_is_none_is_refused(item: str) -> None:
    with pytest.raises(ValueError, match=r"sampling.cohort_weights: found .*; expected name=weight"):
        SamplingConfig(cohort_weights=(item,))


def test_a_weight_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling.sequence_weights: 'T1' is given twice, 2 and 3; give it once"):
        SamplingConfig(sequence_weights=("T1=2", "T1=3"))


def test_weights_are_read_from_flags_and_from_yaml() -> None:
    flags = ["debug", "--store", "S", "--out", "R", "--sampling.cohort-weights", "ixi=2.0", "oasis t1=0"]
    _, config = parse_arguments(flags)
    assert config.sampling.by_cohort == {"ixi": 2.0, "oasis t1": 0.0} and config.sampling.by_sequence == {}
    values = {"sampling": {"sequence_weights": ["FLAIR=1.5"]}}
    assert overlay(DEBUG, values, source="my.yaml").sampling.by_sequence == {"FLAIR": 1.5}


def test_all_weights_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="batch of 4 slices cannot be drawn from 0 usable slices"):
        SliceSampler(FORTY_EIGHT, batch_size=4, seed=0, scan_weights=np.zeros(8))


def listed(folder: Path, *subjects: str) -> Path:
    path = folder / "held_out.txt"
    path.write_text("# held out\n" + "\n".join(subjects) + "\n")
    return path


def test_excluded_subjects_are_never_drawn(tmp_path: Path) -> None:
    scans = [scan(subject, sequence=sequence) for subject in "abcd" for sequence in ("T1", "T2")]
    exclusion = read_exclusion(listed(tmp_path, "site/b", "", "site/d", "site/not-here"), scans=scans)
    assert exclusion.subjects == {"site/b", "site/d", "site/not-here"}
    assert exclusion.joined == {} and exclusion.lines() == []
    weights = scan_weights(scans, by_cohort={}, by_sequence={}, excluded=exclusion.subjects)
    sampler = SliceSampler(FORTY_EIGHT, batch_size=5, seed=0, scan_weights=weights)
    drawn = np.concatenate([sampler.indices_of(iteration) for iteration in range(20)])
    assert {scans[row].subject for row in FORTY_EIGHT[drawn]} == {"a", "c"}


def test_an_exclusion_list_that_excludes_nobody_is_refused(tmp_path: Path) -> None:
    scans = [scan("a"), scan("b")]
    with pytest.raises(ValueError, match=r"none of its 1 subjects is in the store \(first: 'sites/b'"):
        read_exclusion(listed(tmp_path, "sites/b"), scans=scans)
    with pytest.raises(ValueError, match="found 'b'; expected cohort/subject"):
        read_exclusion(listed(tmp_path, "b"), scans=scans)


def test_who_is_the_same_person_under_another_id_is_excluded_and_told(tmp_path: Path) -> None:
    table = tmp_path / "mapping.csv"
    table.write_text("BraTS2021 ID,UPENN patient id\nBraTS2021_00007,UPENN-GBM-00001_11\n")
    scans = [
        scan("TCGA-02-0003", cohort="test"),
        scan("TCGA-02-0003-01", cohort="tcga-gbm"),  # certain, by the built-in rules
        scan("BraTS2021_00007", cohort="brats"),  # certain, by the user's table
        scan("BraTS-GLI-00008-000", cohort="gli"),  # probable, by its number
        scan("x", cohort="copy", content_hash="c" * 32),  # the same voxels
        scan("9", cohort="test", content_hash="c" * 32),
        scan("1", cohort="site"),  # another spelling of a listed id
        scan("TCGA-02-0004", cohort="tcga-gbm"),  # somebody else
        scan("BraTS2021_00001", cohort="brats"),  # somebody else
    ]
    path = listed(
        tmp_path, "test/TCGA-02-0003", "test/9", "site/sub-1", "upenn/UPENN-GBM-00001", "brats21/BraTS2021_00008"
    )
    exclusion = read_exclusion(path, scans=scans, crosswalk=Crosswalk([table]))
    assert exclusion.joined == {
        "tcga-gbm/TCGA-02-0003-01": "same_subject_by_crosswalk as test/TCGA-02-0003, certain",
        "brats/BraTS2021_00007": "same_subject_by_crosswalk as upenn/UPENN-GBM-00001, certain",
        "gli/BraTS-GLI-00008-000": "same_subject_by_crosswalk as brats21/BraTS2021_00008, probable",
        "copy/x": "same_voxels as test/9, certain",
        "site/1": "same_subject as site/sub-1, certain",
    }
    assert exclusion.lines()[0].startswith("5 subjects that are not on the list are left out with it: tcga-gbm/TCGA-02")
    left = [one for one in scans if one.subject_key not in exclusion.subjects]
    assert [one.subject_key for one in left] == ["tcga-gbm/TCGA-02-0004", "brats/BraTS2021_00001"]
    tested = [Scan("", *key.split("/")) for key in exclusion.subjects]
    assert find_overlaps(Exposure(tuple(left)), tested, Crosswalk([table])) == []
    # Without the table the built-in rules alone decide.
    assert "brats/BraTS2021_00007" not in read_exclusion(path, scans=scans).subjects


def test_a_list_whose_subjects_are_in_the_store_under_other_ids_alone_is_an_exclusion(tmp_path: Path) -> None:
    path = listed(tmp_path, "test/TCGA-02-0003")
    assert read_exclusion(path, scans=[scan("TCGA-02-0003", cohort="tcga-gbm"), scan("1")]).subjects == {
        "test/TCGA-02-0003",
        "tcga-gbm/TCGA-02-0003",
    }


def test_crop_pairs_are_drawn_with_their_ratios() -> None:
    pairs = crop_pair_of_each_iteration(10_000, STAGE2.crops.pair_ratios, seed=0)
    assert np.bincount(pairs, minlength=5) / 10_000 == pytest.approx((0.3, 0.3, 0.3, 0.05, 0.05), abs=0.015)
    assert np.array_equal(pairs, crop_pair_of_each_iteration(10_000, STAGE2.crops.pair_ratios, seed=0))
