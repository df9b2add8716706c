"""What robustness is tested with (paper sec. 4.5): contrast, Gibbs ringing and bias field, on the voxels of one scan
before any preprocessing. Pure: arrays in RAS+ to arrays of the same shape.

A condition is one perturbation at one severity; they are never combined. The severity at which nothing changes gives
back the very array, bit for bit. Everything else is float32, whatever the scan was stored as: rounding to its integers
would be a second perturbation, whose strength depends on how a scanner scales its images.

Every perturbation of PERTURBATIONS keeps finite voxels finite and knows no background. Of a scan whose skull and air
were set to 0 by somebody, ``keep_background`` puts the zeros back.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

GAMMAS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)  # paper sec. 4.5
GIBBS_STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4)  # paper sec. 4.5
BIAS_STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4)  # paper sec. 4.5
LEGENDRE_DEGREE = 3
CLEAN = "clean"

# Powers (i, j, k) of total degree 0 to 3, the constant first.
_DEGREES = [
    (i, j, k)
    for i in range(LEGENDRE_DEGREE + 1)
    for j in range(LEGENDRE_DEGREE + 1 - i)
    for k in range(LEGENDRE_DEGREE + 1 - i - j)
]
# Borders that are equal but for rounding belong to what is kept.
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """A row of PERTURBATIONS.

    Attributes:
        apply: of (X, Y, Z) voxels, a severity and the subject's generator; not called at ``identity``.
        identity: the severity that changes nothing.
        severities: of the paper, rising.
        limits: lowest and highest severity; the lowest itself only where it is the identity.
        definition: in words, for the record.
    """

    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    identity: float
    severities: tuple[float, ...]
    limits: tuple[float, float]
    definition: str


class Condition(NamedTuple):
    """One perturbation at one severity."""

    perturbation: str
    severity: float

    @property
    def name(self) -> str:
        """``gamma-0.5``: of folders."""
        return f"{self.perturbation}-{self.severity:g}"

    @property
    def is_clean(self) -> bool:
        """Whether it changes nothing."""
        return self.severity == PERTURBATIONS[self.perturbation].identity


def perturb(data: np.ndarray, condition: Condition, generator: np.random.Generator) -> np.ndarray:
    """The voxels under the condition, float32; ``data`` itself where it changes nothing.

    Args:
        data: (X, Y, Z) in RAS+, real numbers, all finite.
        condition: what is done.
        generator: from ``subject_generator``, fresh for every call: the same subject then gets the same field at every
            severity, in every sequence and for every encoder.

    Raises:
        ValueError: ``data`` is no volume of finite real numbers.
    """
    _check_volume(data)
    if condition.is_clean:
        return data
    row = PERTURBATIONS[condition.perturbation]
    return row.apply(data, condition.severity, generator).astype(np.float32)


def keep_background(perturbed: np.ndarray, original: np.ndarray) -> np.ndarray:
    """``perturbed`` with exact zeros where ``original`` has them: what a skull-strip took away stays away.

    Ringing, or the power of negative voxels, would fill it; every crop to the brain and every mean over non-zero voxels
    that comes after would then be another one, and the result would tell of that and not of the image.
    """
    return np.where(original == 0, np.float32(0), perturbed)


def subject_generator(seed: int, subject_key: str) -> np.random.Generator:
    """Randomness of one subject, which depends on the subject and the seed alone."""
    digest = hashlib.sha256(f"{seed}\0{subject_key}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def read_condition(name: str) -> Condition:
    """The condition that a folder such as ``gamma-0.5`` is called after.

    Raises:
        ValueError: no such perturbation, or a severity that it does not have.
    """
    perturbation, dash, text = name.rpartition("-")
    if not dash or perturbation not in PERTURBATIONS:
        raise ValueError(
            f"condition {name!r}: expected PERTURBATION-SEVERITY such as gamma-0.5, of {', '.join(PERTURBATIONS)}"
        )
    row = PERTURBATIONS[perturbation]
    low, high = row.limits
    try:
        severity = float(text)
    except ValueError as error:
        raise ValueError(f"condition {name!r}: severity {text!r}; expected a number") from error
    if not low <= severity <= high or (severity == low and severity != row.identity):
        raise ValueError(f"condition {name!r}: expected a severity from {low:g} to {high:g}")
    return Condition(perturbation, severity)


def paper_conditions(perturbations: Sequence[str]) -> list[Condition]:
    """All severities of the paper but the one that changes nothing, perturbation by perturbation."""
    return [
        condition
        for name in perturbations
        for severity in PERTURBATIONS[name].severities
        if not (condition := Condition(name, severity)).is_clean
    ]


def adjust_gamma(data: np.ndarray, gamma: float) -> np.ndarray:
    """``((x - min) / (max - min)) ** gamma * (max - min) + min``, float64.

    Minimum and maximum of the volume stay, and with them a background that is the minimum; negative voxels need no
    rule. MONAI's AdjustContrast but for its 1e-7 in the denominator.
    """
    values = data.astype(np.float64)
    low, high = values.min(), values.max()
    if low == high:
        return values
    return ((values - low) / (high - low)) ** gamma * (high - low) + low


def truncate_k_space(data: np.ndarray, alpha: float, *, axes: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """The volume without its high spatial frequencies, float64: ringing beside every edge.

    A frequency is kept where ``sum over axes of (k / k_Nyquist)^2 <= (1 - alpha)^2 d`` with d axes: an ellipsoid about
    the centre of k-space that reaches its corners at alpha = 0, where nothing is lost, and shrinks to the mean at
    alpha = 1. Frequencies are relative to each axis's own Nyquist frequency, so the strength does not depend on the
    shape of the grid or of its voxels. The result is real and may be negative; the mean stays.

    Args:
        data: (X, Y, Z).
        alpha: 0 to 1.
        axes: of the transform; (0, 1) truncates every axial slice by itself, which on square slices is MONAI's
            GibbsNoise but for the half sample by which that is off the centre.
    """
    shape = [data.shape[axis] for axis in axes]
    squares: np.ndarray = np.zeros((1,) * data.ndim)
    for axis, size in zip(axes, shape, strict=True):
        frequency = np.fft.rfftfreq(size) if axis == axes[-1] else np.fft.fftfreq(size)
        squares = squares + ((2 * frequency) ** 2).reshape([-1 if a == axis else 1 for a in range(data.ndim)])
    spectrum = np.fft.rfftn(data.astype(np.float64), axes=axes)
    spectrum *= squares <= (1 - alpha) ** 2 * len(axes) + _ROUNDING
    return np.fft.irfftn(spectrum, s=shape, axes=axes)


def truncate_k_space_sphere(data: np.ndarray, alpha: float) -> np.ndarray:
    """MONAI's GibbsNoise in 3D, float64: what lies within ``(1 - alpha) max(shape) sqrt(2) / 2`` samples of the middle
    of the grid of frequencies is kept.

    Here for comparison with what others report. Its strength depends on the shape: of 128^3 it removes 3.5 % of k-space
    at alpha = 0 already, of a flat volume hardly anything along the short axis.
    """
    distance: np.ndarray = np.zeros((1,) * data.ndim)
    for axis, size in enumerate(data.shape):
        # MONAI takes (n - 1) / 2 for the middle, half a sample beside the zero frequency of an even axis.
        offset = np.arange(size) - (size - 1) / 2
        distance = distance + (offset**2).reshape([-1 if a == axis else 1 for a in range(data.ndim)])
    radius = (1 - alpha) * max(data.shape) * math.sqrt(2) / 2
    kept = np.fft.ifftshift(np.sqrt(distance) <= radius)
    return np.fft.ifftn(np.fft.fftn(data.astype(np.float64)) * kept).real


def smooth_field(shape: tuple[int, int, int], generator: np.random.Generator) -> np.ndarray:
    """(X, Y, Z) float64 from exactly -1 to exactly 1: a random polynomial of degree 3 over the field of view.

    The coefficients of the products of Legendre polynomials are standard normal, without the constant. The same
    generator gives the same field over the head on a finer or coarser grid.

    Raises:
        ValueError: the grid has one voxel only.
    """
    coefficients = np.concatenate([[0.0], generator.standard_normal(len(_DEGREES) - 1)])
    middles = [(2 * np.arange(size) + 1) / size - 1 for size in shape]
    field = _legendre(middles, coefficients)
    low, high = field.min(), field.max()
    if low == high:
        raise ValueError(f"a field over a grid of {shape} voxels; expected at least two")
    return 2 * ((field - low) / (high - low)) - 1


def multiply_bias(data: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """``x (1 + s g)`` with the field g of ``smooth_field``, float64: the receive field of a coil reaches exactly 1 - s
    and 1 + s somewhere in the field of view. Zeros stay zeros.
    """
    return data * (1 + strength * smooth_field(data.shape, generator))  # type: ignore[arg-type]


def multiply_legendre_bias(data: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """``x exp(sum over i + j + k <= 3 of c_ijk P_i P_j P_k)``, float64: MONAI's RandBiasField of degree 3.

    Here for comparison. The field has no bound of its own: with every coefficient at 0.4, as BrainIAC's script has it,
    it spans 0.09 to 2,981.

    Args:
        data: (X, Y, Z).
        coefficients: (20,) in MONAI's order, k fastest.
    """
    ends = [np.linspace(-1, 1, size) for size in data.shape]
    return data * np.exp(_legendre(ends, coefficients))


def _legendre(coordinates: Sequence[np.ndarray], coefficients: np.ndarray) -> np.ndarray:
    """(X, Y, Z) of a sum of products of Legendre polynomials, at (X,), (Y,) and (Z,) places from -1 to 1."""
    grid = np.zeros((LEGENDRE_DEGREE + 1,) * 3)
    for degrees, coefficient in zip(_DEGREES, coefficients, strict=True):
        grid[degrees] = coefficient
    x, y, z = coordinates
    return np.polynomial.legendre.leggrid3d(x, y, z, grid)


def _check_volume(data: np.ndarray) -> None:
    if data.ndim != 3 or data.dtype.kind not in "iuf":
        raise ValueError(f"perturbation of {data.ndim} axes of {data.dtype}; expected a volume of real numbers")
    if not np.isfinite(data).all():
        num_bad = int(np.count_nonzero(~np.isfinite(data)))
        raise ValueError(
            f"perturbation: {num_bad} voxels are NaN or infinite; expected finite ones: in k-space one of them is "
            "everywhere. `braindino.volume.load_volume` replaces a few"
        )


PERTURBATIONS: Mapping[str, Perturbation] = MappingProxyType(
    {
        "gamma": Perturbation(
            apply=lambda data, severity, _: adjust_gamma(data, severity),
            identity=1.0,
            severities=GAMMAS,
            limits=(0.0, 10.0),
            definition="((x - min) / (max - min))^gamma (max - min) + min over the volume",
        ),
        "gibbs": Perturbation(
            apply=lambda data, severity, _: truncate_k_space(data, severity),
            identity=0.0,
            severities=GIBBS_STRENGTHS,
            limits=(0.0, 1.0),
            definition="k-space of the volume within (1 - alpha) of the ellipsoid through its corners",
        ),
        "bias_field": Perturbation(
            apply=multiply_bias,
            identity=0.0,
            severities=BIAS_STRENGTHS,
            limits=(0.0, 0.99),
            definition="x (1 + s g), g a random polynomial of degree 3 scaled to [-1, 1], one per subject",
        ),
        "gibbs_slices": Perturbation(
            apply=lambda data, severity, _: truncate_k_space(data, severity, axes=(0, 1)),
            identity=0.0,
            severities=GIBBS_STRENGTHS,
            limits=(0.0, 1.0),
            definition="k-space of every axial slice within (1 - alpha) of the ellipse through its corners",
        ),
        "gibbs_sphere": Perturbation(
            apply=lambda data, severity, _: truncate_k_space_sphere(data, severity),
            identity=0.0,
            severities=GIBBS_STRENGTHS,
            limits=(0.0, 1.0),
            definition="MONAI GibbsNoise: k-space within (1 - alpha) max(shape) sqrt(2) / 2 samples of its middle",
        ),
        "bias_field_legendre": Perturbation(
            apply=lambda data, severity, generator: multiply_legendre_bias(
                data, severity * generator.uniform(0, 1, len(_DEGREES))
            ),
            identity=0.0,
            severities=BIAS_STRENGTHS,
            limits=(0.0, 1.0),
            definition="MONAI RandBiasField(coeff_range=(0, s)): x exp(sum c P_i P_j P_k), one draw per subject",
        ),
    }
)
PAPER_PERTURBATIONS = ("gamma", "gibbs", "bias_field")
