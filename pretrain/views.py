"""The views of a batch: what student and teacher are shown in one iteration."""

from typing import NamedTuple

import torch
from torch import Tensor

from braindino.pretrain.augment import CropParameters, draw_crops, render_crops
from braindino.transfer import send


class Views(NamedTuple):
    """Crops and masks of B slices on the training device; crops of one kind follow each other, B at a time."""

    global_crops: Tensor
    """(2B, 1, S, S) float32."""
    local_crops: Tensor | None
    """(L * B, 1, s, s) float32."""
    masks: Tensor
    """(2B, N) bool, True = hidden from the student."""
    masked: Tensor
    """(M,) positions of the masked patches in the flattened (2B * N) patches, ascending, on the CPU: what is computed
    depends on them."""
    mask_weights: Tensor
    """(M,) 1 / (masked patches of the same crop)."""


def build_views(
    slices: Tensor,
    masks: Tensor,
    *,
    sizes: tuple[int, int],
    num_local: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    aspect: tuple[float, float],
    canvas_size: int,
    flip_probability: float,
    blur_probabilities: tuple[float, float, float],
    blur_sigma: tuple[float, float],
    generator: torch.Generator,
    device: torch.device,
    part: slice | None = None,
    global_batch: int | None = None,
) -> Views:
    """Crop slices (B, 256, 256) into 2 global and num_local local views of the given sizes (global, local; px).

    `part` says which of the `global_batch` slices of the iteration these are: crops are drawn for all of them, so that
    a slice is cropped alike whoever does it. By default the B slices are all there are.
    """
    slices = send(slices, device).float()

    def crop(size: int, scale: tuple[float, float], blur_probability: float) -> Tensor:
        crops = draw_crops(
            global_batch or len(slices),
            canvas_size=canvas_size,
            scale=scale,
            aspect=aspect,
            flip_probability=flip_probability,
            blur_probability=blur_probability,
            blur_sigma=blur_sigma,
            generator=generator,
        )
        if part is not None:
            crops = CropParameters(*(values[part] for values in crops))
        return render_crops(slices, crops, size=size, canvas_size=canvas_size)

    global_size, local_size = sizes
    first_blur, second_blur, local_blur = blur_probabilities
    views = [crop(global_size, global_scale, first_blur), crop(global_size, global_scale, second_blur)]
    local_views = [crop(local_size, local_scale, local_blur) for _ in range(num_local)]
    # Found on the CPU, where the masks come from: asking the device how many there are would make it wait.
    masked = masks.flatten().nonzero().squeeze(1)
    counts = masks.sum(dim=1)
    return Views(
        global_crops=torch.cat(views),
        local_crops=torch.cat(local_views) if local_views else None,
        masks=send(masks, device),
        masked=masked,
        mask_weights=send(1.0 / counts.repeat_interleave(counts), device),
    )
