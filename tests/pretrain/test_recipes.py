"""The recipes, setting by setting; test_config.py holds those that the paper states."""

import dataclasses
from pathlib import Path

from braindino.pretrain.config import PretrainConfig, changed_settings, config_to_dict
from braindino.pretrain.recipes import RECIPES, STAGE1, STAGE2
from braindino.pretrain.schedules import effective_lr


def with_paths(config: PretrainConfig) -> PretrainConfig:
    return dataclasses.replace(config, store=Path("S"), out=Path("R"))


def test_stage_1_has_these_values_where_the_paper_is_silent() -> None:
    crops, loss, optimizer = STAGE1.crops, STAGE1.loss, STAGE1.optimizer
    # DINOv3's ViT-L ImageNet setting (the file that MedDINOv3's author names), with epochs of 1,000 iterations.
    assert (loss.teacher_temperature, loss.teacher_temperature_iterations) == ((0.04, 0.07), 30_000)
    assert (loss.student_temperature, loss.sinkhorn_iterations) == (0.1, 3)
    assert (optimizer.min_lr, optimizer.last_layer_freeze_iterations) == (1e-6, 1_000)
    assert (optimizer.betas, optimizer.patch_embed_lr_multiplier) == ((0.9, 0.999), 0.2)
    assert optimizer.lr_scaling == "dinov3"
    assert STAGE1.model.layer_scale_init == 1e-5
    # The loaders of MedDINOv3 and BrainDINO.
    assert STAGE1.model.drop_path == 0.2
    assert (crops.aspect, crops.blur_sigma, crops.canvas_size) == ((3 / 4, 4 / 3), (0.1, 2.0), 256)


def test_stage_2_differs_from_stage_1_in_these_settings_only() -> None:
    changes = changed_settings(config_to_dict(with_paths(STAGE1)), config_to_dict(with_paths(STAGE2)))
    assert changes == [
        "iterations: 500000 -> 10000",
        "crops.global_sizes: [256] -> [512, 768, 768, 768, 768]",
        "crops.local_sizes: [112] -> [112, 112, 168, 224, 336]",
        "crops.pair_ratios: [1.0] -> [0.3, 0.3, 0.3, 0.05, 0.05]",
        "crops.canvas_size: 256 -> 1024",
        "loss.teacher_temperature: [0.04, 0.07] -> [0.07, 0.07]",
        "loss.teacher_temperature_iterations: 30000 -> 0",
        "optimizer.base_lr: 0.0001 -> 1.25e-05",
        "optimizer.warmup_iterations: 10000 -> 1000",
        "optimizer.last_layer_freeze_iterations: 1000 -> 0",
    ]
    assert STAGE2.batch_size == 56


def test_the_effective_rates_at_the_papers_four_gpus() -> None:
    rates = [
        effective_lr(config.optimizer.base_lr, 4 * config.batch_size, scaling=config.optimizer.lr_scaling)
        for config in (STAGE1, STAGE2)
    ]
    assert rates[0] == 4e-4
    assert round(rates[1], 8) == 2.339e-5


def test_every_recipe_warms_up_before_it_ends() -> None:
    for _, config in RECIPES.values():
        assert config.optimizer.warmup_iterations < config.iterations
        assert config.optimizer.min_lr <= config.optimizer.base_lr
