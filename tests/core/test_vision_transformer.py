"""The encoder against timm's DINOv3 (an independent program), and against itself taken apart."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from braindino.vision_transformer import VisionTransformer, vit_base, vit_large, vit_small, vit_tiny
from braindino.weights import to_timm_state

# Twelve blocks of float32 products that two libraries sum in another order; see the float64 test for the formula.
TOLERANCE = 5e-5


def _randomize(encoder, seed=0):
    """Weights under which mistakes show: LayerScale far from 0, peaky attention, biases and norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.1, 1.0, generator=generator)
            elif "qkv.weight" in name:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if name.endswith("qkv.bias"):  # a key bias is not in timm, nor in any released file
                width = encoder.embed_dim
                parameter[width : 2 * width] = 0.0
    return encoder.eval()


def _timm_twin(encoder, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's imports use what torch has deprecated
        import timm
    model = timm.create_model(name, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    model.load_state_dict(to_timm_state(encoder), strict=True)
    return model.eval()


def _sequence(tokens):
    return torch.cat([tokens.cls[:, None], tokens.storage, tokens.patches], dim=1)


def _image(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _small(**overrides):
    return VisionTransformer(**{"embed_dim": 64, "depth": 3, "num_heads": 2, **overrides})


@pytest.fixture(scope="module")
def base_and_twin():
    encoder = _randomize(vit_base())
    return encoder, _timm_twin(encoder, "vit_base_patch16_dinov3")


def _check_against(encoder, model, x, atol):
    blocks = [2, 5, 8, 11]
    with torch.inference_mode():
        ours = encoder.intermediate(x, blocks)
        theirs = model.forward_intermediates(
            x, indices=blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        torch.testing.assert_close(_sequence(encoder(x)), model.forward_features(x), rtol=0, atol=atol)
    for index, mine, (patches, prefix) in zip(blocks, ours, theirs, strict=True):
        sequence = torch.cat([prefix, patches], dim=1)
        torch.testing.assert_close(_sequence(mine), sequence, rtol=0, atol=atol, msg=lambda m, i=index: f"{i}: {m}")


@pytest.mark.parametrize("size", [(256, 256), (112, 112), (512, 512), (224, 160)])
def test_all_tokens_and_blocks_2_5_8_11_equal_timm(base_and_twin, size):
    encoder, model = base_and_twin
    _check_against(encoder, model, _image(1, 3, *size), TOLERANCE)


def test_in_float64_the_difference_to_timm_is_rounding():
    # A grid of 4 x 8 patches: its coordinates are exact in float32, in which timm computes them.
    encoder = _randomize(vit_small()).double()
    model = _timm_twin(encoder, "vit_small_patch16_dinov3").double()
    model.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    _check_against(encoder, model, _image(2, 3, 64, 128, dtype=torch.float64), 1e-11)


def test_with_qkv_bias_it_equals_timm_with_qkv_bias():
    encoder = _randomize(vit_small(qkv_bias=True))
    _check_against(encoder, _timm_twin(encoder, "vit_small_patch16_dinov3_qkvb"), _image(1, 3, 64, 96), TOLERANCE)


@pytest.mark.parametrize(
    ("build", "num_parameters"),
    [(vit_tiny, 5_485_248), (vit_small, 21_587_328), (vit_base, 85_641_984), (vit_large, 303_080_448)],
)
def test_the_sizes_have_the_parameter_counts_of_dinov3(build, num_parameters):
    with torch.device("meta"):
        encoder = build()
    assert sum(parameter.numel() for parameter in encoder.parameters()) == num_parameters
    if build is vit_base:
        assert len(encoder.state_dict()) == 164


def test_the_parameters_carry_the_official_names():
    names = set(_small(depth=1).state_dict())
    assert names == {
        "cls_token", "storage_tokens", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "rope_embed.periods", "blocks.0.norm1.weight", "blocks.0.norm1.bias", "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias", "blocks.0.ls1.gamma", "blocks.0.norm2.weight",
        "blocks.0.norm2.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.weight",
        "blocks.0.mlp.fc2.bias", "blocks.0.ls2.gamma", "norm.weight", "norm.bias",
    }  # fmt: skip
    shapes = {name: tuple(value.shape) for name, value in _small().state_dict().items() if "token" in name}
    assert shapes == {"cls_token": (1, 1, 64), "storage_tokens": (1, 4, 64), "mask_token": (1, 64)}


def test_tokens_have_their_shapes_and_patches_run_along_rows_first():
    encoder = _randomize(_small())
    for block in encoder.blocks:  # without blocks a patch token depends on its own pixels alone
        nn.init.zeros_(block.ls1.gamma)
        nn.init.zeros_(block.ls2.gamma)
    image = _image(2, 1, 48, 80)
    other = image.clone()
    other[:, :, 16:32, 48:64] += 1.0  # patch row 1 of 3, column 3 of 5
    before, after = encoder(image), encoder(other)
    assert before.cls.shape == (2, 64)
    assert before.storage.shape == (2, 4, 64)
    assert before.patches.shape == (2, 15, 64)
    changed = (before.patches != after.patches).any(dim=-1)
    assert changed.nonzero().tolist() == [[0, 1 * 5 + 3], [1, 1 * 5 + 3]]


def test_one_channel_equals_the_same_channel_three_times():
    encoder = _randomize(_small()).double()
    grey = _image(2, 1, 64, 32, dtype=torch.float64)
    three = _sequence(encoder(grey.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(_sequence(encoder(grey)), three, rtol=0, atol=1e-12)


def test_packed_crops_equal_separate_passes_and_so_do_their_gradients():
    encoder = _randomize(_small()).double()
    crops = [_image(2, 1, 64, 64, dtype=torch.float64), _image(5, 1, 32, 32, seed=2, dtype=torch.float64)]
    crops.append(_image(1, 3, 48, 16, seed=3, dtype=torch.float64))
    masks = [_image(2, 16, seed=4) > 0, None, None]

    def loss_of(outputs):
        return sum((_sequence(tokens) * torch.arange(64.0)).cos().sum() for tokens in outputs)

    packed = encoder.forward_crops(crops, masks)
    separate = [encoder.forward_crops([crop], [mask])[0] for crop, mask in zip(crops, masks, strict=True)]
    parameters = list(encoder.parameters())
    for ours, theirs in zip(packed, separate, strict=True):
        torch.testing.assert_close(_sequence(ours), _sequence(theirs), rtol=0, atol=1e-12)
    packed_gradients = torch.autograd.grad(loss_of(packed), parameters)
    separate_gradients = torch.autograd.grad(loss_of(separate), parameters)
    for ours, theirs in zip(packed_gradients, separate_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_masked_patch_counts_as_one_whose_embedding_is_the_mask_token():
    encoder = _randomize(_small()).double()
    image = _image(1, 1, 32, 48, dtype=torch.float64)
    mask = torch.tensor([[False, True, False, False, False, True]])
    filled = image.clone()
    filled[..., 0:16, 16:32] = 0.7
    filled[..., 16:32, 32:48] = 0.7
    with torch.no_grad():
        encoder.mask_token.copy_(encoder.patch_embed(torch.full((1, 1, 16, 16), 0.7, dtype=torch.float64))[:, 0])
    masked = encoder.forward_crops([image], [mask])[0]
    torch.testing.assert_close(_sequence(masked), _sequence(encoder(filled)), rtol=0, atol=1e-12)
    unmasked = encoder.forward_crops([image], [torch.zeros_like(mask)])[0]
    assert torch.equal(_sequence(unmasked), _sequence(encoder(image)))
    assert not torch.allclose(_sequence(masked), _sequence(unmasked))


def _drop_path_encoder(drop_path):
    """One block, no final norm and an MLP branch of zero, so that output minus input is the attention branch alone."""
    encoder = _randomize(_small(depth=1, drop_path=drop_path)).double()
    nn.init.zeros_(encoder.blocks[0].mlp.fc2.weight)
    nn.init.zeros_(encoder.blocks[0].mlp.fc2.bias)
    encoder.norm = nn.Identity()
    return encoder


def test_drop_path_computes_a_branch_for_a_random_subset_and_scales_it_up():
    encoder = _drop_path_encoder(0.3)
    images, small = _image(10, 1, 32, 32, dtype=torch.float64), _image(4, 1, 16, 32, seed=2, dtype=torch.float64)
    whole = [_sequence(tokens) for tokens in encoder.forward_crops([images, small])]
    still = copy.deepcopy(encoder)
    nn.init.zeros_(still.blocks[0].ls1.gamma)
    base = [_sequence(tokens) for tokens in still.forward_crops([images, small])]

    encoder.train()
    generator = torch.Generator().manual_seed(5)
    kept_counts = torch.zeros(10)
    for _ in range(300):
        outputs = encoder.forward_crops([images, small], generator=generator)
        for tokens, with_branch, without, kept in zip(outputs, whole, base, (7, 2), strict=True):
            change = _sequence(tokens) - without
            used = change.flatten(1).abs().amax(dim=1) > 0
            assert int(used.sum()) == kept  # int(10 * 0.7) and int(4 * 0.7)
            expected = (with_branch - without) * (len(used) / kept)
            torch.testing.assert_close(change[used], expected[used], rtol=0, atol=1e-10)
            if kept == 7:
                kept_counts += used
    # Each image is kept with probability 0.7: 210 of 300 on average, standard deviation 7.9.
    assert kept_counts.min() > 210 - 5 * 7.9
    assert kept_counts.max() < 210 + 5 * 7.9


def test_drop_path_keeps_the_gradient_of_a_branch_at_its_full_weight():
    encoder = _drop_path_encoder(0.3).train()
    images = _image(10, 1, 32, 32, dtype=torch.float64)
    tokens = encoder.forward_crops([images], generator=torch.Generator().manual_seed(0))[0]
    (gradient,) = torch.autograd.grad(_sequence(tokens).sum(), encoder.blocks[0].attn.proj.bias)
    # 7 images of 9 tokens take part, each counted 10 / 7 times.
    torch.testing.assert_close(gradient, 10 * 9 * encoder.blocks[0].ls1.gamma.detach(), rtol=1e-12, atol=0)


def test_drop_path_draws_every_branch_anew_from_the_generator_and_nothing_in_eval_mode():
    encoder = _randomize(_small(drop_path=0.5))
    images = _image(8, 1, 32, 32)
    global_state = torch.get_rng_state()
    evaluated = _sequence(encoder(images))
    encoder.train()

    def draw(seed):
        return _sequence(encoder.forward_crops([images], generator=torch.Generator().manual_seed(seed))[0])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(_sequence(encoder.eval()(images)), evaluated)


def test_every_image_of_a_batch_of_one_keeps_all_branches():
    encoder = _randomize(_small(drop_path=0.9))
    image = _image(1, 1, 32, 32)
    evaluated = _sequence(encoder(image))
    torch.testing.assert_close(_sequence(encoder.train()(image)), evaluated, rtol=0, atol=1e-5)


def test_intermediate_without_norm_is_what_the_final_norm_is_applied_to():
    encoder = _randomize(_small())
    image = _image(1, 1, 32, 48)
    raw = encoder.intermediate(image, blocks=(2, 0), norm=False)
    normed = encoder.intermediate(image, blocks=(2, 0))
    for before, after in zip(raw, normed, strict=True):
        torch.testing.assert_close(encoder.norm(_sequence(before)), _sequence(after), rtol=0, atol=1e-6)
    torch.testing.assert_close(_sequence(normed[0]), _sequence(encoder(image)), rtol=0, atol=1e-6)
    assert not torch.allclose(raw[0].cls, raw[1].cls)
    with pytest.raises(ValueError, match=r"blocks \[3, -1\] do not exist: this encoder has blocks 0 to 2"):
        encoder.intermediate(image, blocks=(1, 3, -1))


@pytest.mark.parametrize("size", [(168, 168), (8, 16), (256, 250), (0, 16)])
def test_a_size_that_is_no_multiple_of_16_is_an_error(size):
    with pytest.raises(ValueError, match=rf"multiples of the patch size 16, found {size[0]} x {size[1]}; crop, pad or"):
        _small()(torch.zeros(1, 1, *size))


def test_a_wrong_number_of_channels_or_dimensions_is_an_error():
    with pytest.raises(ValueError, match=r"takes \(B, 1, H, W\) or \(B, 3, H, W\), found shape \(1, 2, 16, 16\)"):
        _small()(torch.zeros(1, 2, 16, 16))
    with pytest.raises(ValueError, match=r"found shape \(16, 16\)"):
        _small()(torch.zeros(16, 16))


def test_wrong_masks_are_an_error():
    image = torch.zeros(2, 1, 32, 32)
    with pytest.raises(
        ValueError, match=r"bool of shape \(2, 4\) \(images, patches\), found torch.bool of shape \(2, 5"
    ):
        _small().forward_crops([image], [torch.zeros(2, 5, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"found torch.float32 of shape \(2, 4\)"):
        _small().forward_crops([image], [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="2 batches of crops but 1 masks"):
        _small().forward_crops([image, image], [None])


def test_impossible_constructor_values_are_errors():
    with pytest.raises(ValueError, match=r"embed_dim 60 must be a multiple of 4 x num_heads \(2\)"):
        _small(embed_dim=60)
    with pytest.raises(ValueError, match=r"drop_path must lie in \[0, 1\), found 1.0"):
        _small(drop_path=1.0)
    with pytest.raises(ValueError, match="attention must be one of auto, sdpa, varlen, xformers; found 'fast'"):
        _small(attention="fast")


def test_the_start_values_are_those_of_dinov3():
    encoder = vit_small()
    weights = encoder.blocks[3].mlp.fc1.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert encoder.blocks[11].mlp.fc2.weight.std().item() == pytest.approx(0.02, rel=0.02)  # not rescaled with depth
    assert not encoder.blocks[3].mlp.fc1.bias.any()
    projection = encoder.patch_embed.proj
    bound = 768**-0.5
    for parameter in (projection.weight, projection.bias):
        assert 0.97 * bound < parameter.abs().max().item() <= bound
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert encoder.storage_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert not encoder.mask_token.any()
    assert torch.equal(encoder.blocks[0].ls1.gamma, torch.full((384,), 1e-5))


def test_initialize_is_reproducible_and_independent_of_the_global_generator():
    first, second = _small(), _small()
    for encoder in (first, second):
        encoder.initialize(torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_architecture_rebuilds_the_network():
    encoder = _randomize(_small(qkv_bias=True, num_storage_tokens=2, mlp_ratio=3, layer_norm_eps=1e-4, rope_base=50.0))
    twin = VisionTransformer(**encoder.architecture).eval()
    twin.load_state_dict(encoder.state_dict(), strict=True)
    image = _image(1, 1, 32, 32)
    assert torch.equal(_sequence(twin(image)), _sequence(encoder(image)))
    assert twin.architecture == encoder.architecture


def test_rope_periods_are_powers_of_100_and_stay_float32_in_a_half_precision_encoder():
    encoder = vit_tiny()
    expected = [100 ** (4 * i / 64) for i in range(16)]
    assert encoder.rope_embed.periods.tolist() == pytest.approx(expected, rel=1e-6)
    periods = encoder.rope_embed.periods.clone()
    for convert in (encoder.bfloat16, encoder.half, encoder.float):
        convert()
        assert encoder.rope_embed.periods.dtype == torch.float32
        assert torch.equal(encoder.rope_embed.periods, periods)


def test_a_half_precision_encoder_gives_nearly_the_same_features():
    encoder = _randomize(_small())
    image = _image(1, 1, 64, 64)
    exact = encoder(image).cls
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(image).cls
    half = encoder.bfloat16()(image.bfloat16()).cls
    assert half.dtype == torch.bfloat16
    for features in (mixed, half):
        assert torch.cosine_similarity(features.float(), exact).item() > 0.999


def test_rope_tables_made_during_inference_can_be_trained_with_later():
    encoder = _randomize(_small())
    with torch.inference_mode():
        encoder(_image(1, 1, 32, 32))
    encoder.train()(_image(1, 1, 32, 32)).cls.sum().backward()
    assert encoder.blocks[0].attn.qkv.weight.grad is not None


def test_loading_other_periods_replaces_the_kept_tables():
    encoder = _randomize(_small())
    image = _image(1, 1, 32, 32)
    before = encoder(image).cls
    state = encoder.state_dict() | {"rope_embed.periods": encoder.rope_embed.periods * 2}
    encoder.load_state_dict(state)
    assert not torch.allclose(encoder(image).cls, before)


def test_it_compiles_to_the_same_features():
    encoder = _randomize(_small())
    image = _image(1, 1, 32, 32)
    expected = _sequence(encoder(image))
    compiled = torch.compile(encoder, backend="eager")
    torch.testing.assert_close(_sequence(compiled(image)), expected, rtol=0, atol=5e-6)
