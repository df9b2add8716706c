"""Sites and their scanners: voxel grid, storage order, intensity scale and noise of every simulated image."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# The box that every grid covers, in mm of the scanner (RAS+): the template's brain, with room for larger ones.
FIELD_CENTRE = (0.0, -17.0, 5.0)
FIELD_SIZE = (176.0, 214.0, 186.0)
# Thick slices are averaged over samples at most about this far apart; the template itself is sampled at 1 mm.
SAMPLE_DISTANCE = 1.2

_AXIS_OF_CODE = {"L": (0, -1), "R": (0, 1), "P": (1, -1), "A": (1, 1), "I": (2, -1), "S": (2, 1)}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One site. The last storage axis runs across the slices; all sequences of a session share the grid."""

    site: str
    """Name in ``participants.tsv``."""
    orientation: str
    """Direction in which each storage axis runs, e.g. ``LPS``: the first index grows to the patient's left."""
    spacing: tuple[float, float, float]
    """Distance of voxel centres along the storage axes, mm."""
    thickness: float
    """Slice thickness in mm; what it leaves of the slice distance is a gap."""
    field_strength: float
    """Tesla; only written to the sidecars."""
    scale: float
    """Stored value of white matter on T1, before the offset."""
    offset: float
    """Added to every stored value inside the brain."""
    noise: float
    """Standard deviation of the noise in each of the two channels, as a share of white matter on T1."""
    bias: float
    """Standard deviation of the logarithm of the bias field."""


PROTOCOLS = (
    Protocol(
        site="north", orientation="RAS", spacing=(1.5, 1.5, 1.5), thickness=1.5,
        field_strength=3.0, scale=900.0, offset=0.0, noise=0.02, bias=0.08,
    ),
    Protocol(
        site="east", orientation="LPS", spacing=(1.25, 1.25, 4.0), thickness=3.5,
        field_strength=1.5, scale=320.0, offset=25.0, noise=0.025, bias=0.05,
    ),
    Protocol(
        site="south", orientation="LAS", spacing=(1.4, 1.4, 2.0), thickness=2.0,
        field_strength=3.0, scale=2600.0, offset=100.0, noise=0.03, bias=0.12,
    ),
    Protocol(
        site="west", orientation="PIR", spacing=(1.5, 1.5, 1.8), thickness=1.8,
        field_strength=1.5, scale=150.0, offset=0.0, noise=0.045, bias=0.07,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The voxel grid of one protocol.

    Inside the simulation arrays are indexed (x, y, z), growing to the right, anterior and superior; only ``to_storage``
    turns them into the order of the file.
    """

    protocol: Protocol

    @cached_property
    def slice_axis(self) -> int:
        """Which of x, y, z runs across the slices."""
        return _AXIS_OF_CODE[self.protocol.orientation[2]][0]

    @cached_property
    def num_samples(self) -> int:
        """Samples that are averaged across one slice."""
        return max(1, round(self.protocol.thickness / SAMPLE_DISTANCE))

    @cached_property
    def centres(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Voxel centres along x, y and z, mm of the scanner."""
        axes: list[np.ndarray] = [np.empty(0)] * 3
        for code, step in zip(self.protocol.orientation, self.protocol.spacing, strict=True):
            axis = _AXIS_OF_CODE[code][0]
            count = int(np.ceil(FIELD_SIZE[axis] / step))
            axes[axis] = FIELD_CENTRE[axis] + step * (np.arange(count) - (count - 1) / 2)
        return axes[0], axes[1], axes[2]

    @cached_property
    def samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sampling positions along x, y and z: the voxel centres, but ``num_samples`` per slice across the slices."""
        axes = list(self.centres)
        within = (np.arange(self.num_samples) + 0.5) / self.num_samples - 0.5
        axes[self.slice_axis] = (axes[self.slice_axis][:, None] + self.protocol.thickness * within).ravel()
        return axes[0], axes[1], axes[2]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        x, y, z = self.centres
        return len(x), len(y), len(z)

    @cached_property
    def affine(self) -> np.ndarray:
        """(4, 4) storage indices to mm, RAS+ world."""
        affine = np.zeros((4, 4))
        affine[3, 3] = 1.0
        for storage_axis, (code, step) in enumerate(zip(self.protocol.orientation, self.protocol.spacing, strict=True)):
            axis, direction = _AXIS_OF_CODE[code]
            affine[axis, storage_axis] = direction * step
            affine[axis, 3] = self.centres[axis][0 if direction > 0 else -1]
        return affine

    def average_slices(self, sampled: np.ndarray) -> np.ndarray:
        """(x, y, z) voxel values: the mean of the samples across each slice (a box profile)."""
        axis, shape = self.slice_axis, self.shape
        split = (*shape[: axis + 1], self.num_samples, *shape[axis + 1 :])
        return sampled.reshape(split).mean(axis=axis + 1)

    def to_storage(self, array: np.ndarray) -> np.ndarray:
        """An (x, y, z) array in the axis order and directions of the file."""
        order = [_AXIS_OF_CODE[code] for code in self.protocol.orientation]
        stored = array.transpose([axis for axis, _ in order])
        return np.flip(stored, tuple(axis for axis, (_, direction) in enumerate(order) if direction < 0))
