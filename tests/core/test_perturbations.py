"""Perturbations by hand-worked cases and by values of MONAI 1.6.1 (AdjustContrast, GibbsNoise, RandBiasField)."""

import math

import numpy as np
import pytest

from braindino.perturbations import (
    PAPER_PERTURBATIONS,
    PERTURBATIONS,
    Condition,
    adjust_gamma,
    keep_background,
    multiply_bias,
    multiply_legendre_bias,
    paper_conditions,
    perturb,
    read_condition,
    smooth_field,
    subject_generator,
    truncate_k_space,
    truncate_k_space_sphere,
)


@pytest.fixture
def volume():
    """(5, 6, 4) float32, mean 94, one voxel below 0."""
    return np.round(np.random.default_rng(7).normal(100, 40, (5, 6, 4)), 1).astype(np.float32)


def four_voxels(data):
    return [float(data[index]) for index in ((0, 0, 0), (2, 3, 1), (4, 5, 3), (1, 0, 2))]


def delta(shape):
    """One voxel of 1: every frequency has the same energy."""
    data = np.zeros(shape)
    data[tuple(size // 2 for size in shape)] = 1.0
    return data


def kept_fraction(truncated):
    """Share of k-space that is left of a delta, by Parseval."""
    return float((truncated**2).sum())


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_clean_severity_gives_back_the_very_voxels(name, volume):
    condition = Condition(name, PERTURBATIONS[name].identity)
    assert condition.is_clean
    assert perturb(volume, condition, subject_generator(0, "c/1")) is volume
    assert PERTURBATIONS[name].identity in PERTURBATIONS[name].severities


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_every_perturbation_changes_voxels_the_more_the_severer(name):
    row = PERTURBATIONS[name]
    volume = np.random.default_rng(0).normal(100, 40, (14, 14, 14)).astype(np.float32)
    errors = []
    for severity in sorted(row.severities, key=lambda s: abs(math.log(s)) if name == "gamma" else s):
        data = perturb(volume, Condition(name, severity), subject_generator(0, "c/1"))
        assert data.shape == volume.shape
        assert data.dtype == np.float32
        assert np.isfinite(data).all()
        errors.append(float(np.abs(data - volume).mean()))
    assert errors[0] == 0
    assert min(errors[1:]) > 0
    assert name == "gamma" or errors == sorted(errors)  # gamma 0.5 and 2 are equally far from 1


def test_the_paper_has_thirteen_conditions_besides_the_clean_scans():
    names = [condition.name for condition in paper_conditions(PAPER_PERTURBATIONS)]
    assert names == [
        *("gamma-0.5", "gamma-0.8", "gamma-1.2", "gamma-1.5", "gamma-2"),
        *("gibbs-0.1", "gibbs-0.2", "gibbs-0.3", "gibbs-0.4"),
        *("bias_field-0.1", "bias_field-0.2", "bias_field-0.3", "bias_field-0.4"),
    ]
    assert [read_condition(name).name for name in names] == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gamma", "expected PERTURBATION-SEVERITY such as gamma-0.5"),
        ("blur-0.5", "of gamma, gibbs, bias_field"),
        ("gamma-much", "severity 'much'; expected a number"),
        ("gamma-0", "expected a severity from 0 to 10"),
        ("gamma-nan", "expected a severity from 0 to 10"),
        ("gibbs-1.1", "expected a severity from 0 to 1"),
        ("bias_field-1", r"expected a severity from 0 to 0\.99"),
    ],
)
def test_a_name_that_is_no_condition_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        read_condition(name)


def test_what_is_no_volume_of_finite_numbers_is_refused():
    generator = subject_generator(0, "c/1")
    with pytest.raises(ValueError, match="2 axes of float64; expected a volume"):
        perturb(np.zeros((4, 4)), Condition("gamma", 2.0), generator)
    broken = np.zeros((3, 3, 3))
    broken[1, 1, 1] = np.nan
    with pytest.raises(ValueError, match="1 voxels are NaN or infinite"):
        perturb(broken, Condition("gibbs", 0.1), generator)


def test_gamma_is_the_power_of_the_share_of_the_range():
    data = np.array([-2.0, 0.0, 2.0, 6.0]).reshape(1, 2, 2)
    # Shares 0, 1/4, 1/2 and 1 of a range of 8 above -2.
    assert adjust_gamma(data, 2.0).ravel().tolist() == [-2.0, -1.5, 0.0, 6.0]
    assert adjust_gamma(data, 0.5).ravel().tolist() == pytest.approx([-2.0, 2.0, 8 / math.sqrt(2) - 2, 6.0])


def test_gamma_keeps_zero_background_integers_and_constants():
    data = np.array([0, 0, 3, 1914], dtype=np.int16).reshape(2, 2, 1)
    changed = perturb(data, Condition("gamma", 2.0), subject_generator(0, "c/1"))
    assert changed.ravel()[[0, 1, 3]].tolist() == [0.0, 0.0, 1914.0]
    assert changed.ravel()[2] == pytest.approx(9 / 1914)
    assert (adjust_gamma(np.full((2, 2, 2), 7.0), 2.0) == 7).all()


def test_gamma_is_monai_s_adjust_contrast(volume):
    assert four_voxels(volume) == pytest.approx([100.0, 81.5, 107.7, -0.7])
    half, two = (four_voxels(adjust_gamma(volume, gamma)) for gamma in (0.5, 2.0))
    assert half == pytest.approx([137.803970, 124.436325, 143.001770, -0.7], abs=1e-5)
    assert two == pytest.approx([52.530914, 34.768974, 60.982723, -0.7], abs=1e-5)


@pytest.mark.parametrize("shape", [(32, 32, 32), (40, 40, 26), (64, 64, 8)])
def test_gibbs_strength_does_not_depend_on_the_shape(shape):
    kept = [kept_fraction(truncate_k_space(delta(shape), alpha)) for alpha in (0.0, 0.1, 0.2, 0.3, 0.4)]
    assert kept[0] == pytest.approx(1)
    # The ball of radius (1 - alpha) sqrt(3) within the cube of half-width 1, by counting on a fine grid.
    edges = (np.arange(200) + 0.5) / 200
    squares = edges[:, None, None] ** 2 + edges[None, :, None] ** 2 + edges[None, None, :] ** 2
    expected = [float((squares <= 3 * (1 - alpha) ** 2).mean()) for alpha in (0.1, 0.2, 0.3, 0.4)]
    assert kept[1:] == pytest.approx(expected, abs=0.035)


def test_gibbs_loses_the_energy_of_the_frequencies_that_it_drops_and_keeps_the_mean(volume):
    truncated = truncate_k_space(volume, 0.3)
    frequencies = np.meshgrid(*[2 * np.fft.fftfreq(size) for size in volume.shape], indexing="ij")
    dropped = sum(f**2 for f in frequencies) > 3 * 0.7**2
    spectrum = np.abs(np.fft.fftn(volume.astype(np.float64))) ** 2
    # Parseval: the energy of what is gone.
    assert ((volume - truncated) ** 2).sum() == pytest.approx(spectrum[dropped].sum() / volume.size)
    assert 0 < dropped.mean() < 1
    assert truncated.mean() == pytest.approx(volume.mean(dtype=np.float64))
    np.testing.assert_allclose(truncate_k_space(truncated, 0.3), truncated, atol=1e-9)
    np.testing.assert_allclose(truncate_k_space(volume, 0.0), volume, atol=1e-9)
    np.testing.assert_allclose(truncate_k_space(volume, 1.0), volume.mean(dtype=np.float64), atol=1e-9)


def test_gibbs_rings_beside_an_edge_along_every_axis_alike():
    for axis in range(3):
        line = np.where((np.arange(512) >= 128) & (np.arange(512) < 384), 100.0, 0.0)
        shape = [512 if a == axis else 2 for a in range(3)]
        step = np.broadcast_to(line.reshape([-1 if a == axis else 1 for a in range(3)]), shape)
        ringing = np.moveaxis(truncate_k_space(step, 1 - 0.1 / math.sqrt(3)), axis, 0)[:, 0, 0]
        # A tenth of the frequencies is left: a partial sum, which overshoots by 9 % of the jump on either side.
        assert ringing.max() == pytest.approx(108.95, abs=0.5)
        assert ringing.min() == pytest.approx(-8.95, abs=0.5)


def test_gibbs_of_square_slices_of_odd_size_is_monai_s_gibbs_noise(volume):
    rng = np.random.default_rng(7)
    rng.normal(100, 40, volume.shape)
    slices = np.round(rng.normal(100, 40, (9, 9, 3)), 1).astype(np.float32)
    index = ([0, 4, 8, 1], [0, 2, 8, 5], [0, 1, 2, 1])
    assert truncate_k_space(slices, 0.2, axes=(0, 1))[index].tolist() == pytest.approx(
        [101.950912, 53.957939, 127.460495, 36.173920], abs=1e-4
    )
    assert truncate_k_space(slices, 0.4, axes=(0, 1))[index].tolist() == pytest.approx(
        [107.285896, 87.707306, 103.170944, 46.657387], abs=1e-4
    )


def test_the_slices_of_gibbs_slices_do_not_see_each_other(volume):
    other = volume.copy()
    other[:, :, 2] = 0
    condition = Condition("gibbs_slices", 0.3)
    one, two = (perturb(data, condition, subject_generator(0, "c/1")) for data in (volume, other))
    np.testing.assert_array_equal(one[:, :, [0, 1, 3]], two[:, :, [0, 1, 3]])
    assert not np.array_equal(one[:, :, 2], two[:, :, 2])


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, [100.0, 81.500008, 107.700005, -0.699989]),
        (0.2, [89.180771, 86.439995, 117.226120, 3.467415]),
        (0.4, [92.909775, 94.906822, 77.942352, 48.658585]),
    ],
)
def test_the_sphere_is_monai_s_gibbs_noise_in_3d(volume, alpha, expected):
    assert four_voxels(truncate_k_space_sphere(volume, alpha)) == pytest.approx(expected, abs=1e-4)


def test_the_sphere_depends_on_the_shape_and_removes_something_of_a_cube_at_zero_already():
    cube, flat = (kept_fraction(truncate_k_space_sphere(delta(shape), 0.0)) for shape in ((48, 48, 48), (48, 48, 6)))
    assert cube == pytest.approx(0.964, abs=0.005)
    assert flat == pytest.approx(1)


def test_the_field_reaches_exactly_one_on_both_sides_and_knows_no_grid():
    coarse = smooth_field((21, 15, 9), subject_generator(0, "c/1"))
    assert (coarse.min(), coarse.max()) == (-1, 1)
    fine = smooth_field((63, 45, 27), subject_generator(0, "c/1"))
    # Every third voxel of the fine grid has its middle where one of the coarse grid has.
    np.testing.assert_allclose(fine[1::3, 1::3, 1::3], coarse, atol=0.25)
    assert np.corrcoef(fine[1::3, 1::3, 1::3].ravel(), coarse.ravel())[0, 1] > 0.9999


def test_the_field_is_smooth_and_without_direction_on_average():
    fields = [smooth_field((16, 16, 16), subject_generator(0, f"c/{number}")) for number in range(200)]
    assert max(np.abs(np.diff(field, axis=0)).max() for field in fields) < 0.6
    assert abs(np.mean([field.mean() for field in fields])) < 0.05
    # A cubic polynomial: the fourth differences vanish.
    assert np.abs(np.diff(fields[0], n=4, axis=1)).max() < 1e-9


def test_one_subject_has_one_field_and_another_another():
    ones = np.ones((12, 10, 8), dtype=np.float32)
    twice = [multiply_bias(ones, s, subject_generator(0, "c/1")) - 1 for s in (0.1, 0.4)]
    np.testing.assert_allclose(4 * twice[0], twice[1])
    others = [multiply_bias(ones, 0.1, subject_generator(seed, key)) - 1 for seed, key in ((0, "c/2"), (1, "c/1"))]
    assert all(np.abs(other - twice[0]).max() > 0.02 for other in others)


def test_the_bias_field_multiplies_by_one_plus_s_g():
    field = smooth_field((6, 5, 4), subject_generator(0, "c/1"))
    data = np.arange(120, dtype=np.float32).reshape(6, 5, 4) - 20
    changed = perturb(data, Condition("bias_field", 0.4), subject_generator(0, "c/1"))
    np.testing.assert_allclose(changed, data * (1 + 0.4 * field), rtol=1e-6)
    ratio = perturb(np.ones((6, 5, 4)), Condition("bias_field", 0.4), subject_generator(0, "c/1"))
    assert (ratio.min(), ratio.max()) == (pytest.approx(0.6), pytest.approx(1.4))
    assert changed[data == 0] == 0


def test_a_field_over_one_voxel_is_refused():
    with pytest.raises(ValueError, match=r"a grid of \(1, 1, 1\) voxels; expected at least two"):
        smooth_field((1, 1, 1), subject_generator(0, "c/1"))


def test_the_legendre_field_is_monai_s_rand_bias_field(volume):
    assert four_voxels(multiply_legendre_bias(volume, np.full(20, 0.3))) == pytest.approx(
        [16.529888, 76.770866, 43449.28125, -0.697574], rel=1e-5
    )
    drawn = [
        0.34829292247095056, 0.08268766213577057, 0.36744436317516865, 0.19536447551793168, 0.2446975451610583,
        0.30636314259212627, 0.2073671951491773, 0.11872020063048878, 0.07508849146450065, 0.032296507505949944,
        0.295376118479588, 0.17652368915838124, 0.06332394708506049, 0.35197481248051155, 0.10963458479688987,
        0.16569400763242054, 0.1184319730934592, 0.2515151635517933, 0.23193512407581804, 0.23997167864999502,
    ]  # fmt: skip
    assert four_voxels(multiply_legendre_bias(volume, np.array(drawn))) == pytest.approx(
        [66.551018, 99.721214, 5779.388672, -0.744098], rel=1e-5
    )


def test_the_legendre_condition_draws_coefficients_from_0_to_s_once_per_subject():
    ones = np.ones((5, 6, 7))
    mild, strong = (
        np.log(perturb(ones, Condition("bias_field_legendre", s), subject_generator(0, "c/1"))) for s in (0.1, 0.4)
    )
    np.testing.assert_allclose(4 * mild, strong, rtol=1e-4, atol=1e-5)
    # At the corner where all polynomials are 1 the logarithm is the sum of the 20 coefficients.
    assert 0 < strong[-1, -1, -1] < 20 * 0.4


def test_background_is_zero_again_exactly_where_it_was():
    data = np.zeros((8, 8, 8), dtype=np.float32)
    data[2:6, 2:6, 2:6] = 50.0
    ringing = perturb(data, Condition("gibbs", 0.4), subject_generator(0, "c/1"))
    assert (ringing[data == 0] != 0).mean() > 0.9
    kept = keep_background(ringing, data)
    assert (kept[data == 0] == 0).all()
    np.testing.assert_array_equal(kept[data != 0], ringing[data != 0])
    assert kept.dtype == np.float32
