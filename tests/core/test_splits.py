"""Splits: disjoint, stratified, nested, deterministic."""

from collections import Counter
from pathlib import Path

import pytest

from braindino.splits import (
    check_disjoint,
    fold_subjects,
    nested_subsets,
    read_subjects,
    shared_persons,
    split_subjects,
    write_subjects,
)

SUBJECTS = [f"s{i:03d}" for i in range(100)]


def test_sides_are_disjoint_complete_and_of_the_asked_size() -> None:
    train, test = split_subjects(SUBJECTS * 3, test_fraction=0.25, seed=0)
    assert len(test) == 25 and not set(train) & set(test)
    assert sorted(train + test) == SUBJECTS
    check_disjoint(train, test)


def test_the_split_is_a_function_of_the_set_and_the_seed() -> None:
    assert split_subjects(SUBJECTS[::-1], test_fraction=0.2, seed=3) == split_subjects(
        SUBJECTS, test_fraction=0.2, seed=3
    )
    assert split_subjects(SUBJECTS, test_fraction=0.2, seed=3) != split_subjects(SUBJECTS, test_fraction=0.2, seed=4)


def test_every_stratum_is_divided_in_proportion() -> None:
    strata = {s: "rare" if i < 20 else "common" for i, s in enumerate(SUBJECTS)}
    _, test = split_subjects(SUBJECTS, test_fraction=0.3, seed=1, strata=strata)
    assert Counter(strata[s] for s in test) == {"rare": 6, "common": 24}


def test_even_two_subjects_land_on_two_sides() -> None:
    assert sorted(map(len, split_subjects(["a", "b"], test_fraction=0.01, seed=0))) == [1, 1]


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        split_subjects(["a", "a"], test_fraction=0.5, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_subjects(SUBJECTS, test_fraction=1.0, seed=0)
    with pytest.raises(ValueError, match="'s000' has no stratum"):
        split_subjects(SUBJECTS, test_fraction=0.5, seed=0, strata={"s001": "x"})


def test_label_ratios_are_nested() -> None:
    subsets = nested_subsets(SUBJECTS, (0.1, 0.2, 0.4, 0.6, 0.8, 1.0), seed=5)
    assert [len(subsets[r]) for r in sorted(subsets)] == [10, 20, 40, 60, 80, 100]
    for smaller, larger in zip(sorted(subsets), sorted(subsets)[1:], strict=False):
        assert set(subsets[smaller]) < set(subsets[larger])
    assert nested_subsets(["a"], (0.1,), seed=0) == {0.1: ["a"]}
    with pytest.raises(ValueError, match="ratios: found"):
        nested_subsets(SUBJECTS, (0.0,), seed=0)


def test_an_overlap_is_named() -> None:
    with pytest.raises(ValueError, match=r"1 subject\(s\) on both sides of the split: b"):
        check_disjoint(["a", "b"], ["b", "c"])


def test_a_subject_list_survives_a_round_trip_and_names_a_bad_line(tmp_path: Path) -> None:
    write_subjects(tmp_path / "test.txt", ["ixi/2", "ixi/1", "ixi/2"], comment="held out")
    assert (tmp_path / "test.txt").read_text() == "# held out\nixi/1\nixi/2\n"
    assert read_subjects(tmp_path / "test.txt") == ["ixi/1", "ixi/2"]
    (tmp_path / "test.txt").write_text("ixi/1\n\nsub-7 # no cohort\n")
    with pytest.raises(ValueError, match=r"line 3: found 'sub-7'; expected cohort/subject"):
        read_subjects(tmp_path / "test.txt")


def test_all_ids_of_a_person_land_on_one_side_and_nobody_else_moves() -> None:
    person_of = {s: ("s000" if s in ("s050", "s099") else s) for s in SUBJECTS}
    for seed in range(8):
        train, test = split_subjects(SUBJECTS, test_fraction=0.3, seed=seed, person_of=person_of)
        assert sorted(train + test) == SUBJECTS
        assert len({s in test for s in ("s000", "s050", "s099")}) == 1
        assert len({person_of[s] for s in test}) == round(0.3 * 98)
        assert shared_persons(train, test, person_of) == []
    alone = {s: s for s in SUBJECTS}
    assert split_subjects(SUBJECTS, test_fraction=0.3, seed=1, person_of=alone) == split_subjects(
        SUBJECTS, test_fraction=0.3, seed=1
    )
    assert shared_persons(["s000", "s001"], ["s099", "s002"], person_of) == ["s099"]


def test_subjects_that_only_train_are_never_tested_on_and_count_in_the_shares() -> None:
    strata = {subject: "a" if number < 20 else "b" for number, subject in enumerate(SUBJECTS)}
    barred = SUBJECTS[:10]
    for seed in range(5):
        train, test = split_subjects(SUBJECTS, test_fraction=0.3, seed=seed, strata=strata, train_only=barred)
        assert sorted(train + test) == sorted(SUBJECTS) and not set(test) & set(barred)
        assert len(test) == round(0.3 * len(SUBJECTS))
        # Half of group a is barred, and still as large a part of it is tested on as of group b.
        assert sum(strata[subject] == "a" for subject in test) == 6
    assert split_subjects(SUBJECTS, test_fraction=0.2, seed=3, train_only=["another"]) == split_subjects(
        SUBJECTS, test_fraction=0.2, seed=3
    )
    train, test = split_subjects(["a", "b", "c"], test_fraction=0.5, seed=0, train_only=["a"])
    assert (train, test) == (["a"], ["b", "c"])
    with pytest.raises(ValueError, match=r"1 of 3 subjects may be tested on, and a test fraction of 0.5 asks for 2"):
        split_subjects(["a", "b", "c"], test_fraction=0.5, seed=0, train_only=["a", "c"])


def test_no_id_of_a_person_of_whom_one_only_trains_is_tested_on() -> None:
    person_of = {subject: subject if number > 1 else "one" for number, subject in enumerate(SUBJECTS)}
    for seed in range(5):
        _, test = split_subjects(SUBJECTS, test_fraction=0.5, seed=seed, person_of=person_of, train_only=[SUBJECTS[1]])
        assert not set(test) & set(SUBJECTS[:2])


def test_folds_hold_every_subject_once_and_every_group_in_proportion():
    subjects = [f"c/{number:03d}" for number in range(53)]
    strata = {subject: "ad" if number % 5 == 0 else "cn" for number, subject in enumerate(subjects)}
    folds = fold_subjects(subjects, num_folds=5, seed=0, strata=strata)
    assert sorted(subject for fold in folds for subject in fold) == subjects
    assert {len(fold) for fold in folds} == {10, 11}
    assert {sum(strata[subject] == "ad" for subject in fold) for fold in folds} == {2, 3}
    assert (
        fold_subjects(subjects, num_folds=5, seed=0, strata=strata)
        == folds
        != fold_subjects(subjects, num_folds=5, seed=1)
    )


def test_all_ids_of_a_person_are_in_one_fold_and_there_are_at_most_as_many_folds_as_persons():
    subjects = [f"c/P{number}_{visit}" for number in range(4) for visit in (11, 21)]
    person_of = {subject: subject[:4] for subject in subjects}
    folds = fold_subjects(subjects, num_folds=4, seed=0, person_of=person_of)
    assert [len({person_of[subject] for subject in fold}) for fold in folds] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="num_folds: found 5 for 4 subjects; expected 2 to 4"):
        fold_subjects(subjects, num_folds=5, seed=0, person_of=person_of)
