"""The 3D baselines in nnU-Net: sizes, axes, what is frozen, checkpoints, and the whole way by nnU-Net's commands."""

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from braindino import save_encoder
from braindino.encoders.catalogue import draw_weights, load_volume_encoder
from braindino.encoders.checkpoints import MODALITIES
from braindino.encoders.patch_embedding import widen_patch_embedding
from braindino.encoders.uniformer import UniFormer
from braindino.encoders.volume_transformer import BMMAETransformer, BrainIACTransformer
from braindino.vision_transformer import VisionTransformer
from braindino.volume import load_labels, save_array
from nnunet_braindino import _startup, volume_trainer
from nnunet_braindino.network import count_parameters
from nnunet_braindino.trainer_variants import find_trainer
from nnunet_braindino.volume_network import FrozenVolumeSegmenter, build_encoder, volume_identity
from nnunet_braindino.volume_trainer import (
    nnUNetTrainerBMMAEFrozen,
    nnUNetTrainerBrainIACFrozen,
    nnUNetTrainerBrainMVPFrozen,
)

TRAINERS = {
    "brainmvp": nnUNetTrainerBrainMVPFrozen,
    "bm-mae": nnUNetTrainerBMMAEFrozen,
    "brainiac": nnUNetTrainerBrainIACFrozen,
}
SMALL = {
    "brainmvp": lambda: UniFormer(dims=(64, 64, 64, 64), depths=(1, 1, 1, 1)),
    "bm-mae": lambda: BMMAETransformer(modalities=("t1", "flair"), width=192, depth=4, mlp_dim=64, grid=2),
    "brainiac": lambda: BrainIACTransformer(width=64, depth=4, mlp_dim=64, grid=2),
}
PREFIXES = {"brainmvp": "module.encoder.uniformer.", "bm-mae": "", "brainiac": "backbone."}
DATASET = "Dataset001_Test"
DATASET_JSON = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "tumor": 1},
    "file_ending": ".nii.gz",
}


def small_encoder(kind: str, *, seed: int = 0) -> nn.Module:
    """A network of cubes of 32 voxels whose BatchNorm has seen something."""
    network = draw_weights(SMALL[kind])
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
    with torch.no_grad():
        network.norm.bias.add_(0.01 * seed)
    return network


def save_small_encoder(kind: str, file: Path, *, seed: int = 0) -> str:
    """In its published layout; returns the name by which it is loaded."""
    state = {PREFIXES[kind] + key: value for key, value in small_encoder(kind, seed=seed).state_dict().items()}
    torch.save(state if kind == "bm-mae" else {"state_dict": state}, file)
    return f"{kind}:{file}"


def make_plans(*, patch_size: tuple[int, ...] = (64, 48, 40), batch_size: int = 2) -> dict:
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": list(patch_size),
        "batch_size": batch_size,
        "spacing": [1.0] * len(patch_size),
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [True, True],
        "batch_dice": False,
        "architecture": {"network_class_name": "unused", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "configurations": {"3d_fullres": configuration},
        "continue_training": False,
    }


@pytest.fixture(params=list(TRAINERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setattr(f"{nnUNetTrainer.__module__}.infer_dataset_class", lambda folder: None)
    return tmp_path


class Batches:
    """Random images, brighter where there is tumour, in place of nnU-Net's loader."""

    def __init__(self, trainer) -> None:
        self.shape, self.batch_size = trainer.configuration_manager.patch_size, trainer.batch_size
        self.rng = np.random.default_rng(0)

    def __next__(self) -> dict:
        labels = (self.rng.random((self.batch_size, 1, *self.shape)) < 0.3).astype(np.int16)
        noise = self.rng.normal(size=(self.batch_size, 2, *self.shape)).astype(np.float32)
        return {"data": torch.from_numpy(noise + labels), "target": torch.from_numpy(labels)}


def make_trainer(kind: str, monkeypatch: pytest.MonkeyPatch, encoder: str):
    """The trainer with patches of 32 voxels, two iterations."""
    monkeypatch.setenv(_startup.ENCODER_VARIABLE, encoder)

    class Small(TRAINERS[kind]):
        epochs, iterations, validation_iterations = 1, 2, 1
        patch_edge, largest_batch = 32, 2

        def on_train_start(self) -> None:
            self.dataloader_train = self.dataloader_val = Batches(self)

    Small.__name__ = TRAINERS[kind].__name__
    return Small(make_plans(), "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "build", "trained", "total"),
    [
        ("brainmvp", UniFormer, 2_303_907, 24_342_371),
        ("bm-mae", lambda: BMMAETransformer(modalities=MODALITIES), 3_459_011, 74_344_643),
        ("brainiac", BrainIACTransformer, 3_459_011, 91_799_747),
    ],
)
def test_with_four_channels_and_three_regions_the_decoder_alone_is_trained(kind, build, trained: int, total: int):
    network = FrozenVolumeSegmenter(draw_weights(build), num_input_channels=4, num_classes=3)
    assert count_parameters(network) == (trained, total)
    assert {name.split(".")[0] for name, each in network.named_parameters() if each.requires_grad} == {"decoder"}
    assert not network.train().encoder.training and network.decoder.training
    encoder_size = sum(parameter.numel() for parameter in network.encoder.parameters())
    assert trained == total - encoder_size and volume_identity(network.encoder)["kind"] == kind


def test_several_channels_are_embedded_with_repeated_and_rescaled_weights(kind: str):
    """The maps equal those of an encoder of three channels whose embedding was widened by hand."""
    narrow = small_encoder(kind)
    images = torch.randn(1, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    network = FrozenVolumeSegmenter(narrow, num_input_channels=3, num_classes=2)
    found = network.encode(images)
    wide = copy.deepcopy(narrow)
    projections = [
        module for name, module in wide.named_modules() if name.endswith(("patch_embed1.proj", "patch_embeddings"))
    ]
    for projection in projections:
        projection.weight = nn.Parameter(widen_patch_embedding(projection.weight.detach(), 3), requires_grad=False)
    expected = FrozenVolumeSegmenter(wide, num_input_channels=3, num_classes=2).encode(images)
    average = network.encode(images.mean(dim=1, keepdim=True))
    assert len(found) == 4
    for each, other, averaged in zip(found, expected, average, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each, averaged, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_the_encoder_sees_its_own_axes_and_its_maps_come_back_on_nnunets(kind: str, transpose: tuple[int, int, int]):
    encoder = small_encoder(kind).eval()
    # A volume as the encoder knows it, x to the right (or left), y to the front (or back), z upwards.
    cube = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        if kind == "brainmvp":
            expected = encoder(cube)[1:]
        else:
            tokens = encoder.tokenize({"t1": cube}) if kind == "bm-mae" else cube
            expected = [
                encoder.norm(each.patches).transpose(1, 2).unflatten(2, (2, 2, 2))
                for each in encoder.intermediate(tokens, (0, 1, 2, 3))
            ]

    def as_nnunet(image: torch.Tensor) -> torch.Tensor:
        """From the encoder's axes to an LPS file's array (z, y, x), then through transpose_forward."""
        lps = image if kind == "bm-mae" else image.flip(2, 3)
        stored = lps.permute(0, 1, 4, 3, 2)
        return stored.permute(0, 1, *(2 + axis for axis in transpose))

    network = FrozenVolumeSegmenter(encoder, num_input_channels=1, num_classes=2, transpose_forward=transpose)
    found = network.encode(as_nnunet(cube))
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, as_nnunet(wanted), rtol=1e-4, atol=1e-5)


def test_logits_have_the_size_of_the_patch_and_gradients_stay_out_of_the_encoder(kind: str):
    network = FrozenVolumeSegmenter(small_encoder(kind), num_input_channels=4, num_classes=3)
    images = torch.randn(2, 4, 32, 32, 32, requires_grad=True)
    logits = network(images)
    assert logits.shape == (2, 3, 32, 32, 32)
    logits.square().mean().backward()
    assert all(parameter.grad is None for parameter in network.encoder.parameters())
    assert all(each.grad is not None and each.grad.any() for each in network.decoder.parameters())


def test_patches_become_the_encoders_cubes_and_the_batch_keeps_the_planned_number_of_voxels():
    plans = make_plans(patch_size=(128, 128, 128), batch_size=2)
    volume_trainer.fit_volume_plans(plans, "3d_fullres", edge=96)
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [96, 96, 96]
    assert plans["configurations"]["3d_fullres"]["batch_size"] == 4
    small = make_plans(patch_size=(32, 32, 32), batch_size=2)
    volume_trainer.fit_volume_plans(small, "3d_fullres", edge=128)
    assert small["configurations"]["3d_fullres"]["batch_size"] == 2
    limited = make_plans(patch_size=(128, 128, 128), batch_size=9)
    volume_trainer.fit_volume_plans(limited, "3d_fullres", edge=128, largest_batch=3)
    assert limited["configurations"]["3d_fullres"]["batch_size"] == 3
    json.dumps(plans)
    flat = make_plans(patch_size=(64, 64))
    with pytest.raises(ValueError, match=r"2-dimensional patches.*nnUNetv2_train DATASET 3d_fullres FOLD"):
        volume_trainer.fit_volume_plans(flat, "3d_fullres", edge=96)


def test_the_papers_settings_and_published_patches():
    for name, trainer in TRAINERS.items():
        assert (trainer.epochs, trainer.iterations, trainer.validation_iterations) == (100, 250, 50), name
    assert nnUNetTrainerBrainMVPFrozen.patch_edge == 128
    edges = (BMMAETransformer(modalities=("t1",), depth=1), BrainIACTransformer(depth=1))
    assert [volume_trainer.cube_edge(network, default=64) for network in edges] == [128, 96]
    ours, theirs = (inspect.signature(each.__init__) for each in (nnUNetTrainerBMMAEFrozen, nnUNetTrainer))
    assert list(ours.parameters) == list(theirs.parameters)
    build = inspect.signature(nnUNetTrainerBMMAEFrozen.build_network_architecture)
    assert list(build.parameters) == list(inspect.signature(nnUNetTrainer.build_network_architecture).parameters)


def test_two_iterations_train_the_decoder_and_leave_every_byte_of_the_encoder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    name = save_small_encoder(kind, tmp_path / "published.pt", seed=3)
    trainer = make_trainer(kind, monkeypatch, name)
    identity = json.loads(json.dumps(trainer.plans_manager.plans["braindino"]))
    assert (identity["kind"], len(identity["sha256"])) == (kind, 64)
    assert identity["sha256"] == load_volume_encoder(name).identity.sha256
    trainer.initialize()
    printed = capsys.readouterr().out
    assert str(count_parameters(trainer.network)) in printed and identity["sha256"] in printed
    assert "patches [32, 32, 32], batch size 2" in printed
    published = load_volume_encoder(name).network.state_dict()
    before = copy.deepcopy(trainer.network.decoder.state_dict())
    for group in trainer.optimizer.param_groups:
        assert {id(each) for each in group["params"]} == {id(each) for each in trainer.network.decoder.parameters()}
    rates = []
    for epoch in (0, 0.5, 1):
        trainer.lr_scheduler.step(epoch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([3e-4, 1.5e-4, 0.0]), "the schedule is laid out for the epochs really run"
    trainer.lr_scheduler.step(0)

    trainer.network.train()
    batches = Batches(trainer)
    for _ in range(2):
        assert np.isfinite(trainer.train_step(next(batches))["loss"])
    trainer.network.eval()
    trainer.validation_step(next(batches))
    for key, value in published.items():
        assert torch.equal(trainer.network.encoder.state_dict()[key], value), key
    assert not all(torch.equal(trainer.network.decoder.state_dict()[key], value) for key, value in before.items())

    # Slim on the way, whole at the end; the whole one needs neither variable nor file.
    trainer.save_checkpoint(str(tmp_path / "checkpoint_best.pth"))
    trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    slim, whole = (
        torch.load(tmp_path / f"checkpoint_{part}.pth", weights_only=False)["network_weights"]
        for part in ("best", "final")
    )
    assert not any(key.startswith("encoder.") for key in slim)
    assert all(torch.equal(whole[f"encoder.{key}"], value) for key, value in published.items())

    resumed = make_trainer(kind, monkeypatch, name)
    resumed.load_checkpoint(str(tmp_path / "checkpoint_best.pth"))
    (tmp_path / "published.pt").unlink()
    monkeypatch.delenv(_startup.ENCODER_VARIABLE)
    manager = PlansManager(json.loads(json.dumps(trainer.plans_manager.plans)))
    network = TRAINERS[kind].build_network_architecture(
        manager, manager.get_configuration("3d_fullres"), 2, 2, enable_deep_supervision=False
    )
    network.load_state_dict(whole)
    images = next(batches)["data"]
    with torch.inference_mode():
        expected = trainer.network(images)
        torch.testing.assert_close(network.eval()(images), expected)
        torch.testing.assert_close(resumed.network.eval()(images), expected)


def test_another_encoder_is_refused_when_continuing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer("brainiac", monkeypatch, save_small_encoder("brainiac", tmp_path / "a.ckpt"))
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    other = make_trainer("brainiac", monkeypatch, save_small_encoder("brainiac", tmp_path / "b.ckpt", seed=1))
    with pytest.raises(ValueError, match=r"were trained with the encoder of sha256 .* but here is brainiac-b"):
        other.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))


def test_wrong_encoders_and_plans_are_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    brainiac = save_small_encoder("brainiac", tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"an encoder of kind 'brainiac', but this trainer is for 'bm-mae'.*bm-mae:PATH"
    ):
        make_trainer("bm-mae", monkeypatch, brainiac)
    save_encoder(VisionTransformer(embed_dim=64, depth=4, num_heads=1), tmp_path / "slices")
    with pytest.raises(ValueError, match=r"slices: an encoder of slices.*brainmvp:PATH, bm-mae:PATH or brainiac:PATH"):
        make_trainer("brainiac", monkeypatch, str(tmp_path / "slices"))
    with pytest.raises(ValueError, match="BRAINDINO_ENCODER is not set"):
        make_trainer("brainiac", monkeypatch, "")
    with pytest.raises(ValueError, match=r"encoder of kind None; expected one of brainmvp, bm-mae, brainiac"):
        build_encoder({"name": "a", "sha256": "b", "architecture": {}})


def test_label_ratios_and_short_schedules_exist_for_the_baselines():
    trainer = find_trainer("nnUNetTrainerBrainIACFrozen_r20_10epochs")
    assert trainer is not None and issubclass(trainer, nnUNetTrainerBrainIACFrozen)
    assert (trainer.label_ratio, trainer.epochs, trainer.kind) == (0.2, 10, "brainiac")
    assert trainer.build_network_architecture is nnUNetTrainerBrainIACFrozen.build_network_architecture


def write_dataset(folder: Path) -> None:
    """Three patients of 40x36x34 voxels stored in LPS, a bright ball in a brain."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 36, 34)), indexing="ij")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    for number in range(3):
        labels = (np.linalg.norm([x - 16 - 2 * number, y - 18, z - 15], axis=0) < 6).astype(np.uint8)
        brain = np.linalg.norm([x - 20, y - 18, z - 17], axis=0) < 15
        noise = np.random.default_rng(number).normal(scale=5, size=labels.shape)
        image = np.where(brain, 100 + 60.0 * labels + noise, 0)
        part = "Tr" if number < 2 else "Ts"
        for channel, data in enumerate((image, 200 * brain - image)):
            save_array(data, affine, folder / f"images{part}" / f"p{number}_{channel:04d}.nii.gz", dtype=np.float32)
        save_array(labels, affine, folder / f"labels{part}" / f"p{number}.nii.gz", dtype=np.uint8)
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON | {"numTraining": 2}))


TWO_ITERATIONS = """
from nnunet_braindino.volume_trainer import nnUNetTrainerBrainIACFrozen


class nnUNetTrainerBrainIACTwoIterations(nnUNetTrainerBrainIACFrozen):
    epochs = 1
    iterations = 2
    validation_iterations = 1
    largest_batch = 2
    mirroring = False
"""


@pytest.mark.slow
def test_nnunets_own_commands_plan_train_and_predict_with_the_encoder_gone(tmp_path: Path):
    write_dataset(tmp_path / "raw" / DATASET)
    own_trainers, encoder = tmp_path / "own", save_small_encoder("brainiac", tmp_path / "BrainIAC.ckpt")
    own_trainers.mkdir()
    (own_trainers / "two_iterations.py").write_text(TWO_ITERATIONS)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("nnUNet", "BRAINDINO"))}
    environment |= {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    environment |= {
        "nnUNet_extTrainer": str(own_trainers),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": "1",
    }

    def run(program: str, *arguments: object, **more: str) -> None:
        command = [Path(sys.executable).with_name(program), *map(str, arguments)]
        done = subprocess.run(
            command, env=environment | more, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("nnUNetv2_plan_and_preprocess", "-d", 1, "-c", "3d_fullres", "-npfp", 1, "-np", 1)
    splits = tmp_path / "preprocessed" / DATASET / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["p0"], "val": ["p1"]}]))
    name = "nnUNetTrainerBrainIACTwoIterations"
    run("nnUNetv2_train", 1, "3d_fullres", 0, "-tr", name, "-device", "cpu", BRAINDINO_ENCODER=encoder)

    model = tmp_path / "results" / DATASET / f"{name}__nnUNetPlans__3d_fullres"
    assert json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]["patch_size"] == [32, 32, 32]
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    for key, value in load_volume_encoder(encoder).network.state_dict().items():
        assert torch.equal(checkpoint["network_weights"][f"encoder.{key}"], value), key

    Path(encoder.partition(":")[2]).unlink()
    predictions = tmp_path / "elsewhere"
    images = tmp_path / "raw" / DATASET / "imagesTs"
    arguments = ["-i", images, "-o", predictions, "-d", 1, "-c", "3d_fullres", "-f", 0, "-tr", name]
    run("nnUNetv2_predict", *arguments, "-device", "cpu", "-npp", 1, "-nps", 1)
    predicted, affine = load_labels(predictions / "p2.nii.gz")
    reference, reference_affine = load_labels(tmp_path / "raw" / DATASET / "labelsTs" / "p2.nii.gz")
    assert predicted.shape == reference.shape == (40, 36, 34)
    np.testing.assert_allclose(affine, reference_affine, atol=1e-5)
