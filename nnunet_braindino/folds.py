"""nnU-Net's ``splits_final.json``: who is trained on and who is validated on, fold by fold."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from braindino.records import read_json_list

NUM_FOLDS = 5
FOLD_SEED = 0

FoldRule = Literal["patients", "paper"]
Split = dict[str, list[str]]


def make_folds(subject_of: Mapping[str, str], *, rule: FoldRule = "patients", seed: int = FOLD_SEED) -> list[Split]:
    """The folds under a rule: ``patients`` (``subject_folds``) or ``paper`` (``paper_folds``, which has no seed)."""
    return paper_folds(list(subject_of)) if rule == "paper" else subject_folds(subject_of, seed=seed)


def subject_folds(subject_of: Mapping[str, str], *, seed: int = FOLD_SEED) -> list[Split]:
    """Five folds (or one per subject where there are fewer), no subject on both sides of any.

    Args:
        subject_of: case name -> subject.
        seed: the folds are a function of the set of subjects and the seed.

    Raises:
        ValueError: fewer than two subjects.
    """
    subjects = sorted(set(subject_of.values()))
    if len(subjects) < 2:
        raise ValueError(
            f"found {len(subjects)} subject(s) to train on; expected at least two, one of them for validation"
        )
    order = np.random.default_rng(seed).permutation(len(subjects))
    folds = np.array_split([subjects[i] for i in order], min(NUM_FOLDS, len(subjects)))
    return [
        {
            "train": sorted(name for name, subject in subject_of.items() if subject not in fold),
            "val": sorted(name for name, subject in subject_of.items() if subject in fold),
        }
        for fold in (set(fold.tolist()) for fold in folds)
    ]


def paper_folds(names: Sequence[str]) -> list[Split]:
    """The five folds that nnU-Net makes when it finds none: by case, its own seed, on the sorted names (paper
    sec. 4.3.1, "nnU-Net fold 0"). Time points of one patient may land on both sides.

    Raises:
        ValueError: fewer than five cases.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    if len(names) < NUM_FOLDS:
        raise ValueError(f"found {len(names)} case(s) to train on; the paper's folds need at least {NUM_FOLDS}")
    made = generate_crossval_split(sorted(names), n_splits=NUM_FOLDS)
    return [{side: [str(name) for name in split[side]] for side in ("train", "val")} for split in made]


def leaks_of_dataset(dataset_dir: Path, cases: Collection[str], subject_of: Mapping[str, str]) -> list[str]:
    """Subjects on both sides of the folds of ``dataset_dir/splits_final.json`` whose validation cases are all among
    ``cases``, sorted; none where there is no such file.
    """
    path = dataset_dir / "splits_final.json"
    if not path.exists():
        return []
    splits = read_json_list(path)
    scored = [split for split in splits if set(split["val"]) <= set(cases)]
    owners = {name: subject_of.get(name, name) for split in scored for side in split.values() for name in side}
    return sorted({subject for split in scored for subject in leaking_subjects(split, owners)})


def leaking_subjects(split: Split, subject_of: Mapping[str, str]) -> list[str]:
    """Subjects with cases on both sides of a split, sorted."""
    train, val = ({subject_of[name] for name in split[side]} for side in ("train", "val"))
    return sorted(train & val)
