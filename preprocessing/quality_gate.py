"""Whether a brain mask may be one: its volume, its pieces, its edges, and a quick second opinion without a network.

The second opinion is the shape of an average adult head. Skin is found against air, the same way in T1, T1c, T2 and
FLAIR; the brain is what lies deep enough under it and above a line from the brow over the skull base to the neck, drawn
at fixed places between the top, the front and the back of the head. It knows no grey value inside the head, so it errs
where heads differ, and never the way a network errs.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from braindino.preprocessing.skull_strip import largest_component, voxel_ml
from braindino.scan_quality import LIMITS
from braindino.volume import Volume

GRID_MM = 4.0
# Air is dark in every sequence used here; a tenth of the bright end tells it from skin.
AIR_SHARE = 0.1
# Skin, skull and fluid over the brain; the median over the surface of HD-BET's masks is 20 mm, the lowest percent 13.
BRAIN_DEPTH_MM = 13.0
SKIN_MM = 6.0
# An average adult head, seen from above, and the height from its widest level to its top.
HEAD_WIDTH_MM, HEAD_LENGTH_MM, DOME_MM = 150.0, 190.0, 80.0
# Down to here the head has no face; between these levels it is as long as it gets.
UPPER_HEAD_MM = 100.0
LENGTH_BETWEEN_MM = (40.0, 80.0)
# From the back of the head (0) to the front (1): how far below the top the brain ends, mm in a head of that size.
_BASE_AT = (0.0, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.8, 0.9)
_BASE_MM = (90.0, 118.0, 134.0, 140.0, 138.0, 122.0, 112.0, 97.0, 88.0)
# Heads differ from the average one by this much.
TOLERANCE_MM = 12.0

PICTURE_HEIGHT, PICTURE_MAX_WIDTH = 300, 900
OUTLINE_RGB = (255, 64, 64)

_CELLS = round(TOLERANCE_MM / GRID_MM)
_PAD = 8


@dataclass(frozen=True, kw_only=True)
class MaskFindings:
    """What can be said of a brain mask without a reference.

    Attributes:
        brain_ml: volume of the mask's largest part.
        components: connected parts of the mask.
        largest_component: share of the mask's voxels in its largest part; 0 for an empty mask.
        border: share of that part's voxels on the faces of the field of view.
        agreement: Dice of that part with the second opinion.
        covered: share of the second opinion, less its outer 12 mm, that the part holds: low where brain is missing.
        holes: volume that the part encloses without holding it, as a share of its own; seen from about 1 ml on.
        inside: share of the part within 12 mm of the second opinion and not in the skin: low where the mask leaks.
    """

    brain_ml: float
    components: int
    largest_component: float
    border: float
    agreement: float
    covered: float
    holes: float
    inside: float

    def faults(self) -> list[str]:
        """What speaks against the mask, each as ``what: found, expected``; empty when it may pass."""
        low, high = LIMITS["brain_ml"]
        brain = f"a brain of {low:.0f} to {high:.0f} ml"
        if not self.components:
            return [f"empty: no voxel, expected {brain}"]
        found = {
            "brain_ml": f"volume: {self.brain_ml:.0f} ml",
            "largest_component": f"pieces: {self.largest_component:.0%} of it in the largest of {self.components} "
            "parts",
            "border": f"border: {self.border:.1%} of it on the faces of the field of view",
            "agreement": f"agreement: Dice {self.agreement:.2f} with the second opinion",
            "covered": f"missing brain: {self.covered:.0%} of where a brain must be",
            "holes": f"holes: {self.holes:.1%} of it",
            "inside": f"leak: {self.inside:.0%} of it where a brain can be",
        }
        faults = []
        for name, words in found.items():
            low, high = LIMITS[name]
            if not low <= getattr(self, name) <= high:
                form = "g" if name == "agreement" else ".0%"
                one_sided = f"at least {low:{form}}" if low > -math.inf else f"at most {high:{form}}"
                faults.append(f"{words}, expected {brain if name == 'brain_ml' else one_sided}")
        return faults


def examine_mask(mask: np.ndarray, volume: Volume) -> MaskFindings:
    """What can be said of a mask as the model made it, islands included.

    Args:
        mask: (X, Y, Z) bool in RAS+.
        volume: the scan it was made of, skull on, on the same grid.

    Raises:
        ValueError: the grids differ.
    """
    if mask.shape != volume.shape:
        raise ValueError(f"a mask of shape {mask.shape} does not fit its scan of {volume.shape}")
    total = int(np.count_nonzero(mask))
    if not total:
        return MaskFindings(
            brain_ml=0.0,
            components=0,
            largest_component=0.0,
            border=0.0,
            agreement=0.0,
            covered=0.0,
            holes=0.0,
            inside=0.0,
        )
    _, components = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    part = largest_component(mask)
    count = int(np.count_nonzero(part))
    inner = part[1:-1, 1:-1, 1:-1]
    opinion, depth = second_opinion(volume)
    share = _to_grid(part, volume)
    coarse = share > 0.5
    core = ndimage.binary_erosion(opinion, iterations=_CELLS, border_value=1)
    reach = ndimage.binary_dilation(opinion, iterations=_CELLS) & (depth > SKIN_MM)
    both, held = int(np.count_nonzero(coarse & opinion)), max(1, int(np.count_nonzero(coarse)))
    return MaskFindings(
        brain_ml=count * voxel_ml(volume),
        components=int(components),
        largest_component=count / total,
        border=1 - int(np.count_nonzero(inner)) / count,
        agreement=2 * both / (held + int(np.count_nonzero(opinion))),
        covered=float(share[core].mean()) if core.any() else 0.0,
        holes=int(np.count_nonzero(ndimage.binary_fill_holes(coarse) & ~coarse)) / held,
        inside=int(np.count_nonzero(coarse & reach)) / held,
    )


class SecondOpinion(NamedTuple):
    """On a grid of 4 mm: where the brain of an average adult would lie, (x, y, z) bool, and the depth under the skin in
    mm, 0 in the air."""

    brain: np.ndarray
    depth: np.ndarray


def second_opinion(volume: Volume) -> SecondOpinion:
    """Where the brain should be in the head of ``volume``; nowhere if no head is found."""
    head = _head(_to_grid(volume.data, volume))
    # Where the field of view cuts the head, tissue goes on behind the cut.
    padded = ndimage.distance_transform_edt(np.pad(head, _PAD, mode="edge"))
    depth = padded[_PAD:-_PAD, _PAD:-_PAD, _PAD:-_PAD] * GRID_MM
    nowhere = SecondOpinion(np.zeros_like(head), depth)
    area = head.sum(axis=(0, 1)) * GRID_MM**2
    if not area.any():
        return nowhere
    top = int(np.flatnonzero(area)[-1])
    upper_area = area[max(0, top - round(UPPER_HEAD_MM / GRID_MM)) : top + 1].max()
    size = float(np.sqrt(upper_area / (np.pi / 4 * HEAD_WIDTH_MM * HEAD_LENGTH_MM)))
    # A field of view that cuts the dome shows at its top what an ellipsoid has there.
    vertex = top + 0.5 + DOME_MM * size * (1 - np.sqrt(1 - area[top] / upper_area)) / GRID_MM
    below = (vertex - np.arange(head.shape[2]) - 0.5) * GRID_MM / size

    near, far = LENGTH_BETWEEN_MM
    along = np.flatnonzero(head[:, :, (near <= below) & (below <= far)].any(axis=(0, 2)))
    if not len(along):
        return nowhere
    place = (np.arange(head.shape[1]) + 0.5 - along[0]) / (along[-1] + 1 - along[0])
    base = np.interp(place, _BASE_AT, _BASE_MM)
    return SecondOpinion((depth >= BRAIN_DEPTH_MM) & (below[None, None, :] < base[None, :, None]), depth)


def gate_picture(volume: Volume, mask: np.ndarray) -> np.ndarray:
    """The mask's outline on the sagittal, coronal and axial plane through its centre, side by side: (rows, columns, 3)
    uint8, at most 300 x 900, to scale in mm.

    Drawn as radiologists do: top up, nose to the left in the sagittal plane, the patient's right on the left side of
    the others, front up in the axial plane. An empty mask is drawn through the centre of the scan.
    """
    places = np.nonzero(mask)
    centre = [round(float(place.mean())) if len(place) else n // 2 for place, n in zip(places, mask.shape, strict=True)]
    low, high = np.percentile(volume.data[:: max(1, mask.shape[0] // 64)], [1, 99.5])
    scale = 255 / float(high - low) if high > low else 1.0
    extents = [n * size for n, size in zip(volume.shape, volume.spacing, strict=True)]
    widths = [extents[1], extents[0], extents[0]]
    tallest = max(extents[2], extents[1])
    per_mm = min(PICTURE_HEIGHT / tallest, PICTURE_MAX_WIDTH / sum(widths))
    panels = []
    for axis, width in enumerate(widths):
        plane = np.take(volume.data, centre[axis], axis=axis)
        inside = np.take(mask, centre[axis], axis=axis)
        tall = extents[1] if axis == 2 else extents[2]
        rows, columns = max(1, int(tall * per_mm)), max(1, int(width * per_mm))
        # Indices grow towards front or right, and upwards: front and right are drawn on the left, the top on top.
        take = np.ix_(_nearest(plane.shape[0], columns), _nearest(plane.shape[1], rows))
        grey, inside = plane[take].T[::-1, ::-1], inside[take].T[::-1, ::-1]
        panel = np.repeat(np.clip((grey - low) * scale, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
        panel[inside & ~ndimage.binary_erosion(inside, border_value=1)] = OUTLINE_RGB
        height = int(tallest * per_mm)
        above = (height - rows) // 2
        panels.append(np.pad(panel, ((above, height - rows - above), (0, 0), (0, 0))))
    return np.concatenate(panels, axis=1)


def _nearest(count: int, target: int) -> np.ndarray:
    """Indices of ``target`` samples at half-pixel centres."""
    return np.minimum(((np.arange(target) + 0.5) * count / target).astype(int), count - 1)


def _to_grid(data: np.ndarray, volume: Volume) -> np.ndarray:
    """``data`` on ``volume``'s grid, averaged and interpolated to cubes of 4 mm: float32."""
    step = [max(1, int(GRID_MM // size)) for size in volume.spacing]
    x, y, z = (count // by for count, by in zip(data.shape, step, strict=True))
    kept = data[: x * step[0], : y * step[1], : z * step[2]]
    for axis, (count, by) in enumerate(zip((x, y, z), step, strict=True)):
        if by > 1:
            starts = np.arange(0, count * by, by)
            kept = np.add.reduceat(kept, starts, axis=axis, dtype=np.float32) / np.float32(by)
    zoom = [size * by / GRID_MM for size, by in zip(volume.spacing, step, strict=True)]
    return ndimage.zoom(kept.astype(np.float32, copy=False), zoom, order=1, grid_mode=True, mode="nearest")


def _head(image: np.ndarray) -> np.ndarray:
    """What is not air, in one piece and without holes: (x, y, z) bool on the grid of 4 mm."""
    # The dark end is not 0 in magnitude images with much noise, nor where an offset was taken off.
    low, high = np.percentile(image, [1, 98])
    head = ndimage.binary_opening(image > low + AIR_SHARE * (high - low))
    head = largest_component(head)
    closing = 4
    head = ndimage.binary_closing(np.pad(head, closing, mode="edge"), iterations=closing)
    head = head[closing:-closing, closing:-closing, closing:-closing]
    for axis in range(3):
        for plane in np.moveaxis(head, axis, 0):
            plane[...] = ndimage.binary_fill_holes(plane)
    return head
