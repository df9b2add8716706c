"""Published layouts made here: what is read, what is dropped by name, what is refused and how."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from braindino.encoders.catalogue import draw_weights
from braindino.encoders.checkpoints import load_bm_mae, load_brainiac, load_brainmvp
from braindino.encoders.uniformer import UniFormer
from braindino.encoders.volume_transformer import BMMAETransformer, BrainIACTransformer


def small_uniformer() -> UniFormer:
    return draw_weights(lambda: UniFormer(dims=(64, 64, 128, 64), depths=(1, 2, 1, 1)))


def small_bm_mae() -> BMMAETransformer:
    return draw_weights(
        lambda: BMMAETransformer(modalities=("t1", "t1ce", "t2", "flair"), width=192, depth=2, mlp_dim=96, grid=2)
    )


def small_brainiac() -> BrainIACTransformer:
    return draw_weights(lambda: BrainIACTransformer(width=128, depth=2, mlp_dim=64, grid=2))


def monai_extras(depth: int, width: int, *, version: str) -> dict[str, torch.Tensor]:
    """What MONAI keeps in the blocks and self-attention never reads."""
    extras = {}
    for number in range(depth):
        stem = f"blocks.{number}."
        extras |= {f"{stem}norm_cross_attn.{kind}": torch.ones(width) for kind in ("weight", "bias")}
        if version == "1.4":
            extras |= {f"{stem}cross_attn.to_{part}.weight": torch.ones(width, width) for part in "qkv"}
            extras |= {f"{stem}cross_attn.out_proj.weight": torch.ones(width, width)}
            extras |= {f"{stem}cross_attn.out_proj.bias": torch.ones(width)}
    return extras


def brainmvp_content(network: nn.Module) -> dict:
    """As its pretraining script saves it from DistributedDataParallel."""
    encoder = {f"module.encoder.uniformer.{key}": value for key, value in network.state_dict().items()}
    rest = {"module.decoder.out_1.conv.conv.bias": torch.zeros(1), "module.rep_template": torch.zeros(8, 4, 4, 4)}
    return {"epoch": 3, "state_dict": encoder | rest, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}


def bm_mae_content(network: nn.Module) -> dict:
    decoder = {"decoder.mask_tokens": torch.zeros(1, 1, 8), "decoder.modality_embeddings.t1": torch.zeros(1, 1, 8)}
    return dict(network.state_dict()) | decoder


def brainiac_content(network: nn.Module) -> dict:
    backbone = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    head = {"projection_head.layers.0.weight": torch.zeros(4, 4)}
    return {"state_dict": backbone | head, "epoch": 9, "pytorch-lightning_version": "2.1.0"}


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], dict], Callable[[Path], nn.Module]]] = {
    "brainmvp": (small_uniformer, brainmvp_content, load_brainmvp),
    "bm-mae": (small_bm_mae, bm_mae_content, load_bm_mae),
    "brainiac": (small_brainiac, brainiac_content, load_brainiac),
}


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def tensors_of(content: dict) -> dict[str, torch.Tensor]:
    """The encoder's tensors in a file's content, to break some."""
    return content.get("state_dict", content)


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest):
    return LAYOUTS[request.param]


def test_published_layouts_load_with_every_tensor_in_its_place(layout, tmp_path: Path):
    build, content, load = layout
    network = build()
    assert_equal(load(save(content(network), tmp_path / "published.pt")), network)


@pytest.mark.parametrize("version", ["1.4", "1.6"])
def test_tensors_that_later_monai_adds_are_dropped_by_name(version: str, tmp_path: Path):
    brainiac, bm_mae = small_brainiac(), small_bm_mae()
    extras = {f"backbone.{key}": value for key, value in monai_extras(2, 128, version=version).items()}
    content = brainiac_content(brainiac)
    content["state_dict"] |= extras
    assert_equal(load_brainiac(save(content, tmp_path / "brainiac.ckpt")), brainiac)
    flat = bm_mae_content(bm_mae) | monai_extras(2, 192, version=version)
    assert_equal(load_bm_mae(save(flat, tmp_path / "bmmae.pth")), bm_mae)


def test_bare_backbones_half_precision_and_safetensors_load_too(tmp_path: Path):
    brainiac, uniformer = small_brainiac(), small_uniformer()
    save_file(brainiac.state_dict(), tmp_path / "backbone.safetensors")
    assert_equal(load_brainiac(tmp_path / "backbone.safetensors"), brainiac)
    half = {f"encoder.{key}": v.half() if v.is_floating_point() else v for key, v in uniformer.state_dict().items()}
    loaded = load_brainmvp(save(half, tmp_path / "half.pt"))
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32, torch.int64}


def test_a_file_with_some_tokenizers_gives_an_encoder_with_those(tmp_path: Path):
    network = small_bm_mae()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith(("tokenizers.t2.", "tokenizers.t1."))}
    loaded = load_bm_mae(save(state, tmp_path / "two.pth"))
    assert list(loaded.tokenizers) == ["t1ce", "flair"]
    nothing = {key: value for key, value in state.items() if not key.startswith("tokenizers.")}
    with pytest.raises(ValueError, match="tokenizers for nothing; expected some of t1, t1ce, t2, flair"):
        load_bm_mae(save(nothing, tmp_path / "none.pth"))
    other = state | {"tokenizers.ct.patch_embedding.position_embeddings": torch.zeros(1, 8, 192)}
    with pytest.raises(ValueError, match=r"tokenizers for \['ct', 'flair', 't1ce'\]"):
        load_bm_mae(save(other, tmp_path / "ct.pth"))


def test_a_missing_an_unknown_a_misshapen_and_a_broken_tensor_are_named(layout, tmp_path: Path):
    build, make_content, load = layout
    name = next(key for key in tensors_of(make_content(build())) if re.search(r"blocks.*(norm1)\.weight$", key))

    def error(change: Callable[[dict], object]) -> str:
        content = make_content(build())
        change(tensors_of(content))
        with pytest.raises(ValueError) as caught:
            load(save(content, tmp_path / "wrong.pt"))
        assert str(tmp_path / "wrong.pt") in str(caught.value)
        return str(caught.value)

    short = re.sub(r"^.*?(blocks)", r"\1", name)
    assert f"missing key {short!r}" in error(lambda state: state.pop(name))
    extra = name.replace("norm1.weight", "extra.weight")
    assert f"unknown key {extra!r}: found (3,)" in error(lambda state: state.update({extra: torch.zeros(3)}))
    assert "'surprise'" in error(lambda state: state.update(surprise=torch.zeros(1)))
    assert f"misshapen key {name!r}" in error(lambda state: state.update({name: torch.zeros(7)}))
    broken = torch.full_like(tensors_of(make_content(build()))[name], float("nan"))
    assert f"key {name!r} holds values that are not finite" in error(lambda state: state.update({name: broken}))
    assert "is a str, expected a tensor" in error(lambda state: state.update({name: "text"}))


def test_a_published_file_that_ends_early_is_not_taken_for_a_shallow_network(tmp_path: Path):
    with torch.device("meta"):
        published = BrainIACTransformer().state_dict()
    kept = {key: torch.zeros(value.shape) for key, value in published.items() if not key.startswith("blocks.")}
    kept |= {key: torch.zeros(published[key].shape) for key in published if key.startswith("blocks.0.")}
    with pytest.raises(ValueError, match=r"missing key 'blocks.1.norm1.weight'.*and 116 more"):
        load_brainiac(save(kept, tmp_path / "short.ckpt"))


def test_one_models_file_is_refused_by_the_other_readers(tmp_path: Path):
    for name, (build, content, _) in LAYOUTS.items():
        file = save(content(build()), tmp_path / f"{name}.pt")
        for other, (_, _, load) in LAYOUTS.items():
            if other != name:
                with pytest.raises(ValueError, match=r"another model's file|another model's file, or one"):
                    load(file)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path):
    content = brainiac_content(small_brainiac())
    content["state_dict"]["norm.weight"] = torch.zeros(128)
    with pytest.raises(ValueError, match=r"'backbone\.norm\.weight' and 'norm\.weight' are the same tensor"):
        load_brainiac(save(content, tmp_path / "twice.ckpt"))


def test_a_brainmvp_unet_and_odd_sizes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"missing key 'patch_embed1.norm.weight'; is it another model's file"):
        load_brainmvp(save({"state_dict": {"module.encoder.conv.weight": torch.zeros(1)}}, tmp_path / "unet.pt"))
    state = {f"backbone.{k}": v for k, v in small_brainiac().state_dict().items()}
    state["backbone.patch_embedding.position_embeddings"] = torch.zeros(1, 9, 128)
    with pytest.raises(ValueError, match="9 positions; expected those of a cube"):
        load_brainiac(save(state, tmp_path / "flat.ckpt"))


def test_pickled_objects_are_refused_with_a_way_out_and_damaged_files_named(layout, tmp_path: Path):
    build, content, load = layout
    state = content(build())
    file = save({"state_dict": tensors_of(state), "hyper_parameters": argparse.Namespace(lr=1)}, tmp_path / "n.ckpt")
    with pytest.raises(ValueError, match=r"refused because reading them can run code.*keep the tensors alone"):
        load(file)
    (tmp_path / "half.ckpt").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"half\.ckpt: is damaged"):
        load(tmp_path / "half.ckpt")
    with pytest.raises(FileNotFoundError, match="give the path of the file that its authors publish"):
        load(tmp_path / "nowhere.ckpt")
