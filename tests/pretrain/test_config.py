"""The recipes against the paper, and how settings are read, written and refused."""

import dataclasses
from pathlib import Path

import pytest

from braindino.pretrain.config import (
    CropConfig,
    OptimizerConfig,
    PretrainConfig,
    changed_settings,
    config_to_dict,
    dump_config,
    overlay,
)
from braindino.pretrain.recipes import DEBUG, STAGE1, STAGE2
from braindino.pretrain.train import parse_arguments
from braindino.records import read_yaml


def test_stage_1_has_the_numbers_of_the_paper() -> None:
    model, crops, masks, loss, optimizer = STAGE1.model, STAGE1.crops, STAGE1.masks, STAGE1.loss, STAGE1.optimizer
    assert (STAGE1.iterations, STAGE1.batch_size) == (500_000, 256)
    assert (model.architecture, model.num_storage_tokens) == ("vit_base", 4)
    assert (model.num_prototypes, model.head_hidden_dim, model.head_bottleneck_dim) == (65_536, 2_048, 256)
    assert (crops.sizes(0), crops.num_local) == ((256, 112), 8)
    assert (crops.global_scale, crops.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert crops.flip_probability == 0.5 and crops.blur_probabilities == (0.0, 0.9, 0.5)
    assert (masks.probability, masks.ratios) == (0.5, (0.1, 0.5))
    assert (loss.ibot_weight, loss.koleo_weight) == (1.0, 0.1)
    assert (optimizer.base_lr, optimizer.warmup_iterations) == (1e-4, 10_000)
    assert (optimizer.weight_decay, optimizer.layer_decay, optimizer.clip_norm) == (0.04, 0.9, 3.0)
    assert optimizer.teacher_momentum == 0.994


def test_stage_2_has_the_numbers_of_the_paper() -> None:
    crops = STAGE2.crops
    assert (STAGE2.iterations, STAGE2.batch_size, crops.canvas_size) == (10_000, 56, 1_024)
    assert crops.global_sizes == (512, 768, 768, 768, 768) and crops.local_sizes == (112, 112, 168, 224, 336)
    assert crops.pair_ratios == (0.3, 0.3, 0.3, 0.05, 0.05)
    assert STAGE2.model == STAGE1.model and STAGE2.masks == STAGE1.masks


def test_168_px_are_rendered_as_160_the_whole_patches_in_them() -> None:
    assert [STAGE2.crops.sizes(pair) for pair in range(5)] == [
        (512, 112),
        (768, 112),
        (768, 160),
        (768, 224),
        (768, 336),
    ]


def test_settings_survive_a_round_trip_through_yaml(tmp_path: Path) -> None:
    config = dataclasses.replace(STAGE2, store=Path("store"), out=Path("run"), seed=7)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    blank = dataclasses.replace(STAGE1, store=Path("x"), out=Path("y"))
    assert overlay(blank, read_yaml(tmp_path / "config.yaml"), source="file") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimiser": {}}, "my.yaml: unknown setting optimiser; known here: store, out,"),
        ({"optimizer": {"lr": 1}}, "my.yaml: unknown setting optimizer.lr; known here: base_lr,"),
        ({"optimizer": 3}, "my.yaml: optimizer: found 3; expected settings"),
        ({"iterations": "many"}, "my.yaml: iterations: found 'many'; expected int"),
        ({"iterations": 1.5}, "my.yaml: iterations: found 1.5; expected int"),
        ({"device": "tpu"}, "my.yaml: device: found 'tpu'; expected Literal"),
        ({"masks": {"ratios": [0.1]}}, r"my.yaml: masks.ratios: found \[0.1\]; expected tuple\[float, float\]"),
    ],
)
def test_a_file_with_unknown_or_wrong_settings_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(STAGE1, values, source="my.yaml")


def test_yaml_numbers_like_1e_4_are_read_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("optimizer: {base_lr: 3e-4}\n")
    assert overlay(STAGE1, read_yaml(tmp_path / "my.yaml"), source="my.yaml").optimizer.base_lr == 3e-4


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("iterations: 77\nbatch_size: 6\noptimizer: {layer_decay: 0.8}\n")
    recipe, config = parse_arguments(
        ["debug", "--config", str(tmp_path / "my.yaml"), "--store", "S", "--out", "R", "--batch-size", "8"]
    )
    assert recipe == "debug" and config.out == Path("R")
    assert (config.iterations, config.batch_size, config.optimizer.layer_decay) == (77, 8, 0.8)
    assert config.optimizer.base_lr == DEBUG.optimizer.base_lr


def test_stage_1_without_a_store_is_a_usage_error(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(["stage1", "--out", "R"])
    assert exit_info.value.code == 2 and "--store" in capsys.readouterr().err


def test_a_batch_of_one_is_refused_naming_koleo() -> None:
    with pytest.raises(ValueError, match="batch_size: found 1; expected 2 or more, since KoLeo"):
        PretrainConfig(out=Path("run"), batch_size=1)


def test_values_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"teacher_momentum: found 1.5; expected a value in \[0, 1\]"):
        OptimizerConfig(teacher_momentum=1.5)
    with pytest.raises(ValueError, match=r"global_scale: found 0.9 to 0.3; expected a rising range"):
        CropConfig(global_scale=(0.9, 0.3))
    with pytest.raises(ValueError, match=r"pair_ratios: found .* expected probabilities that sum to 1"):
        CropConfig(global_sizes=(64, 96), local_sizes=(32, 32), pair_ratios=(0.5, 0.4))
    with pytest.raises(ValueError, match="describe pairs"):
        CropConfig(global_sizes=(64, 96))


def test_changed_settings_are_named_unless_they_only_say_where_or_how() -> None:
    before = dataclasses.replace(STAGE1, store=Path("a"), out=Path("run"))
    after = dataclasses.replace(before, store=Path("b"), num_workers=0, seed=1, optimizer=OptimizerConfig(base_lr=2e-4))
    changes = changed_settings(config_to_dict(before), config_to_dict(after))
    assert changes == ["seed: 0 -> 1", "optimizer.base_lr: 0.0001 -> 0.0002"]
