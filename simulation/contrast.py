"""From tissue fractions to what the scanner stores: signal, bias field, Rician noise, scale and offset."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from braindino.simulation.anatomy import TISSUES, interpolate_lattice, lattice_axes
from braindino.simulation.protocols import Grid
from braindino.simulation.tumor import COMPARTMENTS

#: All that a voxel can hold, in the order of the fraction arrays.
MATERIALS = (*TISSUES, *COMPARTMENTS)

# Signal of pure material relative to white matter on T1, in the order of MATERIALS: CSF, grey, white, vessel, necrosis,
# oedema, enhancing. Ranks follow the textbook: T1 has dark CSF and bright white matter, T2 the reverse, FLAIR is T2
# without free water; flowing blood is dark except after gadolinium.
SIGNALS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "T1": (0.24, 0.70, 1.00, 0.36, 0.40, 0.70, 0.62),
        "T1c": (0.25, 0.80, 1.02, 3.40, 0.42, 0.74, 1.90),
        "T2": (1.55, 0.78, 0.54, 0.30, 1.35, 1.15, 0.92),
        "FLAIR": (0.16, 0.84, 0.66, 0.24, 0.60, 1.40, 1.12),
    }
)
# Gain of the template's texture, which is the residual of a T1.
TEXTURE_GAIN: Mapping[str, float] = MappingProxyType({"T1": 1.0, "T1c": 1.0, "T2": -0.7, "FLAIR": -0.5})
# Standard deviation of the logarithm of each material's signal from scan to scan.
SIGNAL_VARIATION = 0.03


def draw_image(
    rng: np.random.Generator,
    sequence: str,
    *,
    fractions: np.ndarray,
    texture: np.ndarray,
    brain: np.ndarray,
    grid: Grid,
) -> np.ndarray:
    """One image as the scanner stores it: (x, y, z) int16, 0 outside the brain and at least 1 inside.

    Args:
        rng: draws this scan's signal variation, bias field and noise.
        sequence: a name of ``SIGNALS``.
        fractions: (7, n) of ``MATERIALS`` in the n voxels of the brain.
        texture: (n,) of the same voxels.
        brain: (x, y, z) bool with n true voxels.
        grid: the protocol's scale, offset, noise and bias are applied.
    """
    protocol = grid.protocol
    levels = np.array(SIGNALS[sequence], dtype=np.float32)
    levels *= np.exp(rng.normal(0, SIGNAL_VARIATION, len(levels))).astype(np.float32)
    signal = levels @ fractions + np.float32(TEXTURE_GAIN[sequence]) * texture
    signal *= np.exp(protocol.bias * _draw_bias(rng, grid)[brain])
    real, imaginary = protocol.noise * rng.standard_normal((2, len(signal)), dtype=np.float32)
    stored = protocol.offset + protocol.scale * np.hypot(np.maximum(signal, 0) + real, imaginary)
    image = np.zeros(brain.shape, dtype=np.int16)
    image[brain] = np.clip(np.rint(stored), 1, np.iinfo(np.int16).max)
    return image


def _draw_bias(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """(x, y, z) sum of random slow waves, mean about 0 and standard deviation about 1 over the field of view."""
    field = np.zeros(tuple(len(axis) for axis in lattice_axes()))
    points = np.meshgrid(*(np.linspace(-1, 1, len(axis)) for axis in lattice_axes()), indexing="ij", sparse=True)
    for _ in range(6):
        wave = sum(frequency * axis for frequency, axis in zip(rng.uniform(-2.2, 2.2, 3), points, strict=True))
        field += rng.normal() * np.cos(wave + rng.uniform(0, 2 * np.pi))
    return interpolate_lattice((field - field.mean()) / field.std(), grid.centres)
