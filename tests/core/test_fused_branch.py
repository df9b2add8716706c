"""The encoder by GPU kernels, in Triton's interpreter, against its plain formulation; where there is a GPU, on it."""

import pytest
import torch

from braindino import own_kernels as kernels
from braindino.vision_transformer import VisionTransformer

SIZES = ((3, 32, 48), (2, 16, 16))  # images, px
MASK = torch.zeros(3, 6, dtype=torch.bool).index_fill(1, torch.tensor([1, 4]), True)


def encoder(**options) -> VisionTransformer:
    """Small, with widths that are no powers of two; every parameter away from its start, where parts of it vanish."""
    torch.manual_seed(0)
    made = VisionTransformer(embed_dim=24, depth=2, num_heads=3, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.train()


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 1, *size, generator=generator) for batch, *size in SIZES]


def read_tokens(model: VisionTransformer, device: str = "cpu") -> torch.Tensor:
    """(R, D) read tokens of both batches, one after another."""
    tokens = model.forward_read(
        [batch.to(device) for batch in images()],
        [torch.tensor([0, 3, 7, 16]), None],
        masks=[MASK.to(device), None],
        generator=torch.Generator().manual_seed(2),
    )
    return torch.cat([part for batch in tokens for part in (batch.cls, batch.patches)])


def all_tokens(model: VisionTransformer, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    tokens = model.forward_crops([batch.to(device) for batch in images()], generator=generator)
    return torch.cat([part.flatten(0, 1) for batch in tokens for part in (batch.cls[:, None], *batch[1:])])


def gradients(model: VisionTransformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    factor = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)).to(tokens.device)
    (tokens * factor).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


PASSES = pytest.mark.parametrize("run", [read_tokens, all_tokens])
OPTIONS = pytest.mark.parametrize(
    ("options", "checkpointing"),
    [({}, False), ({"drop_path": 0.4}, False), ({"drop_path": 0.4}, True), ({"qkv_bias": True}, False)],
    ids=["every token", "drop path", "drop path, computed again", "qkv bias"],
)


@PASSES
@OPTIONS
def test_kernels_give_the_values_and_gradients_of_the_plain_formulation(request, run, options, checkpointing) -> None:
    plain = encoder(**options)
    expected = run(plain)
    wanted = gradients(plain, expected)
    request.getfixturevalue("interpreted_kernels")
    fused = encoder(**options)
    fused.checkpointing = checkpointing
    found = run(fused)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours = gradients(fused, found)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_without_gradients_and_with_a_frozen_encoder(request) -> None:
    """As a teacher, and as nnU-Net uses it: the images want a gradient, the encoder none."""
    plain = encoder().eval().requires_grad_(False)
    pixels = images()[0].requires_grad_()
    expected = plain(pixels).patches
    (wanted,) = torch.autograd.grad(expected.square().sum(), pixels)
    request.getfixturevalue("interpreted_kernels")
    fused = encoder().eval().requires_grad_(False)
    found = fused(pixels).patches
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (ours,) = torch.autograd.grad(found.square().sum(), pixels)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    with torch.inference_mode():
        torch.testing.assert_close(fused(pixels).patches, expected.detach(), rtol=1e-4, atol=1e-5)


def test_in_half_precision_the_residual_stays_whole(interpreted_kernels) -> None:
    """Under autocast tokens are rounded for products only: a branch a thousand times smaller than x still counts."""
    model = encoder(drop_path=0.4)
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.fill_(1e-4)
            block.ls2.gamma.fill_(1e-4)
    exact = all_tokens(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = all_tokens(model)
    assert rounded.dtype == torch.float32
    start = model._embed(images()[0], None)
    assert start.dtype == torch.float32
    # Patches are embedded in half precision, too.
    assert (rounded - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_cuda_devices_have_kernels_and_the_reason_is_told(device: str) -> None:
    assert not kernels.own_kernels(torch.empty(1, device=device))
    assert kernels.explain(torch.device(device)) == f"own kernels on {device}: no ({device} is no CUDA device)"


@pytest.mark.gpu
def test_the_gpu_runs_the_kernels() -> None:
    assert kernels.explain(torch.device("cuda")) == "own kernels on cuda: yes"


@pytest.mark.gpu
@PASSES
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_values_and_gradients_are_those_of_the_cpu(run, drop_path: float, checkpointing: bool) -> None:
    plain = encoder(drop_path=drop_path)
    expected = run(plain)
    wanted = gradients(plain, expected)
    fused = encoder(drop_path=drop_path).cuda()
    fused.checkpointing = checkpointing
    found = run(fused, "cuda")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    ours = gradients(fused, found)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (ours[name].cpu() - gradient).norm() / gradient.norm()
        assert error < 2e-3, f"{name}: {error}"


@pytest.mark.gpu
@PASSES
def test_on_a_gpu_half_precision_comes_near(run) -> None:
    plain = encoder(drop_path=0.4)
    expected = run(plain)
    wanted = gradients(plain, expected)
    fused = encoder(drop_path=0.4).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = run(fused, "cuda")
    assert (found.cpu() - expected).norm() < 0.03 * expected.norm()
    ours = gradients(fused, found)
    for name, gradient in wanted.items():
        error = (ours[name].cpu() - gradient).norm() / gradient.norm()
        assert error < 0.15, f"{name}: {error}"
