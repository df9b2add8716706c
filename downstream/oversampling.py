"""Synthetic cases of the smaller classes (SMOTE; paper sec. 4.3.2, PPMI), made of training cases alone."""

import numpy as np

NEIGHBOURS = 5


def oversample(features: np.ndarray, classes: np.ndarray, *, seed: int, whose: str) -> tuple[np.ndarray, np.ndarray]:
    """Return synthetic features (s, D) float32 and their classes (s,), with which all classes are as large as the
    largest.

    A synthetic case lies between a case and one of its 5 nearest of the same class; fewer where a class is smaller.

    Args:
        features: (n, D) of the training cases.
        classes: (n,) class indices.
        seed: of the draws.
        whose: the head, for errors.

    Raises:
        ValueError: a class has a single case, which has no neighbour.
    """
    # Where it is used: every process that trains heads would wait more than a second for it.
    from imblearn.over_sampling import SMOTE

    names, counts = np.unique(classes, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"SMOTE of {whose}: class {names[counts.argmin()]} has 1 training case; expected 2 or more, since a "
            "synthetic case lies between two; use a larger label ratio or smote: false"
        )
    smote = SMOTE(k_neighbors=min(NEIGHBOURS, int(counts.min()) - 1), random_state=seed)
    made, made_classes = smote.fit_resample(features, classes)
    return made[len(features) :].astype(np.float32), made_classes[len(features) :]
