"""Splits by subject: what is tested on is never trained on, however many scans a subject has.

Owner of the subject list: a text file with one subject key (``cohort/subject``) per line; ``#`` starts a comment.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from braindino.atomic import write_text


def split_subjects(
    subjects: Iterable[str],
    *,
    test_fraction: float,
    seed: int,
    strata: Mapping[str, str] | None = None,
    person_of: Mapping[str, str] | None = None,
    train_only: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """Train and test subjects, each sorted; disjoint by construction.

    Args:
        subjects: subject keys; repeats (several scans of one subject) count once.
        test_fraction: share of the subjects that goes to the test side, in (0, 1); at least one subject lands on
            each side.
        seed: the split is a function of the set of subjects, the strata and the seed.
        strata: subject -> group; every group is divided in the same proportion, as far as whole subjects allow.
        person_of: subject -> person, where some subjects are one person under two ids (a follow-up); all ids of a
            person land on one side, and persons are what is counted.
        train_only: subjects that must not be tested on; nor are other ids of theirs. They count in the shares: the
            test side is as large as without them, and so is every group's part of it while there are others in it.

    Raises:
        ValueError: fewer than two subjects, a fraction outside (0, 1), a subject without a stratum, or fewer subjects
            that may be tested on than the fraction asks for.
    """
    ids_of = _ids_of_persons(subjects, person_of)
    unique = sorted(ids_of)
    if len(unique) < 2:
        raise ValueError(f"found {len(unique)} subject(s); a split needs at least two")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: found {test_fraction}; expected a share between 0 and 1")

    barred = set(train_only)
    free = {subject for subject in unique if barred.isdisjoint(ids_of[subject])}
    num_test = max(round(test_fraction * len(unique)), 1)
    if len(free) == len(unique):
        num_test = min(num_test, len(unique) - 1)
    if len(free) < num_test:
        raise ValueError(
            f"{len(free)} of {len(unique)} subjects may be tested on, and a test fraction of {test_fraction} asks for "
            f"{num_test}; take a smaller fraction, or let more of them be tested on"
        )

    order = _interleaved(unique, strata, seed=seed, wanted=free)
    tested = set(order[:num_test])
    test = sorted(each for subject in tested for each in ids_of[subject])
    train = sorted(each for subject in unique if subject not in tested for each in ids_of[subject])
    return train, test


def fold_subjects(
    subjects: Iterable[str],
    *,
    num_folds: int,
    seed: int,
    strata: Mapping[str, str] | None = None,
    person_of: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """Disjoint folds, each sorted, that hold every subject once; sizes differ by one person at most.

    Args:
        subjects: subject keys; repeats count once.
        num_folds: two or more, and at most one for each person.
        seed: the folds are a function of the set of subjects, the strata and the seed.
        strata: subject -> group; every fold has its part of every group, as far as whole subjects allow.
        person_of: subject -> person; all ids of a person land in one fold.

    Raises:
        ValueError: fewer persons than folds, or a subject without a stratum.
    """
    ids_of = _ids_of_persons(subjects, person_of)
    if not 2 <= num_folds <= len(ids_of):
        raise ValueError(f"num_folds: found {num_folds} for {len(ids_of)} subjects; expected 2 to {len(ids_of)}")
    # One group after another: every n-th of them holds every group in proportion.
    order = [subject for group in _shuffled_groups(sorted(ids_of), strata, seed=seed) for subject in group]
    return [
        sorted(each for subject in order[number::num_folds] for each in ids_of[subject]) for number in range(num_folds)
    ]


def nested_subsets(subjects: Iterable[str], ratios: Sequence[float], *, seed: int) -> dict[float, list[str]]:
    """For each label ratio the subjects to train on: prefixes of one permutation, so that a smaller set lies in
    every larger one.

    Sizes are rounded to the nearest whole subject, never below one.
    """
    unique = sorted(set(subjects))
    if not unique:
        raise ValueError("found no subjects; expected at least one")
    bad = [ratio for ratio in ratios if not 0 < ratio <= 1]
    if bad:
        raise ValueError(f"ratios: found {bad}; expected shares above 0 and up to 1")
    order = [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]
    return {ratio: sorted(order[: max(1, round(ratio * len(order)))]) for ratio in ratios}


def shared_persons(train: Iterable[str], test: Iterable[str], person_of: Mapping[str, str]) -> list[str]:
    """Test subjects whose person is on the training side, too, under this or another id; sorted."""
    trained = {person_of[subject] for subject in train}
    return sorted({subject for subject in test if person_of[subject] in trained})


def check_disjoint(train: Iterable[str], test: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a subject is on both sides; names up to ten of them.
    """
    overlap = sorted(set(train) & set(test))
    if overlap:
        shown = ", ".join(overlap[:10]) + (" ..." if len(overlap) > 10 else "")
        raise ValueError(
            f"{len(overlap)} subject(s) on both sides of the split: {shown}; split by subject, not by scan"
        )


def read_subjects(path: str | Path) -> list[str]:
    """The subject keys of a list, in its order.

    Raises:
        ValueError: a line is no ``cohort/subject``; names the line.
    """
    subjects = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#", maxsplit=1)[0].strip()
        if not text:
            continue
        cohort, slash, subject = text.partition("/")
        if not (cohort and slash and subject):
            raise ValueError(f"{path}, line {number}: found {text!r}; expected cohort/subject, as in scans.tsv")
        subjects.append(text)
    return subjects


def write_subjects(path: str | Path, subjects: Iterable[str], *, comment: str = "") -> None:
    """Write a subject list, sorted, with a comment saying what it is for, atomically."""
    head = [f"# {comment}"] if comment else []
    write_text(path, "\n".join([*head, *sorted(set(subjects))]) + "\n")


def _ids_of_persons(subjects: Iterable[str], person_of: Mapping[str, str] | None) -> dict[str, list[str]]:
    """First id of each person -> all their ids, sorted: a cohort without second ids is divided as if nobody had
    asked."""
    by_person: dict[str, list[str]] = defaultdict(list)
    for subject in sorted(set(subjects)):
        by_person[subject if person_of is None else person_of[subject]].append(subject)
    return {ids[0]: ids for ids in by_person.values()}


def _shuffled_groups(subjects: Sequence[str], strata: Mapping[str, str] | None, *, seed: int) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for subject in subjects:
        if strata is not None and subject not in strata:
            raise ValueError(f"subject {subject!r} has no stratum; give one for every subject, or none at all")
        groups[strata[subject] if strata is not None else ""].append(subject)
    rng = np.random.default_rng(seed)
    return [[group[i] for i in rng.permutation(len(group))] for _, group in sorted(groups.items())]


def _interleaved(
    subjects: Sequence[str], strata: Mapping[str, str] | None, *, seed: int, wanted: set[str]
) -> list[str]:
    """The wanted ones of ``subjects``, shuffled, so that any prefix holds every group in proportion: the groups are
    interleaved by their relative position."""
    order = sorted(
        ((position + 0.5) / len(group), number, subject)
        for number, group in enumerate(_shuffled_groups(subjects, strata, seed=seed))
        for position, subject in enumerate(subject for subject in group if subject in wanted)
    )
    return [subject for _, _, subject in order]
