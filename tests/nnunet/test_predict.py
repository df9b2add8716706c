"""Batched prediction of whole volumes: the labels of nnU-Net's own predictor, computed with less."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from braindino import cli
from braindino.vision_transformer import VisionTransformer
from braindino.volume import load_labels, save_array
from nnunet_braindino import _startup
from nnunet_braindino.predict import Box, SlicePredictor
from nnunet_braindino.predictions import read_prediction_source
from nnunet_braindino.trainer_variants import FULL_TRAINERS

FROZEN, CONTEXT = "nnUNetTrainerBrainDINOFrozen", "nnUNetTrainerBrainDINOContext"
REGIONS = {"background": 0, "whole tumor": [1, 2], "tumor core": [2]}
CLASSES = {"background": 0, "grey": 1, "white": 2}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_startup.TRAINER_VARIABLE, _startup.TRAINER_DIR)
    monkeypatch.delenv(_startup.ENCODER_VARIABLE, raising=False)


def write_model(
    folder: Path, *, trainer: str = FROZEN, labels: dict = REGIONS, patch: tuple[int, ...] = (64, 48)
) -> Path:
    """A model folder as a training leaves it, with random weights."""
    torch.manual_seed(0)
    encoder = VisionTransformer(embed_dim=48, depth=4, num_heads=1, layer_scale_init=1.0)
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": list(patch),
        "batch_size": 2,
        "spacing": [1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [True, True],
        "batch_dice": True,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": {"network_class_name": "unused", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    plans = {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}, "1": {}},
        "configurations": {"2d": configuration},
        "braindino": {"name": "small", "sha256": "ab" * 32, "architecture": encoder.architecture},
    }
    dataset = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": labels, "file_ending": ".nii.gz"}
    if labels is REGIONS:
        dataset["regions_class_order"] = [1, 2]
    manager = PlansManager(plans)
    num_heads = manager.get_label_manager(dataset).num_segmentation_heads
    network = FULL_TRAINERS[trainer].build_network_architecture(
        manager, manager.get_configuration("2d"), 2, num_heads, enable_deep_supervision=False
    )
    torch.nn.init.normal_(network.decoder.to_logits.weight, std=3.0)
    if trainer == CONTEXT:
        torch.nn.init.normal_(network.context.widen.weight)
    folder = folder / f"{trainer}__nnUNetPlans__2d"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    axes = (0, 1) if len(patch) == 2 else (1, 2)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": trainer,
        "init_args": {"configuration": "2d"},
        "inference_allowed_mirroring_axes": axes,
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def predictor_of(kind: type, folder: Path, *, mirroring: bool = False) -> nnUNetPredictor:
    predictor = kind(device=torch.device("cpu"), use_mirroring=mirroring, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    return predictor


def image_of(shape: tuple[int, int, int], *, empty: tuple[int, ...] = ()) -> torch.Tensor:
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    image[:, list(empty)] = 0
    return image


@pytest.mark.parametrize("mirroring", [False, True])
@pytest.mark.parametrize("labels", [REGIONS, CLASSES], ids=["regions", "classes"])
@pytest.mark.parametrize(
    "size",
    [(37, 41), (64, 48), (80, 50), (100, 131), (20, 70)],
    ids=["padded", "exact", "two windows", "many windows", "padded rows, several windows of columns"],
)
def test_logits_and_labels_are_nnunets_own(tmp_path: Path, size, labels, mirroring: bool):
    folder = write_model(tmp_path, labels=labels)
    image = image_of((7, *size), empty=(0, 3, 6))
    expected = predictor_of(nnUNetPredictor, folder, mirroring=mirroring).predict_logits_from_preprocessed_data(image)
    ours = predictor_of(SlicePredictor, folder, mirroring=mirroring)
    ours.batch_size = 3
    found = ours.predict_logits_from_preprocessed_data(image)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    # Half precision holds 11 bits; sums of products may differ in their last bit, and rounding then by one.
    torch.testing.assert_close(found, expected, rtol=2**-9, atol=2e-3)
    segment = ours.label_manager.convert_logits_to_segmentation
    assert torch.equal(segment(found), segment(expected))
    assert len(segment(found).unique()) == 3


def test_only_what_is_needed_goes_through_the_network(tmp_path: Path):
    """Empty slices once, in batches; the decoder sees the patches that the image touches."""
    predictor = predictor_of(SlicePredictor, write_model(tmp_path))
    predictor.batch_size = 4
    network, encoded, decoded = predictor.network, [], []
    encode, decode = network.encode, network.decode
    network.encode = lambda images: encoded.append(len(images)) or encode(images)
    network.decode = lambda features: decoded.append(tuple(features.shape[1:3])) or decode(features)
    predictor.predict_sliding_window_return_logits(image_of((9, 20, 10), empty=(0, 1, 7, 8)))
    assert encoded == [4, 2]  # five slices and one of zeros
    # 20 rows in the middle of 64 (22 to 42) touch two rows of patches, 10 columns of 48 (19 to 29) one.
    assert set(decoded) == {(2, 1)}


@pytest.mark.parametrize("mirroring", [False, True])
def test_a_network_with_context_sees_the_whole_volume_and_encodes_each_slice_once(tmp_path: Path, mirroring: bool):
    predictor = predictor_of(
        SlicePredictor, write_model(tmp_path, trainer=CONTEXT, patch=(5, 64, 48)), mirroring=mirroring
    )
    predictor.batch_size = 3
    image = image_of((8, 40, 30), empty=(0, 4))
    network, encoded = predictor.network, []
    encode = network.encode
    network.encode = lambda images: encoded.append(len(images)) or encode(images)
    found = predictor.predict_sliding_window_return_logits(image)
    assert sum(encoded) == 7 * (4 if mirroring else 1)

    padded = torch.zeros(1, 2, 8, 64, 48)
    padded[..., 12:52, 9:39] = image
    with torch.inference_mode():
        whole = network(padded)
        if mirroring:
            for dims in ((3,), (4,), (3, 4)):
                whole = whole + network(padded.flip(dims)).flip(dims)
            whole = whole / 4
    torch.testing.assert_close(found.float(), whole[0, :, :, 12:52, 9:39], rtol=2**-9, atol=2e-3)


def test_stock_prediction_of_a_network_with_context_slides_stacks(tmp_path: Path):
    predictor = predictor_of(nnUNetPredictor, write_model(tmp_path, trainer=CONTEXT, patch=(5, 64, 48)), mirroring=True)
    found = predictor.predict_logits_from_preprocessed_data(image_of((8, 64, 48)))
    assert found.shape == (2, 8, 64, 48) and torch.isfinite(found).all()


def test_boxes_mirror_grow_and_nest():
    box, grid = Box(slice(1, 3), slice(0, 2)), (4, 5)
    assert box.mirrored((0, 1), grid) == Box(slice(1, 3), slice(3, 5))
    assert box.mirrored((), grid) == box
    wide = box.grown(1, grid)
    assert wide == Box(slice(0, 4), slice(0, 3))
    assert box.within(wide) == Box(slice(1, 3), slice(0, 2))
    assert box.pixels() == (slice(16, 48), slice(0, 32))


def write_cases(folder: Path) -> Path:
    """Two anisotropic cases whose brain does not fill the image, with empty slices inside the crop."""
    for number in range(2):
        rng = np.random.default_rng(number)
        data = np.zeros((50, 60, 9))
        data[8:30, 10:45, 1:8] = rng.normal(100, 20, size=(22, 35, 7))
        data[..., 4] = 0
        for channel in range(2):
            path = folder / f"case{number}_{channel:04d}.nii.gz"
            save_array(data * (1 + channel), np.diag([-1.3, -1.3, 3.0, 1.0]), path, dtype=np.float32)
    return folder


def test_the_command_writes_the_files_that_nnunet_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, images = write_model(tmp_path), write_cases(tmp_path / "images")
    (tmp_path / "stock").mkdir()
    predictor_of(nnUNetPredictor, model).predict_from_files_sequential(str(images), str(tmp_path / "stock"))
    assert cli.main(["segment", str(model), str(images), str(tmp_path / "ours"), "--device", "cpu"]) == 0
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert names == sorted([*(path.name for path in (tmp_path / "stock").iterdir()), "prediction_source.json"])
    assert read_prediction_source(tmp_path / "ours") == "checkpoint_final.pth"
    for number in range(2):
        found, affine = load_labels(tmp_path / "ours" / f"case{number}.nii.gz")
        expected, expected_affine = load_labels(tmp_path / "stock" / f"case{number}.nii.gz")
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(affine, expected_affine)
        assert len(np.unique(found)) == 3

    capsys.readouterr()
    assert cli.main(["segment", str(tmp_path), str(images), str(tmp_path / "x"), "--device", "cpu"]) == 1
    assert "found checkpoint_final.pth in folds [], asked for any" in capsys.readouterr().err
    assert cli.main(["segment", str(model), str(images), str(tmp_path / "x"), "--folds", "0", "3"]) == 1
    assert "in folds ['0'], asked for ['0', '3']" in capsys.readouterr().err
