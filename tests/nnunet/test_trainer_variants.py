"""Trainers put together by name: label ratios, short schedules, and how nnU-Net finds them."""

import json
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from braindino import save_encoder
from braindino.vision_transformer import VisionTransformer
from nnunet_braindino import _startup, trainer_variants
from nnunet_braindino.trainer import nnUNetTrainerBrainDINOFrozen
from nnunet_braindino.trainer_finetune import nnUNetTrainerBrainDINOFinetune
from nnunet_braindino.trainer_variants import choose_cases, find_trainer, subject_of, trainer_names


def qualified_name(trainer: type) -> str:
    return f"{trainer.__module__}.{trainer.__qualname__}"


def test_every_kind_has_five_ratios_and_two_short_schedules_and_each_is_a_class_of_its_own():
    names = trainer_names()
    assert len(set(names)) == len(names) == 8 * 6 * 3
    for kind in ("Frozen", "FrozenFixedFusion", "Finetune", "Linear", "Context"):
        for suffix in ("", "_r10", "_r20", "_r40", "_r60", "_r80", "_10epochs", "_r40_demo"):
            assert f"nnUNetTrainerBrainDINO{kind}{suffix}" in names
    assert {f"nnUNetTrainer{kind}Frozen_r10" for kind in ("BrainMVP", "BMMAE", "BrainIAC")} < set(names)
    trainers = [find_trainer(name) for name in names]
    assert len(set(trainers)) == len(names)
    for name, trainer in zip(names, trainers, strict=True):
        assert trainer.__name__ == name and issubclass(trainer, nnUNetTrainer)
        assert find_trainer(name) is trainer
    assert find_trainer("nnUNetTrainerBrainDINOFrozen_r30") is None
    assert find_trainer("nnUNetTrainerBrainDINOFrozen_10epochs_r10") is None
    with pytest.raises(AttributeError, match="no attribute 'nnUNetTrainerBrainDINOFrozen_r30'"):
        _ = trainer_variants.nnUNetTrainerBrainDINOFrozen_r30


def test_a_variant_has_the_parts_of_its_name():
    trainer = find_trainer("nnUNetTrainerBrainDINOFinetune_r20_10epochs")
    assert issubclass(trainer, nnUNetTrainerBrainDINOFinetune)
    assert (trainer.label_ratio, trainer.epochs, trainer.iterations, trainer.mirroring) == (0.2, 10, 25, False)
    assert trainer.trains_encoder
    assert find_trainer("nnUNetTrainerBrainDINOFrozen_r20").epochs == 100


def test_nnunet_finds_variants_and_they_can_be_sent_to_other_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(_startup.TRAINER_VARIABLE, _startup.TRAINER_DIR)
    found = recursive_find_trainer_class_by_name("nnUNetTrainerBrainDINOFrozen_r60")
    assert found is find_trainer("nnUNetTrainerBrainDINOFrozen_r60")
    assert pickle.loads(pickle.dumps(found)) is found
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        name = "nnunet_braindino.trainer_variants.nnUNetTrainerBrainDINOFrozen_r60"
        assert pool.apply(qualified_name, (found,)) == name
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer nnUNetTrainerBrainDINOFrozen_r65"):
        recursive_find_trainer_class_by_name("nnUNetTrainerBrainDINOFrozen_r65")


@pytest.mark.parametrize(
    ("num_cases", "expected"),
    # The paper's four cohorts (sec. 4.3.1) and one where truncation would lose a case: 0.6 x 11 = 6.6.
    [
        (1000, [100, 200, 400, 600, 800]),
        (800, [80, 160, 320, 480, 640]),
        (190, [19, 38, 76, 114, 152]),
        (1080, [108, 216, 432, 648, 864]),
        (11, [1, 2, 4, 7, 9]),
    ],
)
def test_ratios_are_nested_rounded_and_the_same_every_time(num_cases: int, expected: list[int]):
    cases = [f"BraTS2021_{i:05d}" for i in range(num_cases)]
    subsets = [choose_cases(cases, ratio) for ratio in trainer_variants.LABEL_RATIOS.values()]
    assert [len(subset) for subset in subsets] == expected
    for smaller, larger in zip(subsets, [*subsets[1:], cases], strict=True):
        assert set(smaller) < set(larger)
    assert choose_cases(cases[::-1], 0.2) == subsets[1][::-1]
    assert subsets[0] != cases[: len(subsets[0])]


def test_time_points_of_a_subject_stay_together():
    assert subject_of("sub-01_ses-2") == "sub-01"
    assert subject_of("sub-01") == "sub-01"
    assert subject_of("BraTS-GLI-00005-100") == "BraTS-GLI-00005"
    assert subject_of("BraTS2021_00005") == "BraTS2021_00005"
    assert subject_of("OAS1_0005_MR1") == "OAS1_0005_MR1"
    cases = [f"BraTS-GLI-{i:05d}-{j:03d}" for i in range(20) for j in range(1 + i % 3)]
    for ratio in trainer_variants.LABEL_RATIOS.values():
        chosen = set(choose_cases(cases, ratio))
        subjects = {subject_of(case) for case in chosen}
        assert len(subjects) == 20 * ratio
        assert chosen == {case for case in cases if subject_of(case) in subjects}


def test_a_ratio_leaves_validation_cases_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    save_encoder(VisionTransformer(embed_dim=64, depth=4, num_heads=1), tmp_path / "encoder")
    monkeypatch.setenv(_startup.ENCODER_VARIABLE, str(tmp_path / "encoder"))
    folder = tmp_path / "preprocessed" / "Dataset001_Test"
    (folder / "nnUNetPlans_2d").mkdir(parents=True)
    cases = [f"case_{i:02d}" for i in range(30)]
    for case in cases:
        (folder / "nnUNetPlans_2d" / f"{case}.b2nd").touch()
    (folder / "splits_final.json").write_text(json.dumps([{"train": cases[:20], "val": cases[20:]}]))
    dataset_json = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}

    def split(name: str) -> tuple[list[str], list[str]]:
        configuration = {
            "data_identifier": "nnUNetPlans_2d", "patch_size": [64, 64], "batch_size": 2, "architecture": {},
        }  # fmt: skip
        plans = {"dataset_name": "Dataset001_Test", "plans_name": "nnUNetPlans", "continue_training": False,
                 "label_manager": "LabelManager", "configurations": {"2d": configuration}}  # fmt: skip
        trainer = find_trainer(name)(plans, "2d", 0, dataset_json, torch.device("cpu"))
        assert Path(trainer.output_folder).parent.name == f"{name}__nnUNetPlans__2d"
        return trainer.do_split()

    everything = split("nnUNetTrainerBrainDINOFrozen")
    few = split("nnUNetTrainerBrainDINOFrozen_r20")
    more = split("nnUNetTrainerBrainDINOLinear_r40_10epochs")
    assert everything == (cases[:20], cases[20:])
    assert (len(few[0]), len(more[0])) == (4, 8)
    assert set(few[0]) < set(more[0]) < set(everything[0])
    assert few[1] == more[1] == everything[1]
    assert nnUNetTrainerBrainDINOFrozen.__name__ in trainer_names()
