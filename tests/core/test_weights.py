"""Every layout in and out with equal features, and every wrong file refused with its key and its name."""

import json
import pickle
import re
import warnings

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import braindino
from braindino.vision_transformer import VisionTransformer, vit_small
from braindino.weights import (
    FOREIGN_CONTRACT,
    InputContract,
    hash_weights,
    load_encoder,
    save_encoder,
    to_teacher_state,
    to_timm_state,
)


def _randomize(encoder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.1, 1.0, generator=generator)
            elif "qkv.weight" in name:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return encoder.eval()


@pytest.fixture
def encoder():
    """128 features, 3 blocks, 2 heads."""
    return _randomize(VisionTransformer(embed_dim=128, depth=3, num_heads=2))


def _sequence(tokens):
    return torch.cat([tokens.cls[:, None], tokens.storage, tokens.patches], dim=1)


def _features(model):
    image = torch.randn(1, 1, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return _sequence(model(image))


def _official_state(encoder, *, bias, bias_mask):
    """DINOv3's flat layout: ours plus a qkv bias and its mask in every block."""
    state = dict(encoder.state_dict())
    for number in range(encoder.depth):
        state[f"blocks.{number}.attn.qkv.bias"] = bias.clone()
        state[f"blocks.{number}.attn.qkv.bias_mask"] = bias_mask.clone()
    return state


def _heads():
    return {
        f"{head}.{name}": torch.zeros(2)
        for head in ("dino_head", "ibot_head")
        for name in ("mlp.0.weight", "mlp.0.bias", "last_layer.weight")
    }


# ---- native -------------------------------------------------------------------------------------------------------


def test_a_saved_encoder_comes_back_with_its_features_facts_and_frozen(encoder, tmp_path):
    contract = InputContract(image_size=128, intensity="as scanned")
    file = save_encoder(encoder, tmp_path / "run" / "encoder", contract=contract, data_fingerprint="ab12", notes="try")
    assert file == tmp_path / "run" / "encoder" / "encoder.safetensors"
    for path in (file, file.parent, str(file.parent)):
        loaded = load_encoder(path)
        assert torch.equal(_features(loaded), _features(encoder))
        assert loaded.architecture == encoder.architecture
        assert loaded.contract == contract
        assert loaded.name == "run"
        assert loaded.sha256 == hash_weights(encoder.state_dict())
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_header_and_the_json_beside_it_state_the_same_facts(encoder, tmp_path):
    file = save_encoder(encoder, tmp_path / "mine.safetensors", data_fingerprint="ab12", notes="try")
    with safetensors.safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    told = json.loads((tmp_path / "mine.json").read_text())
    assert header["format"] == "braindino-encoder"
    assert header["format_version"] == "1"
    assert header["data_fingerprint"] == told["data_fingerprint"] == "ab12"
    assert header["notes"] == told["notes"] == "try"
    assert header["sha256"] == told["sha256"] == hash_weights(encoder.state_dict())
    for key in ("architecture", "input_contract", "versions"):
        assert json.loads(header[key]) == told[key]
    assert told["architecture"]["embed_dim"] == 128
    assert told["versions"]["torch"] == torch.__version__.split("+")[0]
    assert told["tensors"] == len(encoder.state_dict())


def test_the_json_beside_the_weights_is_never_read_back(encoder, tmp_path):
    file = save_encoder(encoder, tmp_path)
    (tmp_path / "encoder.json").write_text("not json")
    assert torch.equal(_features(load_encoder(tmp_path)), _features(encoder))
    assert load_encoder(file).contract == InputContract()


def test_saving_a_loaded_encoder_again_keeps_its_contract_and_hash(encoder, tmp_path):
    save_encoder(encoder, tmp_path / "one", contract=InputContract(image_size=512))
    first = load_encoder(tmp_path / "one")
    save_encoder(first, tmp_path / "two")
    second = load_encoder(tmp_path / "two")
    assert (second.contract, second.sha256, second.name) == (first.contract, first.sha256, "two")


def test_the_top_level_names_are_these_functions():
    assert braindino.load_encoder is load_encoder
    assert braindino.save_encoder is save_encoder


@pytest.mark.fault
def test_a_native_file_with_a_key_too_few_or_too_many_names_it(encoder, tmp_path):
    file = save_encoder(encoder, tmp_path)
    with safetensors.safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    renamed = {key.replace("blocks.1.ls2.gamma", "blocks.1.ls3.gamma"): value for key, value in tensors.items()}
    save_file(renamed, file, metadata=header)
    with pytest.raises(ValueError) as caught:
        load_encoder(file)
    assert str(caught.value) == (
        f"{file} (native layout): missing key 'blocks.1.ls2.gamma': expected (128,); "
        "unknown key 'blocks.1.ls3.gamma': found (128,)"
    )


def test_a_native_file_whose_numbers_changed_is_noticed(encoder, tmp_path):
    file = save_encoder(encoder, tmp_path)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: the weights hash to [0-9a-f]{64}, the header says [0-9a-f]{64}"):
        load_encoder(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "2"}, "format_version '2', expected '1'; a newer braindino may read it"),
        ({"architecture": "{"}, r"damaged header \(JSONDecodeError"),
        ({"architecture": '{"embed_dim": 128}'}, "cannot build its architecture .*missing 2 required"),
        ({"architecture": '{"embed_dim": 128, "depth": 3, "num_heads": 2}'}, "architecture has keys .*, expected"),
        ({"input_contract": '{"colour": 1}'}, r"damaged header \(TypeError.*colour"),
    ],
)
def test_a_native_file_with_a_strange_header_is_refused(encoder, tmp_path, changes, message):
    file = save_encoder(encoder, tmp_path)
    with safetensors.safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file(load_file(file), file, metadata=header | changes)
    with pytest.raises(ValueError, match=message):
        load_encoder(file)


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
@pytest.mark.fault
def test_a_half_written_safetensors_file_is_refused(encoder, tmp_path, kept):
    file = save_encoder(encoder, tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"encoder.safetensors: not a whole safetensors file"):
        load_encoder(file)


def test_a_failing_save_leaves_the_former_file_and_nothing_else(encoder, tmp_path):
    save_encoder(encoder, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    broken = _randomize(VisionTransformer(**encoder.architecture), seed=9)
    with torch.no_grad():
        broken.norm.bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"\(not written\): 'norm.bias' holds 1 values that are not finite"):
        save_encoder(broken, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert torch.equal(_features(load_encoder(tmp_path)), _features(encoder))


def test_saving_under_a_pickle_suffix_is_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"a folder or a .safetensors file; for a teacher file use torch.save"):
        save_encoder(encoder, tmp_path / "encoder.pth")


# ---- teacher files ------------------------------------------------------------------------------------------------


def test_a_teacher_file_comes_back_equal_its_heads_dropped(encoder, tmp_path):
    file = tmp_path / "teacher_checkpoint.pth"
    state = to_teacher_state(encoder)
    assert all(key.startswith("backbone.") for key in state["teacher"])
    state["teacher"] |= _heads()
    torch.save(state, file)
    loaded = load_encoder(file)
    assert torch.equal(_features(loaded), _features(encoder))
    assert loaded.architecture == encoder.architecture  # LayerNorm eps 1e-6 and no qkv bias, as they are trained
    assert loaded.sha256 == hash_weights(encoder.state_dict())
    assert loaded.name == "teacher_checkpoint"
    assert loaded.contract == FOREIGN_CONTRACT


def test_wrapped_teacher_names_and_bfloat16_periods_are_read(encoder, tmp_path):
    state = {
        key.replace("blocks.", "blocks.", 1).replace(".attn.", "._checkpoint_wrapped_module.attn."): value
        for key, value in to_teacher_state(encoder)["teacher"].items()
    }
    periods = state["backbone.rope_embed.periods"].bfloat16()
    state["backbone.rope_embed.periods"] = periods
    torch.save({"teacher": state}, tmp_path / "teacher.pth")
    loaded = load_encoder(tmp_path / "teacher.pth")
    assert loaded.rope_embed.periods.dtype == torch.float32
    assert torch.equal(loaded.rope_embed.periods, periods.float())
    encoder.load_state_dict(encoder.state_dict() | {"rope_embed.periods": periods.float()})
    assert torch.equal(_features(loaded), _features(encoder))


@pytest.mark.parametrize("key", ["head.weight", "dino_head_extra.weight", "prototypes.weight"])
def test_a_teacher_file_with_another_head_is_refused(encoder, tmp_path, key):
    state = to_teacher_state(encoder)
    state["teacher"][key] = torch.zeros(1)
    torch.save(state, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=rf"teacher.pth \(teacher layout\): unknown key '{key}': expected 'backbone"):
        load_encoder(tmp_path / "teacher.pth")


# ---- official DINOv3 files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_value", [0.0, 1.0, float("nan")])
def test_released_dinov3_files_with_zero_biases_lose_them(encoder, tmp_path, mask_value):
    state = _official_state(encoder, bias=torch.zeros(384), bias_mask=torch.full((384,), mask_value))
    torch.save(state, tmp_path / "dinov3_vits16_pretrain.pth")
    loaded = load_encoder(tmp_path / "dinov3_vits16_pretrain.pth")
    assert not loaded.architecture["qkv_bias"]
    assert loaded.architecture["layer_norm_eps"] == 1e-5
    assert loaded.sha256 == hash_weights(encoder.state_dict())


def test_a_qkv_bias_acts_through_its_mask(encoder, tmp_path):
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(384, generator=generator)
    mask = torch.cat([torch.ones(128), torch.zeros(128), torch.ones(128)])
    torch.save(_official_state(encoder, bias=bias, bias_mask=mask), tmp_path / "official.pth")
    loaded = load_encoder(tmp_path / "official.pth")
    twin = VisionTransformer(**{**encoder.architecture, "qkv_bias": True, "layer_norm_eps": 1e-5}).eval()
    biases = {f"blocks.{number}.attn.qkv.bias": bias * mask for number in range(3)}
    twin.load_state_dict(encoder.state_dict() | biases, strict=True)
    assert torch.equal(_features(loaded), _features(twin))
    assert (_features(loaded) - _features(encoder)).abs().max() > 0.1


def test_a_flat_file_of_the_training_style_keeps_its_eps(encoder, tmp_path):
    torch.save(encoder.state_dict(), tmp_path / "backbone.pth")
    assert load_encoder(tmp_path / "backbone.pth").architecture == encoder.architecture


def test_a_mask_that_is_not_a_number_beside_a_real_bias_is_refused(encoder, tmp_path):
    state = _official_state(encoder, bias=torch.ones(384), bias_mask=torch.full((384,), torch.nan))
    torch.save(state, tmp_path / "official.pth")
    with pytest.raises(
        ValueError, match=r"'blocks.0.attn.qkv.bias_mask' is not a number although its bias is not zero"
    ):
        load_encoder(tmp_path / "official.pth")


def test_biases_in_some_blocks_only_or_of_a_wrong_shape_are_refused(encoder, tmp_path):
    state = _official_state(encoder, bias=torch.zeros(384), bias_mask=torch.zeros(384))
    less = {key: value for key, value in state.items() if not key.startswith("blocks.2.attn.qkv.bias")}
    torch.save(less, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"missing key 'blocks.2.attn.qkv.bias': 2 other blocks have one"):
        load_encoder(tmp_path / "less.pth")
    torch.save(state | {"blocks.1.attn.qkv.bias": torch.zeros(3)}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"'blocks.1.attn.qkv.bias': expected \(384,\), found \(3,\)"):
        load_encoder(tmp_path / "short.pth")


# ---- timm ---------------------------------------------------------------------------------------------------------


def test_timm_weights_come_back_equal_with_timms_eps(encoder, tmp_path):
    state = to_timm_state(encoder)
    assert "reg_token" in state
    assert "blocks.0.gamma_1" in state
    assert not {"mask_token", "rope_embed.periods", "storage_tokens"} & set(state)
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_encoder(tmp_path)
    assert loaded.sha256 == hash_weights(encoder.state_dict())
    assert loaded.architecture == {**encoder.architecture, "layer_norm_eps": 1e-5}
    assert not loaded.mask_token.any()
    twin = VisionTransformer(**loaded.architecture).eval()
    twin.load_state_dict(encoder.state_dict(), strict=True)
    assert torch.equal(_features(loaded), _features(twin))


def test_timm_weights_with_query_and_value_bias_come_back_equal(encoder, tmp_path):
    architecture = {**encoder.architecture, "qkv_bias": True, "layer_norm_eps": 1e-5}
    biased = _randomize(VisionTransformer(**architecture))
    with pytest.raises(ValueError, match=r"'blocks.0.attn.qkv.bias': its key part is not zero"):
        to_timm_state(biased)
    with torch.no_grad():
        for block in biased.blocks:
            block.attn.qkv.bias[128:256] = 0.0
    state = to_timm_state(biased)
    save_file(state, tmp_path / "timm.safetensors")
    loaded = load_encoder(tmp_path / "timm.safetensors")
    assert loaded.architecture == architecture
    assert torch.equal(_features(loaded), _features(biased))
    save_file(
        {key: value for key, value in state.items() if key != "blocks.1.attn.v_bias"}, tmp_path / "less.safetensors"
    )
    with pytest.raises(ValueError, match=r"missing key 'blocks.1.attn.v_bias': expected \(128,\)"):
        load_encoder(tmp_path / "less.safetensors")


def test_weights_that_timm_itself_wrote_give_timms_features(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's imports use what torch has deprecated
        import timm
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_dinov3", num_classes=0, init_values=0.5).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = _sequence(load_encoder(tmp_path)(image)), model.forward_features(image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# ---- Hugging Face -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["with bias", "without bias"])
def hugging_face_model(request):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_register_tokens=4,
        query_bias=request.param,
        value_bias=request.param,
        layer_norm_eps=1e-6,
    )
    model = DINOv3ViTModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.15 if "_proj.weight" in name else 0.05
            parameter.add_(torch.randn(parameter.shape) * scale)
    return model


def test_a_hugging_face_folder_gives_the_features_of_transformers(hugging_face_model, tmp_path):
    hugging_face_model.save_pretrained(tmp_path / "dinov3")
    loaded = load_encoder(tmp_path / "dinov3")
    assert loaded.name == "dinov3"
    assert loaded.architecture["layer_norm_eps"] == 1e-6
    assert loaded.architecture["qkv_bias"] == hugging_face_model.config.query_bias
    for size in ((112, 112), (64, 96)):
        image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            ours, theirs = _sequence(loaded(image)), hugging_face_model(image).last_hidden_state
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_hugging_face_names_as_held_in_memory_are_read_too(hugging_face_model, tmp_path):
    hugging_face_model.save_pretrained(tmp_path / "dinov3")
    torch.save(hugging_face_model.state_dict(), tmp_path / "memory.bin")
    loaded = load_encoder(tmp_path / "memory.bin")
    assert loaded.sha256 == load_encoder(tmp_path / "dinov3").sha256
    assert loaded.architecture["layer_norm_eps"] == 1e-5  # no config.json beside it: as released


def test_a_hugging_face_file_that_lacks_a_projection_names_it(hugging_face_model, tmp_path):
    hugging_face_model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for change, message in (
        ({"layer.1.attention.k_proj.weight": None}, r"missing key 'layer.1.attention.k_proj.weight': expected \(128, "),
        ({"layer.1.mlp.up_proj.bias": None}, r"missing key 'layer.1.mlp.up_proj.bias': expected \(512,\)"),
        ({"layer.2.attention.v_proj.weight": torch.zeros(64, 128)}, r"'layer.2.attention.v_proj.weight': exp"),
        ({"layer.0.norm3.weight": torch.zeros(1)}, r"unknown key 'layer.0.norm3.weight': found \(1,\)"),
    ):  # fmt: skip
        changed = {key: value for key, value in (state | change).items() if value is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"model.safetensors \(Hugging Face layout\): .*{message}"):
            load_encoder(tmp_path)


def test_a_config_of_another_model_is_refused(hugging_face_model, tmp_path):
    hugging_face_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "dinov2"}))
    with pytest.raises(
        ValueError, match=r"config.json: expected model_type 'dinov3_vit' .*, found \('dinov2', 'gelu'\)"
    ):
        load_encoder(tmp_path)


# ---- what every layout has in common ------------------------------------------------------------------------------


def test_the_hash_is_the_same_in_every_layout_and_changes_with_a_weight(encoder, tmp_path):
    save_encoder(encoder, tmp_path / "native")
    torch.save(to_teacher_state(encoder), tmp_path / "teacher.pth")
    torch.save(to_timm_state(encoder), tmp_path / "timm.pth")
    torch.save(encoder.state_dict(), tmp_path / "flat.pth")
    hashes = {load_encoder(tmp_path / name).sha256 for name in ("native", "teacher.pth", "timm.pth", "flat.pth")}
    assert len(hashes) == 1
    with torch.no_grad():
        encoder.blocks[2].mlp.fc2.weight[5, 7] += 1e-6
    assert hash_weights(encoder.state_dict()) not in hashes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_token": None}, "missing key 'backbone.cls_token'"),
        ({"storage_tokens": None}, "missing key 'backbone.storage_tokens'"),
        ({"norm.bias": None}, r"missing key 'backbone.norm.bias': expected \(128,\)"),
        ({"blocks.1.norm1.weight": None}, r"missing key 'backbone.blocks.1.norm1.weight': expected \(128,\)"),
        ({"local_cls_norm.bias": torch.zeros(128)}, r"unknown key 'backbone.local_cls_norm.bias': found \(128,\)"),
        ({"mask_token": torch.zeros(128)}, r"misshapen key 'backbone.mask_token': expected \(1, 128\), found"),
        ({"cls_token": torch.zeros(128)}, r"misshapen key 'backbone.cls_token': expected 3 dimensions, found shape"),
        ({"rope_embed.periods": torch.zeros(8)}, r"'backbone.rope_embed.periods': expected \(16,\), found \(8,\)"),
        ({"blocks.0.ls1.gamma": torch.full((128,), torch.inf)}, "'backbone.blocks.0.ls1.gamma' holds 128 values"),
        ({"norm.bias": torch.zeros(128, dtype=torch.int64)}, "'backbone.norm.bias' holds torch.int64, expected"),
        ({"norm.bias": [0.0] * 128}, "'backbone.norm.bias' is a list, expected a tensor"),
        ({"blocks.0.mlp.fc1.weight": None, "blocks.0.mlp.w1.weight": torch.zeros(1)}, "key 'backbone.blocks.0.mlp.fc1"),
    ],
)  # fmt: skip
@pytest.mark.fault
def test_a_missing_unknown_or_misshapen_key_is_named_with_its_file(encoder, tmp_path, change, message):
    state = encoder.state_dict() | change
    file = tmp_path / "teacher.pth"
    torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items() if value is not None}}, file)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} \(teacher layout\): .*{message}"):
        load_encoder(file)


def test_the_same_tensor_twice_is_refused(encoder, tmp_path):
    state = to_timm_state(encoder)
    torch.save(state | {"storage_tokens": state["reg_token"]}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match="keys 'reg_token' and 'storage_tokens' are the same tensor 'storage_tokens'"):
        load_encoder(tmp_path / "twice.pth")


def test_a_file_of_a_published_width_must_hold_all_blocks(tmp_path):
    state = vit_small().state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("blocks.11.")}, tmp_path / "s.pth")
    with pytest.raises(ValueError, match=r"missing key 'blocks.11.norm1.weight': expected \(384,\).*\(and 8 more\)"):
        load_encoder(tmp_path / "s.pth")


def test_a_width_that_heads_of_64_do_not_divide_is_refused(tmp_path):
    torch.save(VisionTransformer(embed_dim=96, depth=1, num_heads=2).state_dict(), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="embed_dim 96 is not a multiple of 64"):
        load_encoder(tmp_path / "odd.pth")


def test_another_models_file_is_refused_with_its_first_keys(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet.pth: not a known layout; its first keys are \['conv1.weight', 'fc"):
        load_encoder(tmp_path / "resnet.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth: expected a dictionary of tensors, found list"):
        load_encoder(tmp_path / "list.pth")


class _Intruder:
    """Unpickled without care, this leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("as_torch_file", [True, False])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, as_torch_file):
    trace = tmp_path / "trace"
    file = tmp_path / "evil.pth"
    if as_torch_file:
        torch.save({"teacher": _Intruder(trace)}, file)
    else:
        file.write_bytes(pickle.dumps({"teacher": _Intruder(trace)}, protocol=2))
    with pytest.raises(ValueError, match=r"evil.pth: holds pickled objects other than tensors, which are refused"):
        load_encoder(file)
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_half_written_torch_file_is_refused(encoder, tmp_path, kept):
    file = tmp_path / "teacher.pth"
    torch.save(to_teacher_state(encoder), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"teacher.pth: is damaged, half-written or not a PyTorch file"):
        load_encoder(file)


def test_a_missing_file_says_what_may_be_given(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no encoder at .*nowhere\. Give the path of one: .*untrained:vit_base"
    ):
        load_encoder(tmp_path / "nowhere")


def test_a_folder_without_weights_says_what_was_looked_for_and_points_into_a_run(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a folder without encoder weights, expected encoder.safetensors or"):
        load_encoder(tmp_path)
    save_encoder(encoder, tmp_path / "encoder")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*encoder\?"):
        load_encoder(tmp_path)


def test_untrained_encoders_are_the_same_every_time_and_leave_the_global_generator_alone():
    global_state = torch.get_rng_state()
    first, second = load_encoder("untrained:vit_tiny"), load_encoder("untrained:vit_tiny")
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(_features(first), _features(second))
    assert first.sha256 == second.sha256 == hash_weights(first.state_dict())
    assert (first.name, first.contract, first.embed_dim) == ("untrained-vit_tiny", InputContract(), 192)
    assert not first.training
    with pytest.raises(ValueError, match=r"no architecture 'vit_huge' .* untrained:vit_tiny, .* or untrained:PATH"):
        load_encoder("untrained:vit_huge")


def test_an_untrained_encoder_can_be_like_the_one_in_a_file(tmp_path):
    trained = VisionTransformer(embed_dim=64, depth=2, num_heads=1, layer_scale_init=0.5)
    save_encoder(trained, tmp_path / "encoder")
    like = load_encoder(f"untrained:{tmp_path / 'encoder'}")
    assert like.architecture == trained.architecture
    assert (like.blocks[1].ls1.gamma == 0.5).all()
    assert not torch.equal(like.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)
    assert like.sha256 == load_encoder(f"untrained:{tmp_path / 'encoder'}").sha256
