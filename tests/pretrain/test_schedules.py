"""Schedules at the iterations where something happens."""

import pytest

from braindino.pretrain.recipes import STAGE1
from braindino.pretrain.schedules import Schedules, build_schedules, effective_lr, linear_then_constant, warmup_cosine


def stage1_schedules() -> Schedules:
    settings, loss = STAGE1.optimizer, STAGE1.loss
    return build_schedules(
        STAGE1.iterations,
        peak_lr=effective_lr(settings.base_lr, 1024, scaling=settings.lr_scaling),
        min_lr=settings.min_lr,
        warmup_iterations=settings.warmup_iterations,
        last_layer_freeze_iterations=settings.last_layer_freeze_iterations,
        weight_decay=settings.weight_decay,
        teacher_momentum=settings.teacher_momentum,
        teacher_temperature=loss.teacher_temperature,
        teacher_temperature_iterations=loss.teacher_temperature_iterations,
    )


@pytest.mark.parametrize(
    ("scaling", "batch_size", "expected"),
    [("dinov3", 1024, 4e-4), ("sqrt", 1024, 1e-4), ("none", 1024, 1e-4), ("dinov3", 256, 2e-4), ("sqrt", 256, 5e-5)],
)
def test_the_learning_rate_scales_with_the_batch_as_its_rule_says(scaling, batch_size, expected) -> None:
    assert effective_lr(1e-4, batch_size, scaling=scaling) == pytest.approx(expected)


def test_stage_1_at_the_papers_batch_of_1024() -> None:
    schedules = stage1_schedules()
    assert [len(array) for array in schedules] == [500_000] * 5
    assert schedules.lr[0] == pytest.approx(4e-8)
    assert schedules.lr[9_999] == schedules.lr.max() == pytest.approx(4e-4)
    assert schedules.lr[9_999 + 245_000] == pytest.approx((4e-4 + 1e-6) / 2, rel=1e-3)
    assert schedules.lr[-1] == pytest.approx(1e-6)
    assert (schedules.last_layer_lr[:1_000] == 0).all() and schedules.last_layer_lr[1_000] == schedules.lr[1_000] > 0
    assert set(schedules.weight_decay) == {0.04} and set(schedules.momentum) == {0.994}
    assert schedules.teacher_temperature[0] == pytest.approx(0.04)
    assert schedules.teacher_temperature[15_000] == pytest.approx(0.055)
    assert set(schedules.teacher_temperature[30_000:]) == {0.07}


def test_no_warm_up_starts_just_below_the_peak_and_ends_at_the_minimum() -> None:
    lr = warmup_cosine(4, peak=1.0, final=0.0, warmup=0)
    assert lr.tolist() == pytest.approx([0.853553, 0.5, 0.146447, 0.0], abs=1e-6)


def test_a_ramp_of_no_length_is_constant() -> None:
    assert linear_then_constant(3, start=0.04, end=0.07, ramp=0).tolist() == [0.07] * 3
    assert linear_then_constant(4, start=0.0, end=1.0, ramp=2).tolist() == [0.0, 0.5, 1.0, 1.0]
