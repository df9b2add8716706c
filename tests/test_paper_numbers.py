"""Every number of the paper's Methods 4.1 to 4.3.1 beside the constant that implements it.

A row is (section, the paper's words, the paper's value, what this project uses). Not in it, since no constant here
implements them yet: the 20 datasets of 4.1.1 (the table of cohorts comes with preprocessing at cohort scale), and of
4.3.1 the 128^3 and 96^3 patches and the 1000-epoch schedule of the 3D baselines (they come with the nnU-Net comparison)
and the 200 meningioma cases shared with pretraining (a fact about the authors' split).
"""

import inspect
import math
from functools import cache
from typing import NamedTuple

import pytest
import torch

from braindino import resampling, slices, transforms
from braindino.downstream import head_losses
from braindino.downstream.config import RepresentConfig, RobustnessConfig
from braindino.downstream.heads import Head, Training
from braindino.downstream.task_table import NEIGHBOURS, RATIOS, load_task
from braindino.encoders.contract import layer_blocks
from braindino.perturbations import PAPER_PERTURBATIONS, PERTURBATIONS
from braindino.pretrain.recipes import RECIPES
from braindino.vision_transformer import INPUT_CHANNELS, VisionTransformer, vit_base
from nnunet_braindino import trainer
from nnunet_braindino.network import FrozenEncoderSegmenter, count_parameters, decoder_blocks

STAGE1, STAGE2 = RECIPES["stage1"][1], RECIPES["stage2"][1]
GPUS = 4


class Row(NamedTuple):
    section: str
    words: str
    paper: object
    ours: object


def default(function: object, name: str) -> object:
    return inspect.signature(function).parameters[name].default  # type: ignore[arg-type]


ATLAS, COX = load_task("atlas").training, load_task("os_cox").training


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def segmenter() -> FrozenEncoderSegmenter:
    """The network of the paper's segmentation: four sequences, three regions."""
    with torch.device("meta"):
        return FrozenEncoderSegmenter(VisionTransformer(**vit_base().architecture), num_input_channels=4, num_classes=3)


ROWS = [
    # 4.1.1: 51k volumes times the slices taken of each are the 6.6 million slices of the corpus.
    Row("4.1.1", "6.6 million slices from over 51k volumes", 6.6, round(51_500 * slices.NUM_SLICES / 1e6, 1)),
    # 4.1.2
    Row("4.1.2", "resized to 256 x 256 x 256", (256, 256, 256), transforms.CUBE_SHAPE),
    Row("4.1.2", "clipped to the 0.5th-99.5th percentile", (0.5, 99.5), transforms.CLIP_PERCENTILES),
    Row("4.1.2", "128 axial slices", 128, slices.NUM_SLICES),
    Row("4.1.2", "from the 256 available", 256, slices.DEPTH),
    Row("4.1.2", "mu = 128", 128, slices.GAUSSIAN_MEAN),
    Row("4.1.2", "sigma = 50", 50, slices.GAUSSIAN_SIGMA),
    Row("4.1.2", "drawn so by default", (128, 256, 128.0, 50.0), tuple(
        default(slices.gaussian_indices, name) for name in ("num", "depth", "mu", "sigma")
    )),
    # 4.2: the network
    Row("4.2", "ViT-B", "vit_base", STAGE1.model.architecture),
    Row("4.2", "patch size 16", 16, segmenter().encoder.patch_size),
    Row("4.2", "4 storage tokens", 4, STAGE1.model.num_storage_tokens),
    Row("4.2", "4 storage tokens (encoder)", 4, segmenter().encoder.num_storage_tokens),
    Row("4.2", "replicated to three channels", 3, INPUT_CHANNELS),
    # 4.2: views
    Row("4.2", "two global views", 2, len(STAGE1.crops.blur_probabilities) - 1),
    Row("4.2", "eight local views", 8, STAGE1.crops.num_local),
    Row("4.2", "global scale [0.32, 1.0]", (0.32, 1.0), STAGE1.crops.global_scale),
    Row("4.2", "global crops 256 x 256", (256,), STAGE1.crops.global_sizes),
    Row("4.2", "local scale [0.05, 0.32]", (0.05, 0.32), STAGE1.crops.local_scale),
    Row("4.2", "local crops 112 x 112", (112,), STAGE1.crops.local_sizes),
    # 4.2: teacher, heads, losses
    Row("4.2", "momentum fixed to 0.994", 0.994, STAGE1.optimizer.teacher_momentum),
    Row("4.2", "momentum 0.994 throughout (stage 2)", 0.994, STAGE2.optimizer.teacher_momentum),
    Row("4.2", "hidden dimension 2048", 2048, STAGE1.model.head_hidden_dim),
    Row("4.2", "bottleneck dimension 256", 256, STAGE1.model.head_bottleneck_dim),
    Row("4.2", "K = 65536 prototypes", 65536, STAGE1.model.num_prototypes),
    Row("4.2", "masked with probability 0.5", 0.5, STAGE1.masks.probability),
    Row("4.2", "mask ratio from [0.1, 0.5]", (0.1, 0.5), STAGE1.masks.ratios),
    Row("4.2", "lambda = 1", 1, STAGE1.loss.ibot_weight),
    Row("4.2", "KoLeo with weight 0.1", 0.1, STAGE1.loss.koleo_weight),
    # 4.2: optimisation
    Row("4.2", "gradient clipping, max norm 3.0", 3.0, STAGE1.optimizer.clip_norm),
    Row("4.2", "layer-wise decay 0.9", 0.9, STAGE1.optimizer.layer_decay),
    Row("4.2", "500,000 iterations", 500_000, STAGE1.iterations),
    Row("4.2", "4 GPUs with 256 each", 1024, GPUS * STAGE1.batch_size),
    Row("4.2", "warm-up of 10,000 iterations", 10_000, STAGE1.optimizer.warmup_iterations),
    Row("4.2", "peak base learning rate 1e-4", 1e-4, STAGE1.optimizer.base_lr),
    Row("4.2", "weight decay 0.04", 0.04, STAGE1.optimizer.weight_decay),
    # 4.2: high-resolution stage
    Row("4.2", "upsampled from 256 to 1024", (256, 1024), (STAGE1.crops.canvas_size, STAGE2.crops.canvas_size)),
    Row("4.2", "global crop sizes", (512, 768, 768, 768, 768), STAGE2.crops.global_sizes),
    Row("4.2", "local crop sizes", (112, 112, 168, 224, 336), STAGE2.crops.local_sizes),
    Row("4.2", "five pairs with ratios", (0.30, 0.30, 0.30, 0.05, 0.05), STAGE2.crops.pair_ratios),
    Row("4.2", "batch of 56 per GPU", 56, STAGE2.batch_size),
    Row("4.2", "10,000 iterations", 10_000, STAGE2.iterations),
    # 4.3
    Row("4.3", "128 x 256 x 256, sampled uniformly into 128 slices", (128, 256, 256), (
        len(slices.uniform_indices()), *transforms.CUBE_SHAPE[:2]
    )),
    Row("4.3", "learning rate 1e-4", 1e-4, Training().learning_rate),
    Row("4.3", "weight decay 1e-5", 1e-5, Training().weight_decay),
    Row("abstract, 4.3", "0.6 % of the parameters trained", 0.6, round(
        100 * (2 * 768 + (768 + 3) * Head().hidden_width + 2) / num_parameters(segmenter().encoder), 1
    )),
    # 4.3.1
    Row("4.3.1", "configuration 2d at 256 x 256", (256, 256), trainer.PATCH_SIZE),
    Row("4.3.1", "1 x 1 convolution from 4 to 3 channels", (3, 4, 1, 1), tuple(segmenter().fusion.weight.shape)),
    Row("4.3.1", "features of layers {2, 5, 8, 11}", (2, 5, 8, 11), decoder_blocks(12)),
    Row("4.3.1", "110.7 M parameters", 110.7, round(count_parameters(segmenter()).total / 1e6, 1)),
    Row("4.3.1", "77.4 % of them frozen", 77.4, round(
        100 - 100 * count_parameters(segmenter()).trainable / count_parameters(segmenter()).total, 1
    )),
    Row("4.3.1", "22.6 % trained", 22.6, round(
        100 * count_parameters(segmenter()).trainable / count_parameters(segmenter()).total, 1
    )),
    Row("4.3.1", "label ratios", (0.1, 0.2, 0.4, 0.6, 0.8, 1.0), RATIOS),
    Row("4.3.2", "ADNI evaluated over five splits", 5, load_task("adni").protocol.num_splits),
    Row("4.3.3", "AdamW, learning rate 1e-3, weight decay 1e-4", ("adamw", 1e-3, 1e-4), (
        ATLAS.optimiser, ATLAS.learning_rate, ATLAS.weight_decay
    )),
    Row("4.3.3", "alpha 0.2 and delta 1.0 of Eq. 9", (0.2, 1.0), (head_losses.SQUARED_SHARE, head_losses.HUBER_DELTA)),
    Row("4.3.4", "Cox at learning rate 3e-4, weight decay 1e-3", (3e-4, 1e-3), (COX.learning_rate, COX.weight_decay)),
    Row("4.3.5", "T1CE and FLAIR for IDH", ("T1c", "FLAIR"), load_task("idh").inputs.sequences),
    Row("4.5", "gamma in {0.5, 0.8, 1.0, 1.2, 1.5, 2.0}", (0.5, 0.8, 1.0, 1.2, 1.5, 2.0), (
        PERTURBATIONS["gamma"].severities
    )),
    Row("4.5", "alpha in {0.0, 0.1, 0.2, 0.3, 0.4}", (0.0, 0.1, 0.2, 0.3, 0.4), PERTURBATIONS["gibbs"].severities),
    Row("4.5", "s in {0.0, 0.1, 0.2, 0.3, 0.4}", (0.0, 0.1, 0.2, 0.3, 0.4), PERTURBATIONS["bias_field"].severities),
    Row("4.5", "zero or unity is the clean condition", (1.0, 0.0, 0.0), tuple(
        PERTURBATIONS[name].identity for name in PAPER_PERTURBATIONS
    )),
    Row("4.5", "full-data training ratio (1.0)", 1.0, RobustnessConfig.ratio),
    Row("4.6", "k in {1, 3, 5, 10, 20, 50}", (1, 3, 5, 10, 20, 50), NEIGHBOURS),
    Row("4.6", "early (block 2), mid (block 6), and late (block 11)", (2, 6, 11), layer_blocks(12)),
    Row("4.6", "a fixed subset of 1,000 volumes per dataset", 1000, RepresentConfig.per_cohort),
    Row("4.7", "2,000 bootstrap iterations, seed 42", (2000, 42), (resampling.ITERATIONS, resampling.SEED)),
    Row("4.3.1", "100 epochs", 100, trainer.nnUNetTrainerBrainDINOFrozen.epochs),
    Row("4.3.1", "250 training iterations per epoch", 250, trainer.nnUNetTrainerBrainDINOFrozen.iterations),
    Row("4.3.1", "50 validation iterations", 50, trainer.nnUNetTrainerBrainDINOFrozen.validation_iterations),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section} {row.words}")
def test_the_paper_says(row: Row) -> None:
    assert row.ours == row.paper


def test_stage_two_keeps_what_the_paper_does_not_change() -> None:
    for part in ("model", "masks"):
        assert getattr(STAGE2, part) == getattr(STAGE1, part)
    for name in ("num_local", "global_scale", "local_scale", "flip_probability", "blur_probabilities"):
        assert getattr(STAGE2.crops, name) == getattr(STAGE1.crops, name)


def test_the_fusion_starts_as_an_equal_weight_average() -> None:
    network = FrozenEncoderSegmenter(
        VisionTransformer(embed_dim=64, depth=4, num_heads=1), num_input_channels=4, num_classes=3
    )
    assert (network.fusion.weight == 0.25).all()


def test_the_clip_at_norm_12_and_mixed_precision_are_nnunets_own() -> None:
    source = inspect.getsource(trainer.nnUNetTrainer.train_step)
    assert "clip_grad_norm_(self.network.parameters(), 12)" in source
    assert "train_step" not in vars(trainer.nnUNetTrainerBrainDINOFrozen)


def test_the_first_loss_is_what_the_prototypes_predict() -> None:
    # ln K for DINO and half of it for iBOT, whose unmasked images count as zero.
    assert 1.5 * math.log(STAGE1.model.num_prototypes) == pytest.approx(16.63, abs=0.01)
