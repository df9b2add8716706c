"""The trainers' contract with stock nnU-Net: plans, encoder, optimiser, and the whole way by its console scripts."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from braindino import load_encoder, save_encoder
from braindino.vision_transformer import VisionTransformer
from braindino.volume import load_labels, save_array
from nnunet_braindino import _startup, trainer_plans
from nnunet_braindino.network import count_parameters
from nnunet_braindino.predictions import read_prediction_source
from nnunet_braindino.trainer import (
    nnUNetTrainerBrainDINOFrozen,
    nnUNetTrainerBrainDINOFrozenFixedFusion,
    nnUNetTrainerBrainDINOLinear,
)
from nnunet_braindino.trainer_finetune import encoder_rate, nnUNetTrainerBrainDINOFinetune

DATASET_JSON = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "whole tumor": [1, 2], "tumor core": [2]},
    "regions_class_order": [1, 2],
    "file_ending": ".nii.gz",
}


def make_plans(*, patch_size: tuple[int, ...] = (192, 160), batch_size: int = 105) -> dict:
    """As the planner writes them, with what the trainer reads."""
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": list(patch_size),
        "batch_size": batch_size,
        "spacing": [1.0] * len(patch_size),
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [True, True],
        "batch_dice": True,
        "architecture": {"network_class_name": "unused", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    return {
        "dataset_name": "Dataset999_Test",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "configurations": {"2d": configuration},
        "continue_training": False,
    }


def save_small_encoder(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_encoder(VisionTransformer(embed_dim=64, depth=4, num_heads=1, layer_scale_init=1.0), folder)
    return folder


@pytest.fixture
def small_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nnUNetTrainerBrainDINOFrozen:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv(_startup.ENCODER_VARIABLE, str(save_small_encoder(tmp_path / "encoder")))
    monkeypatch.setattr(f"{nnUNetTrainer.__module__}.infer_dataset_class", lambda folder: None)
    return nnUNetTrainerBrainDINOFrozen(make_plans(), "2d", 0, DATASET_JSON, torch.device("cpu"))


def test_patches_become_256_and_the_batch_keeps_the_planned_number_of_pixels():
    plans = make_plans()  # what the planner makes of BraTS
    trainer_plans.fit_plans(plans, "2d")
    assert plans["configurations"]["2d"]["patch_size"] == [256, 256]
    assert plans["configurations"]["2d"]["batch_size"] == 49
    small = make_plans(patch_size=(64, 64), batch_size=4)
    trainer_plans.fit_plans(small, "2d")
    assert small["configurations"]["2d"]["batch_size"] == 2
    limited = make_plans()
    trainer_plans.fit_plans(limited, "2d", largest_batch=4)
    assert limited["configurations"]["2d"]["batch_size"] == 4
    with pytest.raises(ValueError, match=r"\(250, 256\) of the trainer is no multiple of 16.*take e.g. \(256, 256\)"):
        trainer_plans.fit_plans(make_plans(), "2d", patch_size=(250, 256))
    json.dumps(plans)  # nnU-Net writes them into the model folder


def test_a_3d_configuration_is_refused_with_the_command_that_works():
    with pytest.raises(ValueError, match=r"'2d' has 3-dimensional patches.*nnUNetv2_train DATASET 2d FOLD"):
        trainer_plans.fit_plans(make_plans(patch_size=(128, 128, 128)), "2d")


def test_slices_that_are_not_axial_and_unmasked_normalisation_are_warned_about():
    plans = make_plans()
    assert trainer_plans.plan_warnings(plans, "2d") == []
    plans["transpose_forward"] = [2, 0, 1]
    plans["configurations"]["2d"]["use_mask_for_norm"] = [True, False]
    axis, background = trainer_plans.plan_warnings(plans, "2d")
    assert "slices are not axial" in axis
    assert "background is then not 0" in background


def test_a_stack_of_slices_counts_as_so_many_patches():
    plans = make_plans()
    trainer_plans.fit_plans(plans, "2d", num_slices=5)
    assert plans["configurations"]["2d"]["patch_size"] == [5, 256, 256]
    assert plans["configurations"]["2d"]["batch_size"] == 9
    trainer_plans.fit_plans(plans := make_plans(), "2d", num_slices=5, largest_batch=8)
    assert plans["configurations"]["2d"]["batch_size"] == 2


@pytest.mark.parametrize(
    ("direction", "warning"),
    [
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), None),
        # 20 degrees of tilt are still axial.
        ((1, 0, 0, 0, 0.94, -0.34, 0, 0.34, 0.94), None),
        # RAS+: ITK sees both axes of the plane run backwards.
        ((-1, 0, 0, 0, -1, 0, 0, 0, 1), r"turned or mirrored .*columns X-, rows Y-; expected columns X\+, rows Y\+"),
        # Columns to the front, rows from above, slices from the right: as scanners store sagittal series.
        ((0, 0, 1, 1, 0, 0, 0, -1, 0), "slices are sagittal, the encoder was trained on axial ones"),
        ((1, 0, 0, 0, 0, 1, 0, -1, 0), "slices are coronal"),
    ],
)
def test_slices_stored_in_another_order_than_the_encoders_are_warned_about(direction, warning):
    found = trainer_plans.orientation_warnings({"sitk_stuff": {"direction": direction}}, [0, 1, 2])
    if warning is None:
        assert found == []
    else:
        assert len(found) == 1 and re.search(warning, found[0]) and "Store the images in LPS" in found[0]
    assert trainer_plans.orientation_warnings({}, [0, 1, 2]) == []


def test_without_an_encoder_the_error_says_how_to_set_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(_startup.ENCODER_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"BRAINDINO_ENCODER is not set.*export BRAINDINO_ENCODER=RUN/encoder"):
        nnUNetTrainerBrainDINOFrozen(make_plans(), "2d", 0, DATASET_JSON, torch.device("cpu"))
    monkeypatch.setenv(_startup.ENCODER_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no encoder at .*nowhere"):
        nnUNetTrainerBrainDINOFrozen(make_plans(), "2d", 0, DATASET_JSON, torch.device("cpu"))


def test_the_constructor_and_the_builder_have_the_signatures_that_nnunet_asks_for():
    ours, theirs = (inspect.signature(each.__init__) for each in (nnUNetTrainerBrainDINOFrozen, nnUNetTrainer))
    assert list(ours.parameters) == list(theirs.parameters)
    build = nnUNetTrainerBrainDINOFrozen.build_network_architecture
    assert list(inspect.signature(build).parameters) == list(
        inspect.signature(nnUNetTrainer.build_network_architecture).parameters
    )


def test_plans_alone_build_the_network_with_neither_variable_nor_encoder_file(
    small_trainer: nnUNetTrainerBrainDINOFrozen, monkeypatch: pytest.MonkeyPatch
):
    plans = json.loads(json.dumps(small_trainer.plans_manager.plans))
    (Path(os.environ[_startup.ENCODER_VARIABLE]) / "encoder.safetensors").unlink()
    monkeypatch.delenv(_startup.ENCODER_VARIABLE)
    manager = PlansManager(plans)
    network = nnUNetTrainerBrainDINOFrozen.build_network_architecture(
        manager, manager.get_configuration("2d"), 2, 2, enable_deep_supervision=False
    )
    assert network(torch.zeros(1, 2, 32, 48)).shape == (1, 2, 32, 48)
    assert plans["braindino"]["name"] and len(plans["braindino"]["sha256"]) == 64
    with pytest.raises(ValueError, match="the plans hold no 'braindino' entry"):
        nnUNetTrainerBrainDINOFrozen.build_network_architecture(
            PlansManager(make_plans()), manager.get_configuration("2d"), 2, 2
        )


def test_initialize_loads_the_frozen_weights_and_prints_what_is_trained(
    small_trainer: nnUNetTrainerBrainDINOFrozen, capsys: pytest.CaptureFixture[str]
):
    small_trainer.initialize()
    encoder = load_encoder(os.environ[_startup.ENCODER_VARIABLE])
    for name, value in encoder.state_dict().items():
        assert torch.equal(small_trainer.network.encoder.state_dict()[name], value), name
    printed = capsys.readouterr().out
    assert str(count_parameters(small_trainer.network)) in printed
    assert encoder.sha256 in printed
    assert "patches [256, 256], batch size 49" in printed


def test_networks_are_not_compiled_on_gpus_where_nnunet_would(
    small_trainer: nnUNetTrainerBrainDINOFrozen, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("nnUNet_compile", raising=False)
    small_trainer.device = torch.device("cuda")
    assert nnUNetTrainer._do_i_compile(small_trainer)
    assert not small_trainer._do_i_compile()


def test_the_optimiser_trains_all_but_the_encoder_and_its_rate_falls_linearly_to_zero(
    small_trainer: nnUNetTrainerBrainDINOFrozen,
):
    small_trainer.initialize()
    optimizer, schedule = small_trainer.optimizer, small_trainer.lr_scheduler
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for name, p in small_trainer.network.named_parameters() if not name.startswith("encoder.")
    }
    assert (optimizer.defaults["weight_decay"], optimizer.defaults["betas"]) == (5e-2, (0.9, 0.98))
    rates = []
    for epoch in (0, 25, 50, 99):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([3e-4, 2.25e-4, 1.5e-4, 3e-6])


def test_fine_tuning_has_slower_rates_for_earlier_layers(small_trainer: nnUNetTrainerBrainDINOFrozen):
    trainer = nnUNetTrainerBrainDINOFinetune(make_plans(), "2d", 0, DATASET_JSON, torch.device("cpu"))
    trainer.initialize()
    trainer.lr_scheduler.step(25)
    names = {id(parameter): name for name, parameter in trainer.network.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates["decoder.to_logits.weight"] == rates["fusion.weight"] == pytest.approx(0.75 * 3e-4)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.75 * 3e-4), "the rate that nnU-Net logs"
    top, below = rates["encoder.blocks.3.attn.qkv.weight"], rates["encoder.blocks.2.mlp.fc1.bias"]
    assert rates["encoder.norm.weight"] == top == pytest.approx(0.75 * 3e-5)
    assert below == pytest.approx(0.9 * top)
    assert rates["encoder.patch_embed.proj.weight"] == pytest.approx(0.9**4 * top)
    assert set(rates) == {name for name, _ in trainer.network.named_parameters()} - {"encoder.mask_token"}
    assert encoder_rate("blocks.11.ls1.gamma", 12) == 0.1
    assert encoder_rate("cls_token", 12) == pytest.approx(0.1 * 0.9**12)


def test_the_linear_trainer_trains_fusion_and_one_layer(small_trainer: nnUNetTrainerBrainDINOFrozen):
    trainer = nnUNetTrainerBrainDINOLinear(make_plans(), "2d", 0, DATASET_JSON, torch.device("cpu"))
    trainer.initialize()
    assert count_parameters(trainer.network).trainable == 2 * 3 + 64 * 2 + 2


def test_the_papers_case_prints_the_papers_numbers(
    tmp_path: Path, small_trainer: nnUNetTrainerBrainDINOFrozen, capsys: pytest.CaptureFixture[str]
):
    four = {"channel_names": {str(i): "T1" for i in range(4)}, "file_ending": ".nii.gz"}
    regions = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": [3]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_startup.ENCODER_VARIABLE, "untrained:vit_base")
        dataset = {**four, "labels": regions, "regions_class_order": [2, 1, 3]}
        trainer = nnUNetTrainerBrainDINOFrozen(make_plans(), "2d", 0, dataset, torch.device("cpu"))
        trainer.initialize()
    printed = capsys.readouterr().out
    assert "BrainDINO: 25,076,751 of 110,718,735 parameters trained (22.65 %)" in printed
    assert re.search(r"BrainDINO: frozen encoder .*vit_base.*, sha256 [0-9a-f]{64}", printed)


def test_the_fusion_is_fixed_after_a_tenth_of_the_epochs_also_when_continued(
    small_trainer: nnUNetTrainerBrainDINOFrozen, capsys: pytest.CaptureFixture[str]
):
    def start_epoch(epoch: int) -> nnUNetTrainerBrainDINOFrozenFixedFusion:
        trainer = nnUNetTrainerBrainDINOFrozenFixedFusion(make_plans(), "2d", 0, DATASET_JSON, torch.device("cpu"))
        trainer.initialize()
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        return trainer

    trainer = start_epoch(9)
    assert trainer.fusion_epochs == 10
    assert trainer.network.fusion.weight.requires_grad
    trainer.current_epoch = 10
    trainer.on_train_epoch_start()
    assert not trainer.network.fusion.weight.requires_grad
    assert not trainer.network.encode(torch.zeros(1, 2, 32, 32)).requires_grad
    assert "fusion fixed after 10 epochs" in capsys.readouterr().out
    before = trainer.network.fusion.weight.clone()
    trainer.network(torch.randn(1, 2, 32, 32)).square().mean().backward()
    trainer.optimizer.step()
    assert torch.equal(trainer.network.fusion.weight, before), "no weight decay either"
    assert not start_epoch(50).network.fusion.weight.requires_grad


def test_the_start_up_hook_appends_our_folder_once_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(_startup.OPT_OUT_VARIABLE, raising=False)
    monkeypatch.setenv(_startup.TRAINER_VARIABLE, "/my/trainers")
    for _ in range(2):
        _startup.register()
        assert os.environ[_startup.TRAINER_VARIABLE] == os.pathsep.join(["/my/trainers", _startup.TRAINER_DIR])
    monkeypatch.delenv(_startup.TRAINER_VARIABLE)
    monkeypatch.setenv(_startup.OPT_OUT_VARIABLE, "1")
    _startup.register()
    assert _startup.TRAINER_VARIABLE not in os.environ
    assert [path.name for path in Path(_startup.TRAINER_DIR).glob("*.py")] == ["braindino_trainers.py"]


def test_the_installed_package_makes_a_fresh_python_know_the_trainer_folder(tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("nnUNet", "BRAINDINO"))}
    code = "import os, sys; print(os.environ.get('nnUNet_extTrainer'), 'torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [_startup.TRAINER_DIR, "False"], "install the package again: pip install -e ."


TWO_ITERATIONS = """
from nnunet_braindino.trainer_variants import nnUNetTrainerBrainDINOContext_demo, nnUNetTrainerBrainDINOFrozen_demo


class nnUNetTrainerTwoIterations(nnUNetTrainerBrainDINOFrozen_demo):
    epochs = 1
    iterations = 2
    validation_iterations = 1
    patch_size = (256, 256)
    largest_batch = 2


class nnUNetTrainerTwoStacks(nnUNetTrainerBrainDINOContext_demo):
    epochs = 1
    iterations = 2
    validation_iterations = 1
    patch_size = (64, 64)
"""


def write_scans(folder: Path) -> None:
    """Three patients of 40x36x8 voxels, a bright ball with a brighter core, stored in RAS+ with thick slices."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 36, 8)), indexing="ij")
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    for number in range(3):
        radius = np.hypot(np.hypot(x - 16 - 4 * number, y - 18), 3 * (z - 4))
        labels = (radius < 9).astype(np.uint8) + (radius < 5)
        brain = np.hypot(x - 20, y - 18) < 15
        noise = np.random.default_rng(number).normal(scale=5, size=labels.shape)
        image = np.where(brain, 100 + 60.0 * labels + noise, 0)
        save_array(image, affine, folder / f"p{number}_t1.nii.gz", dtype=np.float32)
        save_array(image[::-1], affine, folder / f"p{number}_t2.nii.gz", dtype=np.float32)
        save_array(labels, affine, folder / f"p{number}_seg.nii.gz", dtype=np.uint8)


def test_nnunet_plans_trains_and_predicts_from_elsewhere_with_the_encoder_gone(tmp_path: Path):
    """Stock console scripts: plan and preprocess, train, predict; the last with neither variable nor encoder file."""
    scans, own_trainers, encoder = tmp_path / "scans", tmp_path / "own", save_small_encoder(tmp_path / "encoder")
    write_scans(scans)
    own_trainers.mkdir()
    (own_trainers / "two_iterations.py").write_text(TWO_ITERATIONS)
    (tmp_path / "test.txt").write_text("scans/p2\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("nnUNet", "BRAINDINO"))}
    environment |= {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    environment |= {
        "nnUNet_extTrainer": str(own_trainers),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": "1",
    }
    logs = []

    def run(*command: object, **more: str) -> None:
        program = Path(sys.executable).with_name(str(command[0]))
        done = subprocess.run(
            [program, *map(str, command[1:])],
            env=environment | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        logs.append(done.stdout + done.stderr)
        assert done.returncode == 0, logs[-1]

    images = [f"{scans}/*_t1.nii.gz", f"{scans}/*_t2.nii.gz"]
    run(
        *("braindino", "nnunet", "convert-pairs", "--images", *images, "--labels", f"{scans}/*_seg.nii.gz"),
        *("--channels", "T1", "T2", "--label-names", "rim", "core", "--test-subjects", tmp_path / "test.txt"),
        *("--dataset-id", 9, "--name", "Balls"),
    )
    run("nnUNetv2_plan_and_preprocess", "-d", 9, "-c", "2d", "-npfp", 1, "-np", 1)
    name = "nnUNetTrainerTwoIterations"
    run("nnUNetv2_train", 9, "2d", 0, "-tr", name, "-device", "cpu", BRAINDINO_ENCODER=str(encoder))

    model = tmp_path / "results" / "Dataset009_Balls" / f"{name}__nnUNetPlans__2d"
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    for key, value in load_encoder(encoder).state_dict().items():
        assert torch.equal(checkpoint["network_weights"][f"encoder.{key}"], value), key
    assert not torch.equal(checkpoint["network_weights"]["fusion.weight"], torch.full((3, 2, 1, 1), 0.5))
    assert json.loads((model / "plans.json").read_text())["configurations"]["2d"]["patch_size"] == [256, 256]

    encoder.rename(tmp_path / "gone")
    images_dir, labels_dir = (tmp_path / "raw" / "Dataset009_Balls" / part for part in ("imagesTs", "labelsTs"))
    predictions = tmp_path / "elsewhere" / "predictions"
    arguments = ["-i", images_dir, "-o", predictions, "-d", 9, "-c", "2d", "-f", 0, "-tr", name]
    run("nnUNetv2_predict", *arguments, "-device", "cpu", "-npp", 1, "-nps", 1)
    predicted, affine = load_labels(predictions / "p2.nii.gz")
    reference, reference_affine = load_labels(labels_dir / "p2.nii.gz")
    assert predicted.shape == reference.shape == (40, 36, 8)
    np.testing.assert_allclose(affine, reference_affine, atol=1e-5)
    assert set(np.unique(predicted)) <= {0, 1, 2}

    # The trainer that looks at neighbouring slices, on the same preprocessed slices.
    (tmp_path / "gone").rename(encoder)
    name = "nnUNetTrainerTwoStacks"
    run("nnUNetv2_train", 9, "2d", 0, "-tr", name, "-device", "cpu", BRAINDINO_ENCODER=str(encoder))
    assert "patches [5, 64, 64], batch size 2" in logs[-1]
    model = model.with_name(f"{name}__nnUNetPlans__2d")
    run("braindino", "segment", model, images_dir, tmp_path / "context", "--device", "cpu")
    assert load_labels(tmp_path / "context" / "p2.nii.gz")[0].shape == (40, 36, 8)
    assert read_prediction_source(tmp_path / "context") == "checkpoint_final.pth"
    ours = [line for log in logs for line in log.splitlines() if "Warning" in line and "braindino/" in line]
    assert ours == []
