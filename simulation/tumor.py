"""Gliomas: a necrotic core in an enhancing rim, in oedema along the white matter, with mass effect and growth."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

COMPARTMENTS = ("necrosis", "edema", "enhancing")
#: Label values of ``*_dseg.nii.gz``, in the order of ``COMPARTMENTS``.
LABELS = (1, 2, 3)

# Irregular outlines come from a cube of smooth noise around the centre.
NOISE_STEP = 4.0
NOISE_POINTS = 37
# Half width in mm of the partial-volume border between compartments.
BORDER = 0.7
# Ranges of the make-up: share of the core (necrosis and enhancement) in the whole, and of necrosis in the core. They
# overlap a little between mutants and wild types, as in patients.
CORE_SHARE = {"mutant": (0.04, 0.18), "wildtype": (0.13, 0.4)}
NECROSIS_SHARE = {"mutant": (0.04, 0.25), "wildtype": (0.18, 0.6)}


@dataclass(frozen=True)
class Tumor:
    """One tumour at one visit; the outline belongs to the person, the radius grows."""

    centre: np.ndarray
    """(3,) template mm."""
    radius: float
    """Radius of the whole tumour without its irregularities, mm."""
    core_share: float
    """Volume of necrosis and enhancement over that of the whole."""
    necrosis_share: float
    """Volume of necrosis over that of the core."""
    mass_effect: float
    """How strongly tissue is pushed aside, 0 to below 0.4."""
    outline: np.ndarray
    """(3, n, n, n) smooth noise that bends the outer, the core and the necrotic border."""

    @property
    def core_radius(self) -> float:
        """Radius of the core, mm."""
        return self.radius * self.core_share ** (1 / 3)

    @property
    def necrosis_radius(self) -> float:
        """Radius of the necrosis, mm."""
        return self.core_radius * self.necrosis_share ** (1 / 3)


def draw_tumor(rng: np.random.Generator, *, idh: str, sites: np.ndarray) -> Tumor:
    """A random tumour at one of ``sites`` ((n, 3) template mm); mutants have little necrosis and enhancement."""
    shape = (NOISE_POINTS,) * 3
    outline = []
    for _ in range(3):
        broad, fine = (ndimage.gaussian_filter(rng.standard_normal(shape), sigma) for sigma in (2.2, 1.0))
        # Bounded, so that `near_tumor` can tell what is out of reach.
        outline.append(np.clip(0.8 * broad / broad.std() + 0.6 * fine / fine.std(), -2, 2))
    return Tumor(
        centre=sites[rng.integers(len(sites))].astype(float),
        radius=float(rng.uniform(18, 31)),
        core_share=float(rng.uniform(*CORE_SHARE[idh])),
        necrosis_share=float(rng.uniform(*NECROSIS_SHARE[idh])),
        mass_effect=float(rng.uniform(0.1, 0.3)),
        outline=np.stack(outline).astype(np.float32),
    )


def grow(tumor: Tumor, *, years: float, rate: float) -> Tumor:
    """The tumour some years later; ``rate`` is the growth of the radius per year as a share of the radius."""
    return replace(tumor, radius=tumor.radius * (1 + rate * years))


def push_tissue(positions: np.ndarray, tumor: Tumor) -> np.ndarray:
    """(3, ...) template positions drawn towards the centre: what they show is then pushed outwards by the tumour."""
    away = positions - tumor.centre.reshape(3, *[1] * (positions.ndim - 1))
    reach = 1.2 * tumor.core_radius + 8.0
    return positions - tumor.mass_effect * np.exp(-(away**2).sum(axis=0) / (2 * reach**2)) * away


def near_tumor(positions: np.ndarray, tumor: Tumor) -> np.ndarray:
    """Indices of the positions (3, n) that the tumour can reach."""
    return np.flatnonzero(((positions - tumor.centre[:, None]) ** 2).sum(axis=0) < (2.2 * tumor.radius) ** 2)


def tumor_fractions(
    positions: np.ndarray, white: np.ndarray, csf: np.ndarray, tumor: Tumor
) -> tuple[np.ndarray, np.ndarray]:
    """What the tumour takes of every position.

    Args:
        positions: (3, n) template mm before anything was pushed.
        white: (n,) fraction of white matter, which oedema follows.
        csf: (n,) fraction of CSF, which oedema does not enter.
        tumor: the tumour.

    Returns:
        fractions: (3, n) of ``COMPARTMENTS``.
        texture: (n,) inner irregularity of the tumour, standard deviation about 1.
    """
    away = positions - tumor.centre[:, None]
    distance = np.sqrt((away**2).sum(axis=0))
    at = away / NOISE_STEP + (NOISE_POINTS - 1) / 2
    outer, core, inner = (ndimage.map_coordinates(part, at, order=1, mode="nearest") for part in tumor.outline)
    whole_share = _inside(distance * np.exp(0.24 * outer) * (1.35 - 0.4 * white), tumor.radius)
    core_distance = distance * np.exp(0.13 * core)
    core_share = _inside(core_distance, tumor.core_radius)
    necrosis_share = _inside(core_distance * np.exp(0.16 * inner), tumor.necrosis_radius)
    fractions = np.stack(
        [
            core_share * necrosis_share,
            (1 - core_share) * whole_share * np.clip(1 - 1.2 * csf, 0, 1) * (0.65 + 0.35 * white),
            core_share * (1 - necrosis_share),
        ]
    )
    return fractions.astype(np.float32), inner


def label_voxels(fractions: np.ndarray) -> np.ndarray:
    """uint8 labels of voxels with these fractions (3, n): the strongest compartment where most is tumour, else 0."""
    strongest = np.asarray(LABELS, dtype=np.uint8)[fractions.argmax(axis=0)]
    return np.where(fractions.sum(axis=0) > 0.5, strongest, 0).astype(np.uint8)


def _inside(distance: np.ndarray, radius: float) -> np.ndarray:
    """Share of a point's surroundings that lies within ``radius``: a smooth step."""
    return 1 / (1 + np.exp(np.clip((distance - radius) / BORDER, -30, 30)))
