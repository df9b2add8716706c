"""The decoder against the plain layers whose parameters it holds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_braindino import decoder as decoder_module
from nnunet_braindino.decoder import PatchDecoder


def plain_layers(decoder: PatchDecoder, features: torch.Tensor) -> torch.Tensor:
    """Transposed convolution, norm over channels, GELU, four times; 1x1 convolution: as one would write it down."""
    x = features.movedim(-1, 1)
    for convolution, norm in decoder.stages:
        x = F.conv_transpose2d(x, convolution.weight, convolution.bias, stride=2)
        centred = x - x.mean(dim=1, keepdim=True)
        x = centred / (centred.square().mean(dim=1, keepdim=True) + norm.eps).sqrt()
        x = F.gelu(x * norm.weight[:, None, None] + norm.bias[:, None, None])
    return F.conv2d(x, decoder.to_logits.weight, decoder.to_logits.bias)


def random_decoder(embed_dim: int = 48, num_classes: int = 3) -> PatchDecoder:
    torch.manual_seed(0)
    decoder = PatchDecoder(embed_dim, num_classes)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return decoder


@pytest.mark.parametrize(("rows_at_a_time", "kernels"), [(7, False), (1_000_000, False), (700, True)])
def test_values_and_gradients_are_those_of_the_plain_layers(
    request, rows_at_a_time: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
):
    if kernels:
        request.getfixturevalue("interpreted_kernels")
    monkeypatch.setitem(decoder_module.CHUNK_VALUES, "cpu", 1)
    monkeypatch.setattr(decoder_module, "MIN_CHUNK_ROWS", rows_at_a_time)
    decoder = random_decoder()
    features = torch.randn(2, 3, 5, 4 * 48, requires_grad=True)
    ours, plain = decoder(features), plain_layers(decoder, features)
    assert ours.shape == (2, 3, 48, 80)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)

    outer = torch.randn_like(plain)
    wanted = [features, *decoder.parameters()]
    for found, expected in zip(
        torch.autograd.grad(ours, wanted, outer), torch.autograd.grad(plain, wanted, outer), strict=True
    ):
        torch.testing.assert_close(found / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_on_a_gpu_values_and_gradients_are_those_of_the_plain_layers(half: bool):
    """At widths and numbers of pixels that fill many programs, the last of them in part."""
    decoder = random_decoder(embed_dim=192)
    features = torch.randn(3, 7, 5, 4 * 192)
    wanted = [features.requires_grad_(), *decoder.parameters()]
    plain = plain_layers(decoder, features)
    outer = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, wanted, outer)
    decoder.cuda()
    there = features.detach().cuda().requires_grad_()
    with torch.autocast("cuda", dtype=torch.float16, enabled=half):
        ours = decoder(there)
    tolerance = 0.02 if half else 1e-4
    assert (ours.cpu() - plain).norm() < tolerance * plain.norm()
    found = torch.autograd.grad(ours, [there, *decoder.parameters()], outer.cuda().to(ours.dtype))
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu() - other).norm() < tolerance * other.norm()


def test_gradients_are_exact_in_double_precision():
    decoder = random_decoder(embed_dim=4, num_classes=2).double()
    features = torch.randn(1, 1, 2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(decoder, (features,), fast_mode=True)


def test_under_autocast_it_is_as_close_as_half_precision_allows():
    decoder, features = random_decoder(), torch.randn(1, 2, 2, 4 * 48)
    expected = plain_layers(decoder, features)
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(features)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
    logits.float().square().mean().backward()
    half = [parameter.grad for parameter in decoder.parameters()]
    assert all(gradient.dtype == torch.float32 for gradient in half)
    decoder.zero_grad()
    plain_layers(decoder, features).square().mean().backward()
    for found, parameter in zip(half, decoder.parameters(), strict=True):
        assert (found - parameter.grad).norm() < 0.05 * parameter.grad.norm()


def test_it_can_be_traced_for_torch_compile():
    decoder, features = random_decoder(), torch.randn(1, 2, 3, 4 * 48)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), decoder(features))
    compiled(features).square().mean().backward()
    assert decoder.stages[0][0].weight.grad is not None


def test_a_part_of_the_grid_is_decoded_to_the_same_part_of_the_image():
    decoder, features = random_decoder(), torch.randn(1, 4, 6, 4 * 48)
    with torch.inference_mode():
        torch.testing.assert_close(decoder(features[:, 1:3, 2:5]), decoder(features)[..., 16:48, 32:80])


def test_parameters_have_the_names_and_the_start_of_plain_layers():
    decoder = PatchDecoder(192, 3)
    names = [name for name, _ in decoder.named_parameters()]
    assert names[:4] == ["stages.0.0.weight", "stages.0.0.bias", "stages.0.1.weight", "stages.0.1.bias"]
    assert names[-2:] == ["to_logits.weight", "to_logits.bias"]
    for convolution, norm in decoder.stages:
        fan_in = convolution.out_channels * 4  # as torch counts it for a transposed convolution
        assert convolution.weight.std().item() == pytest.approx((2 / (1 + 1e-4) / fan_in) ** 0.5, rel=0.05)
        assert not convolution.bias.any()
        assert (norm.weight == 1).all()
    with pytest.raises(ValueError, match="multiple of 4 to be halved four times"):
        PatchDecoder(30, 3)
