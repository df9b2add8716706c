"""Starting from a run or from weights of any layout: what is taken, what stays fresh, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from braindino.leakage import EXPOSURE_FILE, read_exposure
from braindino.manifest import Scan
from braindino.metrics_log import read_metrics
from braindino.pretrain.checkpoint import load_newest_checkpoint, save_checkpoint
from braindino.pretrain.distillation import Centre, Network, build_student, build_teacher
from braindino.pretrain.initialization import resolve_layer_norm_eps, start_from
from braindino.pretrain.train import main
from braindino.records import read_yaml
from braindino.slice_store import SliceStoreWriter
from braindino.vision_transformer import VisionTransformer, vit_tiny
from braindino.weights import (
    load_encoder,
    save_encoder,
    to_dinov3_state,
    to_hugging_face_config,
    to_hugging_face_state,
    to_teacher_state,
    to_timm_state,
)

K, HIDDEN, BOTTLENECK = 96, 64, 32


def networks(**changes) -> tuple[Network, Network]:
    settings = {
        "num_storage_tokens": 4,
        "layer_scale_init": 1e-5,
        "drop_path": 0.1,
        "num_prototypes": K,
        "head_hidden_dim": HIDDEN,
        "head_bottleneck_dim": BOTTLENECK,
        "seed": 0,
    }
    student = build_student("vit_tiny", **{**settings, **changes})
    return student, build_teacher(student)


def randomized(encoder: VisionTransformer, seed: int = 5) -> VisionTransformer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return encoder.eval()


def write(layout: str, encoder: VisionTransformer, folder: Path) -> Path:
    """The encoder in a layout; what --init-from is to name."""
    folder.mkdir(parents=True, exist_ok=True)
    match layout:
        case "native":
            save_encoder(encoder, folder)
            return folder
        case "teacher":
            torch.save(to_teacher_state(encoder), folder / "teacher.pth")
            return folder / "teacher.pth"
        case "dinov3":
            torch.save(to_dinov3_state(encoder), folder / "dinov3.pth")
            return folder / "dinov3.pth"
        case "timm":
            save_file(to_timm_state(encoder), folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        case _:
            save_file(to_hugging_face_state(encoder), folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(to_hugging_face_config(encoder)))
            return folder


def heads(student: Network, value: float) -> dict[str, torch.Tensor]:
    """Both heads of a teacher file, filled with a value."""
    return {
        f"{name}.{key}": torch.full_like(tensor, value)
        for name in ("dino_head", "ibot_head")
        for key, tensor in getattr(student, name).state_dict().items()
    }


@pytest.mark.parametrize("layout", ["native", "teacher", "dinov3", "timm", "Hugging Face"])
def test_the_encoder_of_every_layout_goes_into_student_and_teacher_and_heads_stay_fresh(layout: str, tmp_path: Path):
    encoder = randomized(vit_tiny())
    student, teacher = networks()
    fresh, _ = networks()
    lines = start_from(student, teacher, write(layout, encoder, tmp_path / "weights"))
    expected = load_encoder(write(layout, encoder, tmp_path / "weights"))
    image = torch.randn(1, 1, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = encoder(image).patches
        for network in (student, teacher):
            assert all(
                torch.equal(a, b) for a, b in zip(network.encoder.parameters(), expected.parameters(), strict=True)
            )
            torch.testing.assert_close(network.encoder.eval()(image).patches, features, rtol=0, atol=1e-5)
            for name in ("dino_head", "ibot_head"):
                for key, tensor in getattr(fresh, name).state_dict().items():
                    assert torch.equal(getattr(network, name).state_dict()[key], tensor)
    assert lines[0].startswith(f"starting from the encoder {tmp_path / 'weights'}")
    assert lines[-2:] == [f"{name}: fresh, since the file has none" for name in ("dino_head", "ibot_head")]
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert student.encoder.drop_path == 0.1


@pytest.mark.parametrize("wrapped", [False, True])
def test_heads_of_a_teacher_file_are_taken(wrapped: bool, tmp_path: Path):
    student, teacher = networks()
    state = to_teacher_state(randomized(vit_tiny()))
    state["teacher"] |= heads(student, 0.25)
    if wrapped:
        state["teacher"] = {
            key.replace(".", "._checkpoint_wrapped_module.", 1): value for key, value in state["teacher"].items()
        }
    torch.save(state, tmp_path / "teacher.pth")
    lines = start_from(student, teacher, tmp_path / "teacher.pth")
    assert lines[1:] == ["dino_head: from the file", "ibot_head: from the file"]
    for network in (student, teacher):
        for name in ("dino_head", "ibot_head"):
            assert all((tensor == 0.25).all() for tensor in getattr(network, name).state_dict().values())


def test_a_head_that_does_not_fit_starts_fresh_with_the_reason_and_the_other_is_taken(tmp_path: Path):
    student, teacher = networks()
    state = to_teacher_state(vit_tiny())
    state["teacher"] |= heads(student, 0.25)
    # DINOv2's weight normalisation in one head, as its files have it.
    del state["teacher"]["ibot_head.last_layer.weight"]
    state["teacher"] |= {"ibot_head.last_layer.weight_g": torch.ones(K, 1)}
    state["teacher"] |= {"ibot_head.last_layer.weight_v": torch.ones(K, BOTTLENECK)}
    torch.save(state, tmp_path / "teacher.pth")
    fresh = student.ibot_head.state_dict()["last_layer.weight"].clone()
    lines = start_from(student, teacher, tmp_path / "teacher.pth")
    assert lines[1] == "dino_head: from the file"
    assert lines[2] == (
        "ibot_head: fresh, since 3 parameters do not fit, first last_layer.weight: found none, "
        f"expected ({K}, {BOTTLENECK})"
    )
    assert torch.equal(student.ibot_head.last_layer.weight, fresh)
    assert torch.equal(teacher.ibot_head.last_layer.weight, fresh)


@pytest.mark.fault
def test_a_head_that_is_not_finite_is_refused(tmp_path: Path):
    student, teacher = networks()
    state = to_teacher_state(vit_tiny())
    state["teacher"] |= heads(student, float("nan"))
    torch.save(state, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"teacher.pth: 'dino_head.mlp.0.weight' holds 12288 values that are not"):
        start_from(student, teacher, tmp_path / "teacher.pth")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: VisionTransformer(embed_dim=384, depth=12, num_heads=6),
            r"embed_dim: found 384, expected 192; num_heads: found 6, expected 3\); use --model.architecture vit_small",
        ),
        (
            lambda: vit_tiny(num_storage_tokens=2),
            r"num_storage_tokens: found 2, expected 4\); use --model.num-storage-tokens 2",
        ),
        (lambda: vit_tiny(depth=3), r"depth: found 3, expected 12\); no setting of a run describes such an encoder"),
        (lambda: vit_tiny(rope_base=50.0), r"rope_base: found 50.0, expected 100.0\); no setting"),
        (
            lambda: randomized(vit_tiny(qkv_bias=True)),
            r"qkv_bias: found True, expected False\); encoders with biases of query, key and value that are not zero",
        ),
    ],
)
def test_an_encoder_of_another_architecture_is_refused_with_what_differs(build, message: str, tmp_path: Path):
    student, teacher = networks()
    before = student.encoder.norm.weight.clone()
    save_encoder(build(), tmp_path)
    with pytest.raises(ValueError, match=rf"--init-from .*: another architecture \(.*{message}"):
        start_from(student, teacher, tmp_path)
    assert torch.equal(student.encoder.norm.weight, before)


def test_zero_biases_of_released_files_are_no_biases(tmp_path: Path):
    """Released DINOv3 files hold biases and masks of zeros; the layout is written by hand here."""
    encoder = randomized(vit_tiny())
    state = dict(encoder.state_dict())
    for number in range(12):
        state |= {f"blocks.{number}.attn.qkv.{name}": torch.zeros(576) for name in ("bias", "bias_mask")}
    torch.save(state, tmp_path / "dinov3_vitt16.pth")
    student, teacher = networks(layer_norm_eps=1e-5)
    lines = start_from(student, teacher, tmp_path / "dinov3_vitt16.pth")
    assert torch.equal(teacher.encoder.blocks[3].attn.qkv.weight, encoder.blocks[3].attn.qkv.weight)
    assert "LayerNorm eps 1e-05, taken over from it" in lines


def test_nothing_at_the_path_says_what_may_be_given(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no encoder at .*nowhere"):
        start_from(*networks(), tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--init-from .*run: no checkpoint there; .*run/encoder for its encoder"):
        start_from(*networks(), tmp_path / "run")


# ---- eps ----------------------------------------------------------------------------------------------------------


def test_eps_is_the_stated_one_then_the_recorded_one_then_that_of_the_source(tmp_path: Path):
    source = write("timm", vit_tiny(), tmp_path / "timm")
    config = tmp_path / "run" / "config.yaml"
    resolve = resolve_layer_norm_eps
    assert resolve(None, source=None, config_path=config) == 1e-6
    assert resolve(None, source=source, config_path=config) == 1e-5
    assert resolve(1e-4, source=source, config_path=config) == 1e-4
    config.parent.mkdir()
    config.write_text("model:\n  layer_norm_eps: 1.0e-05\n")
    assert resolve(None, source=tmp_path / "gone", config_path=config) == 1e-5
    # A run that starts from that run.
    (config.parent / "checkpoints").mkdir()
    assert resolve(None, source=config.parent, config_path=tmp_path / "new" / "config.yaml") == 1e-5


# ---- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    writer, rng = SliceStoreWriter(tmp_path_factory.mktemp("initialization") / "store"), np.random.default_rng(0)
    for n in range(2):
        scan = Scan(f"/data/{n}.nii.gz", "site", f"s{n}", sequence="T1", content_hash=f"{n}" * 32, appearance_hash="")
        writer.add(scan, rng.standard_normal((6, 256, 256)), range(6))
    writer.publish()
    return writer.store_dir


def arguments(store: Path, out: Path, *more: str) -> list[str]:
    flags = ["debug", "--store", str(store), "--out", str(out), "--device", "cpu", "--batch-size", "4"]
    return [*flags, "--num-workers", "0", "--optimizer.warmup-iterations", "0", *more]


def test_a_run_takes_over_the_eps_of_public_weights_records_it_and_resumes_without_them(
    store: Path, tmp_path: Path, capsys
):
    weights = write("timm", randomized(vit_tiny()), tmp_path / "public")
    flags = arguments(store, tmp_path / "run", "--init-from", str(weights), "--checkpoint-every", "1")
    # Learning rate 0 keeps the student as it was started.
    assert main([*flags, "--iterations", "1", "--optimizer.base-lr", "0", "--optimizer.min-lr", "0"]) == 0
    told = capsys.readouterr().out
    assert f"starting from the encoder {weights}" in told
    assert "LayerNorm eps 1e-05, taken over from it" in told
    assert "dino_head: fresh, since the file has none" in told
    assert read_yaml(tmp_path / "run" / "config.yaml")["model"]["layer_norm_eps"] == 1e-5
    encoder = load_encoder(tmp_path / "run" / "encoder")
    assert encoder.architecture["layer_norm_eps"] == 1e-5
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, load_encoder(weights).blocks[0].attn.qkv.weight)
    # What public weights have seen is unknown, and the table says so.
    exposure = read_exposure(tmp_path / "run")
    assert exposure.unknown == (f"the run starts from public, which has no {EXPOSURE_FILE}",)
    assert {scan.subject for scan in exposure.scans} == {"s0", "s1"}

    (weights / "model.safetensors").unlink()
    assert main([*flags, "--iterations", "1", "--optimizer.base-lr", "0", "--optimizer.min-lr", "0"]) == 0
    assert "all 1 iterations are done" in capsys.readouterr().out
    assert load_encoder(tmp_path / "run" / "encoder").architecture["layer_norm_eps"] == 1e-5

    # A second stage from that run starts from its teacher and heads, with its eps.
    second = arguments(store, tmp_path / "second", "--init-from", str(tmp_path / "run"), "--iterations", "1")
    assert main([*second, "--optimizer.base-lr", "0", "--optimizer.min-lr", "0"]) == 0
    assert "encoder and heads" in capsys.readouterr().out
    assert read_yaml(tmp_path / "second" / "config.yaml")["model"]["layer_norm_eps"] == 1e-5
    first, later = (load_newest_checkpoint(tmp_path / name) for name in ("run", "second"))
    assert first is not None and later is not None
    for name, tensor in first.state["teacher"].items():
        torch.testing.assert_close(later.state["teacher"][name], tensor, rtol=0, atol=1e-7)
    assert len(read_metrics(tmp_path / "second" / "metrics.jsonl")) == 1


def test_a_run_of_other_settings_is_refused_and_a_centre_that_it_lacks_starts_from_zeros(store: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert main(arguments(store, run, "--iterations", "1")) == 0
    model = read_yaml(run / "config.yaml")["model"]
    student = build_student(**{**model, "num_prototypes": 7}, seed=1)
    with pytest.raises(ValueError, match=r"do not fit, first dino_head.last_layer.weight: found \(128, 32\)"):
        start_from(student, build_teacher(student), run)
    student = build_student(**model, seed=1)
    teacher = build_teacher(student, centering="softmax")
    lines = start_from(student, teacher, run)
    assert lines[-1] == "softmax centring starts from zeros: that run had none"
    assert isinstance(teacher.centre, Centre) and not teacher.centre.dino.any()
    checkpoint = load_newest_checkpoint(run)
    assert checkpoint is not None
    assert all(torch.equal(student.state_dict()[name], value) for name, value in checkpoint.state["teacher"].items())


def test_a_centre_is_taken_where_both_have_one_and_left_where_only_the_run_has(tmp_path: Path):
    student, _ = networks(seed=1)
    teacher = build_teacher(student, centering="softmax")
    assert isinstance(teacher.centre, Centre)
    teacher.centre.dino.fill_(2.0)
    teacher.centre.ibot.fill_(3.0)
    save_checkpoint(tmp_path, iteration=1, config={}, state={"teacher": teacher.state_dict()})
    student, sinkhorn = networks()
    softmax = build_teacher(student, centering="softmax")
    assert len(start_from(student, softmax, tmp_path)) == 1
    assert isinstance(softmax.centre, Centre)
    assert (softmax.centre.dino == 2.0).all() and (softmax.centre.ibot == 3.0).all()
    start_from(student, sinkhorn, tmp_path)
    assert sinkhorn.centre is None
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]) and torch.equal(value, sinkhorn.state_dict()[name])
