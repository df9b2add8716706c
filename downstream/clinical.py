"""The baseline that knows no image: what age, sex and other facts of a label table say of the target."""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.linear_model import LinearRegression, LogisticRegression

from braindino.downstream.survival import fit_cox
from braindino.label_table import number_of


def predict_from_facts(
    facts: Mapping[str, Sequence[str]],
    targets: np.ndarray,
    *,
    kind: str,
    num_classes: int,
    train: np.ndarray,
    test: np.ndarray,
) -> np.ndarray:
    """(len(test), K) class probabilities, or (len(test), 1) values or risks.

    Logistic regression for classes, least squares for numbers, Cox for survival.

    Args:
        facts: column -> text of each case, "" where unknown.
        targets: of all cases; see ``cases.Cases``.
        kind: of the target.
        num_classes: of a class.
        train: indices of the training cases.
        test: indices of the test cases.

    Raises:
        ValueError: the facts do not vary among the training cases, or no finite hazard fits them.
    """
    design = design_matrix(facts, train)
    if not design.shape[1]:
        raise ValueError(f"{', '.join(facts)}: the same in all {len(train)} training cases")
    known, asked = design[train], design[test]
    if kind == "survival":
        fitted = fit_cox(known, targets[train, 0], targets[train, 1].astype(bool))
        return fitted.risks(asked)[:, None]
    if kind == "number":
        values: np.ndarray = LinearRegression().fit(known, targets[train]).predict(asked)
        return values[:, None]
    probabilities = np.zeros((len(test), num_classes))
    classes = np.unique(targets[train])
    if len(classes) == 1:
        probabilities[:, classes] = 1.0
    else:
        probabilities[:, classes] = LogisticRegression(max_iter=1000).fit(known, targets[train]).predict_proba(asked)
    return probabilities


def design_matrix(facts: Mapping[str, Sequence[str]], train: np.ndarray) -> np.ndarray:
    """(n, P) float64: numbers standardised by the training cases, with their median where unknown; of categories an
    indicator of each but the most frequent one, unknown ones being that. Columns that do not vary in training are left
    away."""
    columns = []
    for texts in facts.values():
        known = [text for text in texts if text]
        if np.isfinite([number_of(text) for text in known]).all():
            values = np.array([number_of(text) for text in texts])
            if np.isnan(values[train]).all():
                continue
            values = np.where(np.isnan(values), np.nanmedian(values[train]), values)
            columns.append((values - values[train].mean()) / (values[train].std() or 1.0))
        else:
            of_train = [texts[row] for row in train if texts[row]]
            names = sorted(set(of_train), key=lambda name: (-of_train.count(name), name))
            columns += [np.array([float(text == name) for text in texts]) for name in names[1:]]
    varying = [column for column in columns if np.ptp(column[train]) > 0]
    return np.stack(varying, axis=1) if varying else np.empty((len(next(iter(facts.values()), ())), 0))
