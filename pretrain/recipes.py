"""The recipes: complete settings to start from. `store` and `out` are left to the user."""

from pathlib import Path

import tyro

from braindino.pretrain.config import CropConfig, LossConfig, ModelConfig, OptimizerConfig, PretrainConfig

STAGE1 = PretrainConfig(store=tyro.MISSING, out=tyro.MISSING)

STAGE2 = PretrainConfig(
    store=tyro.MISSING,
    out=tyro.MISSING,
    iterations=10_000,
    batch_size=56,
    checkpoint_every=500,
    crops=CropConfig(
        global_sizes=(512, 768, 768, 768, 768),
        local_sizes=(112, 112, 168, 224, 336),
        pair_ratios=(0.30, 0.30, 0.30, 0.05, 0.05),
        canvas_size=1024,
    ),
    # The paper gives no temperature or learning rate for this stage. The teacher continues at the temperature
    # stage 1 ended with and the prototypes are not frozen again; the rate is what DINOv3 7B's stage reaches.
    loss=LossConfig(teacher_temperature=(0.07, 0.07), teacher_temperature_iterations=0),
    optimizer=OptimizerConfig(base_lr=1.25e-5, warmup_iterations=1_000, last_layer_freeze_iterations=0),
)

DEBUG = PretrainConfig(
    store=tyro.MISSING,
    out=tyro.MISSING,
    iterations=12,
    batch_size=4,
    checkpoint_every=4,
    probe_every=0,
    log_every=1,
    num_workers=0,
    tensorboard=False,
    model=ModelConfig(
        architecture="vit_tiny", drop_path=0.2, num_prototypes=128, head_hidden_dim=64, head_bottleneck_dim=32
    ),
    crops=CropConfig(global_sizes=(64,), local_sizes=(32,), num_local=2),
    loss=LossConfig(teacher_temperature_iterations=6),
    optimizer=OptimizerConfig(
        base_lr=1e-3, lr_scaling="none", warmup_iterations=3, last_layer_freeze_iterations=2, teacher_momentum=0.9
    ),
)

DEMO = PretrainConfig(
    out=Path("demo/pretrain"),
    iterations=300,
    batch_size=32,
    checkpoint_every=100,
    probe_every=100,
    probe_scans=24,
    log_every=2,
    num_workers=0,
    # A few hundred iterations are too few for layer scales to grow from 1e-5: branches start at full strength, and both
    # temperatures are well below the paper's, or the teacher keeps liking all prototypes alike.
    model=ModelConfig(
        architecture="vit_tiny",
        depth=4,
        layer_scale_init=1.0,
        drop_path=0.0,
        num_prototypes=256,
        head_hidden_dim=512,
        head_bottleneck_dim=64,
    ),
    # Small crops of small boxes: few tokens, and structures about as large as in the whole slices encoded later.
    crops=CropConfig(
        global_sizes=(96,), local_sizes=(48,), num_local=4, global_scale=(0.1, 0.4), local_scale=(0.02, 0.1)
    ),
    loss=LossConfig(student_temperature=0.05, teacher_temperature=(0.02, 0.02), teacher_temperature_iterations=0),
    optimizer=OptimizerConfig(
        base_lr=1.5e-3,
        lr_scaling="none",
        warmup_iterations=20,
        layer_decay=1.0,
        patch_embed_lr_multiplier=1.0,
        last_layer_freeze_iterations=0,
        teacher_momentum=0.985,
    ),
)

RECIPES: dict[str, tuple[str, PretrainConfig]] = {
    "stage1": ("The paper's pretraining: ViT-B/16, 500,000 iterations.", STAGE1),
    "stage2": ("The paper's high-resolution stage: five pairs of crop sizes, 10,000 iterations.", STAGE2),
    "debug": ("A dozen iterations of a tiny model, to see that everything works.", DEBUG),
    "demo": ("A tiny model that learns something in a few minutes on two CPU cores.", DEMO),
}
