"""The 3D networks: published sizes and names, and equal numbers from independent programs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braindino.encoders.bm_mae import TOKENIZERS
from braindino.encoders.catalogue import draw_weights
from braindino.encoders.checkpoints import MODALITIES
from braindino.encoders.patch_embedding import embed_patches, widen_patch_embedding
from braindino.encoders.uniformer import UniFormer
from braindino.encoders.volume_transformer import BMMAETransformer, BrainIACTransformer, sincos_positions


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(build, **options) -> nn.Module:
    with torch.device("meta"):
        return build(**options)


def test_brainmvp_has_the_published_sizes_part_by_part():
    network = on_meta(UniFormer)
    assert count(network) == 22_038_464
    assert count(on_meta(UniFormer, in_channels=4)) == 22_040_000
    parts = {name: count(module) for name, module in network.named_children()}
    assert parts == {
        "patch_embed1": 704,
        "patch_embed2": 65_920,
        "patch_embed3": 328_640,
        "patch_embed4": 1_312_256,
        "blocks1": 154_560,
        "blocks2": 739_840,
        "blocks3": 9_935_360,
        "blocks4": 9_500_160,
        "norm": 1_024,
    }
    assert len(network.state_dict()) == 329
    assert sum(buffer.numel() for buffer in network.buffers()) == 3_855


def test_brainmvp_has_the_published_names():
    block_parts = {
        **dict.fromkeys((1, 2), ("pos_embed", "conv1", "conv2", "attn", "mlp.fc1", "mlp.fc2")),
        **dict.fromkeys((3, 4), ("pos_embed", "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
    }
    batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"norm.{kind}" for kind in batch_norm}
    for stage, depth in zip((1, 2, 3, 4), (3, 4, 8, 3), strict=True):
        expected |= {f"patch_embed{stage}.{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")}
        for index in range(depth):
            stem = f"blocks{stage}.{index}."
            expected |= {f"{stem}{part}.{kind}" for part in block_parts[stage] for kind in ("weight", "bias")}
            if stage < 3:
                expected |= {f"{stem}{norm}.{kind}" for norm in ("norm1", "norm2") for kind in batch_norm}
    assert set(on_meta(UniFormer).state_dict()) == expected


def test_brainiac_has_the_published_size_and_names():
    network = on_meta(BrainIACTransformer)
    assert (count(network), len(network.state_dict())) == (88_340_736, 137)
    parts = ("mlp.linear1", "mlp.linear2", "norm1", "attn.out_proj", "norm2")
    expected = {f"blocks.{n}.{part}.{kind}" for n in range(12) for part in parts for kind in ("weight", "bias")}
    expected |= {f"blocks.{n}.attn.qkv.weight" for n in range(12)} | {"norm.weight", "norm.bias"}
    expected |= {f"patch_embedding.patch_embeddings.{kind}" for kind in ("weight", "bias")}
    assert set(network.state_dict()) == expected | {"patch_embedding.position_embeddings"}
    assert network.state_dict()["patch_embedding.position_embeddings"].shape == (1, 216, 768)


@pytest.mark.parametrize(("modalities", "size", "tensors"), [(("t1",), 60_266_496, 150), (MODALITIES, 70_885_632, 159)])
def test_bm_mae_has_the_published_size_and_names(modalities: tuple[str, ...], size: int, tensors: int):
    network = draw_weights(lambda: BMMAETransformer(modalities=modalities))
    state = network.state_dict()
    assert (count(network), len(state)) == (size, tensors)
    assert state["cls_token"].shape == (1, 1, 768)
    assert state["blocks.11.mlp.linear1.weight"].shape == (1536, 768)
    assert state["blocks.0.attn.qkv.bias"].shape == (2304,)
    for name in modalities:
        stem = f"tokenizers.{name}.patch_embedding."
        assert state[stem + "position_embeddings"].shape == (1, 512, 768)
        assert state[stem + "patch_embeddings.weight"].shape == (768, 1, 16, 16, 16)
    assert set(TOKENIZERS.values()) == set(MODALITIES)


def test_positions_are_sines_and_cosines_in_a_hand_loop():
    grid, width = 3, 12
    positions = sincos_positions(grid, width)
    assert positions.shape == (1, 27, 12)
    for number in range(27):
        first, second, third = number // 9, number // 3 % 3, number % 3
        expected = []
        for coordinate in (second, first, third):
            angles = [coordinate / 10_000 ** (k / 2) for k in range(2)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert positions[0, number].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="found width 64; expected a multiple of 6"):
        sincos_positions(2, 64)


def reference_block(state: dict[str, torch.Tensor], stem: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    """One pre-norm block in float64, one head and one token at a time."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        bias = state.get(f"{stem}{name}.bias")
        return value @ state[f"{stem}{name}.weight"].T + (0 if bias is None else bias)

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{stem}{name}.weight"] + state[f"{stem}{name}.bias"]

    width = x.shape[-1]
    qkv = linear("attn.qkv", norm("norm1", x))
    seen = torch.empty_like(x)
    size = width // heads
    for head in range(heads):
        q, k, v = (qkv[:, part * width + head * size :][:, :size] for part in range(3))
        for token in range(len(x)):
            weights = torch.exp(k @ q[token] / size**0.5)
            seen[token, head * size : (head + 1) * size] = (weights / weights.sum()) @ v
    x = x + linear("attn.out_proj", seen)
    hidden = linear("mlp.linear1", norm("norm2", x))
    return x + linear("mlp.linear2", hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def reference_patches(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(N, D): every 16^3 patch of one cube (X, Y, Z) times the weights, the last axis fastest."""
    patches = [
        images[x : x + 16, y : y + 16, z : z + 16]
        for x in range(0, images.shape[0], 16)
        for y in range(0, images.shape[1], 16)
        for z in range(0, images.shape[2], 16)
    ]
    return torch.stack([(weight[:, 0] * patch).sum((1, 2, 3)) + bias for patch in patches])


def test_brainiac_equals_a_float64_loop_over_patches_heads_and_tokens():
    network = draw_weights(lambda: BrainIACTransformer(width=128, depth=3, mlp_dim=96, grid=2))
    images = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    state = {key: value.double() for key, value in network.state_dict().items()}
    stem = "patch_embedding.patch_embeddings."
    x = reference_patches(images[0, 0].double(), state[stem + "weight"], state[stem + "bias"])
    x = x + state["patch_embedding.position_embeddings"][0]
    outputs = []
    for number in range(3):
        x = reference_block(state, f"blocks.{number}.", x, heads=2)
        outputs.append(x)
    with torch.inference_mode():
        found = network.intermediate(images, [0, 2])
    for tokens, expected in zip(found, (outputs[0], outputs[2]), strict=True):
        assert tokens.cls is None
        torch.testing.assert_close(tokens.patches[0].double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"blocks \[3\] do not exist"):
        network.intermediate(images, [3])
    with pytest.raises(ValueError, match=r"expected \(B, C, 32, 32, 32\)"):
        network.intermediate(torch.zeros(1, 1, 48, 32, 32), [0])


def test_bm_mae_equals_a_float64_loop_with_one_modality_and_with_two():
    network = draw_weights(lambda: BMMAETransformer(modalities=("t1", "flair"), width=192, depth=2, mlp_dim=64, grid=2))
    generator = torch.Generator().manual_seed(1)
    images = {name: torch.randn(1, 1, 32, 32, 32, generator=generator) for name in ("t1", "flair")}
    state = {key: value.double() for key, value in network.state_dict().items()}
    for names in (("flair",), ("t1", "flair")):
        parts = [state["cls_token"][0]]
        for name in names:
            stem = f"tokenizers.{name}.patch_embedding."
            weight, bias = state[stem + "patch_embeddings.weight"], state[stem + "patch_embeddings.bias"]
            parts.append(reference_patches(images[name][0, 0].double(), weight, bias) + sincos_positions(2, 192)[0])
        x = torch.cat(parts)
        for number in range(2):
            x = reference_block(state, f"blocks.{number}.", x, heads=3)
        with torch.inference_mode():
            [tokens] = network.intermediate(network.tokenize({name: images[name] for name in names}), [1])
        assert tokens.patches.shape == (1, 8 * len(names), 192)
        assert tokens.cls is not None
        torch.testing.assert_close(torch.cat([tokens.cls, tokens.patches[0]]).double(), x, rtol=1e-4, atol=1e-5)


def test_both_transformers_equal_monais():
    pytest.importorskip("monai")
    from monai.networks.blocks import PatchEmbeddingBlock, TransformerBlock
    from monai.networks.nets import ViT

    torch.manual_seed(0)
    theirs = ViT(1, (64,) * 3, (16,) * 3, hidden_size=128, mlp_dim=96, num_layers=3, num_heads=2).eval()
    state = {key: value for key, value in theirs.state_dict().items() if "cross_attn" not in key}
    ours = BrainIACTransformer(width=128, depth=3, mlp_dim=96, grid=4)
    ours.load_state_dict(state)
    images = torch.randn(2, 1, 64, 64, 64)
    with torch.no_grad():
        last, hidden = theirs(images)
        tokens = ours.intermediate(images, [0, 2])
        torch.testing.assert_close(tokens[0].patches, hidden[0])
        torch.testing.assert_close(ours.norm(tokens[1].patches), last)

    embedding = PatchEmbeddingBlock(1, (64,) * 3, (16,) * 3, 192, 3, proj_type="conv", pos_embed_type="sincos").eval()
    block = TransformerBlock(192, 96, 3, qkv_bias=True).eval()
    network = BMMAETransformer(modalities=("t1",), width=192, depth=1, mlp_dim=96, grid=4)
    torch.testing.assert_close(
        network.tokenizers["t1"].patch_embedding.position_embeddings, embedding.position_embeddings
    )
    network.tokenizers["t1"].patch_embedding.load_state_dict(embedding.state_dict())
    network.blocks[0].load_state_dict({k: v for k, v in block.state_dict().items() if "cross_attn" not in k})
    with torch.inference_mode():
        expected = block(torch.cat([network.cls_token.expand(2, -1, -1), embedding(images)], dim=1))
        [found] = network.intermediate(network.tokenize({"t1": images}), [0])
    assert found.cls is not None
    torch.testing.assert_close(torch.cat([found.cls[:, None], found.patches], dim=1), expected)


def small_uniformer() -> UniFormer:
    network = draw_weights(lambda: UniFormer(dims=(64, 64, 128, 64), depths=(1, 1, 1, 1))).eval()
    generator = torch.Generator().manual_seed(2)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return network


def test_uniformer_equals_a_float64_reference_that_permutes_as_the_published_one():
    """Stage by stage with plain convolutions and loops over heads, on maps in the published order (last axis first)."""
    network = small_uniformer()
    state = {key: value.double() for key, value in network.state_dict().items() if value.is_floating_point()}
    images = torch.randn(1, 1, 32, 48, 16, generator=torch.Generator().manual_seed(1))

    def convolve(name: str, x: torch.Tensor, **options) -> torch.Tensor:
        return F.conv3d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def batch_norm(name: str, x: torch.Tensor) -> torch.Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{kind}"].view(-1, 1, 1, 1) for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def layer_norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    x = images.double().permute(0, 1, 4, 2, 3)
    maps = []
    for stage in (1, 2, 3, 4):
        x = convolve(f"patch_embed{stage}.proj", x, stride=2)
        x = layer_norm(f"patch_embed{stage}.norm", x.movedim(1, -1), 1e-5).movedim(-1, 1)
        stem, dim = f"blocks{stage}.0.", x.shape[1]
        x = x + convolve(stem + "pos_embed", x, padding=1, groups=dim)
        if stage < 3:
            mixed = convolve(
                stem + "attn", convolve(stem + "conv1", batch_norm(stem + "norm1", x)), padding=2, groups=dim
            )
            x = x + convolve(stem + "conv2", mixed)
            hidden = gelu(convolve(stem + "mlp.fc1", batch_norm(stem + "norm2", x)))
            x = x + convolve(stem + "mlp.fc2", hidden)
        else:
            tokens = x[0].flatten(1).T
            qkv = linear(stem + "attn.qkv", layer_norm(stem + "norm1", tokens, 1e-6))
            heads = []
            for head in range(dim // 64):
                q, k, v = (qkv[:, part * dim + 64 * head :][:, :64] for part in range(3))
                heads.append((q @ k.T / 8).softmax(dim=-1) @ v)
            tokens = tokens + linear(stem + "attn.proj", torch.cat(heads, dim=1))
            hidden = gelu(linear(stem + "mlp.fc1", layer_norm(stem + "norm2", tokens, 1e-6)))
            tokens = tokens + linear(stem + "mlp.fc2", hidden)
            x = tokens.T.reshape(x.shape)
        maps.append(batch_norm("norm", x) if stage == 4 else x)
    with torch.inference_mode():
        found = network(images)
    assert torch.equal(found[0], images)
    assert [tuple(each.shape[2:]) for each in found[1:]] == [(16, 24, 8), (8, 12, 4), (4, 6, 2), (2, 3, 1)]
    for ours, published in zip(found[1:], maps, strict=True):
        torch.testing.assert_close(ours.double(), published.permute(0, 1, 3, 4, 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 16"):
        network(torch.zeros(1, 1, 32, 40, 32))


def test_uniformer_at_the_published_sizes_gives_the_published_shapes():
    network = draw_weights(UniFormer).eval()
    with torch.inference_mode():
        maps = network(torch.zeros(1, 1, 96, 96, 96))
    assert [tuple(each.shape[1:]) for each in maps] == [
        (1, 96, 96, 96),
        (64, 48, 48, 48),
        (128, 24, 24, 24),
        (320, 12, 12, 12),
        (512, 6, 6, 6),
    ]


def test_transformers_at_the_published_sizes_give_the_published_shapes():
    with torch.inference_mode():
        brainiac = draw_weights(BrainIACTransformer).intermediate(torch.zeros(1, 1, 96, 96, 96), [2, 6, 11])
        bm_mae = draw_weights(lambda: BMMAETransformer(modalities=MODALITIES))
        tokens = bm_mae.tokenize({name: torch.zeros(1, 1, 128, 128, 128) for name in MODALITIES})
        [joint] = bm_mae.intermediate(tokens, [1])
    assert [tuple(each.patches.shape) for each in brainiac] == [(1, 216, 768)] * 3
    assert joint.cls is not None
    assert (tuple(joint.cls.shape), tuple(joint.patches.shape)) == ((1, 768), (1, 2048, 768))


def test_a_widened_patch_embedding_answers_equal_channels_as_the_narrow_one_answers_one():
    weight = torch.randn(5, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    wide = widen_patch_embedding(weight, 4)
    assert wide.shape == (5, 4, 2, 2, 2)
    torch.testing.assert_close(F.conv3d(image.expand(-1, 4, -1, -1, -1), wide), F.conv3d(image, weight))
    assert torch.equal(wide[:, 2], weight[:, 0] / 4)
    channels = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    projection = nn.Conv3d(1, 5, 2, stride=2)
    expected = nn.Conv3d(3, 5, 2, stride=2)
    expected.load_state_dict({"weight": projection.weight.repeat(1, 3, 1, 1, 1) / 3, "bias": projection.bias})
    torch.testing.assert_close(embed_patches(channels, projection), expected(channels))
    with pytest.raises(ValueError, match=r"found weights of shape \(5, 4, 2, 2, 2\)"):
        widen_patch_embedding(wide, 4)
