"""Every format loaded by its own library through the printed snippet, and the card and folder that go with it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from braindino.cli import main as braindino
from braindino.file_digest import file_digest
from braindino.leakage import EXPOSURE_FILE, Exposure, read_exposure, write_exposure
from braindino.manifest import Scan
from braindino.pretrain.checkpoint import load_newest_checkpoint
from braindino.pretrain.export import export_encoder, main
from braindino.pretrain.initialization import start_from
from braindino.pretrain.loading_snippet import FORMATS, WEIGHTS_FILE, architecture_name
from braindino.pretrain.train import main as pretrain
from braindino.slice_store import SliceStoreWriter
from braindino.vision_transformer import ARCHITECTURES, VisionTransformer, vit_base, vit_large, vit_small, vit_tiny
from braindino.weights import (
    InputContract,
    load_encoder,
    save_encoder,
    to_dinov3_state,
    to_timm_state,
)


def randomized(encoder: VisionTransformer, seed: int = 0) -> VisionTransformer:
    """Weights with peaky attention and large layer scales, so that a misplaced tensor shows."""
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


def small(**changes) -> VisionTransformer:
    return randomized(VisionTransformer(**{"embed_dim": 128, "depth": 3, "num_heads": 2, **changes}))


def biased() -> VisionTransformer:
    """With query and value biases, the key's zero, as a trained DINOv3 with biases has them."""
    encoder = small(qkv_bias=True, layer_norm_eps=1e-5)
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.bias[128:256] = 0.0
    return encoder


def with_rounded_periods() -> VisionTransformer:
    encoder = small()
    encoder.load_state_dict(
        {**encoder.state_dict(), "rope_embed.periods": encoder.rope_embed.periods.bfloat16().float()}
    )
    return encoder


def saved(encoder: VisionTransformer, folder: Path) -> Path:
    save_encoder(encoder, folder, contract=InputContract(image_size=64))
    return folder


def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))


# DINOv3's code may not be copied here. This stands in for the class that the snippet names: it takes the same settings,
# refuses others, expects the parameters that DINOv3's has (qkv bias with its mask) and gives the same dictionary. The
# real class is tried by `test_dinov3s_own_class_...`, where it can be imported.
STAND_IN = """
import torch
from braindino.vision_transformer import VisionTransformer

class DinoVisionTransformer(torch.nn.Module):
    def __init__(self, *, patch_size, embed_dim, depth, num_heads, ffn_ratio, n_storage_tokens, layerscale_init,
                 qkv_bias, mask_k_bias, norm_layer, pos_embed_rope_base, pos_embed_rope_dtype):
        super().__init__()
        assert pos_embed_rope_dtype == "fp32"
        eps = {"layernorm": 1e-6, "layernormbf16": 1e-5}[norm_layer]
        self.inner = VisionTransformer(embed_dim=embed_dim, depth=depth, num_heads=num_heads, patch_size=patch_size,
            num_storage_tokens=n_storage_tokens, mlp_ratio=ffn_ratio, layer_scale_init=layerscale_init,
            layer_norm_eps=eps, qkv_bias=qkv_bias, rope_base=pos_embed_rope_base)
        self.masked = qkv_bias and mask_k_bias

    def load_state_dict(self, state, strict):
        assert strict
        masks = {key for key in state if key.endswith("bias_mask")}
        assert len(masks) == (len(self.inner.blocks) if self.masked else 0)
        weights = {key: value for key, value in state.items() if key not in masks}
        for key in masks:
            weights[key.removesuffix("_mask")] = weights[key.removesuffix("_mask")] * state[key]
        self.inner.load_state_dict(weights, strict=True)

    def forward_features(self, images):
        tokens = self.inner(images)
        return {"x_norm_clstoken": tokens.cls, "x_norm_patchtokens": tokens.patches}
"""


def run_snippet(
    snippet: str, tmp_path: Path, *, cwd: Path, path: Path | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run it as printed, then once more from where it makes its image with ours in its place; CLS and patch tokens."""
    torch.save(image(), tmp_path / "image.pt")
    made, again = snippet.split("images = ", maxsplit=1)[0], snippet.split("images = ")[1].split("\n", 1)[1]
    assert made.startswith(("import", "from"))
    script = f"{snippet}\nimages = torch.load({str(tmp_path / 'image.pt')!r}, weights_only=True)\n{again}"
    script += f"\ntorch.save((cls, patches), {str(tmp_path / 'features.pt')!r})\n"
    search = os.pathsep.join([str(path), *sys.path] if path else [entry for entry in sys.path if entry])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "features.pt", weights_only=True)


def stand_in(tmp_path: Path) -> Path:
    package = tmp_path / "stand-in" / "dinov3" / "models"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "vision_transformer.py").write_text(STAND_IN)
    return package.parents[1]


def printed_snippet(output: str) -> str:
    return output.split("To load it:\n\n")[1]


def card_snippet(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def assert_same_features(features: tuple[torch.Tensor, torch.Tensor], encoder: VisionTransformer, atol: float) -> None:
    with torch.inference_mode():
        tokens = encoder(image())
    torch.testing.assert_close(features[0], tokens.cls, rtol=0, atol=atol)
    torch.testing.assert_close(features[1], tokens.patches, rtol=0, atol=atol)


# ---- the snippets, each in a process of its own --------------------------------------------------------------------

# Their attention sums in another order than ours: differences of float32, as measured in tests/core/test_weights.py.
TOLERANCE = {"native": 0.0, "teacher": 0.0, "dinov3": 0.0, "timm": 5e-5, "hf": 5e-5}


@pytest.mark.parametrize("format", FORMATS)
def test_the_printed_snippet_loads_the_export_with_our_features(format: str, tmp_path: Path, capfd):
    encoder = small()
    source = saved(encoder, tmp_path / "encoder")
    assert braindino(["export", str(source), "--format", format, "--out", str(tmp_path / "out")]) == 0
    snippet = printed_snippet(capfd.readouterr().out)
    features = run_snippet(snippet, tmp_path, cwd=tmp_path, path=stand_in(tmp_path))
    assert_same_features(features, encoder, TOLERANCE[format])
    # The card's is the same but for the place: it is run in the folder.
    relative = snippet.replace(f"{tmp_path / 'out'}/", "").replace(str(tmp_path / "out"), ".")
    assert card_snippet(tmp_path / "out") == relative


@pytest.mark.parametrize("format", ["native", "hf"])
def test_the_cards_snippet_runs_in_the_folder(format: str, tmp_path: Path):
    encoder = small()
    out = export_encoder(saved(encoder, tmp_path / "encoder"), format, tmp_path / "out").folder
    assert_same_features(run_snippet(card_snippet(out), tmp_path, cwd=out), encoder, TOLERANCE[format])


@pytest.mark.parametrize("format", ["teacher", "dinov3"])
@pytest.mark.parametrize("build", [small, biased, with_rounded_periods, vit_small])
def test_dinov3s_own_class_loads_the_export_with_our_features(format: str, build, tmp_path: Path):
    """Where DINOv3's code can be imported: PYTHONPATH=/path/to/dinov3 pytest ..."""
    if importlib.util.find_spec("dinov3") is None:
        pytest.skip("DINOv3's code (own licence) is not on the path")
    encoder = randomized(build())
    exported = export_encoder(saved(encoder, tmp_path / "encoder"), format, tmp_path / "out")
    assert_same_features(run_snippet(exported.snippet, tmp_path, cwd=tmp_path), encoder, 1e-5)


def run_here(snippet: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Load as the snippet does, without a process of its own."""
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's imports use what torch has deprecated
        load, use = snippet.split("images = ")
        exec(load, names)
        names["images"] = image()
        exec(use.split("\n", 1)[1], names)
    return names["cls"], names["patches"]


@pytest.mark.parametrize("format", ["timm", "hf"])
@pytest.mark.parametrize(
    "build",
    [biased, with_rounded_periods, vit_tiny, vit_small, vit_base, pytest.param(vit_large, marks=pytest.mark.slow)],
)
def test_bias_rounded_periods_and_every_architecture_keep_their_features(format: str, build, tmp_path: Path):
    encoder = build() if build in (biased, with_rounded_periods) else randomized(build())
    exported = export_encoder(saved(encoder, tmp_path / "encoder"), format, tmp_path / "out")
    assert_same_features(run_here(exported.snippet), encoder, 5e-5)
    names = {vit_small: "vit_small_patch16_dinov3", vit_base: "vit_base_patch16_dinov3"}
    assert format == "hf" or f'"{names.get(build, "vit_")}' in exported.snippet
    loaded = load_encoder(exported.folder / WEIGHTS_FILE[format])
    assert loaded.architecture["layer_norm_eps"] == encoder.architecture["layer_norm_eps"]
    with torch.inference_mode():
        same = torch.equal(loaded(image()).patches, encoder(image()).patches)
    unsaid = "but this layout does not say all: the RoPE periods are not rounded then."
    assert same == (build is not with_rounded_periods)
    assert same == (unsaid not in (exported.folder / "README.md").read_text())


def test_the_features_would_differ_with_the_wrong_eps_periods_or_bias_mask(tmp_path: Path):
    """What the snippets write out matters: each line taken away moves the features by more than the tolerance."""
    exported = export_encoder(saved(with_rounded_periods(), tmp_path / "one"), "timm", tmp_path / "timm")
    line = next(line for line in exported.snippet.splitlines() if "periods.copy_" in line)
    whole, without = run_here(exported.snippet), run_here(exported.snippet.replace(line, ""))
    assert (whole[1] - without[1]).abs().max() > 1e-3
    biases = to_dinov3_state(biased())
    mask = biases["blocks.0.attn.qkv.bias_mask"]
    assert mask.tolist() == [1.0] * 128 + [0.0] * 128 + [1.0] * 128
    zeros = to_dinov3_state(small())
    assert not zeros["blocks.2.attn.qkv.bias"].any() and not zeros["blocks.2.attn.qkv.bias_mask"].any()


def test_timms_own_reader_of_dinov3_files_takes_the_export(tmp_path: Path):
    """An independent reading of the flat layout: timm's filter for DINOv3's released files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
        from timm.models.eva import checkpoint_filter_fn
    encoder = biased()
    out = export_encoder(saved(encoder, tmp_path / "encoder"), "dinov3", tmp_path / "out").folder
    model = timm.create_model(
        "vit_small_patch16_dinov3_qkvb", num_classes=0, embed_dim=128, depth=3, num_heads=2
    ).eval()  # fmt: skip
    state = torch.load(out / "dinov3.pth", weights_only=True)
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    with torch.inference_mode():
        tokens = model.forward_features(image())
    assert_same_features((tokens[:, 0], tokens[:, 5:]), encoder, 1e-5)


@pytest.mark.parametrize(
    ("changes", "formats", "message"),
    [
        ({"num_storage_tokens": 0}, ("teacher", "dinov3", "timm", "hf"), "the encoder has no storage tokens"),
        ({"num_heads": 4}, ("teacher", "dinov3", "timm"), "its readers take embed_dim / 64 = 2; the encoder has 4"),
        ({"rope_base": 50.0}, ("timm",), "its RoPE base is 50.0, which timm files do not say"),
    ],
)
def test_a_model_that_a_format_cannot_hold_is_refused(changes: dict, formats: tuple, message: str, tmp_path: Path):
    source = saved(small(**changes), tmp_path / "encoder")
    for format in formats:
        with pytest.raises(ValueError, match=f"--format {format} cannot hold this encoder: .*{message}.*native"):
            export_encoder(source, format, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    export_encoder(source, "native", tmp_path / "out")


def test_periods_of_another_rule_are_refused_by_programs_that_compute_them(tmp_path: Path):
    encoder = small()
    encoder.load_state_dict({**encoder.state_dict(), "rope_embed.periods": encoder.rope_embed.periods * 1.5})
    source = saved(encoder, tmp_path / "encoder")
    for format in ("timm", "hf"):
        with pytest.raises(ValueError, match="its RoPE periods are not those of its rope_base"):
            export_encoder(source, format, tmp_path / "out")
    loaded = load_encoder(export_encoder(source, "dinov3", tmp_path / "out").folder / "dinov3.pth")
    assert torch.equal(loaded.rope_embed.periods, encoder.rope_embed.periods)


def test_a_key_bias_is_refused_by_timm_alone_and_kept_by_the_others(tmp_path: Path):
    encoder = small(qkv_bias=True)
    source = saved(encoder, tmp_path / "encoder")
    with pytest.raises(ValueError, match="its key part is not zero; timm's DINOv3 has no key bias"):
        export_encoder(source, "timm", tmp_path / "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]  # nothing half-written
    assert_same_features(run_here(export_encoder(source, "hf", tmp_path / "hf").snippet), encoder, 1e-5)
    for format in ("teacher", "dinov3"):
        loaded = load_encoder(export_encoder(source, format, tmp_path / format).folder / WEIGHTS_FILE[format])
        assert torch.equal(loaded.blocks[1].attn.qkv.bias, encoder.blocks[1].attn.qkv.bias)


# ---- from a run ---------------------------------------------------------------------------------------------------

STRANGE_COHORT = "Zürich: <b>|x|</b> #1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One iteration of the debug recipe on two cohorts, one of them with a strange name, one subject kept out."""
    folder = tmp_path_factory.mktemp("export")
    writer, rng = SliceStoreWriter(folder / "store"), np.random.default_rng(0)
    for n, (cohort, sequence) in enumerate([("ixi", "T1"), ("ixi", "T2"), (STRANGE_COHORT, "T1"), ("ixi", "T1")]):
        scan = Scan(f"/data/{n}.nii.gz", cohort, f"s{n}", sequence=sequence, content_hash=f"{n}" * 32)
        writer.add(scan, rng.standard_normal((3, 256, 256)), range(3))
    writer.publish()
    (folder / "held_out.txt").write_text("ixi/s3\n")
    flags = ["--store", str(writer.store_dir), "--out", str(folder / "run"), "--device", "cpu", "--iterations", "1"]
    flags += ["--batch-size", "2", "--num-workers", "0", "--exclude-subjects", str(folder / "held_out.txt")]
    assert pretrain(["debug", *flags]) == 0
    return folder / "run"


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_card_of_a_run_tells_data_recipe_licence_and_making(run: Path, tmp_path: Path, capsys):
    from huggingface_hub import ModelCard

    out = tmp_path / "out"
    assert main([str(run), "--format", "timm", "--out", str(out), "--license", "cc-by-nc-4.0"]) == 0
    assert f"{EXPOSURE_FILE} names subjects" in capsys.readouterr().out
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data == front_matter(out)
    assert data["license"] == "cc-by-nc-4.0" and data["library_name"] == "timm"
    assert data["datasets"] == [STRANGE_COHORT, "ixi"]
    card = (out / "README.md").read_text()
    assert "| ixi | 2 | 2 | T1 1, T2 1 |" in card
    assert "| Zürich: &lt;b>\\|x\\|&lt;/b> #1 | 1 | 1 | T1 1 |" in card
    assert "| all | 3 | 3 | T1 2, T2 1 |" in card
    assert "The last stage drew from 9 slices." in card
    assert "1 subjects were kept out of it by a list" in card
    assert "trial run (recipe `debug`)" in card
    assert "| `model.architecture` | vit_tiny |" in card and "| `iterations` | 1 |" in card
    assert "teacher after 1 iterations of pretraining recipe debug" in card
    encoder = load_encoder(run / "encoder")
    assert f"| hash of the weights | `{encoder.sha256}` |" in card
    assert json.loads((run / "run.json").read_text())["store_fingerprint"] in card
    assert f"torch {torch.__version__.split('+')[0]}" in card
    for path in out.iterdir():
        if path.name != "README.md":
            assert f"| `{path.name}` | `{file_digest(path)}` |" in card
    assert str(run.parent) not in card  # nobody's folders
    assert read_exposure(out) == read_exposure(run)


def test_a_licence_is_never_assumed_and_other_names_become_other(run: Path, tmp_path: Path, capsys):
    assert main([str(run), "--format", "native", "--out", str(tmp_path / "none")]) == 0
    assert "licence: not stated in the model card" in capsys.readouterr().out
    assert "license" not in front_matter(tmp_path / "none")
    assert "Licence: not stated." in (tmp_path / "none" / "README.md").read_text()
    hostile = "Our terms: see\n---\ntags: [x] <script>"
    flags = ["--license", hostile, "--datasets", "openneuro/ds000001", "a: b"]
    assert main([str(run), "--format", "native", "--out", str(tmp_path / "own"), *flags]) == 0
    matter = front_matter(tmp_path / "own")
    assert (matter["license"], matter["license_name"]) == ("other", "Our terms: see --- tags: [x] <script>")
    assert matter["datasets"] == ["openneuro/ds000001", "a: b"]
    assert "<script>" not in (tmp_path / "own" / "README.md").read_text().split("\n# ")[1]


def test_a_native_export_is_the_runs_own_file(run: Path, tmp_path: Path):
    for source in (run, run / "encoder", run / "encoder" / "encoder.safetensors"):
        out = export_encoder(source, "native", tmp_path / "out", title="one").folder
        for name in ("encoder.safetensors", "encoder.json", EXPOSURE_FILE):
            assert (out / name).read_bytes() == (run / "encoder" / name).read_bytes()
    assert "Recipe `debug`" in (tmp_path / "out" / "README.md").read_text()


def test_heads_travel_with_a_teacher_file_and_a_run_can_start_from_them(run: Path, tmp_path: Path):
    from braindino.pretrain.distillation import build_student, build_teacher
    from braindino.records import read_yaml

    export_encoder(run, "teacher", tmp_path / "out", with_heads=True)
    checkpoint = load_newest_checkpoint(run)
    assert checkpoint is not None
    teacher = checkpoint.state["teacher"]
    state = torch.load(tmp_path / "out" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert sorted(state) == sorted(key.replace("encoder.", "backbone.", 1) for key in teacher)
    assert len([key for key in state if key.startswith("ibot_head.")]) == 7
    student = build_student(**read_yaml(run / "config.yaml")["model"], seed=3)
    lines = start_from(student, build_teacher(student), tmp_path / "out" / "teacher_checkpoint.pth")
    assert lines[1:] == ["dino_head: from the file", "ibot_head: from the file"]
    assert all(torch.equal(value, teacher[key]) for key, value in student.state_dict().items())


def test_heads_where_there_are_none_are_an_error(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--with-heads: format timm holds no heads; use --format teacher"):
        export_encoder(run, "timm", tmp_path / "out", with_heads=True)
    source = saved(small(), tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"--with-heads: .* has no checkpoint, where the heads are"):
        export_encoder(source, "teacher", tmp_path / "out", with_heads=True)


# ---- the folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_export_is_left_as_it_is_and_another_is_refused(format: str, tmp_path: Path, capsys):
    source, out = saved(small(), tmp_path / "encoder"), tmp_path / "out"
    flags = ["--format", format, "--out", str(out)]
    out.mkdir()  # an empty folder may be filled
    assert main([str(source), *flags]) == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert main([str(source), *flags]) == 0
    assert "holds this export already, left as it is" in capsys.readouterr().out
    other = saved(small(layer_norm_eps=1e-5), tmp_path / "other")
    assert main([str(other), *flags]) == 1
    error = capsys.readouterr().err
    assert re.search(r"out holds something else \(differing: .*README.md.*\), and nothing is overwritten", error)
    (out / "mine.txt").write_text("notes")
    assert main([str(source), *flags]) == 1
    assert "(differing: mine.txt)" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "other", "out"]


@pytest.mark.fault
def test_a_file_at_the_place_a_missing_run_and_a_failing_write_leave_nothing_behind(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    source = saved(small(), tmp_path / "encoder")
    (tmp_path / "file").write_text("mine")
    assert main([str(source), "--format", "timm", "--out", str(tmp_path / "file")]) == 1
    assert "file is a file, and nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    assert main([str(tmp_path / "nowhere"), "--format", "timm", "--out", str(tmp_path / "out")]) == 1
    assert "no encoder at" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([str(source), "--format", "onnx", "--out", str(tmp_path / "out")])
    assert caught.value.code == 2

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("braindino.pretrain.export.write_text", full_disk)
    assert main([str(source), "--format", "timm", "--out", str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "file"]


@pytest.mark.fault
def test_weights_that_come_back_changed_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = saved(small(), tmp_path / "encoder")

    def damaged(encoder: VisionTransformer) -> dict[str, torch.Tensor]:
        state = to_timm_state(encoder)
        state["blocks.1.mlp.fc1.bias"][3] += 1
        return state

    monkeypatch.setattr("braindino.pretrain.export.to_timm_state", damaged)
    with pytest.raises(OSError, match=r"'blocks.1.mlp.fc1.bias' read back from the export is not what was written"):
        export_encoder(source, "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_others_made_gets_a_card_without_claims(tmp_path: Path):
    torch.save(to_dinov3_state(small()), tmp_path / "dinov3.pth")
    out = export_encoder(tmp_path / "dinov3.pth", "native", tmp_path / "out").folder
    card = (out / "README.md").read_text()
    assert "What the encoder was trained on was not written down" in card
    assert "The settings of its training are not known here" in card
    assert "self-distillation without labels" not in card and "brain-MRI slices: a vision" not in card
    assert not (out / EXPOSURE_FILE).exists() and "datasets" not in front_matter(out)
    assert {"brain", "mri"}.isdisjoint(front_matter(out)["tags"])
    # Half-known is said, too.
    write_exposure(tmp_path / EXPOSURE_FILE, Exposure((Scan("", "ixi", "1", sequence="T1"),), ("the rest",)))
    card = (export_encoder(tmp_path / "dinov3.pth", "native", tmp_path / "two").folder / "README.md").read_text()
    assert "Not known: the rest." in card and "| ixi | 1 | 1 | T1 1 |" in card


def test_an_encoder_of_another_layout_exported_twice_gives_the_same_native_file(tmp_path: Path):
    torch.save(to_dinov3_state(small()), tmp_path / "dinov3.pth")
    for name in ("one", "two"):
        export_encoder(tmp_path / "dinov3.pth", "native", tmp_path / name, title="same")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert not export_encoder(tmp_path / "dinov3.pth", "native", tmp_path / "one", title="same").is_new


def test_names_are_those_of_our_architectures():
    assert [architecture_name(build().architecture) for build in (vit_tiny, vit_small)] == ["vit_tiny", "vit_small"]
    assert architecture_name(small().architecture) is None
    assert set(ARCHITECTURES) == {"vit_tiny", "vit_small", "vit_base", "vit_large"}
