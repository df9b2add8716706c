"""Brains: tissue maps of the MNI152 template, bent into a person's shape, aged, and placed in the scanner.

Positions are in mm, RAS+. Three frames are used: ``scanner`` (the image grid), ``head`` (the scanner frame
without this session's head pose; the same for all visits of a person) and ``template`` (MNI152).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage
from scipy.interpolate import make_interp_spline

from braindino.simulation.protocols import FIELD_CENTRE, FIELD_SIZE, Grid

AGE_RANGE = (20.0, 85.0)
TISSUES = ("csf", "grey", "white", "vessel")

# Smooth quantities (coordinates, fields) live on a lattice with this step in mm and are interpolated.
LATTICE_STEP = 6.0
# Smooth maps of the template keep every second voxel along each axis.
COARSE_STEP = 2
# Probability maps are averages of 152 people; raising them to a power makes borders as crisp as one person's.
SHARPENING = 1.7
# Factor on the odds of CSF against tissue, at full atrophy. It acts only where there is some CSF: sulci widen and the
# cortex thins.
CSF_ODDS_OLD = 9.0
# Nobody has more atrophy than this, old and unlucky as they may be.
MAX_SHARE = 1.1
# Displacement of the ventricle wall in mm, at no and at full atrophy.
VENTRICLE_SHIFT = (-1.0, 5.0)
# Mean intensity of the tissues on the template T1; what it has beyond them is texture.
TEMPLATE_T1 = {"csf": 0.255, "grey": 0.65, "white": 0.87}

# Centre lines of large veins and arteries in template mm; mirrored to the other side where they leave the midline.
VESSEL_LINES = (
    ((0, 66, 8), (0, 56, 38), (0, 30, 62), (0, 0, 74), (0, -35, 80), (0, -70, 62), (0, -95, 35), (0, -104, 5)),
    ((0, -104, 5), (14, -98, -10), (34, -88, -18), (50, -68, -24), (56, -48, -28)),
    ((0, -42, 8), (0, -60, 6), (0, -80, -2), (0, -100, 0)),
    ((3, 2, 12), (3, -14, 14), (2, -32, 10), (0, -42, 8)),
    ((6, 6, -18), (22, 6, -18), (38, 8, -10), (46, -6, 2), (50, -24, 12)),
    ((2, 8, -14), (2, 36, -6), (2, 42, 12), (2, 24, 28), (2, 0, 34)),
    ((0, -34, -44), (0, -22, -22), (0, -18, -14)),
    ((18, -40, 16), (24, -42, 10), (26, -40, 0)),
)


@dataclass(frozen=True)
class Template:
    """What every simulated brain is made of. Read-only."""

    affine: np.ndarray
    """(4, 4) voxel indices to template mm, 1 mm isotropic."""
    young: np.ndarray
    """(3, X, Y, Z) fractions of CSF, grey and white matter without atrophy; their sum is 1 in the brain, else 0."""
    old: np.ndarray
    """The same at full atrophy."""
    vessels: np.ndarray
    """(X, Y, Z) fraction of blood: sinuses, large vessels, vessels in the sulci, meninges."""
    texture: np.ndarray
    """(X, Y, Z) intensity on the template T1 beyond what the tissue fractions explain."""
    near_brain: np.ndarray
    """(X, Y, Z) bool: the brain and two voxels around it; beyond them every map is 0 and nothing need be looked up."""
    ventricle_pull: np.ndarray
    """(3, x, y, z) direction towards the lateral ventricles, length at most 1, on a grid of ``COARSE_STEP`` voxels."""
    tumor_sites: np.ndarray
    """(n, 3) template mm: cerebral white matter, deep and off the midline."""


@dataclass(frozen=True)
class Person:
    """What makes one brain differ from all others, at every visit."""

    size: np.ndarray
    """(3,) size relative to the template along x, y, z."""
    displacement: np.ndarray
    """(3, x, y, z) mm to add to head positions before looking up the template, on the lattice of ``lattice_axes``."""
    atrophy_pattern: np.ndarray
    """(x, y, z) on the same lattice: some regions lose more than others; mean 0, standard deviation 1."""
    ventricle_offset: float
    """Atrophy of the ventricles beyond what the age says."""
    cortex_offset: float
    """Atrophy of the grey matter beyond what the age says."""


@dataclass(frozen=True)
class Pose:
    """Where the head lies in the scanner at one visit."""

    rotation: np.ndarray
    """(3, 3) scanner to head."""
    shift: np.ndarray
    """(3,) mm."""


@cache
def load_template() -> Template:
    """The template maps, made once per process from the files inside the nilearn package (no network), about 3 s."""
    from nilearn import datasets

    images = [
        load(resolution=1)
        for load in (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    ]
    t1, grey, white = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    box, margin = ndimage.find_objects((t1 > 0).astype(np.uint8))[0], 3
    t1, grey, white = (np.pad(map_[box], margin) for map_ in (t1, grey, white))
    affine = images[0].affine.copy()
    affine[:3, 3] += [part.start - margin for part in box]

    brain = t1 > 0
    grey, white = grey * brain, white * brain
    csf = np.clip(brain - grey - white, 0, 1)
    expected = csf * TEMPLATE_T1["csf"] + grey * TEMPLATE_T1["grey"] + white * TEMPLATE_T1["white"]
    # The rim of the brain is cut through partial volume: its residual is an edge, not texture.
    inner = ndimage.binary_erosion(brain, iterations=2)
    texture = np.where(inner, np.clip(t1 - expected, -0.15, 0.15), 0).astype(np.float32)

    maps = np.stack([csf, grey, white]) ** np.float32(SHARPENING)
    young = _normalised(maps, brain)
    maps[0] *= np.float32(CSF_ODDS_OLD)
    old = _normalised(maps, brain)
    return Template(
        affine=affine,
        young=young,
        old=old,
        vessels=_vessels(young[0], brain, affine),
        texture=texture,
        near_brain=ndimage.binary_dilation(brain, iterations=2),
        ventricle_pull=_ventricle_pull(young[0], affine),
        tumor_sites=_tumor_sites(young[2], brain, affine),
    )


def lattice_axes(step: float = LATTICE_STEP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions along x, y, z of a lattice that covers the field of view with a step to spare on each side, mm."""
    x, y, z = (
        centre + step * np.arange(-np.ceil(size / 2 / step) - 1, np.ceil(size / 2 / step) + 2)
        for centre, size in zip(FIELD_CENTRE, FIELD_SIZE, strict=True)
    )
    return x, y, z


def draw_person(rng: np.random.Generator, *, sex: str) -> Person:
    """A random head shape and atrophy pattern. Men's heads (``M``) are 6 % larger per axis than women's (``F``)."""
    sizes = {"M": 1.02, "F": 0.96}
    shape = tuple(len(axis) for axis in lattice_axes())
    size = sizes[sex] * np.exp(rng.normal(0, 0.02) + rng.normal(0, 0.015, 3))
    # Broad bends of a few mm and finer ones below 1 mm keep the map one-to-one: gradients stay well under 1.
    displacement = np.stack(
        [2.8 * _smooth_noise(rng, shape, sigma=4.0) + 1.0 * _smooth_noise(rng, shape, sigma=1.8) for _ in range(3)]
    )
    return Person(
        size=size,
        displacement=displacement,
        atrophy_pattern=_smooth_noise(rng, shape, sigma=3.0),
        ventricle_offset=float(rng.normal(0, 0.05)),
        cortex_offset=float(rng.normal(0, 0.04)),
    )


def draw_pose(rng: np.random.Generator) -> Pose:
    """A head turned by a few degrees and shifted by a few mm."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.normal(0, (3.0, 1.5, 2.0)))):
        turn = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        rotation = rotation @ turn
    return Pose(rotation, rng.normal(0, 1.5, 3))


def atrophy(age: float) -> float:
    """Expected share of the full atrophy at an age in years: 0 at 20, 1 at 85, faster in later life."""
    low, high = AGE_RANGE
    return max(0.0, (age - low) / (high - low)) ** 1.3


def template_positions(person: Person, pose: Pose) -> np.ndarray:
    """(3, x, y, z) template mm of the lattice points of the scanner, before ventricles and tumours push."""
    points = np.stack(np.meshgrid(*lattice_axes(), indexing="ij"))
    centre = np.reshape(FIELD_CENTRE, (3, 1, 1, 1))
    head = np.einsum("ij,jxyz->ixyz", pose.rotation, points - centre - pose.shift.reshape(3, 1, 1, 1))
    bend = np.stack([_look_up(component, head + centre) for component in person.displacement])
    return head / person.size.reshape(3, 1, 1, 1) + bend + centre


def push_ventricles(positions: np.ndarray, person: Person, age: float, template: Template) -> np.ndarray:
    """Template positions moved so that the lateral ventricles have the size of that age; same shape, mm."""
    origin = template.affine[:3, 3].reshape(3, 1, 1, 1)
    indices = (positions - origin) / COARSE_STEP
    pull = np.stack([ndimage.map_coordinates(part, indices, order=1) for part in template.ventricle_pull])
    low, high = VENTRICLE_SHIFT
    share = np.clip(atrophy(age) + person.ventricle_offset, 0, MAX_SHARE)
    return positions + (low + (high - low) * share) * pull


def tissue_maps(person: Person, age: float, template: Template) -> np.ndarray:
    """(3, X, Y, Z) fractions of CSF, grey and white matter on the template grid, at that age, without vessels."""
    axes = [
        origin + np.arange(count) for origin, count in zip(template.affine[:3, 3], template.texture.shape, strict=True)
    ]
    pattern = interpolate_lattice(0.12 * person.atrophy_pattern, axes)
    share = np.clip(atrophy(age) + person.cortex_offset + pattern * atrophy(age), 0, MAX_SHARE)
    return template.young + share * (template.old - template.young)


def interpolate_lattice(values: np.ndarray, positions: Sequence[np.ndarray]) -> np.ndarray:
    """Lattice values (x, y, z) at the grid spanned by three arrays of positions in mm: cubic splines, float32."""
    out = np.asarray(values, dtype=np.float32)
    for axis, wanted in zip(lattice_axes(), positions, strict=True):
        weights = make_interp_spline(axis, np.eye(len(axis)), k=3)(np.clip(wanted, axis[0], axis[-1]))
        # Contracting the first axis and appending the result last visits x, y, z in turn and ends in that order.
        out = np.tensordot(out, weights.astype(np.float32), axes=(0, 1))
    return out


def sample_anatomy(
    positions: np.ndarray, tissues: np.ndarray, template: Template, grid: Grid
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The brain at the sampling positions of a grid.

    Args:
        positions: (3, x, y, z) template mm on the lattice.
        tissues: (3, X, Y, Z) fractions on the template grid.
        template: for vessels and texture.
        grid: its ``samples`` are looked up.

    Returns:
        inside: flat indices of the sampling positions that touch the brain.
        fractions: (4, len(inside)) of ``TISSUES``; their sum is below 1 at the edge of the brain.
        texture: (len(inside),).
    """
    origin = template.affine[:3, 3]
    indices = np.stack([interpolate_lattice(positions[axis] - origin[axis], grid.samples).ravel() for axis in range(3)])
    nearest = np.rint(indices).astype(np.int32)
    limit = np.array(template.texture.shape)[:, None] - 1
    np.clip(nearest, 0, limit, out=nearest)
    inside = np.flatnonzero(template.near_brain[nearest[0], nearest[1], nearest[2]])
    indices = indices[:, inside]
    csf, grey, white, vessels, texture = (
        ndimage.map_coordinates(map_, indices, order=1) for map_ in (*tissues, template.vessels, template.texture)
    )
    fractions = np.stack([csf, grey, white, np.zeros_like(csf)])
    fractions *= 1 - vessels
    fractions[3] = vessels * (csf + grey + white)
    return inside, fractions, texture


def _normalised(maps: np.ndarray, brain: np.ndarray) -> np.ndarray:
    return maps * (brain / np.maximum(maps.sum(axis=0), 1e-6)).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], *, sigma: float) -> np.ndarray:
    """Gaussian noise smoothed over ``sigma`` lattice steps, mean 0, standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _look_up(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Values of a lattice at any positions (3, ...), mm, linear."""
    start = np.array([axis[0] for axis in lattice_axes()]).reshape(3, 1, 1, 1)
    return ndimage.map_coordinates(values, (positions - start) / LATTICE_STEP, order=1, mode="nearest")


def _positions_of(shape: tuple[int, ...], affine: np.ndarray, step: int) -> list[np.ndarray]:
    """Template mm along each axis, shaped to broadcast, of every ``step``-th voxel."""
    axes = [origin + np.arange(0, count, step) for origin, count in zip(affine[:3, 3], shape, strict=True)]
    return list(np.meshgrid(*axes, indexing="ij", sparse=True))


def _ventricle_pull(csf: np.ndarray, affine: np.ndarray) -> np.ndarray:
    coarse = csf[::COARSE_STEP, ::COARSE_STEP, ::COARSE_STEP]
    x, y, z = _positions_of(csf.shape, affine, COARSE_STEP)
    box = (np.abs(x) < 42) & (y > -58) & (y < 40) & (z > -14) & (z < 34)
    components, _ = ndimage.label((coarse > 0.6) & box)
    # Of the CSF in this box the lateral ventricles are the largest connected part (17 ml).
    largest = np.bincount(components.ravel())[1:].argmax() + 1
    smooth = ndimage.gaussian_filter((components == largest).astype(np.float32), 8.0 / COARSE_STEP)
    pull = np.stack(np.gradient(smooth))
    return pull / np.sqrt((pull**2).sum(axis=0)).max()


def _tumor_sites(white: np.ndarray, brain: np.ndarray, affine: np.ndarray) -> np.ndarray:
    step = COARSE_STEP
    x, y, z = _positions_of(white.shape, affine, step)
    depth = ndimage.gaussian_filter(brain[::step, ::step, ::step].astype(np.float32), 9.0 / step)
    cerebrum = (z > 2) & (z < 55) & (np.abs(x) > 16) & (y > -75) & (y < 50)
    voxels = np.argwhere((white[::step, ::step, ::step] > 0.8) & (depth > 0.88) & cerebrum)
    return voxels * step + affine[:3, 3]


def _vessels(csf: np.ndarray, brain: np.ndarray, affine: np.ndarray) -> np.ndarray:
    lines = np.zeros(brain.shape, dtype=np.float32)
    for line in VESSEL_LINES:
        corners = np.asarray(line, dtype=float)
        stops = np.arange(len(corners))
        points = np.stack(
            [np.interp(np.linspace(0, stops[-1], 400), stops, corners[:, axis]) for axis in range(3)], axis=1
        )
        for side in (1, -1):
            at = np.rint(points * (side, 1, 1) - affine[:3, 3]).astype(int)
            at = at[((at >= 0) & (at < brain.shape)).all(axis=1)]
            lines[tuple(at.T)] = 1
    tubes = np.clip(ndimage.gaussian_filter(lines, 1.3) * 9, 0, 1)
    x, _, _ = _positions_of(brain.shape, affine, 1)
    # How close to the surface: 0.5 on it, 1 deep inside.
    depth = ndimage.gaussian_filter(brain.astype(np.float32), 2.0)
    rim = np.clip((0.72 - depth) / 0.2, 0, 1)
    # The pattern of small vessels in the sulci is the same in everybody, like the other maps of the template.
    dots = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(brain.shape, dtype=np.float32), 1.3)
    dots = np.clip(dots / dots.std() - 1.0, 0, 1) * np.clip(2 * csf, 0, 1) * np.clip((0.98 - depth) / 0.1, 0, 1)
    falx = rim * np.exp(-((x / 4) ** 2))
    return (np.maximum.reduce([0.9 * tubes, 0.7 * falx, 0.15 * rim, 0.6 * dots]) * brain).astype(np.float32)
