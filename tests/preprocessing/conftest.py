"""Heads and brains of a realistic size on a coarse grid, so that a scan takes a second."""

from pathlib import Path

import numpy as np
import pytest

from braindino.volume import save_array

SHAPE, SPACING_MM = (40, 48, 36), 4.0


class Phantom:
    """A head on a 4 mm grid in RAS+: brain, skull, scalp, a neck that runs out of the field, and noise in the air."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        x, y, z = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * SPACING_MM for n in SHAPE], indexing="ij")
        self.affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
        self.brain = (x / 60) ** 2 + (y / 74) ** 2 + ((z - 4) / 52) ** 2 < 1
        scalp = (x / 72) ** 2 + (y / 88) ** 2 + ((z - 4) / 64) ** 2 < 1
        neck = (x**2 + y**2 < 45**2) & (z < 0)
        tissue = 300 + 2 * x + y + 0.5 * z + 40 * rng.random(SHAPE)
        air = 5 * rng.random(SHAPE)
        self.head = np.where(self.brain, tissue, np.where(scalp | neck, 800.0, air)).astype(np.float32)
        self.stripped = np.where(self.brain, tissue, 0.0).astype(np.float32)
        self.zeroed_air = np.where(scalp | neck, self.head, 0.0).astype(np.float32)

    def save(self, path: Path, *, stripped: bool = True) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_array(self.stripped if stripped else self.head, self.affine, path, dtype=np.int16)
        return path


@pytest.fixture
def phantom() -> Phantom:
    return Phantom()


@pytest.fixture
def make_phantom() -> type[Phantom]:
    """Phantom(seed): every seed another head."""
    return Phantom
