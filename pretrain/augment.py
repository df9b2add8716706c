"""Random crops of slices as two matrix products.

A random resized crop (bicubic, antialiased), a horizontal flip and a Gaussian blur are all linear and separable, so
that a whole crop is rows @ slice @ columns^T. The two matrices are built from a handful of random numbers; the product
is the same batched matmul on the CPU and on the GPU, on one-channel slices.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from braindino.own_kernels import own_kernels
from braindino.transfer import send

BLUR_KERNEL = 9
CROP_ATTEMPTS = 10


class CropParameters(NamedTuple):
    """What was drawn for n crops, (n,) each: boxes in px of the canvas, blur sigma in px of the crop (0 = none)."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    sigma: Tensor


def draw_crops(
    num_crops: int,
    *,
    canvas_size: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    flip_probability: float,
    blur_probability: float,
    blur_sigma: tuple[float, float],
    generator: torch.Generator,
) -> CropParameters:
    """Random boxes with whole-pixel borders on a square canvas, flips and blurs, on the CPU.

    The area is uniform in `scale` (fraction of the canvas), the aspect ratio (width / height) log-uniform; a box that
    does not fit is drawn again, up to ten times, and is the whole canvas after that.
    """
    shape = (num_crops, CROP_ATTEMPTS)
    area = canvas_size**2 * _uniform(shape, scale, generator)
    log_aspect = _uniform(shape, (math.log(aspect[0]), math.log(aspect[1])), generator)
    widths = torch.sqrt(area * torch.exp(log_aspect)).round()
    heights = torch.sqrt(area / torch.exp(log_aspect)).round()
    fits = (widths >= 1) & (widths <= canvas_size) & (heights >= 1) & (heights <= canvas_size)
    chosen = torch.argmax(fits.long(), dim=1, keepdim=True)
    found = fits.any(dim=1)
    height = torch.where(found, heights.gather(1, chosen).squeeze(1), canvas_size)
    width = torch.where(found, widths.gather(1, chosen).squeeze(1), canvas_size)
    draws = torch.rand((num_crops, 4), generator=generator, dtype=torch.float64)
    return CropParameters(
        top=torch.floor(draws[:, 0] * (canvas_size - height + 1)),
        left=torch.floor(draws[:, 1] * (canvas_size - width + 1)),
        height=height,
        width=width,
        flip=draws[:, 2] < flip_probability,
        sigma=torch.where(
            draws[:, 3] < blur_probability, _uniform((num_crops,), blur_sigma, generator), torch.zeros(num_crops)
        ),
    )


def render_crops(slices: Tensor, crops: CropParameters, *, size: int, canvas_size: int) -> Tensor:
    """The crops of square slices (n, S, S), resized to (n, 1, size, size), on the device of the slices.

    canvas_size != S stands for slices interpolated to a canvas of that side before cropping (paper sec. 4.2, second
    stage). Both resamplings are linear: their matrices are multiplied first, (size x canvas) @ (canvas x S), and the
    canvas itself is never made. The view is the one that interpolating, cropping and resizing gives, to rounding.
    """
    source_size = slices.shape[-1]
    # One small copy that the host does not wait for: waiting here would leave a GPU idle after every step.
    drawn = send(torch.stack([values.float() for values in crops]), slices.device)
    top, left, height, width, flip, sigma = drawn
    rows = resize_matrix(top, height, size=size, source_size=canvas_size)
    columns = resize_matrix(left, width, size=size, source_size=canvas_size, flip=flip)
    if canvas_size != source_size:
        whole = torch.full((1,), float(source_size), device=slices.device)
        to_canvas = resize_matrix(torch.zeros_like(whole), whole, size=canvas_size, source_size=source_size)
        rows, columns = rows @ to_canvas, columns @ to_canvas
    if crops.sigma.any():  # on the CPU, so that nothing waits
        rows, columns = blur_rows(rows, sigma), blur_rows(columns, sigma)
    return (rows.to(slices.dtype) @ slices @ columns.to(slices.dtype).mT).unsqueeze(1)


def resize_matrix(start: Tensor, length: Tensor, *, size: int, source_size: int, flip: Tensor | None = None) -> Tensor:
    """Bicubic antialiased resampling of px [start, start + length) to `size` px: (n,) -> (n, size, source_size).

    Keys' kernel (a = -0.5), widened by length / size when shrinking; only pixels that the box touches have weight, and
    each row sums to 1: what torchvision does for resized_crop(..., BICUBIC, antialias=True) when borders are whole.
    Where `flip` (n,) is not 0 the rows run backwards.
    """
    if own_kernels(start):
        from braindino.pretrain import augment_kernels

        return augment_kernels.resize_matrix(start, length, flip, size=size, source_size=source_size)
    centers = torch.arange(source_size, device=start.device) + 0.5
    outputs = (torch.arange(size, device=start.device) + 0.5).expand(len(start), size)
    if flip is not None:
        outputs = torch.where(flip.bool()[:, None], size - outputs, outputs)
    step = (length / size)[:, None, None]
    target = start[:, None, None] + outputs[:, :, None] * step
    weights = _keys_kernel((centers - target) / step.clamp_min(1))
    first = start.floor()[:, None, None]
    last = (start + length).ceil()[:, None, None]
    weights = weights * ((centers > first) & (centers < last))
    return weights / weights.sum(dim=-1, keepdim=True)


def blur_rows(matrices: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur along the second-last axis, reflected at the ends; sigma (n,) in rows, 0 = no blur."""
    half = BLUR_KERNEL // 2
    offsets = torch.arange(-half, half + 1, device=matrices.device, dtype=matrices.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    length = matrices.shape[1]
    # The blur is one more matrix, a sum of shifts: two products instead of a pass over the matrices for every tap.
    return (kernel @ _shifts(length, matrices.device)).unflatten(1, (length, length)) @ matrices


@functools.lru_cache(maxsize=32)
def _shifts(length: int, device: torch.device) -> Tensor:
    """(taps, length * length): for each tap the matrix that takes row i + tap to row i, reflected at the ends."""
    half = BLUR_KERNEL // 2
    source = torch.arange(length) + torch.arange(-half, half + 1)[:, None]
    source = source.abs()
    source = torch.where(source < length, source, 2 * (length - 1) - source)
    return torch.nn.functional.one_hot(source, length).float().flatten(1).to(device)


def _keys_kernel(x: Tensor) -> Tensor:
    """Cubic convolution kernel with a = -0.5, zero from |x| = 2 on."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _uniform(shape: tuple[int, ...], limits: tuple[float, float], generator: torch.Generator) -> Tensor:
    low, high = limits
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
