"""The segmentation network: the paper's sizes, what is trained and what is not, checkpoints."""

import copy
import warnings

import pytest
import torch

from braindino.vision_transformer import VisionTransformer, vit_base, vit_tiny
from nnunet_braindino.decoder import ChannelLayerNorm, PatchDecoder
from nnunet_braindino.network import FrozenEncoderSegmenter, count_parameters, decoder_blocks


def tiny_network(num_input_channels: int = 4, num_classes: int = 3) -> FrozenEncoderSegmenter:
    torch.manual_seed(0)
    # Gamma as after training: with its start of 1e-5 the blocks would hardly matter.
    encoder = vit_tiny(depth=4, layer_scale_init=1.0)
    return FrozenEncoderSegmenter(encoder, num_input_channels=num_input_channels, num_classes=num_classes)


def test_vit_base_with_three_regions_has_the_papers_parameter_counts():
    network = FrozenEncoderSegmenter(vit_base(), num_input_channels=4, num_classes=3)
    counts = count_parameters(network)
    assert counts == (25_076_751, 110_718_735)
    assert str(counts) == "25,076,751 of 110,718,735 parameters trained (22.65 %)"


def test_the_decoder_reads_the_last_block_of_every_quarter():
    assert decoder_blocks(12) == (2, 5, 8, 11)
    assert decoder_blocks(24) == (5, 11, 17, 23)
    with pytest.raises(ValueError, match="four blocks, the encoder has 3"):
        decoder_blocks(3)


@pytest.mark.parametrize("num_channels", [1, 2, 4, 5])
def test_fusion_starts_as_the_average_of_its_channels_and_gets_a_gradient_through_the_frozen_encoder(num_channels):
    network = tiny_network(num_input_channels=num_channels)
    images = torch.randn(2, num_channels, 32, 32)
    fused = network.fusion(images)
    torch.testing.assert_close(fused, images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1))

    network(images).square().mean().backward()
    assert network.fusion.weight.grad is not None
    assert network.fusion.weight.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in network.encoder.parameters())
    assert all(parameter.grad is not None for parameter in network.decoder.parameters())


def test_training_steps_leave_the_encoders_bytes_and_mode_alone_and_change_the_rest():
    network = tiny_network()
    network.encoder.drop_path = 0.5  # would make features random if train() reached the encoder
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.05)
    images = torch.randn(2, 4, 32, 32)
    for _ in range(3):
        network.train()
        assert network.training
        assert not any(module.training for module in network.encoder.modules())
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()
    after = network.state_dict()
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed == {key for key in after if not key.startswith("encoder.")}
    torch.testing.assert_close(network(images), network(images), rtol=0, atol=0)


def test_logits_sit_where_their_pixels_are():
    """A change inside one patch of the image changes the logits of that patch most: rows and columns in order."""
    network = tiny_network(num_input_channels=1, num_classes=2).eval()
    image = torch.randn(1, 1, 48, 80)
    changed = image.clone()
    changed[..., 32:48, 16:32] += 5
    with torch.inference_mode():
        difference = (network(changed) - network(image)).abs().sum(dim=1)[0]
    assert difference.shape == (48, 80)
    per_patch = difference.unflatten(1, (5, 16)).unflatten(0, (3, 16)).mean(dim=(1, 3))
    assert per_patch.argmax() == 2 * 5 + 1


def test_features_are_the_normed_patch_tokens_of_the_four_blocks():
    network = tiny_network(num_input_channels=3).eval()
    with torch.no_grad():
        network.fusion.weight.copy_(torch.eye(3)[:, :, None, None])
        images = torch.randn(1, 3, 32, 48)
        tokens = network.encoder.intermediate(images, blocks=(0, 1, 2, 3), norm=True)
        grid = torch.cat([block.patches for block in tokens], dim=2).transpose(1, 2).reshape(1, 4 * 192, 2, 3)
        torch.testing.assert_close(network(images), network.decoder(grid))


def test_state_dict_goes_round_without_the_encoder_it_was_built_from():
    trained = tiny_network().eval()
    # What prediction does: the architecture from the plans, every weight from the checkpoint.
    restored = FrozenEncoderSegmenter(
        VisionTransformer(**trained.encoder.architecture), num_input_channels=4, num_classes=3
    ).eval()
    restored.load_state_dict(trained.state_dict(), strict=True)
    images = torch.randn(1, 4, 32, 32)
    with torch.inference_mode():
        assert torch.equal(trained(images), restored(images))


def test_channel_norm_equals_its_formula_and_the_decoder_starts_with_unit_gains():
    x = torch.randn(2, 8, 3, 5)
    norm = ChannelLayerNorm(8, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    centred = x - x.mean(dim=1, keepdim=True)
    expected = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)

    decoder = PatchDecoder(192, 3)
    for stage in decoder.stages:
        convolution = stage[0]
        fan_in = convolution.out_channels * 4  # as torch counts it for a transposed convolution
        assert convolution.weight.std().item() == pytest.approx((2 / (1 + 1e-4) / fan_in) ** 0.5, rel=0.05)
        assert not convolution.bias.any()


def test_patches_of_another_size_than_sixteen_are_refused():
    with pytest.raises(ValueError, match="needs patches of 16 pixels, the encoder has 8"):
        FrozenEncoderSegmenter(vit_tiny(patch_size=8), num_input_channels=1, num_classes=2)


def test_the_network_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_network(num_input_channels=2)(torch.randn(1, 2, 32, 32)).sum().backward()
