import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from braindino.downstream.knn import knn_predict, vote


def test_a_tie_in_votes_goes_to_the_class_with_the_larger_summed_similarity():
    # Two votes each: class 0 with 0.9 + 0.3 = 1.2, class 2 with 0.8 + 0.6 = 1.4. Class 1 is nearest.
    labels = np.array([[1, 0, 2, 2, 0]])
    similarity = np.array([[0.95, 0.9, 0.8, 0.6, 0.3]])
    assert vote(labels, similarity, num_classes=3).tolist() == [2]


def test_most_votes_win_against_a_larger_summed_similarity():
    # Class 1 has the two largest similarities (1.9), class 0 three small ones (0.6).
    labels = np.array([[1, 1, 0, 0, 0]])
    similarity = np.array([[1.0, 0.9, 0.2, 0.2, 0.2]])
    assert vote(labels, similarity, num_classes=2).tolist() == [0]


def test_negative_similarities_do_not_let_an_absent_class_win_a_tie():
    # Class 2 has no vote and a summed similarity of 0, larger than both tied sums.
    labels = np.array([[0, 1]])
    similarity = np.array([[-0.5, -0.2]])
    assert vote(labels, similarity, num_classes=3).tolist() == [1]


def test_classes_equal_in_votes_and_similarity_give_the_lower_index():
    assert vote(np.array([[2, 1]]), np.array([[0.5, 0.5]]), num_classes=3).tolist() == [1]


def test_similarity_is_the_cosine_and_not_the_distance():
    bank = np.array([[10.0, 0.0], [0.6, 0.8]])
    query = np.array([[1.0, 0.1]])  # nearer to the second point, but in the direction of the first
    assert knn_predict(bank, np.array([0, 1]), query, neighbours=[1], num_classes=2)[1].tolist() == [0]


def test_without_ties_the_predictions_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((60, 7)), rng.standard_normal((1100, 7))
    labels = rng.integers(0, 2, 60)
    odd = [1, 3, 5, 51]  # an odd k with two classes cannot tie
    ours = knn_predict(bank, labels, queries, neighbours=odd, num_classes=2)
    for k in odd:
        reference = KNeighborsClassifier(k, metric="cosine").fit(bank, labels).predict(queries)
        assert ours[k].tolist() == reference.tolist()


def test_a_k_larger_than_the_bank_is_refused_and_named():
    with pytest.raises(ValueError, match=r"k = 4, but the memory bank holds 3 scans"):
        knn_predict(np.eye(3), np.arange(3), np.eye(3), neighbours=[1, 4], num_classes=3)
