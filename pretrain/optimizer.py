"""AdamW with layer-wise learning rates, gradient clipping per submodule, and the moving average that is the teacher."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from braindino.vision_transformer import VisionTransformer


def parameter_groups(
    encoder: VisionTransformer, heads: Iterable[nn.Module], *, layer_decay: float, patch_embed_multiplier: float
) -> list[dict[str, Any]]:
    """Optimiser groups; beside `params` and `names` each has `lr_multiplier`, `decays` and `is_last_layer`.

    An encoder of n blocks: tokens and patch embedding count as layer 0, block i as layer i + 1, the final norm as layer
    n + 1; the learning rate is multiplied by layer_decay ** (n + 1 - layer), and for the patch embedding once more by
    patch_embed_multiplier. Heads keep the full rate. Biases, norms and layer scales do not decay; tokens do.
    """
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}

    def place(name: str, parameter: nn.Parameter, multiplier: float, is_last_layer: bool) -> None:
        decays = not (name.endswith(("bias", "gamma")) or "norm" in name)
        group = groups.setdefault(
            (multiplier, decays, is_last_layer),
            {
                "params": [],
                "names": [],
                "lr_multiplier": multiplier,
                "decays": decays,
                "is_last_layer": is_last_layer,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)

    for name, parameter in encoder.named_parameters():
        layer = _layer(name, encoder.depth)
        multiplier = layer_decay ** (encoder.depth + 1 - layer)
        if name.startswith("patch_embed."):
            multiplier *= patch_embed_multiplier
        place(name, parameter, multiplier, is_last_layer=False)
    for head in heads:
        for name, parameter in head.named_parameters():
            place(name, parameter, 1.0, is_last_layer=name.startswith("last_layer."))
    return list(groups.values())


def build_adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW over the groups; its rates are set before each step by `set_rates`."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, last_layer_lr: float, weight_decay: float) -> None:
    """Set every group's learning rate and weight decay for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def clip_gradients(modules: Iterable[nn.Module], *, max_norm: float) -> list[Tensor]:
    """Scale each module's gradients to a norm of at most max_norm, separately; the norms before, on the device."""
    norms = [nn.utils.clip_grad_norm_(module.parameters(), max_norm) for module in modules]
    return [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Take the optimiser's step, or leave parameters and moments alone where `skip` () is 1.0, without asking which.

    The way in which torch.amp's gradient scaler tells a fused optimiser of overflows.
    """
    optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, *, momentum: float, skip: Tensor | None = None) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, for all parameters in one pass.

    Where `skip` () is 1.0 the teacher stays as it is; decided on the device.
    """
    averaged, current = ([_local(p) for p in module.parameters()] for module in (teacher, student))
    if skip is None:
        torch._foreach_lerp_(averaged, current, 1.0 - momentum)
    else:
        torch._foreach_lerp_(averaged, current, [(1.0 - momentum) * (1.0 - skip)] * len(averaged))


def _local(parameter: Tensor) -> Tensor:
    """The part of a sharded parameter that this process has; student and teacher are sharded alike."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _layer(name: str, depth: int) -> int:
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith("norm.") else 0
