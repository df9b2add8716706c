"""Parameter groups of ViT-B, clipping per submodule, the moving average."""

import pytest
import torch
from torch import nn

from braindino.pretrain.heads import ProjectionHead
from braindino.pretrain.optimizer import build_adamw, clip_gradients, parameter_groups, set_rates, update_teacher
from braindino.vision_transformer import vit_base, vit_tiny


@pytest.fixture(scope="module")
def vit_base_groups() -> dict[str, dict]:
    """The group that each parameter of ViT-B and of one head is in, by name."""
    with torch.device("meta"):
        encoder, head = vit_base(), ProjectionHead(768)
    groups = parameter_groups(encoder, [head], layer_decay=0.9, patch_embed_multiplier=0.2)
    return {name: group for group in groups for name in group["names"]}


@pytest.mark.parametrize(
    ("name", "multiplier"),
    [
        ("cls_token", 0.2542),
        ("storage_tokens", 0.2542),
        ("mask_token", 0.2542),
        ("patch_embed.proj.weight", 0.0508),
        ("patch_embed.proj.bias", 0.0508),
        ("blocks.0.attn.qkv.weight", 0.2824),
        ("blocks.5.mlp.fc1.weight", 0.4783),
        ("blocks.11.mlp.fc2.bias", 0.9),
        ("norm.weight", 1.0),
        ("mlp.0.weight", 1.0),
        ("last_layer.weight", 1.0),
    ],
)
def test_learning_rates_of_vit_base_fall_with_depth(vit_base_groups, name: str, multiplier: float) -> None:
    assert vit_base_groups[name]["lr_multiplier"] == pytest.approx(multiplier, abs=5e-5)


def test_biases_norms_and_layer_scales_do_not_decay_but_tokens_do(vit_base_groups) -> None:
    exempt = {name for name, group in vit_base_groups.items() if not group["decays"]}
    assert {"norm.weight", "blocks.3.norm1.weight", "blocks.3.ls1.gamma", "mlp.0.bias"} <= exempt
    assert not exempt & {"cls_token", "storage_tokens", "mask_token", "patch_embed.proj.weight", "last_layer.weight"}


def test_only_the_prototypes_are_marked_as_last_layer(vit_base_groups) -> None:
    assert [name for name, group in vit_base_groups.items() if group["is_last_layer"]] == ["last_layer.weight"]


def test_every_parameter_is_in_one_group() -> None:
    encoder, heads = vit_tiny(depth=2), [ProjectionHead(192, num_prototypes=8) for _ in range(2)]
    groups = parameter_groups(encoder, heads, layer_decay=0.9, patch_embed_multiplier=0.2)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    everything = [id(parameter) for module in (encoder, *heads) for parameter in module.parameters()]
    assert sorted(grouped) == sorted(everything)


def test_a_step_of_adamw_moves_each_parameter_by_its_own_rate() -> None:
    first, second = (nn.Parameter(torch.tensor([1.0])) for _ in range(2))
    common = {"names": [], "decays": True, "is_last_layer": False}
    optimizer = build_adamw(
        [
            {"params": [first], "lr_multiplier": 0.5, **common},
            {"params": [second], "lr_multiplier": 1.0, **common, "is_last_layer": True},
        ],
        betas=(0.9, 0.999),
    )
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([3.0])
    set_rates(optimizer, lr=0.1, last_layer_lr=0.0, weight_decay=0.04)
    optimizer.step()
    # The first step of Adam has length lr; the decay takes lr * 0.04 of the weight beforehand.
    assert first.item() == pytest.approx(1.0 * (1 - 0.05 * 0.04) - 0.05, abs=1e-6)
    assert second.item() == 1.0


def test_modules_are_clipped_separately_and_the_norms_before_are_returned() -> None:
    small, large = nn.Linear(1, 1, bias=False), nn.Linear(2, 1, bias=False)
    small.weight.grad, large.weight.grad = torch.tensor([[2.0]]), torch.tensor([[30.0, 40.0]])
    norms = clip_gradients([small, large], max_norm=3.0)
    assert [norm.item() for norm in norms] == [2.0, 50.0]
    assert small.weight.grad.item() == 2.0
    torch.testing.assert_close(large.weight.grad, torch.tensor([[1.8, 2.4]]))


def test_the_teacher_is_the_moving_average_of_the_student() -> None:
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    before = [parameter.detach().double().clone() for parameter in teacher.parameters()]
    update_teacher(teacher, student, momentum=0.994)
    for old, new, source in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new.detach().double(), 0.994 * old + 0.006 * source.detach().double())
