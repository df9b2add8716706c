"""The one door: names, options, and features equal to what the networks say by themselves."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from braindino import load_encoder, save_encoder
from braindino.encoders import catalogue
from braindino.encoders.bm_mae import BMMAE
from braindino.encoders.brainiac import BrainIAC
from braindino.encoders.catalogue import load_volume_encoder
from braindino.encoders.intensity import LIMIT, NUM_BINS, IntensityFloor
from braindino.encoders.slice_transformer import SliceTransformer
from braindino.encoders.timm_encoder import TimmEncoder, build_timm
from braindino.encoders.volume_transformer import BrainIACTransformer
from braindino.vision_transformer import VisionTransformer
from braindino.volume import Volume
from braindino.weights import hash_weights, to_timm_state


def encode(encoder, volume: Volume, *, sequence: str = "T1"):
    [features] = encoder.encode([encoder.prepare(volume, sequence=sequence)])
    return features


def test_untrained_encoders_have_published_sizes_and_always_the_same_weights():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sizes = {}
    for name in ("brainmvp", "bm-mae", "brainiac"):
        encoder = load_volume_encoder(f"untrained:{name}")
        sizes[name] = sum(parameter.numel() for parameter in encoder.network.parameters())
        assert encoder.identity.sha256 == hash_weights(encoder.network.state_dict())
        assert encoder.identity.name.startswith(f"{name}-untrained")
    assert sizes == {"brainmvp": 22_038_464, "bm-mae": 70_885_632, "brainiac": 88_340_736}
    assert torch.equal(torch.get_rng_state(), before), "the global generator was touched"
    again = load_volume_encoder("untrained:brainmvp")
    assert again.identity == load_volume_encoder("untrained:brainmvp").identity


def test_published_preparations_are_the_defaults():
    facts = {name: load_volume_encoder(f"untrained:{name}").identity for name in ("brainmvp", "bm-mae", "brainiac")}
    kept = ("size", "fit", "intensity", "orientation")
    assert {name: tuple(each.preparation[key] for key in kept) for name, each in facts.items()} == {
        "brainmvp": (128, "crop", "percentiles", "RAS"),
        "bm-mae": (128, "crop", "zscore", "LPS"),
        "brainiac": (96, "resize", "zscore", "RAS"),
    }
    assert facts["brainmvp"].preparation["spacing"] == 1.0 and "spacing" not in facts["brainiac"].preparation
    assert facts["bm-mae"].reading["layers"] == facts["brainiac"].reading["layers"] == [2, 6, 11]
    assert facts["brainiac"].reading["feature"] == "token0"


def test_a_checkpoint_gives_the_features_of_its_weights_and_its_name(tmp_path: Path, volume: Volume):
    network = catalogue.draw_weights(lambda: BrainIACTransformer(width=128, depth=3, mlp_dim=64)).eval()
    state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "BrainIAC.ckpt")
    encoder = load_volume_encoder(f"brainiac:{tmp_path / 'BrainIAC.ckpt'}", feature="mean", fit="crop")
    assert encoder.identity.name == "brainiac-BrainIAC-mean"
    prepared = encoder.prepare(volume)
    [features] = encoder.encode([prepared])
    with torch.inference_mode():
        early, mid, late = network.intermediate(prepared.data[None], [0, 1, 2])
        last = network.norm(late.patches)[0]
        torch.testing.assert_close(features.layers.early, network.norm(early.patches)[0].mean(0))
        torch.testing.assert_close(features.layers.mid, network.norm(mid.patches)[0].mean(0))
    torch.testing.assert_close(features.global_, last.mean(0))
    torch.testing.assert_close(features.layers.late, last.mean(0))
    # RAS is the orientation of this encoder, so the first token is that of the corner at 0, 0, 0.
    torch.testing.assert_close(features.tokens.features.flatten(0, 2), last)
    as_published = BrainIAC(network)
    torch.testing.assert_close(encode(BrainIAC(network, fit="crop"), volume).global_, last[0])
    assert as_published.identity.reading["feature"] == "token0"
    raw = encode(BrainIAC(network, fit="crop", inner_norm=False), volume)
    torch.testing.assert_close(raw.layers.early, early.patches[0, 0])
    torch.testing.assert_close(raw.layers.late, late.patches[0, 0])
    torch.testing.assert_close(raw.global_, last[0])


def test_brainmvp_features_are_means_of_the_stages_asked_for(build, volume: Volume):
    encoder = build("brainmvp", stages=(1, 2, 4))
    prepared = encoder.prepare(volume)
    [features] = encoder.encode([prepared])
    with torch.inference_mode():
        maps = encoder.network(prepared.data[None])
    for layer, stage in zip(features.layers, (1, 2, 4), strict=True):
        torch.testing.assert_close(layer, maps[stage][0].mean((1, 2, 3)))
    torch.testing.assert_close(features.global_, maps[4][0].mean((1, 2, 3)))
    torch.testing.assert_close(features.tokens.features, maps[4][0].movedim(0, -1))
    with pytest.raises(ValueError, match=r"stages: found \(0, 1, 2\)"):
        build("brainmvp", stages=(0, 1, 2))
    with pytest.raises(ValueError, match="multiple of 16"):
        build("brainmvp", size=100)


def test_bm_mae_uses_the_tokenizer_of_the_sequence_on_bra_ts_orientation(build, volume: Volume):
    encoder = build("bm-mae")
    assert isinstance(encoder, BMMAE)
    network, prepared = encoder.network, encoder.prepare(volume, sequence="FLAIR")
    [features] = encoder.encode([prepared])
    with torch.inference_mode():
        [late] = network.intermediate(network.tokenize({"flair": prepared.data[None].flip(2, 3)}), [2])
        torch.testing.assert_close(features.global_, network.norm(late.cls)[0])
        grid = network.norm(late.patches)[0].unflatten(0, (4, 4, 4)).flip(0, 1)
    torch.testing.assert_close(features.tokens.features, grid)
    both = encoder.encode([encoder.prepare(volume, sequence="T1"), prepared], batch_size=2)
    torch.testing.assert_close(both[1].global_, features.global_, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0].global_, features.global_, rtol=1e-3)
    with pytest.raises(ValueError, match="found sequence 'T2'; this file has tokenizers for T1, FLAIR"):
        encoder.prepare(volume, sequence="T2")
    with pytest.raises(ValueError, match="found sequence None"):
        encoder.prepare(volume)


def test_slices_are_encoded_as_the_network_does_and_native_files_come_through_the_same_door(
    tmp_path: Path, volume: Volume
):
    torch.manual_seed(0)
    network = VisionTransformer(embed_dim=64, depth=12, num_heads=1, layer_scale_init=0.5)
    save_encoder(network, tmp_path / "encoder")
    encoder = load_volume_encoder(tmp_path / "encoder", num_slices=4, image_size=64)
    assert isinstance(encoder, SliceTransformer)
    assert encoder.identity.sha256 == load_encoder(tmp_path / "encoder").sha256
    prepared = encoder.prepare(volume)
    [features] = encoder.encode([prepared], batch_size=3)
    with torch.inference_mode():
        tokens = network.eval()(prepared.data)
        inner = network.intermediate(prepared.data, (2, 6), norm=True)
    torch.testing.assert_close(features.slices.cls, tokens.cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.global_, tokens.cls.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.layers.late, features.global_)
    torch.testing.assert_close(features.layers.early, inner[0].cls.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.layers.mid, inner[1].cls.mean(0), rtol=1e-4, atol=1e-5)
    # Row 0 is anterior and column 0 right: the first patch of a slice is the last token along x and y.
    torch.testing.assert_close(features.tokens.features[-1, -1, 2], tokens.patches[2, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.tokens.features[-2, -1, 2], tokens.patches[2, 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="image_size: found 250; expected a multiple of the patch size, 16"):
        load_volume_encoder(tmp_path / "encoder", image_size=250)


def test_timms_dinov3_gives_our_features_for_our_weights(tmp_path: Path, volume: Volume):
    """Class tokens (timm would pool patches), layers and tokens of the same weights through timm and through ours."""
    torch.manual_seed(0)
    network = VisionTransformer(embed_dim=384, depth=12, num_heads=6, layer_scale_init=0.5, layer_norm_eps=1e-5)
    torch.save(to_timm_state(network), tmp_path / "small.pth")
    name = "vit_small_patch16_dinov3"
    theirs = load_volume_encoder(f"timm:{name}", weights=tmp_path / "small.pth", num_slices=2, image_size=64)
    ours = load_volume_encoder(tmp_path / "small.pth", num_slices=2, image_size=64)
    assert isinstance(theirs, TimmEncoder) and theirs.feature == "cls" and theirs.dim == 384
    first, second = encode(theirs, volume), encode(ours, volume)
    for found, expected in ((first.global_, second.global_), *zip(first.layers, second.layers, strict=True)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first.tokens.features, second.tokens.features, rtol=1e-3, atol=1e-3)
    pooled = load_volume_encoder(
        f"timm:{name}", weights=tmp_path / "small.pth", num_slices=2, image_size=64, feature="pooled"
    )
    torch.testing.assert_close(
        encode(pooled, volume).global_, second.tokens.features.mean((0, 1, 2)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "size", "dim", "grid"),
    [("resnet18", 64, 512, 2), ("convnext_atto", 64, 320, 2), ("vit_tiny_patch16_224", 224, 192, 14)],
)
def test_timm_models_of_other_kinds_pool_as_timm_does(name: str, size: int, dim: int, grid: int, volume: Volume):
    options = {} if size == 224 else {"image_size": size}
    encoder = load_volume_encoder(f"untrained:timm:{name}", num_slices=2, feature="pooled", **options)
    prepared = encoder.prepare(volume)
    assert prepared.data.shape == (2, 1, size, size)
    [features] = encoder.encode([prepared])
    with torch.inference_mode():
        expected = encoder.network(prepared.data.expand(-1, 3, -1, -1))
    torch.testing.assert_close(features.slices.cls, expected)
    assert features.global_.shape == (dim,) and features.tokens.features.shape == (grid, grid, 2, dim)
    assert encoder.identity.name == f"untrained-timm-{name}"


def test_timm_never_falls_back_to_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(name: str, *, pretrained: bool, num_classes: int):
        assert pretrained
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"timm:resnet18: OSError: no route.*untrained:timm:resnet18"):
        load_volume_encoder("timm:resnet18")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"timm:resnet_nonsense: RuntimeError"):
        load_volume_encoder("untrained:timm:resnet_nonsense")
    torch.save(
        build_timm("resnet18", pretrained=False).state_dict() | {"fc.weight": torch.zeros(1)}, tmp_path / "fc.pth"
    )
    with pytest.raises(ValueError, match=r"unknown keys \['fc.weight'\], missing keys \[\]"):
        load_volume_encoder("timm:resnet18", weights=tmp_path / "fc.pth")
    with pytest.raises(ValueError, match="contradicts untrained"):
        load_volume_encoder("untrained:timm:resnet18", weights=tmp_path / "fc.pth")
    with pytest.raises(ValueError, match="feature: found 'cls'; expected pooled, as this model has no class token"):
        load_volume_encoder("untrained:timm:resnet18", feature="cls")


def test_the_intensity_floor_is_a_histogram_and_a_small_slice(volume: Volume):
    encoder = load_volume_encoder("intensity", num_slices=4)
    assert isinstance(encoder, IntensityFloor) and encoder.dim == 288
    prepared = encoder.prepare(volume)
    [features] = encoder.encode([prepared])
    slices = prepared.data[:, 0]
    values = slices[slices != 0]
    edges = torch.linspace(-LIMIT, LIMIT, NUM_BINS + 1)
    counts = torch.histogram(values.clamp(-LIMIT, LIMIT - 1e-4), edges).hist
    torch.testing.assert_close(features.global_[:NUM_BINS], counts / slices.numel() / 0.25, rtol=1e-3, atol=1e-5)
    cells = slices.unflatten(2, (16, 16)).unflatten(1, (16, 16)).mean((2, 4))
    torch.testing.assert_close(features.global_[NUM_BINS:], cells.mean(0).flatten())
    torch.testing.assert_close(features.tokens.features[15, 15, 1, 0], cells[1, 0, 0])


def test_unknown_options_and_names_are_refused_with_what_there_is(tmp_path: Path):
    with pytest.raises(ValueError, match=r"brainiac: unknown options size; this encoder has feature, fit, inner_norm"):
        load_volume_encoder("untrained:brainiac", size=3)
    with pytest.raises(ValueError, match=r"intensity: unknown options fit; this encoder has num_slices"):
        load_volume_encoder("intensity", fit="crop")
    with pytest.raises(ValueError, match=r"unknown options stages; this encoder has image_size, inner_norm"):
        load_volume_encoder("untrained:vit_tiny", stages=(1, 2, 3))
    with pytest.raises(ValueError, match="feature: found 'cls'; expected one of token0, mean"):
        load_volume_encoder("untrained:brainiac", feature="cls")
    with pytest.raises(FileNotFoundError, match=r"no encoder at nowhere.*Volume encoders are brainmvp:PATH"):
        load_volume_encoder("nowhere")
    with pytest.raises(ValueError, match=r"no architecture 'uniformer'.*untrained:NAME for random weights"):
        load_volume_encoder("untrained:uniformer")
    torch.save({"state_dict": {"backbone.norm.weight": torch.zeros(1)}}, tmp_path / "BrainIAC.ckpt")
    with pytest.raises(ValueError, match=r"not a known layout.*brainiac:PATH"):
        load_volume_encoder(tmp_path / "BrainIAC.ckpt")


def test_a_model_without_intermediates_is_refused():
    class Plain(nn.Module):
        pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    with pytest.raises(ValueError, match="has no forward_intermediates"):
        TimmEncoder(Plain(), name="plain")


@pytest.mark.slow
def test_published_sizes_run_from_volume_to_feature(volume: Volume):
    dims = {}
    for name in ("brainmvp", "bm-mae", "brainiac"):
        features = encode(load_volume_encoder(f"untrained:{name}"), volume)
        dims[name] = (tuple(features.global_.shape), tuple(features.tokens.features.shape))
        assert torch.isfinite(features.global_).all()
    assert dims == {
        "brainmvp": ((512,), (8, 8, 8, 512)),
        "bm-mae": ((768,), (8, 8, 8, 768)),
        "brainiac": ((768,), (6, 6, 6, 768)),
    }
