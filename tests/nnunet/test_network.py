"""The segmentation network: the paper's sizes, what is trained and what is not, checkpoints."""

import copy
import warnings

import pytest
import torch

from braindino.vision_transformer import VisionTransformer, vit_base, vit_tiny
from nnunet_braindino.decoder import LinearDecoder
from nnunet_braindino.network import (
    FineTunedSegmenter,
    FrozenEncoderSegmenter,
    count_parameters,
    decoder_blocks,
)


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
    assert changed == {key for key in after if key.startswith(("fusion.", "decoder."))}
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
        grid = torch.cat([block.patches for block in tokens], dim=2).reshape(1, 2, 3, 4 * 192)
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


@pytest.mark.parametrize("network_class", [FrozenEncoderSegmenter, FineTunedSegmenter])
def test_a_fixed_fusion_gets_no_gradient_and_the_encoder_no_graph_unless_it_is_trained(network_class):
    torch.manual_seed(0)
    network = network_class(vit_tiny(depth=4, layer_scale_init=1.0), num_input_channels=2, num_classes=2)
    images = torch.randn(2, 2, 32, 32)
    expected = network(images)
    assert network.encode(images).requires_grad
    network(images).sum().backward()
    network.fix_fusion()
    assert network.encode(images).requires_grad == (network_class is FineTunedSegmenter)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=0)
    assert network.fusion.weight.grad is None
    network(images).sum().backward()
    assert network.fusion.weight.grad is None


def test_fine_tuning_gives_every_parameter_but_the_mask_token_a_gradient():
    torch.manual_seed(0)
    network = FineTunedSegmenter(vit_tiny(depth=4, layer_scale_init=1.0), num_input_channels=2, num_classes=2)
    network(torch.randn(2, 2, 32, 32)).square().mean().backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert without == {"encoder.mask_token"}
    assert count_parameters(network).trainable == count_parameters(network).total - 192


def test_the_linear_floor_has_one_layer_on_the_last_tokens_and_keeps_their_places():
    torch.manual_seed(0)
    encoder = vit_tiny(depth=4, layer_scale_init=1.0)
    network = FrozenEncoderSegmenter(encoder, num_input_channels=1, num_classes=2, decoder=LinearDecoder).eval()
    assert count_parameters(network).trainable == 3 + 192 * 2 + 2
    images = torch.randn(1, 1, 48, 64)
    with torch.inference_mode():
        logits = network(images)
        tokens = encoder(images.expand(-1, 3, -1, -1)).patches
        expected = network.decoder.to_logits(tokens).reshape(3, 4, 2)
    assert logits.shape == (1, 2, 48, 64)
    # Where the enlarged map meets a patch centre between four pixels, their mean is the patch's own value.
    inner = logits[0, :, 16 + 7 : 16 + 9, 16 + 7 : 16 + 9].mean(dim=(1, 2))
    neighbours = expected[0:3, 0:3].permute(2, 0, 1)
    near, far = 31 / 32, 1 / 32
    centre = (
        near * near * neighbours[:, 1, 1] * 4
        + far * near * 2 * (neighbours[:, 0, 1] + neighbours[:, 2, 1] + neighbours[:, 1, 0] + neighbours[:, 1, 2])
        + far * far * (neighbours[:, 0, 0] + neighbours[:, 0, 2] + neighbours[:, 2, 0] + neighbours[:, 2, 2])
    ) / 4
    torch.testing.assert_close(inner, centre)


def test_patches_of_another_size_than_sixteen_are_refused():
    with pytest.raises(ValueError, match="needs patches of 16 pixels, the encoder has 8"):
        FrozenEncoderSegmenter(vit_tiny(patch_size=8), num_input_channels=1, num_classes=2)


def test_the_network_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_network(num_input_channels=2)(torch.randn(1, 2, 32, 32)).sum().backward()
