"""Brains: template maps, age, head pose, coordinates."""

import numpy as np
import pytest

from braindino.simulation.anatomy import (
    Pose,
    draw_person,
    draw_pose,
    interpolate_lattice,
    lattice_axes,
    push_ventricles,
    sample_anatomy,
    template_positions,
    tissue_maps,
)
from braindino.simulation.protocols import PROTOCOLS, Grid

STRAIGHT = Pose(np.eye(3), np.zeros(3))
AGES = (20, 40, 60, 80)


@pytest.fixture(scope="module")
def volumes_by_age(template, coarse):
    """Ventricles and grey matter of one person, ml, at ``AGES``."""
    person = draw_person(np.random.default_rng(5), sex="F")
    grid = Grid(coarse[0])
    voxel_ml = np.prod(grid.protocol.spacing) / grid.num_samples / 1000
    unpushed = template_positions(person, STRAIGHT)
    deep = [
        np.abs(axis - centre) < half
        for axis, centre, half in zip(grid.samples, (0, -12, 14), (30, 42, 18), strict=True)
    ]
    near_ventricles = np.logical_and.outer(np.logical_and.outer(deep[0], deep[1]), deep[2]).ravel()
    ventricles, grey_matter = [], []
    for age in AGES:
        positions = push_ventricles(unpushed, person, age, template)
        inside, (csf, grey, _, _), _ = sample_anatomy(positions, tissue_maps(person, age, template), template, grid)
        ventricles.append(csf[near_ventricles[inside] & (csf > 0.7)].sum() * voxel_ml)
        grey_matter.append(grey.sum() * voxel_ml)
    return np.array(ventricles), np.array(grey_matter)


def test_ventricles_grow_with_age(volumes_by_age):
    ventricles, _ = volumes_by_age
    assert (np.diff(ventricles) > 0.05 * ventricles[0]).all(), ventricles
    assert 1.5 < ventricles[-1] / ventricles[0] < 5, ventricles


def test_grey_matter_falls_with_age(volumes_by_age):
    _, grey_matter = volumes_by_age
    assert (np.diff(grey_matter) < 0).all(), grey_matter
    assert 500 < grey_matter[-1] < 0.95 * grey_matter[0] < 1000, grey_matter


def test_tissue_fractions_fill_the_brain_and_nothing_else(template):
    for maps in (template.young, template.old):
        total = maps.sum(axis=0)
        assert maps.min() >= 0
        np.testing.assert_allclose(total[total > 0], 1, atol=1e-5)
    brain_ml = (template.young.sum(axis=0) > 0.5).sum() / 1000
    assert brain_ml == pytest.approx(1886.5, abs=0.1)  # the T1 template above 0
    assert not (template.vessels[template.young.sum(axis=0) == 0]).any()


def test_the_ventricle_pull_points_to_the_ventricle_from_both_sides(template):
    def pull_at(x: float, y: float, z: float) -> np.ndarray:
        index = np.rint((np.array([x, y, z]) - template.affine[:3, 3]) / 2).astype(int)
        return template.ventricle_pull[(slice(None), *index)]

    # Lateral to the body of the ventricles: the way to them is to the left on the right side and the reverse.
    assert pull_at(26, -10, 22)[0] < -0.2 < 0.2 < pull_at(-26, -10, 22)[0]
    assert pull_at(10, -10, 38)[2] < -0.2


def test_tumours_start_in_deep_white_matter_of_both_sides(template):
    sites = template.tumor_sites
    assert len(sites) > 1000
    assert (np.abs(sites[:, 0]) > 16).all()
    assert 0.4 < (sites[:, 0] > 0).mean() < 0.6


def test_the_map_into_the_template_is_one_to_one(template):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        person = draw_person(rng, sex="M")
        positions = push_ventricles(template_positions(person, draw_pose(rng)), person, 85, template)
        steps = [np.gradient(component, 6.0) for component in positions]
        jacobian = np.linalg.det(np.moveaxis(np.array(steps), (0, 1), (-2, -1)))
        # Smallest inside the ventricles, which are enlarged most.
        assert jacobian.min() > 0.05, seed


def test_a_turn_to_the_right_moves_the_nose_as_the_pose_says():
    person = draw_person(np.random.default_rng(0), sex="M")
    still = type(person)(
        size=np.ones(3),
        displacement=np.zeros_like(person.displacement),
        atrophy_pattern=person.atrophy_pattern,
        ventricle_offset=0.0,
        cortex_offset=0.0,
    )
    quarter_turn = Pose(np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), np.array([1.0, 2, 3]))
    positions = template_positions(still, quarter_turn)
    lattice = np.stack(np.meshgrid(*lattice_axes(), indexing="ij"))
    x, y, z = lattice
    # Relative to the centre (0, -17, 5): scanner to head, after undoing the shift.
    np.testing.assert_allclose(positions[0], -(y + 17 - 2))
    np.testing.assert_allclose(positions[1], (x - 1) - 17)
    np.testing.assert_allclose(positions[2], z - 3)


def test_cubic_interpolation_of_a_lattice_is_exact_for_cubics_and_keeps_the_axes_apart():
    x, y, z = np.meshgrid(*lattice_axes(), indexing="ij", sparse=True)
    values = (x / 50) ** 3 + 2 * (y / 50) ** 2 - 3 * (z / 50) + (x / 50) * (z / 50)
    at = Grid(PROTOCOLS[1]).centres
    u, v, w = np.meshgrid(*at, indexing="ij", sparse=True)
    expected = (u / 50) ** 3 + 2 * (v / 50) ** 2 - 3 * (w / 50) + (u / 50) * (w / 50)
    np.testing.assert_allclose(interpolate_lattice(values, at), expected, atol=2e-4)
