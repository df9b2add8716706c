"""One iteration on a GPU: the host never waits for it, and it computes what the CPU does.

The iteration is that of train.py, piece by piece; the test on the CPU keeps these pieces in step with the code.
"""

import warnings
from collections.abc import Callable

import pytest
import torch

from braindino.pretrain.distillation import build_student, build_teacher, distillation_objective, teacher_targets
from braindino.pretrain.guards import StepGuard
from braindino.pretrain.masking import batch_masks
from braindino.pretrain.optimizer import (
    build_adamw,
    clip_gradients,
    parameter_groups,
    set_rates,
    step_unless,
    update_teacher,
)
from braindino.pretrain.randomness import numpy_generator, torch_generator
from braindino.pretrain.views import build_views

BATCH, SIZES = 4, (64, 32)


def stepper(device: torch.device) -> Callable[[int], torch.Tensor]:
    """A function of the iteration that trains a tiny model and returns (loss, norms of the gradients) on the device."""
    student = build_student(
        "vit_tiny",
        num_storage_tokens=4,
        layer_scale_init=1e-5,
        drop_path=0.2,
        num_prototypes=512,
        head_hidden_dim=64,
        head_bottleneck_dim=32,
        seed=0,
    ).to(device)
    teacher = build_teacher(student)
    student.train()
    heads = [student.dino_head, student.ibot_head]
    groups = parameter_groups(student.encoder, heads, layer_decay=0.9, patch_embed_multiplier=0.2)
    optimizer = build_adamw(groups, betas=(0.9, 0.999))
    guard = StepGuard(3, device)

    def step(iteration: int) -> torch.Tensor:
        slices = torch.randn(BATCH, 256, 256, generator=torch_generator(0, iteration, "slices")).half()
        masks = batch_masks(2 * BATCH, (SIZES[0] // 16,) * 2, rng=numpy_generator(0, iteration, "masks"))
        if device.type == "cuda":
            slices = slices.pin_memory()
        views = build_views(
            slices,
            torch.from_numpy(masks),
            sizes=SIZES,
            num_local=2,
            global_scale=(0.32, 1.0),
            local_scale=(0.05, 0.32),
            aspect=(3 / 4, 4 / 3),
            canvas_size=256,
            flip_probability=0.5,
            blur_probabilities=(0.0, 0.9, 0.5),
            blur_sigma=(0.1, 2.0),
            generator=torch_generator(0, iteration, "crops"),
            device=device,
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            (targets,) = teacher_targets(teacher, [views], temperature=0.05, sinkhorn_iterations=3)
            objective = distillation_objective(
                student,
                views,
                targets,
                student_temperature=0.1,
                ibot_weight=1.0,
                koleo_weight=0.1,
                generator=torch_generator(0, iteration, "drop path"),
            )
        optimizer.zero_grad()
        objective.loss.backward()
        norms = torch.stack(clip_gradients([student.encoder, *heads], max_norm=3.0))
        skip = guard.check(iteration, objective.loss, norms)
        set_rates(optimizer, lr=1e-3, last_layer_lr=1e-3, weight_decay=0.04)
        step_unless(optimizer, skip)
        update_teacher(teacher, student, momentum=0.9, skip=skip)
        return torch.cat([objective.loss.detach().float()[None], norms])

    return step


def test_the_pieces_make_a_step_that_trains() -> None:
    step = stepper(torch.device("cpu"))
    losses = [float(step(iteration)[0]) for iteration in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_never_waits_for_the_gpu_in_a_step() -> None:
    step = stepper(torch.device("cuda"))
    for iteration in range(2):  # kernels are chosen, and tables made, at the first
        step(iteration)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(2)
            step(3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_what_the_cpu_does_to_half_precision() -> None:
    on_cpu, on_gpu = (stepper(torch.device(name))(0).cpu() for name in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0.03, atol=1e-3)
