"""nnU-Net's plans made to fit the encoder, and what in plans and images keeps it from the slices that it knows."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

PATCH_SIZE = (256, 256)
MIN_BATCH_SIZE = 2
ENCODER_PATCH = 16
# Columns of ITK's direction matrix for a file stored in LPS, as the encoder's slices are.
PLANES = ("sagittal", "coronal", "axial")


def fit_plans(
    plans: dict,
    configuration: str,
    *,
    patch_size: tuple[int, int] = PATCH_SIZE,
    largest_batch: int | None = None,
    num_slices: int | None = None,
) -> None:
    """Change the configuration in place to patches of another size, with at most as many pixels per batch as planned.

    There are never fewer than two patches in a batch, and never more than ``largest_batch``. With ``num_slices`` a
    patch is a stack of so many neighbouring slices, and it counts as so many patches.

    Raises:
        ValueError: the configuration is not two-dimensional, or the patch is no multiple of the encoder's.
    """
    planned = PlansManager(plans).get_configuration(configuration)
    if len(planned.patch_size) != 2:
        raise ValueError(
            f"configuration {configuration!r} has {len(planned.patch_size)}-dimensional patches, but the encoder sees "
            "slices; train with configuration 2d: nnUNetv2_train DATASET 2d FOLD -tr nnUNetTrainerBrainDINOFrozen"
        )
    if any(size <= 0 or size % ENCODER_PATCH for size in patch_size):
        near = tuple(max(1, round(size / ENCODER_PATCH)) * ENCODER_PATCH for size in patch_size)
        raise ValueError(
            f"patch_size {tuple(patch_size)} of the trainer is no multiple of {ENCODER_PATCH}, the side of the "
            f"encoder's patches; take e.g. {near}"
        )
    stack = [] if num_slices is None else [num_slices]
    batch_size = planned.batch_size * math.prod(planned.patch_size) // math.prod([*stack, *patch_size])
    if largest_batch is not None:
        batch_size = min(batch_size, largest_batch // math.prod(stack))
    batch_size = int(max(MIN_BATCH_SIZE, batch_size))
    plans["configurations"][configuration].update(patch_size=[*stack, *patch_size], batch_size=batch_size)


def plan_warnings(plans: dict, configuration: str) -> list[str]:
    """What in nnU-Net's plans keeps the encoder from seeing the slices that it was trained on, and what to do about
    it.
    """
    warnings = []
    if list(plans["transpose_forward"]) != [0, 1, 2]:
        warnings.append(
            f"slices are not axial: nnU-Net cuts along the axis with the largest voxels (transpose_forward "
            f"{list(plans['transpose_forward'])}), the encoder was trained on axial slices. Resample the images so "
            "that no axis is coarser than the vertical one, convert with `braindino nnunet`, then plan again"
        )
    if not all(PlansManager(plans).get_configuration(configuration).use_mask_for_norm):
        warnings.append(
            "nnU-Net normalises over the whole image, because zeros make up less than a quarter of it: background is "
            "then not 0, as it is in the slices that the encoder was trained on. Strip the skull before converting"
        )
    return warnings


def orientation_warnings(properties: Mapping[str, Any], transpose_forward: list[int]) -> list[str]:
    """The same from the orientation of one preprocessed case; nothing where its reader kept none.

    ``properties``: what nnU-Net's SimpleITK reader notes of a case. ITK's frame is LPS: a direction of 1 on the
    diagonal means columns from the patient's right, rows from the front, slices from below.
    """
    stored = properties.get("sitk_stuff", {}).get("direction")
    if stored is None or len(stored) != 9 or list(transpose_forward) != [0, 1, 2]:
        return []
    # nnU-Net's axes (slice, row, column) are ITK's backwards.
    direction = np.asarray(stored, dtype=float).reshape(3, 3)
    columns, rows, slices = direction.T
    plane = PLANES[int(np.abs(slices).argmax())]
    advice = "Store the images in LPS, axial first (`braindino nnunet convert-...` does), then preprocess again"
    if plane != "axial":
        return [f"slices are {plane}, the encoder was trained on axial ones: files are stored in that order. {advice}"]
    found = [
        f"{name} {'XYZ'[int(np.abs(axis).argmax())]}{'-' if axis[np.abs(axis).argmax()] < 0 else '+'}"
        for name, axis in (("columns", columns), ("rows", rows))
    ]
    if found != ["columns X+", "rows Y+"]:
        return [
            f"axial slices are turned or mirrored (ITK direction of {', '.join(found)}; expected columns X+, rows Y+): "
            f"the encoder was trained with row 0 at the patient's front and column 0 at the right. {advice}"
        ]
    return []
