"""k-nearest-neighbour probing of frozen features (paper sec. 4.6): no training, so the number speaks of the
features alone.
"""

from collections.abc import Sequence

import numpy as np

QUERIES_AT_A_TIME = 1024


def knn_predict(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    *,
    neighbours: Sequence[int],
    num_classes: int,
) -> dict[int, np.ndarray]:
    """Return, for every k in ``neighbours``, the predicted class of each query, (m,) int64.

    Features are L2-normalised, similarity is the cosine, the class with the most of the k votes wins, and a tie
    goes to the tied class whose voters have the larger summed similarity (paper sec. 4.6; no PCA, no whitening).
    The paper says nothing of what is
    left: of equally similar bank rows at the border of the neighbourhood the earlier row is taken, and of classes
    equal in votes and in similarity the one with the lower index.

    Args:
        bank: (n, D) features of the training subjects.
        bank_labels: (n,) class indices.
        queries: (m, D) features to classify.
        neighbours: the values of k, each between 1 and n.
        num_classes: number of classes; labels are 0 to num_classes - 1.

    Raises:
        ValueError: k is larger than the bank (a smaller neighbourhood under the same name would be another number).
    """
    for k in neighbours:
        if not 1 <= k <= len(bank):
            raise ValueError(
                f"kNN: k = {k}, but the memory bank holds {len(bank)} scans; leave this k out, or give more "
                "training subjects"
            )
    normalised_bank = _l2_normalise(bank)
    predictions: dict[int, list[np.ndarray]] = {k: [] for k in neighbours}
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        similarity = _l2_normalise(queries[start : start + QUERIES_AT_A_TIME]) @ normalised_bank.T
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : max(neighbours)]
        labels, similarity = bank_labels[order], np.take_along_axis(similarity, order, axis=1)
        for k in neighbours:
            predictions[k].append(vote(labels[:, :k], similarity[:, :k], num_classes=num_classes))
    return {k: np.concatenate(parts) if parts else np.empty(0, np.int64) for k, parts in predictions.items()}


def vote(labels: np.ndarray, similarity: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Return the winning class of each row, (m,): most votes, then larger summed similarity, then lower index.

    Args:
        labels: (m, k) classes of the neighbours.
        similarity: (m, k) their cosine similarity to the query.
        num_classes: number of classes.
    """
    cells = (np.arange(len(labels))[:, None] * num_classes + labels).ravel()
    shape = (len(labels), num_classes)
    votes = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    summed = np.bincount(cells, weights=similarity.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    tied = votes == votes.max(axis=1, keepdims=True)
    return np.where(tied, summed, -np.inf).argmax(axis=1)


def _l2_normalise(features: np.ndarray) -> np.ndarray:
    # Mean CLS tokens of one encoder point in nearly the same direction: in float32 their cosines would agree in
    # most digits.
    features = features.astype(np.float64)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norms > 0, norms, 1.0)
