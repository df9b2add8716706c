"""CKA against hand-worked cases, an independent Gram form, its invariances and simulated encoders."""

import numpy as np
import pytest
import scipy.stats

from braindino.downstream.cka import Products, align, combine, gram, gram_products, linear_cka


def gram_form(first, second):
    """The paper's words: K = X X', L = Y Y', H = I - 1 1'/n, <HKH, HLH> / sqrt(<HKH, HKH> <HLH, HLH>)."""
    n = len(first)
    H = np.eye(n) - np.ones((n, n)) / n
    K, L = (H @ (x @ x.T) @ H for x in (np.asarray(first, np.float64), np.asarray(second, np.float64)))
    return np.sum(K * L) / np.sqrt(np.sum(K * K) * np.sum(L * L))


def unbiased_form(first, second):
    """HSIC_1 of Song et al. 2012, Eq. 5, with traces of whole matrices."""

    def hsic(K, L):
        n = len(K)
        K, L = (matrix - np.diag(np.diag(matrix)) for matrix in (K, L))
        one = np.ones(n)
        middle = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        return (np.trace(K @ L) + middle - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))

    K, L = first @ first.T, second @ second.T
    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


def draw(rng, n, *, dims=(5, 7), shared=0.5):
    x = rng.standard_normal((n, dims[0]))
    return x, shared * x @ rng.standard_normal(dims) + rng.standard_normal((n, dims[1]))


def test_a_case_by_hand():
    # Of one feature each, CKA is the squared correlation.
    x = np.array([[1.0], [2.0], [3.0], [2.0]])
    y = np.array([[0.0], [4.0], [2.0], [6.0]])
    # x centred (-1, 0, 1, 0), y centred (-3, 1, -1, 3): product 2, squares 2 and 20; 4 / 40.
    assert linear_cka(x, y) == pytest.approx(0.1)
    assert align(x, y, list("abcd")).cka == pytest.approx(0.1)


def test_two_features_that_split_the_scans_alike_and_otherwise():
    # The four corners of a square, by one side and by both: K of both sides is that of the one plus that of the other.
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=float)
    assert linear_cka(corners[:, :1], corners) == pytest.approx(1 / np.sqrt(2))
    assert linear_cka(corners[:, :1], corners[:, 1:]) == pytest.approx(0)


def test_features_and_gram_matrices_give_the_same():
    rng = np.random.default_rng(0)
    for n, dims in ((12, (5, 7)), (40, (3, 90)), (9, (200, 150))):
        x, y = draw(rng, n, dims=dims, shared=0.3)
        x, y = x.astype(np.float32) + 10, y.astype(np.float32)
        assert linear_cka(x, y) == pytest.approx(gram_form(x, y), abs=1e-12)
        found = align(x, y, [str(i) for i in range(n)])
        assert found.cka == pytest.approx(gram_form(x, y), abs=1e-12)
        assert found.debiased == pytest.approx(unbiased_form(x.astype(np.float64), y.astype(np.float64)), abs=1e-9)


def test_rotation_scale_and_shift_change_nothing_and_other_maps_do():
    rng = np.random.default_rng(1)
    x, y = draw(rng, 30)
    turn = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    subjects = [str(i // 2) for i in range(30)]
    first, second = align(x, y, subjects), align(x * 1e-6, 300 * y @ turn + 5, subjects)
    np.testing.assert_allclose(first[:6], second[:6], rtol=1e-8)
    assert align(x, y @ np.diag([9, 1, 1, 1, 1, 1, 1]), subjects).cka != pytest.approx(first.cka, abs=0.01)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))


def test_an_encoder_is_aligned_with_itself():
    x, _ = draw(np.random.default_rng(2), 12)
    found = align(x, 2 * x, list("aabbccddeeff"))
    np.testing.assert_allclose(found[:6], 1, atol=1e-9)


def test_the_values_without_a_subject_are_those_of_the_scans_of_the_others():
    rng = np.random.default_rng(3)
    x, y = draw(rng, 13)
    subjects = np.array(list("baccabdeedffb"))
    products = [gram_products(gram(a), gram(b), subjects) for a, b in ((x, y), (x, x), (y, y))]
    plain = products[0].plain / np.sqrt(products[1].plain * products[2].plain)
    unbiased = products[0].unbiased / np.sqrt(products[1].unbiased * products[2].unbiased)
    for number, kept in enumerate([subjects != "", *(subjects != name for name in "abcdef")]):
        assert plain[number] == pytest.approx(gram_form(x[kept], y[kept]), abs=1e-12)
        assert unbiased[number] == pytest.approx(unbiased_form(x[kept], y[kept]), abs=1e-12)


def test_the_interval_is_students_t_on_fishers_z_of_the_values_without_each_subject():
    rng = np.random.default_rng(4)
    x, y = draw(rng, 15)
    found = align(x, y, [str(i) for i in range(15)])
    without = np.arctanh([gram_form(np.delete(x, i, 0), np.delete(y, i, 0)) for i in range(15)])
    error = np.sqrt(14 / 15 * ((without - without.mean()) ** 2).sum())
    half = scipy.stats.t.ppf(0.975, 14) * error
    expected = np.tanh(np.arctanh(found.cka) + np.array([-half, half]))
    np.testing.assert_allclose([found.low, found.high], expected, atol=1e-9)
    assert found.subjects == 15 and found.method == "95 % jackknife over 15 subjects, Student's t on Fisher's z"


def test_unrelated_encoders_are_aligned_by_the_plain_ratio_alone():
    rng = np.random.default_rng(5)
    subjects = [str(i) for i in range(25)]
    found = [align(rng.standard_normal((25, 300)), rng.standard_normal((25, 300)), subjects) for _ in range(40)]
    assert np.mean([each.cka for each in found]) > 0.9
    assert abs(np.mean([each.debiased for each in found])) < 0.02
    assert all(each.low >= 0 for each in found)


def test_the_interval_covers_and_a_bootstrap_would_not():
    """Encoders that share half of what varies, 30 subjects: what they are aligned to in the long run lies in about 95 %
    of the intervals, and in few of a bootstrap's."""
    rng = np.random.default_rng(6)
    to_x, to_y = rng.standard_normal((2, 6, 40))
    across = np.linalg.norm(0.5 * to_x.T @ to_y) ** 2
    truth = across / np.linalg.norm(to_x.T @ to_x) / np.linalg.norm(to_y.T @ to_y)
    subjects = [str(i) for i in range(30)]
    covered, covered_by_bootstrap = [], []
    for _ in range(100):
        seen = rng.standard_normal((30, 6))
        x, y = seen @ to_x, (0.5 * seen + np.sqrt(0.75) * rng.standard_normal((30, 6))) @ to_y
        found = align(x, y, subjects)
        covered.append(found.debiased_low <= truth <= found.debiased_high)
        draws = [linear_cka(x[rows], y[rows]) for rows in rng.integers(0, 30, (100, 30))]
        low, high = np.percentile(draws, [2.5, 97.5])
        covered_by_bootstrap.append(low <= truth <= high)
    assert np.mean(covered) >= 0.9
    assert np.mean(covered_by_bootstrap) < 0.5


def test_features_that_are_all_equal_have_no_alignment():
    x = np.random.default_rng(7).standard_normal((6, 3))
    same = np.full((6, 4), 0.1, dtype=np.float32)
    assert np.isnan(linear_cka(x, same))
    found = align(x, same, list("abcdef"))
    assert np.isnan(found[:6]).all()


def test_too_few_subjects_have_no_interval():
    x, y = draw(np.random.default_rng(8), 6)
    found = align(x, y, list("aaabbb"))
    assert np.isfinite(found.cka) and np.isnan([found.low, found.high]).all()
    # Without one of three subjects only three scans are left: nothing unbiased can be said of them.
    three = align(x[:5], y[:5], list("aabbc"))
    assert np.isfinite([three.low, three.debiased]).all() and np.isnan(three.debiased_low)


def test_other_numbers_of_scans_are_refused():
    x, y = draw(np.random.default_rng(9), 6)
    with pytest.raises(ValueError, match=r"features of 6 and 5 scans of 6 named subjects"):
        align(x, y[:5], list("abcdef"))
    with pytest.raises(ValueError, match=r"expected the same scans, 4 or more"):
        align(x[:3], y[:3], list("abc"))


def test_combine_needs_no_features():
    one = Products(np.array([4.0, 3.0, 5.0, 4.0]), np.array([1.0, 1.0, 1.0, 1.0]))
    found = combine(Products(np.full(4, 2.0), np.full(4, 0.5)), one, one)
    assert found.cka == 0.5 and found.debiased == 0.5
