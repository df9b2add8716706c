"""Crops by matrix products against torchvision, image by image."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from braindino.pretrain.augment import CropParameters, draw_crops, render_crops
from braindino.pretrain.views import Views, build_views


def asymmetric_slices(count: int) -> torch.Tensor:
    """Smooth gradients that differ in both directions, plus texture."""
    rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    base = rows / 128 - (columns / 200) ** 2
    return base + 0.3 * torch.randn(count, 256, 256, generator=torch.Generator().manual_seed(0))


def draw(count: int, *, canvas: int = 256, seed: int = 0, blur: float = 0.5, scale=(0.05, 1.0)) -> CropParameters:
    return draw_crops(
        count,
        canvas_size=canvas,
        scale=scale,
        aspect=(3 / 4, 4 / 3),
        flip_probability=0.5,
        blur_probability=blur,
        blur_sigma=(0.1, 2.0),
        generator=torch.Generator().manual_seed(seed),
    )


def torchvision_crop(image: torch.Tensor, crops: CropParameters, n: int, size: int) -> torch.Tensor:
    box = [int(values[n]) for values in (crops.top, crops.left, crops.height, crops.width)]
    view = tv.resized_crop(image[None], *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    if crops.flip[n]:
        view = tv.hflip(view)
    if crops.sigma[n] > 0:
        view = tv.gaussian_blur(view, [9, 9], [float(crops.sigma[n])] * 2)
    return view


# In Triton's interpreter a kernel is slow.
@pytest.mark.parametrize(("size", "kernels"), [(256, False), (112, False), (48, False), (48, True)])
def test_crops_equal_torchvisions_crop_flip_and_blur(request, size: int, kernels: bool) -> None:
    if kernels:
        request.getfixturevalue("interpreted_kernels")
    slices = asymmetric_slices(12)
    crops = draw(12)
    assert 0 < crops.flip.sum() < 12 and 0 < (crops.sigma > 0).sum() < 12
    views = render_crops(slices, crops, size=size, canvas_size=256)
    assert views.shape == (12, 1, size, size)
    for n in range(12):
        torch.testing.assert_close(views[n], torchvision_crop(slices[n], crops, n, size), rtol=0, atol=1e-4)


def test_a_whole_slice_at_its_own_size_comes_back_unchanged() -> None:
    slices = asymmetric_slices(1)
    one = torch.ones(1)
    whole = CropParameters(0 * one, 0 * one, 256 * one, 256 * one, one > 2, 0 * one)
    torch.testing.assert_close(render_crops(slices, whole, size=256, canvas_size=256)[:, 0], slices)


def test_a_flip_mirrors_columns_only() -> None:
    slices = asymmetric_slices(1)
    one = torch.ones(1)
    flipped = CropParameters(0 * one, 0 * one, 256 * one, 256 * one, one > 0, 0 * one)
    torch.testing.assert_close(render_crops(slices, flipped, size=256, canvas_size=256)[:, 0], slices.flip(2))


@pytest.mark.parametrize(
    ("size", "scale"), [(768, (0.32, 1.0)), (512, (0.32, 1.0)), (336, (0.05, 0.32)), (112, (0.05, 0.32))]
)
def test_cropping_once_from_256_px_equals_interpolating_to_1024_cropping_and_resizing(size: int, scale) -> None:
    # Every pixel, with texture up to the highest frequency: the two resamplings are composed, not approximated.
    slices = asymmetric_slices(4)
    canvases = tv.resize(slices[:, None], [1024, 1024], InterpolationMode.BICUBIC, antialias=True)[:, 0]
    crops = draw(4, canvas=1024, scale=scale, seed=6)
    assert 0 < crops.flip.sum() < 4 and (crops.sigma > 0).any()
    views = render_crops(slices, crops, size=size, canvas_size=1024)
    for n in range(4):
        torch.testing.assert_close(views[n], torchvision_crop(canvases[n], crops, n, size), rtol=0, atol=2e-4)


def test_boxes_are_distributed_as_torchvision_draws_them() -> None:
    ours = draw(4000, scale=(0.32, 1.0))
    torch.manual_seed(0)
    image = torch.zeros(1, 256, 256)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.32, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    ).double()
    for column, values in enumerate((ours.top, ours.left, ours.height, ours.width)):
        assert torch.equal(values, values.round())
        assert values.double().mean().item() == pytest.approx(theirs[:, column].mean().item(), abs=3.0)
        assert values.double().std().item() == pytest.approx(theirs[:, column].std().item(), rel=0.06)
    assert (ours.top + ours.height <= 256).all() and (ours.left + ours.width <= 256).all()


@pytest.mark.parametrize("probability", [0.0, 0.5, 0.9, 1.0])
def test_the_blur_probability_is_the_probability_of_blur(probability: float) -> None:
    sigma = draw(5000, blur=probability).sigma
    assert (sigma > 0).double().mean().item() == pytest.approx(probability, abs=0.02)
    assert sigma.max() <= 2.0 and (sigma[sigma > 0] >= 0.1).all()


def test_a_box_that_never_fits_is_the_whole_slice() -> None:
    crops = draw_crops(
        3,
        canvas_size=256,
        scale=(1.0, 1.0),
        aspect=(1.3, 4 / 3),
        flip_probability=0.0,
        blur_probability=0.0,
        blur_sigma=(0.1, 2.0),
        generator=torch.Generator().manual_seed(0),
    )
    assert crops.height.tolist() == crops.width.tolist() == [256.0] * 3 and crops.top.tolist() == [0.0] * 3


def views_on(device: str) -> tuple[Views, torch.Tensor]:
    """Views of six slices, cut on a device, and the state of the generator afterwards."""
    generator = torch.Generator().manual_seed(7)
    views = build_views(
        asymmetric_slices(6).half(),
        torch.arange(12 * 16).remainder(3).eq(0).unflatten(0, (12, 16)),
        sizes=(64, 32),
        num_local=3,
        global_scale=(0.32, 1.0),
        local_scale=(0.05, 0.32),
        aspect=(3 / 4, 4 / 3),
        canvas_size=256,
        flip_probability=0.5,
        blur_probabilities=(0.0, 0.9, 0.5),
        blur_sigma=(0.1, 2.0),
        generator=generator,
        device=torch.device(device),
    )
    return views, generator.get_state()


def test_the_random_numbers_of_views_do_not_depend_on_the_device() -> None:
    on_cpu, cpu_state = views_on("cpu")
    elsewhere, state = views_on("meta")  # shapes without values: whatever is drawn is drawn on the CPU
    assert torch.equal(state, cpu_state)
    assert elsewhere.global_crops.is_meta and elsewhere.global_crops.shape == on_cpu.global_crops.shape
    again, _ = views_on("cpu")
    assert torch.equal(on_cpu.global_crops, again.global_crops)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_cut_on_the_gpu_equal_those_cut_on_the_cpu() -> None:
    (on_cpu, cpu_state), (on_gpu, state) = views_on("cpu"), views_on("cuda")
    assert torch.equal(state, cpu_state)
    for name, values in on_cpu._asdict().items():
        found = getattr(on_gpu, name)
        assert found.is_cuda or name == "masked"
        torch.testing.assert_close(found.cpu(), values, rtol=0, atol=1e-4)
