"""Gliomas: make-up, nesting, growth, mass effect."""

import numpy as np
import pytest

from braindino.simulation.tumor import (
    CORE_SHARE,
    NECROSIS_SHARE,
    Tumor,
    draw_tumor,
    grow,
    label_voxels,
    near_tumor,
    push_tissue,
    tumor_fractions,
)

SITE = np.array([[30.0, -10.0, 25.0]])


def round_tumor(**changes) -> Tumor:
    """A tumour without irregularities around ``SITE``."""
    values = {
        "centre": SITE[0],
        "radius": 20.0,
        "core_share": 0.343,
        "necrosis_share": 0.125,
        "mass_effect": 0.2,
        "outline": np.zeros((3, 37, 37, 37), dtype=np.float32),
    }
    return Tumor(**(values | changes))


def labels_on_cube(tumor: Tumor, *, white: float = 0.875) -> np.ndarray:
    """Labels on a 1 mm cube of 81 mm around the centre. At the default the tissue neither draws nor repels oedema."""
    at = np.indices((81, 81, 81)).reshape(3, -1) - 40 + tumor.centre[:, None]
    fractions, _ = tumor_fractions(at, np.full(at.shape[1], white), np.zeros(at.shape[1]), tumor)
    return label_voxels(fractions).reshape(81, 81, 81)


def test_volumes_of_a_round_tumour_are_those_of_its_spheres():
    labels = labels_on_cube(round_tumor())
    whole = 4 / 3 * np.pi * 20**3
    assert (labels > 0).sum() == pytest.approx(whole, rel=0.03)
    assert np.isin(labels, (1, 3)).sum() == pytest.approx(0.343 * whole, rel=0.05)
    assert (labels == 1).sum() == pytest.approx(0.125 * 0.343 * whole, rel=0.1)
    # From the centre outwards: necrosis, enhancement, oedema, healthy.
    np.testing.assert_array_equal(labels[[40, 45, 50, 57, 65], 40, 40], [1, 1, 3, 2, 0])


def test_oedema_reaches_further_in_white_matter_and_never_into_csf():
    tumor = round_tumor()
    assert (labels_on_cube(tumor, white=1.0) == 2).sum() > 1.3 * (labels_on_cube(tumor, white=0.0) == 2).sum()
    outside_core = tumor.centre[:, None] + [[17.0], [0.0], [0.0]]
    in_csf, _ = tumor_fractions(outside_core, np.zeros(1), np.ones(1), tumor)
    assert in_csf[1, 0] == 0


def test_fractions_never_exceed_the_whole_and_vanish_out_of_reach():
    tumor = draw_tumor(np.random.default_rng(1), idh="wildtype", sites=SITE)
    at = np.random.default_rng(2).uniform(-80, 80, (3, 20000)) + SITE[0][:, None]
    fractions, _ = tumor_fractions(at, np.ones(20000), np.zeros(20000), tumor)
    assert fractions.min() >= 0 and fractions.sum(axis=0).max() <= 1 + 1e-6
    out_of_reach = np.setdiff1d(np.arange(20000), near_tumor(at, tumor))
    assert len(out_of_reach) > 10000
    assert fractions[:, out_of_reach].max() < 0.01


def test_mutants_have_less_necrosis_and_enhancement():
    shares = {}
    for idh in ("mutant", "wildtype"):
        tumors = [draw_tumor(np.random.default_rng(seed), idh=idh, sites=SITE) for seed in range(40)]
        shares[idh] = np.array([[t.core_share, t.necrosis_share] for t in tumors])
        assert (shares[idh][:, 0] >= CORE_SHARE[idh][0]).all() and (shares[idh][:, 1] <= NECROSIS_SHARE[idh][1]).all()
    assert (shares["mutant"].mean(axis=0) < 0.6 * shares["wildtype"].mean(axis=0)).all()
    necrosis, enhancing = (
        {idh: s[:, 0] * part(s[:, 1]) for idh, s in shares.items()} for part in (lambda n: n, lambda n: 1 - n)
    )
    assert necrosis["mutant"].mean() < necrosis["wildtype"].mean()
    assert enhancing["mutant"].mean() < enhancing["wildtype"].mean()


def test_growth_enlarges_the_same_tumour():
    tumor = draw_tumor(np.random.default_rng(0), idh="mutant", sites=SITE)
    later = grow(tumor, years=2.0, rate=0.1)
    assert later.radius == pytest.approx(1.2 * tumor.radius)
    assert later.outline is tumor.outline and later.centre is tumor.centre
    before, after = (labels_on_cube(t) > 0 for t in (tumor, later))
    assert 1.5 < after.sum() / before.sum() < 2.0
    assert (before & after).sum() > 0.98 * before.sum()


def test_the_mass_effect_pushes_tissue_away_and_never_folds_it():
    tumor = round_tumor(mass_effect=0.3)
    line = np.linspace(-80, 80, 801)
    positions = tumor.centre[:, None] + np.stack([line, 0 * line, 0 * line])
    shown = push_tissue(positions, tumor)[0] - tumor.centre[0]
    assert (np.diff(shown) > 0).all()
    # What is seen at 15 mm was nearer to the centre before: it has been pushed outwards, on either side.
    assert 0 < shown[np.argmin(np.abs(line - 15))] < 14
    assert -14 < shown[np.argmin(np.abs(line + 15))] < 0
    assert shown[-1] == pytest.approx(80, abs=0.2)
