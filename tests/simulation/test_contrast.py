"""The signal model: textbook order of the tissues, noise, offset, integer storage."""

from dataclasses import replace

import numpy as np
import pytest

from braindino.manifest import SEQUENCES
from braindino.simulation import contrast
from braindino.simulation.contrast import MATERIALS, SIGNALS, draw_image
from braindino.simulation.protocols import PROTOCOLS, Grid

QUIET = replace(PROTOCOLS[0], spacing=(8.0, 8.0, 8.0), thickness=8.0, noise=0.0, bias=0.0, scale=1000.0, offset=50.0)


def image_of_pure_materials(sequence: str, protocol=QUIET) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Stored values of many voxels of each material, and the whole image."""
    grid = Grid(protocol)
    brain = np.zeros(grid.shape, dtype=bool)
    brain[2:-2, 2:-2, 2:-2] = True
    which = np.arange(brain.sum()) % len(MATERIALS)
    fractions = np.eye(len(MATERIALS), dtype=np.float32)[:, which]
    texture = np.zeros(len(which), dtype=np.float32)
    rng = np.random.default_rng(0)
    image = draw_image(rng, sequence, fractions=fractions, texture=texture, brain=brain, grid=grid)
    return {material: image[brain][which == i] for i, material in enumerate(MATERIALS)}, image


def test_every_sequence_has_a_signal_for_every_material():
    assert tuple(SIGNALS) == SEQUENCES == tuple(contrast.TEXTURE_GAIN)
    assert all(len(levels) == len(MATERIALS) for levels in SIGNALS.values())


def test_tissues_have_the_textbook_order():
    t1, t1c, t2, flair = (
        {name: values.mean() for name, values in image_of_pure_materials(sequence)[0].items()} for sequence in SEQUENCES
    )
    assert t1["csf"] < t1["grey"] < t1["white"]
    assert t2["white"] < t2["grey"] < t2["csf"]
    assert flair["csf"] < flair["white"] < flair["grey"] < flair["edema"]
    assert t1c["enhancing"] > 1.3 * t1c["white"] and t1["enhancing"] < 0.8 * t1["white"]
    assert t1c["vessel"] > 1.3 * t1c["white"] and t1["vessel"] < 0.5 * t1["white"]
    assert t2["necrosis"] > t2["edema"] > t2["white"]


def test_values_are_scaled_shifted_and_stored_as_integers():
    materials, image = image_of_pure_materials("T1")
    assert image.dtype == np.int16
    # White matter is 1 by definition, up to the variation between scans.
    assert materials["white"][0] == pytest.approx(1050, rel=0.12)
    assert np.ptp(materials["white"]) == 0
    assert image[0].max() == 0 and image[2:-2, 2:-2, 2:-2].min() >= 1


def test_noise_is_rician():
    # In pure air-like signal the magnitude of two Gaussian channels is Rayleigh: mean sigma * sqrt(pi / 2).
    protocol = replace(QUIET, spacing=(4.0, 4.0, 4.0), thickness=4.0, offset=0.0, noise=0.05, scale=10000.0)
    grid = Grid(protocol)
    brain = np.ones(grid.shape, dtype=bool)
    empty = np.zeros((len(MATERIALS), brain.sum()), dtype=np.float32)
    rng = np.random.default_rng(0)
    image = draw_image(rng, "T1", fractions=empty, texture=empty[0], brain=brain, grid=grid)
    assert image.mean() == pytest.approx(500 * np.sqrt(np.pi / 2), rel=0.01)
    assert image.std() == pytest.approx(500 * np.sqrt(2 - np.pi / 2), rel=0.01)


def test_the_bias_field_is_smooth_and_as_strong_as_the_protocol_says():
    materials, _ = image_of_pure_materials("T1", replace(QUIET, bias=0.1, offset=0.0, scale=5000.0))
    logarithm = np.log(materials["white"].astype(float))
    assert 0.05 < logarithm.std() < 0.15
    assert np.median(np.abs(np.diff(logarithm))) < 0.05
