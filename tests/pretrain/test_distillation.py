"""Heads, views and the objective of one iteration."""

import math
from typing import Any

import pytest
import torch

from braindino.pretrain.config import ModelConfig
from braindino.pretrain.data import batch_masks
from braindino.pretrain.distillation import (
    Network,
    Objective,
    build_student,
    build_teacher,
    collapse_indicators,
    distillation_objective,
    expected_initial_loss,
    teacher_targets,
)
from braindino.pretrain.heads import ProjectionHead
from braindino.pretrain.losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from braindino.pretrain.randomness import numpy_generator, torch_generator
from braindino.pretrain.views import Views, build_views

K, B, L = 64, 3, 2


def objective_of(
    student: Network,
    teacher: Network,
    views: Views,
    *,
    teacher_temperature: float,
    sinkhorn_iterations: int,
    **settings: Any,
) -> Objective:
    """Both halves of the objective of one micro-batch that is the whole batch."""
    (targets,) = teacher_targets(
        teacher, [views], temperature=teacher_temperature, sinkhorn_iterations=sinkhorn_iterations
    )
    return distillation_objective(student, views, targets, **settings)


def tiny_student(*, drop_path: float = 0.0, layer_scale_init: float = 0.5) -> Network:
    return build_student(
        "vit_tiny",
        num_storage_tokens=4,
        layer_scale_init=layer_scale_init,
        drop_path=drop_path,
        num_prototypes=K,
        head_hidden_dim=32,
        head_bottleneck_dim=16,
        seed=0,
    )


def views_of(slices: torch.Tensor, *, seed: int = 0) -> Views:
    masks = torch.from_numpy(batch_masks(2 * len(slices), (4, 4), rng=numpy_generator(seed, 0, "masks")))
    return build_views(
        slices.half(),
        masks,
        sizes=(64, 32),
        num_local=L,
        global_scale=(0.32, 1.0),
        local_scale=(0.05, 0.32),
        aspect=(3 / 4, 4 / 3),
        canvas_size=256,
        flip_probability=0.5,
        blur_probabilities=(0.0, 0.9, 0.5),
        blur_sigma=(0.1, 2.0),
        generator=torch_generator(seed, 0, "crops"),
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def views() -> Views:
    return views_of(torch.randn(B, 256, 256, generator=torch.Generator().manual_seed(0)))


def test_a_student_can_have_fewer_blocks_than_its_architecture():
    heads = {"num_prototypes": 8, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
    common = {"num_storage_tokens": 1, "layer_scale_init": 1.0, "drop_path": 0.0, "seed": 0, **heads}
    student = build_student("vit_tiny", **common, depth=3)
    assert len(student.encoder.blocks) == student.encoder.architecture["depth"] == 3
    assert len(build_student("vit_tiny", **common).encoder.blocks) == 12
    with pytest.raises(ValueError, match="depth"):
        ModelConfig(depth=0)


def test_a_paper_head_has_23_million_parameters_and_prototypes_of_norm_a_third() -> None:
    head = ProjectionHead(768, num_prototypes=65_536, generator=torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in head.parameters()) == 23_073_024
    assert head.last_layer.bias is None and "weight_g" not in dict(head.last_layer.named_parameters())
    assert head.last_layer.weight.norm(dim=1).mean().item() == pytest.approx(0.32, abs=0.005)
    features = torch.randn(5, 768, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head.project(features).norm(dim=1), torch.ones(5))
    assert head(features).shape == (5, 65_536)


def test_views_have_two_global_and_all_local_crops_and_weights_that_sum_to_the_masked_images(views: Views) -> None:
    assert views.global_crops.shape == (2 * B, 1, 64, 64)
    assert views.local_crops is not None and views.local_crops.shape == (L * B, 1, 32, 32)
    assert views.masks.shape == (2 * B, 16) and torch.equal(views.masks.flatten().nonzero()[:, 0], views.masked)
    assert views.mask_weights.sum().item() == pytest.approx(B)


def test_the_objective_equals_its_terms_computed_one_network_call_at_a_time(views: Views) -> None:
    student, teacher = tiny_student(), build_teacher(tiny_student())
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    objective = objective_of(
        student,
        teacher,
        views,
        teacher_temperature=0.05,
        student_temperature=0.1,
        sinkhorn_iterations=3,
        ibot_weight=0.7,
        koleo_weight=0.3,
    )
    assert views.local_crops is not None
    targets = [teacher.encoder(crop) for crop in views.global_crops.split(B)]
    q = sinkhorn_knopp(teacher.dino_head(torch.cat([target.cls for target in targets])), temperature=0.05)
    masked = views.masks.split(B)
    seen = [
        student.encoder.forward_crops([crop], masks=[mask])[0]
        for crop, mask in zip(views.global_crops.split(B), masked, strict=True)
    ]
    local = [student.dino_head(student.encoder(crop).cls) for crop in views.local_crops.split(B)]
    dino = dino_loss(
        torch.stack([student.dino_head(part.cls) for part in seen]), torch.stack(local), q.unflatten(0, (2, B))
    )
    patches = torch.cat([part.patches[mask] for part, mask in zip(seen, masked, strict=True)])
    target_patches = torch.cat([part.patches[mask] for part, mask in zip(targets, masked, strict=True)])
    ibot = ibot_loss(
        student.ibot_head(patches),
        sinkhorn_knopp(teacher.ibot_head(target_patches), temperature=0.05),
        views.mask_weights,
        num_images=2 * B,
    )
    koleo = koleo_loss(seen[0].cls) + koleo_loss(seen[1].cls)
    for found, expected in (
        (objective.dino, dino.loss),
        (objective.dino_global, dino.global_loss),
        (objective.dino_local, dino.local_loss),
        (objective.ibot, ibot),
        (objective.koleo, koleo),
        (objective.loss, dino.loss + 0.7 * ibot + 0.3 * koleo),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_student_parameter_and_no_teacher_parameter(views: Views) -> None:
    student = tiny_student()
    teacher = build_teacher(student)
    objective = objective_of(
        student,
        teacher,
        views,
        teacher_temperature=0.05,
        student_temperature=0.1,
        sinkhorn_iterations=3,
        ibot_weight=1.0,
        koleo_weight=0.1,
    )
    objective.loss.backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_loss_starts_at_its_expected_value(views: Views) -> None:
    student = tiny_student(layer_scale_init=1e-5)
    objective = objective_of(
        student,
        build_teacher(student),
        views,
        teacher_temperature=0.04,
        student_temperature=0.1,
        sinkhorn_iterations=3,
        ibot_weight=1.0,
        koleo_weight=0.1,
    )
    expected = expected_initial_loss(
        K, masked_fraction=0.5, ibot_weight=1.0, koleo_weight=0.1, koleo=objective.koleo.item()
    )
    assert expected - 0.1 * objective.koleo.item() == pytest.approx(1.5 * math.log(K))
    assert objective.loss.item() == pytest.approx(expected, rel=0.02)


def test_the_expected_start_of_the_paper_is_16_6() -> None:
    expected = expected_initial_loss(65_536, masked_fraction=0.5, ibot_weight=1.0, koleo_weight=0.1, koleo=0.0)
    assert expected == pytest.approx(16.63, abs=0.01)


def test_drop_path_is_decided_by_its_generator(views: Views) -> None:
    student = tiny_student(drop_path=0.5).train()
    teacher = build_teacher(student)

    def loss(seed: int) -> float:
        return objective_of(
            student,
            teacher,
            views,
            teacher_temperature=0.05,
            student_temperature=0.1,
            sinkhorn_iterations=3,
            ibot_weight=1.0,
            koleo_weight=0.1,
            generator=torch_generator(seed, 0, "drop path"),
        ).loss.item()

    assert loss(0) == loss(0) != loss(1)


def test_indicators_tell_collapsed_from_spread_features() -> None:
    zero = torch.zeros(())

    def indicators(features: torch.Tensor, q: torch.Tensor) -> dict[str, float]:
        entropy, usage = torch.special.entr(q).sum(dim=1).mean(), q.mean(dim=0)
        terms = dict.fromkeys(Objective._fields, zero)
        objective = Objective(
            **terms | dict(teacher_entropy=entropy, prototype_usage=usage, student_cls=features, teacher_cls=features)
        )
        return {name: value.item() for name, value in collapse_indicators(objective).items()}

    spread = indicators(torch.eye(8), torch.eye(8))
    assert spread["teacher_entropy"] == pytest.approx(0.0)
    assert spread["prototype_entropy"] == pytest.approx(math.log(8))
    assert spread["feature_std"] == pytest.approx(math.sqrt(7 / 8))
    assert spread["feature_rank"] == pytest.approx(7.0)
    collapsed = indicators(torch.ones(8, 8), torch.eye(8)[:1].expand(8, 8))
    assert collapsed["feature_std"] == pytest.approx(0.0, abs=1e-6) and collapsed["prototype_entropy"] == 0.0
